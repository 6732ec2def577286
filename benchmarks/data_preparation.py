"""Measures data preparation: encoding compared with FastChat, cleaning, a million dialogues.

python benchmarks/data_preparation.py [--parts encode clean many encoded] [--text FILE]
    [--tokenizer DIR] [--runs 3] [--fastchat DIR] [--clean_text FILE] [--dialogues N]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loop.config.flags import DUMMY_DATA, ROOT

PARTS = ("encode", "clean", "many", "encoded")  # parts of the measurement, each a function
FASTCHAT = ("fschat==0.2.36", "transformers==4.41.2", "numpy<2", "torch", "accelerate", "psutil")
FASTCHAT += ("sentencepiece", "protobuf")
MAX_TOKENS, CORES = 2048, 2
WORDS = [
    f"{first}{last}" for first in ("the", "wa", "sta") for last in ("n", "ter", "te", "rm", "")
]
Facts = dict[str, Any]


def main() -> None:
    """Measure the chosen parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--text", type=Path, default=DUMMY_DATA, help="ShareGPT JSON")
    parser.add_argument("--tokenizer", type=Path, help="a folder; default: the bundled model's")
    parser.add_argument("--runs", type=int, default=3, help="runs per system, in turns")
    kept = Path.home() / ".cache/lora-loop/fastchat"
    parser.add_argument("--fastchat", type=Path, default=kept, help="folder of its environment")
    parser.add_argument(
        "--clean_text",
        type=Path,
        help="JSON to clean; tens of MB, because the time includes the start",
    )
    parser.add_argument("--dialogues", type=int, default=1_000_000, help="for the last two parts")
    asked = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as name:
        for part in asked.parts:
            print(f"\n{part}: {_conditions()}", flush=True)
            {"encode": encode, "clean": clean, "many": many, "encoded": encoded}[part](
                asked, Path(name)
            )


def encode(asked: argparse.Namespace, folder: Path) -> None:
    """Encode a file with this project and with FastChat, in turns; print medians and ratio."""
    python = _fastchat(asked.fastchat)
    model = _two_forms(asked.tokenizer, folder / "model")
    text = str(asked.text.resolve())
    worker = str(ROOT / "benchmarks/peers/fastchat_preprocess.py")
    commands = {
        "FastChat": [str(python), worker, str(model / "slow"), text, str(MAX_TOKENS)],
        "this project": _child("encode_once", str(model), text),
    }
    found: dict[str, list[Facts]] = {name: [] for name in commands}
    for _ in range(asked.runs):
        for name, words in commands.items():
            found[name].append(_result(words))
            print(f"  {name}: {found[name][-1]}", flush=True)
    rates = {}
    for name, runs in found.items():
        rates[name] = statistics.median(run["dialogues"] / run["seconds"] for run in runs)
        tokens = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        cpu = statistics.median(run["cpu"] for run in runs)
        print(f"{name}: {rates[name]:,.1f} dialogues/s, {tokens:,.0f} tokens/s, {cpu:.1f} s CPU")
    print(f"ratio of dialogues/s: {rates['this project'] / rates['FastChat']:.1f}")


def clean(asked: argparse.Namespace, folder: Path) -> None:
    """Clean a file on one core, and in turns only read and write it as JSON."""
    text = asked.clean_text or asked.text
    size, out = text.stat().st_size / 1e6, folder / "clean.jsonl"
    words = [sys.executable, "-m", "data", "clean", "--in", str(text.resolve()), "--out", str(out)]
    words += ["--processes", "1", "--on_bad_record", "skip"]
    for _ in range(asked.runs):
        before = os.times()
        done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
        after = os.times()
        spent = after.children_user + after.children_system
        spent -= before.children_user + before.children_system
        started = time.process_time()
        reference = "the complete file"
        try:
            json.dumps(json.loads(text.read_bytes()))
        except ValueError:
            reference = "the kept records, because the file is truncated"
            started = time.process_time()
            for line in out.read_text(encoding="utf-8").splitlines():
                json.dumps(json.loads(line))
        plain = time.process_time() - started
        print(f"{done.stderr.strip().splitlines()[-1][:60]} …")
        print(f"{size / spent:.2f} MB/s of a core; JSON alone {size / plain:.2f} ({reference})")
        out.unlink()


