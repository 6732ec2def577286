"""Times steps of a bare loop, this project, TRL and FastChat on the same tokens, in turns.

python benchmarks/step/run.py [--systems bare loop trl trl_packed fastchat] [--data bundled|long|F]
    [--model decoder|t5|llama-1b|llama-7b] [--kind lora|qlora] [--precision fp32|bf16]
    [--steps 8] [--runs 3] [-- --flag value ...]

Words after -- are further flags of loop/train.py, for this project and the bare loop. The result is
a Markdown table for RESULTS.md; --out also writes it. --json writes time and loss of each step.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.peers.environments import ROOT, peer_python
from benchmarks.step.measure import PEERS, STEP, Failed, Job, Run, checked, run_system
from benchmarks.step.table import markdown

SYSTEMS = ("bare", "loop", *PEERS)


def main() -> None:
    """Measure the chosen systems in turns, and print the table."""
    asked = parse(sys.argv[1:])
    # All systems get the same cores, regardless of environment variables.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])
    for name in {PEERS[name] for name in asked.systems if name in PEERS}:
        peer_python(name)
    with tempfile.TemporaryDirectory(prefix="step-time-") as name:
        folder = asked.work or Path(name)
        job = prepared(asked, folder)
        runs, failures, peaks, loads = take_turns(job)
    text = markdown(asked, job.plan, runs, failures, peaks, loads)
    print(text)
    if asked.out:
        asked.out.write_text(text)
    if asked.json:
        found = {name: [vars(run) for run in of] for name, of in runs.items()}
        plan = [{k: v for k, v in step.items() if k != "examples"} for step in job.plan["steps"]]
        asked.json.write_text(json.dumps({"runs": found, "failures": failures, "plan": plan}))
    if failures:
        sys.exit(1)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the settings; words after -- are flags of loop/train.py."""
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all possible ones")
    parser.add_argument("--data", default="bundled", help="bundled, long, or a file of dialogues")
    parser.add_argument(
        "--model", default="decoder", choices=("decoder", "t5", "llama-1b", "llama-7b")
    )
    parser.add_argument("--tokenizer", default="-", help="a folder; default: the model's own")
    parser.add_argument("--kind", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="dialogues per step")
    parser.add_argument("--model_max_length", type=int, help="default: 512, for --data long 2048")
    parser.add_argument(
        "--packed_length", type=int, help="tokens of TRL's rows; default: at least 1024"
    )
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=8, help="steps per run, with warm-up")
    parser.add_argument("--warm_up", type=int, default=2, help="untimed steps per run")
    parser.add_argument("--runs", type=int, default=3, help="runs per system, in turns")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    gpu = shutil.which("nvidia-smi") is not None
    parser.add_argument(
        "--config", default="single_gpu" if gpu else "cpu", help="accelerate config"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try it out")
    parser.add_argument("--work", type=Path, help="a new folder for all files; it is kept")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--json", type=Path, help="a file for time, loss and tokens of each step")
    asked = parser.parse_args(words[:cut])
    asked.loop_flags, asked.gpu = words[cut + 1 :], gpu
    asked.threads = min(asked.threads, cores)
    if asked.steps <= asked.warm_up:
        parser.error(f"--steps {asked.steps}: expected more than --warm_up {asked.warm_up}")
    pairs = asked.model == "t5"
    asked.systems = asked.systems or [s for s in SYSTEMS if not (pairs and s.startswith("trl"))]
    if pairs and {"trl", "trl_packed"} & {*asked.systems}:
        parser.error("--systems trl: found --model t5; expected a decoder, as SFTTrainer has no T5")
    asked.model_max_length = asked.model_max_length or (2048 if asked.data == "long" else 512)
    asked.packed_length = asked.packed_length or max(1024, asked.model_max_length)
    return asked


def prepared(asked: argparse.Namespace, folder: Path) -> Job:
    """Write model, data and plan in child processes, so that this process stays small."""
    folder.mkdir(exist_ok=True)
    model, data, plan = folder / "model", folder / "long.json", folder / "plan.json"
    tokenizer = asked.tokenizer if asked.tokenizer == "-" else str(Path(asked.tokenizer).resolve())
    inputs = [sys.executable, str(STEP / "inputs.py")]
    tiny = ["tiny"] if asked.tiny else []
    checked([*inputs, "model", asked.model, str(model), tokenizer, *tiny])
    if "fastchat" in asked.systems:
        checked([*inputs, "fastchat", str(model), str(folder / "fastchat_model")])
    if asked.data == "long":
        checked([*inputs, "long", str(data), str(asked.model_max_length)])
    elif asked.data == "bundled":
        data = ROOT / "data" / "dummy_conversation.json"
    else:
        data = Path(asked.data).resolve()
    flags = loop_flags(asked, model, data)
    checked([sys.executable, str(STEP / "bare_loop.py"), "plan", str(plan), *flags])
    found = json.loads(plan.read_text())
    sizes = {len(step["examples"]) for step in found["steps"]}
    if sizes != {asked.batch}:
        sys.exit(f"found steps of {sizes} examples; expected {asked.batch}. Give fewer --steps.")
    return Job(asked, folder, flags, found)


def loop_flags(asked: argparse.Namespace, model: Path, data: Path) -> list[str]:
    """Return the flags of loop/train.py for the chosen settings."""
    values: dict[str, object] = {
        "model_name_or_path": model,
        "data_path": data,
        "max_steps": asked.steps,
        "per_device_train_batch_size": asked.batch,
        "global_batch_size": asked.batch,
        "model_max_length": asked.model_max_length,
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[asked.precision],
        "q_lora": asked.kind == "qlora",
        "lora_dropout": asked.dropout,
        "learning_rate": asked.learning_rate,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    # Like FastChat: its template for decoders; for a T5, its tokens and pairs, and only LoRA.
    t5 = {"t5_compat": True, "train_new_tokens": False}
    values |= t5 if asked.model == "t5" else {"template": "vicuna"}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*flags, *asked.loop_flags]


def take_turns(
    job: Job,
) -> tuple[dict[str, list[Run]], dict[str, str], list[dict[str, float]], list[float]]:
    """Run each system once per turn; skip a failed system in later turns.

    Returns the runs, the errors of failed systems, the GEMM peaks of each turn, and the load
    averages between turns.
    """
    asked = job.asked
    runs: dict[str, list[Run]] = {name: [] for name in asked.systems}
    failures: dict[str, str] = {}
    peaks, loads = [], [os.getloadavg()[0]]
    for turn in range(asked.runs):
        size = ["256"] if asked.tiny else []
        peak = checked([sys.executable, str(STEP / "gemm_peak.py"), *size])
        peaks.append(json.loads(peak.splitlines()[-1]))
        for name in (name for name in asked.systems if name not in failures):
            label = f"turn {turn + 1}, {name}:"
            try:
                run = run_system(name, job, job.folder / f"{name}-{turn}")
            except Failed as failed:
                failures[name] = str(failed)
                print(f"{label} failed: {failed}", file=sys.stderr, flush=True)
                continue
            runs[name].append(run)
            each = (run.ends[-1] - run.ends[asked.warm_up - 1]) / (asked.steps - asked.warm_up)
            text = f"{label} {each:.3f} s per step, first loss {run.losses[0]:.6f}"

            print(text, file=sys.stderr, flush=True)
        loads.append(os.getloadavg()[0])
    return runs, failures, peaks, loads


if __name__ == "__main__":
    main()
