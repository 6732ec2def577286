"""If a rank or the launcher is killed, all other processes end, or all ranks are restarted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from loop.checkpoint.storage import list_folders, verify
from tests.support.helpers import HANG, ROOT, log_of, wait_until, write_dialogues

LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", "accelerate_configs/zero2.yaml", "--num_processes", "2"),
    *("--main_process_port", "0", "loop/train.py"),
)


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., psutil.Popen]]:
    """Start a run on two ranks and wait until it has trained two steps."""
    started: list[psutil.Popen] = []
    data = write_dialogues(
        tmp_path / "data.json", *[["Hi " * 9 * n, "Yo " * 9] for n in range(1, 9)]
    )

    def run(steps: int, *launcher: str | Path) -> psutil.Popen:
        launched = psutil.Popen(
            [
                *(launcher or LAUNCH),
                *("--model_name_or_path", tiny_model, "--data_path", data),
                *("--output_dir", tmp_path / "run", "--mixed_precision", "no"),
                *("--max_steps", str(steps), "--logging_steps", "1"),
            ],
            cwd=ROOT,
            env={**os.environ, "NUM_PROCESSES": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(launched)
        wait_until(lambda: steps_done(tmp_path / "run") >= 2, lambda: launched.poll() is None)
        return launched

    yield run
    for launched in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*launched.children(recursive=True), launched]:
                process.kill()


def steps_done(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def ranks_of(launched: psutil.Popen) -> list[psutil.Process]:
    """Return the two training processes."""
    children = launched.children(recursive=True)
    ranks = [
        child
        for child in children
        if "loop/train.py" in child.cmdline() and "-u" in child.cmdline()
    ]
    assert len(ranks) == 2
    return ranks


def test_a_rank_killed_in_mid_step_ends_the_launch_and_every_process(
    start: Callable[..., psutil.Popen],
) -> None:
    launched = start(10**6)
    everyone = launched.children(recursive=True)
    ranks_of(launched)[1].kill()
    assert launched.wait(timeout=HANG) != 0
    assert not psutil.wait_procs(everyone, timeout=HANG)[1]


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_training(start: Callable[..., psutil.Popen]) -> None:
    launched = start(10**6)
    ranks = ranks_of(launched)
    launched.kill()
    assert not psutil.wait_procs(ranks, timeout=HANG)[1]


def test_a_signal_to_launch_sh_and_all_its_processes_saves_and_ends(
    start: Callable[..., psutil.Popen], tmp_path: Path
) -> None:
    launched = start(10**6, ROOT / "launch.sh", "accelerate_configs/zero2.yaml")
    everyone = launched.children(recursive=True)
    assert len(ranks_of(launched)) == 2
    for process in [launched, *everyone]:  # as SLURM does with a step
        process.send_signal(signal.SIGUSR1)
    assert launched.wait(timeout=HANG) == 75
    (folder,) = list_folders(tmp_path / "run")
    verify(folder)
    assert not psutil.wait_procs(everyone, timeout=HANG)[1]


@pytest.mark.slow
def test_max_restarts_restarts_the_ranks_after_one_is_killed(
    start: Callable[..., psutil.Popen], tmp_path: Path
) -> None:
    words = (ROOT / "launch.sh", "accelerate_configs/zero2.yaml", "--max_restarts", "1")
    launched = start(300, *words)
    ranks_of(launched)[1].kill()
    assert launched.wait(timeout=HANG) == 0
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [*range(1, 301)]


def is_connected(processes: list[psutil.Popen], port: int) -> bool:
    """Return whether the first process is connected to that port of this machine."""
    return any(one.raddr and one.raddr.port == port for one in processes[0].net_connections())


def test_restarted_ranks_do_not_connect_to_dead_ranks() -> None:
    # With torchelastic's static rendezvous, the launcher has one store for all attempts.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = (
        sys.executable,
        "-c",
        "from loop.distributed import accelerator; accelerator.init_process_group_once()",
    )
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    for attempt in ("0", "1"):
        ranks: list[psutil.Popen] = []
        joined = partial(is_connected, ranks, store.port)
        keys = store.num_keys()
        for rank in ("1", "0"):
            env = environment | {"RANK": rank, "LOCAL_RANK": rank}
            env |= {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            ranks.append(psutil.Popen(words, cwd=ROOT, env={**os.environ, **env}))
            # Rank 1 starts first, so it could read the address of the first attempt's rank 0.
            if rank == "1":
                wait_until(joined)
                # A rank writes its own address before it reads. With the old keys, it would
                # overwrite them and add no key.
                deadline = time.monotonic() + 20
                while store.num_keys() == keys and time.monotonic() < deadline:
                    time.sleep(0.05)
        assert [rank.wait(timeout=HANG) for rank in ranks] == [0, 0]