def many(asked: argparse.Namespace, folder: Path) -> None:
    """Encode synthetic dialogues with read_training_data, and open the cache again."""
    data, kept = folder / "many.jsonl", folder / "many.kept"
    write_many(data, asked.dialogues)
    print(f"{asked.dialogues:,} dialogues, {data.stat().st_size / 1e6:,.0f} MB", flush=True)
    facts = _result(_child("prepare_once", str(data), str(kept)))
    rate = asked.dialogues / facts["prepare"]
    print(f"encoded: {facts}; {rate:,.0f} dialogues/s; cache {kept.stat().st_size / 1e6:,.0f} MB")
    print(f"opened again: {_result(_child('prepare_once', str(data), str(kept)))}")


def encoded(asked: argparse.Namespace, folder: Path) -> None:
    """Write a cache of synthetic examples, without tokenizing, then open it and plan steps."""
    kept = folder / "encoded.kept"
    print(f"written: {_result(_child('keep_encoded', str(kept), str(asked.dialogues)))}")
    print(f"{kept.stat().st_size / 1e6:,.0f} MB", flush=True)
    print(f"opened and planned: {_result(_child('open_encoded', str(kept)))}")


def write_many(file: Path, count: int) -> None:
    """Write synthetic dialogues of one question and one answer, about 1 KB each."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as opened:
        for number in range(count):
            texts = [" ".join(draw.choices(WORDS, k=length)) for length in (20, 160)]
            named = zip(("human", "gpt"), texts, strict=True)
            turns = [{"from": who, "value": text} for who, text in named]
            opened.write(json.dumps({"id": f"s{number}", "conversations": turns}) + "\n")


def encode_once(model: str, text: str) -> Facts:
    """Read and encode a file's dialogues and write the cache, as read_training_data does."""
    from data.dialogues.sharegpt import Tally, read_dialogues
    from data.encoding.cache import read_cache, write_cache
    from data.encoding.encode import encode_dialogues
    from loop.config.flags import Config
    from loop.model.base import load_tokenizer

    tokenizer, spent = load_tokenizer(model, Config()), []
    with tempfile.TemporaryDirectory() as name:
        kept = str(Path(name) / "kept")
        for _ in range(2):  # the first pass is a warm-up
            tally, begun = Tally(), (time.perf_counter(), time.process_time())
            dialogues = read_dialogues([Path(text)], tally)
            examples = encode_dialogues(dialogues, "vicuna", tokenizer, MAX_TOKENS, tally)
            write_cache(kept, {}, examples, tally)
            spent = [time.perf_counter() - begun[0], time.process_time() - begun[1]]
        tokens = sum(example.tokens for example in read_cache(kept, {}) or [])
    return {"seconds": spent[0], "cpu": spent[1], "dialogues": tally.read, "tokens": tokens}


def prepare_once(data: str, kept: str) -> Facts:
    """Load the tokenizer, call read_training_data, then open its cache again."""
    from data.encoding.cache import read_cache
    from loop.config.flags import Config
    from loop.inputs.training_data import read_training_data
    from loop.model.base import load_tokenizer
    from loop.model.bundled_model import embedded_model

    # Late imports and the first read of the tokenizer from disk are not measured.
    load_tokenizer(str(embedded_model()), Config())
    begun = time.process_time()
    config = Config(data_path=(data,), preprocessed_path=kept)
    prepare_seconds, prepared = _timed(lambda: read_training_data(config))
    cpu = time.process_time() - begun
    read_seconds, again = _timed(lambda: read_cache(kept, prepared.examples.key))
    assert again is not None
    times = {"prepare": prepare_seconds, "its CPU": cpu, "read_cache": read_seconds}
    return {**times, "peak MiB": _peak()}


