"""The benchmark of steps runs with a tiny model; its bare loop has the losses of this project."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.environments import is_made
from tests.project.test_style import imports
from tests.support.helpers import ROOT, command

STEPS, WARM_UP = 4, 1
PARTS = ("--tiny", "--runs", "1", "--steps", str(STEPS), "--warm_up", str(WARM_UP), "--batch", "3")
COLUMNS = {
    *("system", "supervised tokens/s", "least to most", "real tokens/s", "run tokens/s"),
    *("s a step", "peak RSS, MiB", "MFU, %", "loss, step 1", "this project is"),
}


def test_no_script_of_a_peer_hides_a_package_that_it_imports() -> None:
    """The folder of a script is the first entry of sys.path."""
    files = [*(ROOT / "benchmarks" / "peers").glob("*.py")]
    for file in files:
        taken = {name.partition(".")[0] for name in imports(file)} & {f.stem for f in files}
        assert taken <= {"step_timer"}, file


def measure(folder: Path, *flags: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Run the command; return the rows of its table by column, and its JSON file."""
    kept = folder / "kept.json"
    words = ("benchmarks/step/run.py", *PARTS, "--json", kept, "--config", "cpu", *flags)
    done = command(sys.executable, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("| ") for line in done.stdout.splitlines() if line.startswith("|")]
    heads, _, *rows = [re.split(r" *\| *", line) for line in lines]
    padded = [row + [""] * (len(heads) - len(row)) for row in rows]
    table = [dict(zip(heads, row, strict=True)) for row in padded]
    return table, json.loads(kept.read_text())


def numbers(row: dict[str, str]) -> list[float]:
    """Return all numbers in a row."""
    texts = " ".join(text for name, text in row.items() if name != "system")
    return [float(text.replace(",", "")) for text in re.findall(r"\S*\d\S*|nan|inf", texts)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], Any]:
    return measure(tmp_path_factory.mktemp("bench"), "--systems", "bare", "loop")


def test_the_benchmark_prints_every_column_with_numbers(measured: Any) -> None:
    bare, loop = measured[0]
    assert {bare["system"], loop["system"]} == {"bare PyTorch loop", "this project"}
    for row in (bare, loop):
        assert {*row} == COLUMNS
        assert all(row[name] for name in COLUMNS - {"this project is"})
        assert all(math.isfinite(number) and number > 0 for number in numbers(row))
    assert re.fullmatch(r"[\d.]+ x", bare["this project is"])


def test_the_rates_are_the_tokens_of_the_timed_steps_by_their_time(measured: Any) -> None:
    table, kept = measured
    (run,) = kept["runs"]["loop"]
    seconds = run["ends"][-1] - run["ends"][WARM_UP - 1]
    row = table[1]
    counts = {name: [step[name] for step in kept["plan"]] for name in ("supervised", "padded")}
    for column, name in (("supervised tokens/s", "supervised"), ("run tokens/s", "padded")):
        shown = float(row[column].replace(",", ""))
        assert shown == pytest.approx(sum(counts[name][WARM_UP:]) / seconds, rel=1e-2, abs=0.1)
    for step in kept["plan"]:
        assert step["supervised"] < step["padded"]
        assert step["supervised"] < step["tokens"]


def test_the_bare_loops_losses_are_this_projects(measured: Any) -> None:
    runs = measured[1]["runs"]
    (bare,), (loop,) = runs["bare"], runs["loop"]
    assert len(loop["losses"]) == STEPS
    assert bare["losses"] == pytest.approx(loop["losses"], abs=1e-6)
    assert len({*loop["losses"]}) == STEPS


def test_the_bare_loop_and_this_one_take_the_same_steps_in_turns() -> None:
    words = ("--model", "tiny", "--steps", "12")
    done = command(
        sys.executable, "benchmarks/step/loop_overhead.py", *words, ACCELERATE_USE_CPU="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert "7 pairs of steps" in summary
    assert float(summary.split("Losses at most ")[1].split()[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(
    not is_made("trl"), reason="python benchmarks/peers/environments.py trl was never run here"
)
def test_ten_steps_of_trl_have_this_projects_losses() -> None:
    words = ("--tiny", "--steps", "10", "--batch", "3", "--config", "cpu")
    done = command(sys.executable, "benchmarks/step/loss_curve.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 10" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not is_made("fastchat"), reason="benchmarks/peers/environments.py fastchat was never run"
)
def test_the_peers_learn_the_same_tokens(tmp_path: Path) -> None:
    names = ["fastchat", *(["trl"] if is_made("trl") else [])]
    _, kept = measure(tmp_path, "--systems", *names)
    plan = [step["supervised"] for step in kept["plan"]]
    for name in names:
        (run,) = kept["runs"][name]
        assert run["supervised"] == plan
    padded = kept["runs"]["fastchat"][0]["padded"]
    assert padded == [3 * 512] * STEPS


def test_a_model_whose_flops_are_known_needs_them() -> None:
    from transformers import LlamaConfig

    from benchmarks.step.bare_loop import flops_of
    from data.encoding.encode import Example

    shape = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    linear = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)
    example = Example("a", [*range(5)], [-100, -100, 2, 3, 4], 3)
    attention = 2 * 6 * 8 * 4**2  # four tokens are computed; the last token predicts nothing
    assert flops_of(shape)(example) == 4 * linear * 4 + 4 * 50 * 8 * 3 + attention
