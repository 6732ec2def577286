"""A run killed at any instant ends as one that was never killed, bit for bit."""

from pathlib import Path

import pytest

from benchmarks.kill_sweep import BACKENDS, dialogues, sweep
from tests.helpers import write_dialogues

# benchmarks/kill_sweep.py makes 200 kills, or as many as you like.
KILLS = [
    ("one process", 2),
    *[pytest.param(backend, 5, marks=pytest.mark.slow) for backend in BACKENDS],
]


@pytest.mark.parametrize(("backend", "kills"), KILLS)
def test_a_run_killed_again_and_again_ends_as_one_never_killed(
    backend: str, kills: int, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "data.json", *dialogues())
    given = ["--model_name_or_path", str(tiny_model), "--data_path", str(data)]
    found = sweep(backend, kills, tmp_path, given)
    assert found.kills.total() == kills
    assert not found.differences
