"""A T5 learns a second task from LoRA and new tokens."""

from pathlib import Path

import pytest

from benchmarks.small_t5 import Taught, make_base, teach, train_all
from loop.config.flags import DUMMY_DATA
from tests.support.helpers import command
from tests.support.small_t5 import t5_tokenizer


@pytest.mark.slow
def test_a_second_task_lowers_the_held_out_loss_and_changes_the_answers(tmp_path: Path) -> None:
    make_base(tmp_path / "base", t5_tokenizer(), width=64, layers=1)
    losses = train_all(tmp_path / "base", DUMMY_DATA, epochs=8, lr=5e-3)
    assert losses[-1] < losses[0] / 2

    def run(*words: str) -> None:
        done = command(*words)
        assert done.returncode == 0, done.stdout + done.stderr

    flags = ["--learning_rate", "1e-2", "--lora_r", "16", "--lora_target_modules", "all-linear"]
    taught: Taught = teach(tmp_path / "base", tmp_path, 5, [*flags, "--mixed_precision", "no"], run)
    assert taught.loss_after < taught.loss_before / 2
    assert taught.well_formed >= 8, taught.answered