def keep_encoded(kept: str, count: str) -> Facts:
    """Write a cache of `count` examples of 200 tokens."""
    from data.dialogues.sharegpt import Tally
    from data.encoding.cache import write_cache
    from data.encoding.encode import Example

    def examples() -> Iterator[Example]:
        for number in range(int(count)):
            ids = [*range(number % 1000, number % 1000 + 200)]
            yield Example(f"s{number}", ids, [-100] * 40 + ids[40:], 160, number)

    tally = Tally(int(count), int(count))
    seconds, _ = _timed(lambda: write_cache(kept, {}, examples(), tally))
    return {"seconds": seconds, "peak MiB": _peak()}


def open_encoded(kept: str) -> Facts:
    """Open the cache, plan an epoch of 128 examples per step, and collate its first ten windows."""
    from data.batching.collate import Collator
    from data.encoding.cache import read_cache
    from loop.config.flags import Config
    from loop.distributed.layout import plan_layout
    from loop.inputs.windows import windows

    bare = _peak()
    read_seconds, examples = _timed(lambda: read_cache(kept, {}))
    assert examples is not None
    one: Any = SimpleNamespace(process_index=0, num_processes=1)
    layout = plan_layout(Config(global_batch_size=128), len(examples), one)
    dealt = windows(examples, layout, 0, Collator(0))
    first_seconds, _ = _timed(lambda: next(dealt))
    planned = _peak()
    nine_seconds, _ = _timed(lambda: [next(dealt) for _ in range(9)])
    seconds = {"read_cache": read_seconds, "first window": first_seconds, "nine more": nine_seconds}
    peaks = {"peak MiB bare": bare, "after the first window": planned, "after ten": _peak()}
    return seconds | peaks


def _fastchat(folder: Path) -> Path:
    """Return the Python of FastChat's environment; create the environment if it is missing."""
    python, done = folder / "bin/python", folder / "made"
    if not done.exists():
        print(f"creating {folder}: takes minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *FASTCHAT], check=True)
        done.touch()
    return python


def _two_forms(given: Path | None, folder: Path) -> Path:
    """Write a tokenizer in this project's form, and FastChat's form into the subfolder `slow`."""
    from transformers import AutoTokenizer, LlamaTokenizer

    from loop.model.bundled_model import embedded_model

    source = given or embedded_model()
    pieces = source / "tokenizer.model"
    if pieces.is_file():
        how = {"add_bos_token": True, "legacy": False}
        LlamaTokenizer.from_pretrained(source, **how).save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
        kind, names = "LlamaTokenizer", {}
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.save_pretrained(folder)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        kind, names = "GPT2Tokenizer", {"eos_token": tokenizer.eos_token}
    slow = folder / "slow"
    slow.mkdir()
    for file in ("tokenizer.model", "vocab.json", "merges.txt"):
        if (folder / file).is_file():
            (folder / file).rename(slow / file)
    settings = {"tokenizer_class": kind, **names}
    (slow / "tokenizer_config.json").write_text(json.dumps(settings))
    for place in (folder, slow):
        (place / "config.json").write_text('{"model_type": "llama"}')
    return folder


def _child(name: str, *words: str) -> list[str]:
    """Return the command that calls a function of this file in a child process."""
    call = f"from benchmarks.data_preparation import {name} as call; import json, sys"
    return [sys.executable, "-c", f"{call}; print(json.dumps(call(*sys.argv[1:])))", *words]


def _result(words: list[str]) -> Facts:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return {name: round(fact, 3) for name, fact in facts.items()}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _peak() -> int:
    """Return the peak resident memory of this process in MiB, with pages of mapped files."""

    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def _conditions() -> str:
    additions = min(_timed(lambda: sum(range(3_000_000)))[0] for _ in range(3))
    return f"load {os.getloadavg()[0]:.1f}, 3 million additions in {additions:.2f} s"


if __name__ == "__main__":
    main()
