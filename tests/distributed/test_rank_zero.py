"""A run prints only its own lines, only once, with formats for a terminal, a pipe and a file."""

import importlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loop.distributed.rank_zero import quiet, quiet_deepspeed
from loop.doctor import show
from tests.support.helpers import command, write_dialogues

Train = Callable[..., Path]
# The lines of a run, in this order. Lines in parentheses are optional.
OURS = (
    r"(note: this CPU has no bf16 instructions.*)?",
    r"data: .*: read 8 = kept 8 \+ dropped 0; .*",
    r"plan: 2 steps, .*",
    r"(note: QLoRA under ZeRO-3 .*)?",
    r"model: .* trainable .*",
    r"step 1/2  loss .* left",
    r"step 2/2  loss .* left",
    r"checkpoints: 1; .*",
    *(r"result: 2 of 2 steps; .*", r"saved:  .*", r"use:    .*", r"resume: .*", r"cost:   .*"),
)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = [["Hi " * n, "Yo, I am happy to be here."] for n in range(1, 9)]
    return write_dialogues(tmp_path / "data.json", *texts)


def printed(config: str, *flags: str | Path) -> tuple[str, str]:
    done = command(
        "accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml",
        "--num_processes", "2", "--main_process_port", "0", "loop/train.py",
        "--max_steps", "2", *flags,
        OMP_NUM_THREADS="1",  # As in launch.sh. Without it, torchrun prints a note.
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(("kind", "config"), [("tiny_t5", "ddp"), ("tiny_model", "zero3")])
def test_two_ranks_print_the_lines_of_rank_0_and_nothing_of_other_packages(
    kind: str, config: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    flags = ("--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "run")
    out, err = printed(config, *flags, "--q_lora", str(config == "ddp"))
    assert err == ""
    pattern = "".join(f"({line}\n)" + "?" * line.startswith("(") for line in OURS)
    assert re.fullmatch(pattern, out), out
    assert not re.search(r"[\r\x1b]", out)


def test_wandb_adds_one_line(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    # In a separate process, because wandb prints at exit and keeps its environment.
    done = command(
        "python", "loop/train.py", "--model_name_or_path", tiny_model, "--data_path", data,
        "--output_dir", tmp_path / "run", "--max_steps", "2", "--report_to", "wandb",
        HOME=str(tmp_path), NETRC="", WANDB_API_KEY="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "wandb:" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("wandb: no login found; the run is kept offline.")


@pytest.mark.parametrize(("rank", "seen"), [("0", 1), ("1", 0)])
def test_only_rank_0_prints_warnings(
    rank: str, seen: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet()
            warnings.warn("something new", stacklevel=1)
            warnings.warn("`is_gradient_checkpointing` is old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.modeling_utils").warning("something new")
        logging.getLogger("transformers.modeling_utils").warning(
            "The tied weights mapping and config for this model specifies to tie ..."
        )
        logging.getLogger("torch").error("something bad")
    finally:
        logging.disable(before)
    assert len(caught) == seen
    found = [record.message for record in caplog.records]
    assert found == ["something new"] * seen + ["something bad"]


@pytest.mark.parametrize(("fp16", "seen"), [(False, 1), (True, 2)])
def test_deepspeed_reports_an_overflow_only_if_the_loop_does_not(
    fp16: bool, seen: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scalers: Any = importlib.import_module("deepspeed.runtime.fp16.loss_scaler")
    logger = logging.getLogger("DeepSpeed")
    for name, value in {"filters": [], "handlers": [caplog.handler], "propagate": False}.items():
        monkeypatch.setattr(logger, name, value)
    quiet_deepspeed(fp16)
    scalers.LossScalerBase(1).update_scale(overflow=True)
    logger.warning("something new")
    assert len(caplog.records) == seen, caplog.text


@pytest.mark.parametrize(("out", "err", "bar"), [(1, 1, True), (0, 1, False), (1, 0, False)])
def test_the_progress_bar_is_drawn_only_if_stdout_and_stderr_are_one_terminal(
    out: int, err: int, bar: bool, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [Terminal() if is_terminal else io.StringIO() for is_terminal in (out, err)]
    if out and err:
        streams[1] = streams[0]  # On one terminal, lines and bar must not mix.
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    train("run")
    assert ("4/4 [" in streams[1].getvalue()) == bar
    lines = re.split(r"[\r\n]+", streams[0].getvalue())
    for name in ("step 4/4  loss", "checkpoints: 1;", "result: 4 of 4"):
        assert any(line.startswith(name) for line in lines), name
    assert bar or "\r" not in streams[0].getvalue()


@pytest.mark.parametrize(
    ("terminal", "variables", "colour"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
    ],
)
def test_show_has_colours_on_a_terminal_only(
    terminal: bool,
    variables: dict[str, str],
    colour: bool,
    tiny_model: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    show.main(["--model_name_or_path", str(tiny_model), "--data_path", str(data)])
    assert ("\x1b[32m" in out.getvalue()) == colour
    assert ("⟦" in out.getvalue()) != colour
