"""Two simulated machines train: two network namespaces, or loopback addresses without these."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.helpers import HANG, ROOT, adapter_of, launch, wait_until, warm, write_dialogues

pytestmark = pytest.mark.slow
EXACT = ["--mixed_precision", "no", "--lora_dropout", "0", "--learning_rate", "1e-2"]


@dataclass
class Machine:
    """A simulated machine: its address, and the prefix that runs a command on it."""

    address: str
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def quietly(*words: str) -> bool:
    known = shutil.which(words[0]) is not None
    return known and subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    """Two network namespaces, connected by a veth pair, each with one address."""
    names = [f"loop{os.getpid()}{end}" for end in "ab"]
    cards = [f"lv{os.getpid()}{end}" for end in "ab"]
    try:
        made = all(quietly("ip", "netns", "add", name) for name in names)
        made = made and quietly(
            *("ip", "link", "add", cards[0], "netns", names[0], "type", "veth"),
            *("peer", "name", cards[1], "netns", names[1]),
        )
        for number, (name, card) in enumerate(zip(names, cards, strict=True), 1):
            inside = ["ip", "-n", name]
            made = made and quietly(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", card)
            made = made and quietly(*inside, "link", "set", card, "up")
            made = made and quietly(*inside, "link", "set", "lo", "up")
        if made:
            yield [
                # Without it, gloo uses the address of the host name, which is 127.0.0.1.
                Machine(f"10.77.0.{n}", ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": card})
                for n, (name, card) in enumerate(zip(names, cards, strict=True), 1)
            ]
        else:
            yield [Machine("127.0.0.1"), Machine("127.0.0.2")]
    finally:
        for name in names:
            quietly("ip", "netns", "del", name)


Running = list[subprocess.Popen[bytes]]


def start(
    machines: list[Machine],
    config: str,
    flags: list[list[str]],
    folder: Path,
    meanwhile: Callable[[Running], None] = lambda _: None,
) -> list[tuple[int, str]]:
    """Run ./launch.sh on all machines at the same time; return their exit codes and outputs."""
    logs = [folder / f"machine-{rank}.log" for rank in range(len(machines))]
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [*machine.prefix, "./launch.sh", f"accelerate_configs/{config}.yaml", *flags[rank]],
            cwd=ROOT,
            env={
                **os.environ,
                **warm(),
                **machine.environment,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "NNODES": str(len(machines)),
                "NODE_RANK": str(rank),
                "NUM_PROCESSES": "1",
                "MASTER_ADDR": machines[0].address,
                "MASTER_PORT": port,
            },
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, machine in enumerate(machines)
    ]
    try:
        meanwhile(running)
        for process in running:
            process.wait(timeout=HANG)
        return [
            (process.returncode, log.read_text())
            for process, log in zip(running, logs, strict=True)
        ]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()  # launch.sh passes the request to its ranks.


@pytest.fixture(scope="module")
def common(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of every run here."""
    folder = tmp_path_factory.mktemp("data")
    texts = [["What is " + "very " * (3 * n) + "long?", "No " + "idea. " * n] for n in range(6)]
    data = write_dialogues(folder / "dialogues.json", *texts)
    return [
        *("--model_name_or_path", str(tiny_model), "--data_path", str(data), "--max_steps", "4"),
        *("--global_batch_size", "4", "--per_device_train_batch_size", "2"),
        *("--logging_steps", "1", *EXACT),
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_machines_have_the_losses_of_one_and_only_rank_0_writes(
    stage: int, machines: list[Machine], common: list[str], tmp_path: Path
) -> None:
    # Two output folders, like machines with separate disks.
    folders = [tmp_path / "first", tmp_path / "second"]
    flags = [[*common, "--output_dir", str(folder)] for folder in folders]
    done = start(machines, f"multi_node_zero{stage}", flags, tmp_path)
    for code, text in done:
        assert code == 0, text
    starts = [[line.split(":")[0] for line in text.splitlines()] for _, text in done]
    for what in ("data", "plan", "model", "result"):
        assert [lines.count(what) for lines in starts] == [1, 0], done
    assert not folders[1].exists()
    alone = launch(f"zero{stage}", tmp_path / "alone", *common, processes=2)
    log = json.loads((folders[0] / "trainer_state.json").read_text())["log_history"]
    # Equal up to rounding, because a rank that is alone on its machine uses twice the threads.
    assert [entry["loss"] for entry in log] == pytest.approx(
        [entry["loss"] for entry in alone], rel=1e-5
    )
    assert {*adapter_of(folders[0])} == {*adapter_of(tmp_path / "alone")}


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (["--data_path", "/nowhere/d.json"], "/nowhere/d.json: cannot be read: No such file"),
        (["--lora_weight_path", "/nowhere"], "/nowhere/adapter_config.json: cannot be read"),
        (["--seed", "7"], "--seed is 42 on rank 0 and 7 on rank 1"),
    ],
)
def test_a_file_or_flag_that_differs_on_one_machine_is_one_error_on_both(
    wrong: list[str], found: str, machines: list[Machine], common: list[str], tmp_path: Path
) -> None:
    flags = [*common, "--output_dir", str(tmp_path / "run")]
    other = [*flags, *wrong]
    for code, text in start(machines, "multi_node_zero2", [flags, other], tmp_path):
        assert code == 2, text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, text
        assert errors[0].startswith("error: on rank 1, machine ") or "--seed" in wrong
        assert found in errors[0]
        assert "Traceback" not in text


def test_a_stop_request_on_one_machine_stops_both_and_ends_until_done(
    machines: list[Machine], common: list[str], tmp_path: Path
) -> None:
    flags = [*common, "--output_dir", str(tmp_path / "run"), "--max_steps", "100000"]

    def meanwhile(running: Running) -> None:
        log = tmp_path / "machine-0.log"
        wait_until(
            lambda: "step      5/" in log.read_text(),
            lambda: [process.poll() for process in running] == [None, None],
        )
        running[1].send_signal(signal.SIGTERM)

    both = [[*flags, "--until-done"]] * 2
    for code, text in start(machines, "multi_node_zero2", both, tmp_path, meanwhile):
        assert code == 75, text
        assert text.count("stopped: STOP on machine ") == 1, text
        assert ": SIGTERM was received; checkpoint-" in text
        assert "going on" not in text
