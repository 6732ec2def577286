"""The launch that the doctor examines: which config and how many ranks, and what a rank is told."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError, collect_errors
from loop.config.flags import Config, display_path
from loop.distributed.memory import memory_room
from loop.distributed.precision import on_gpu
from loop.doctor.flags import DoctorConfig
from loop.doctor.memory.shape import ALONE, CONFIGS, Backend, read_accelerate
from loop.monitor.formatting import GIB

USUAL = CONFIGS / "zero2.yaml"  # launch.sh's


@dataclass(frozen=True)
class Launch:
    """One launch: its accelerate config and ranks. told: the environment of its first rank."""

    file: Path
    ranks: int
    machines: int
    several: bool  # several ranks are possible
    told: dict[str, str]

    @property
    def process_index(self) -> int:
        """The first rank's, as accelerate calls it."""
        return 0

    @property
    def num_processes(self) -> int:
        """The ranks, as accelerate calls them."""
        return self.ranks

    @property
    def name(self) -> str:
        """The config as a person reads it."""
        return display_path(self.file)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Let this process see what the launch's first rank will be told."""
        before = dict(os.environ)
        os.environ.update(self.told)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def backend(self, asked: dict[str, Any], config: Config) -> Backend:
        """Return what the estimate knows of a backend; asked: of DeepSpeed, empty without it."""
        zero = asked.get("zero_optimization", {})
        devices = {
            what: (zero.get(f"offload_{what}") or {}).get("device") or "none"
            for what in ("optimizer", "param")
        }
        return Backend(
            name=self.file.stem,
            stage=zero.get("stage", 0),
            offload_optimizer=devices["optimizer"] != "none",
            offload_param=devices["param"] != "none",
            several=self.several,
            precision=config.precision,
        )


def find_launch(config: DoctorConfig, errors: list[str]) -> Launch:
    """Return the launch that flags and environment ask for, counted as launch.sh counts.

    What is wrong with its config is added to `mistakes`; one process without DeepSpeed stands in
    its place.
    """
    import torch

    file = Path(config.accelerate_config or USUAL).expanduser()
    values: dict[str, Any] = {}
    with collect_errors(errors):
        values = read_accelerate(file)
    several = values.get("distributed_type", "NO") not in ALONE
    machines = _whole("NNODES", errors) or int(values.get("num_machines") or 1)
    here = _whole("NUM_PROCESSES", errors) or torch.cuda.device_count() or 1
    ranks = config.num_processes or here * machines if several else 1
    if ranks % machines:
        errors.append(
            f"--num_processes: found {ranks} on {machines} machines; expected as many on each. "
            f"Give a multiple of {machines}."
        )
    local = max(1, ranks // machines)
    told = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local, "RANK": 0, "LOCAL_RANK": 0}
    exported: dict[str, str] = {}
    if values:
        with collect_errors(errors):
            exported = _exported(file, ranks, machines)
    words = {name: str(value) for name, value in told.items()}
    return Launch(file, ranks, machines, several, exported | words)


def _whole(name: str, errors: list[str]) -> int | None:
    given = os.environ.get(name)
    if given and not given.isdigit():
        errors.append(f"{name}: found {given}; expected a whole number.")
    return int(given) if given and given.isdigit() else None


def _exported(file: Path, ranks: int, machines: int) -> dict[str, str]:
    """Return what `accelerate launch` itself exports for this config (accelerate 1.15).

    Raises UserError for one that it does not take.
    """
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    words = ["--config_file", str(file), "--num_processes", str(ranks), "--main_process_port", "0"]
    if machines > 1:
        words += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    parser = launch.launch_command_parser()
    try:
        # Where nothing is said of threads, it tells how many it would take.
        args, _, _ = launch._validate_launch_command(
            parser.parse_args([*words, "--num_cpu_threads_per_process", "1", "loop/train.py"])
        )
        args.deepspeed_fields_from_accelerate_config = ""
        args.deepspeed_multinode_launcher = "standard"
        if args.use_deepspeed:
            _, values = environments.prepare_deepspeed_cmd_env(args)
        elif args.multi_gpu:
            values = environments.prepare_multi_gpu_env(args)
        else:
            _, values = environments.prepare_simple_launcher_cmd_env(args)
    except Exception as error:  # Each key has its own ways to be wrong.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--accelerate_config {file}: accelerate launch does not take it: "
            f"{type(error).__name__}: {reason} Mend it, or give one of accelerate_configs/."
        ) from None
    return {name: value for name, value in values.items() if name.startswith("ACCELERATE_")}


def hardware_rows(launch: Launch) -> list[tuple[str, str]]:
    """Return what a run finds here, and what one rank may hold."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    rows = [("CPU", f"{_processor()}, {cores} cores, {memory:.1f} GiB of memory")]
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        alike = [gpu for gpu in gpus if gpu.name == name]
        of = f"{alike[0].total_memory / GIB:.1f} GiB, compute capability {alike[0].major}."
        rows.append(("GPU", f"{len(alike)} x {name}, {of}{alike[0].minor}"))
    rows += [] if gpus else [("GPU", "none")]
    device = "GPU" if on_gpu() else "main memory"
    room = f"{room_of_a_rank() / GIB:.1f} GiB of {device}, 90 % of what is free"
    return [*rows, ("a rank may hold", room + (", shared alike" if launch.ranks > 1 else ""))]


def room_of_a_rank() -> int:
    """Return the bytes that each rank may hold on its device; of GPUs that of the fullest."""
    if not on_gpu():
        return memory_room(torch.device("cpu"))
    return min(memory_room(torch.device("cuda", n)) for n in range(torch.cuda.device_count()))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def launch_rows(launch: Launch, asked: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """Return which backend runs, on how many ranks, and in which precision."""
    zero: dict[str, Any] = asked.get("zero_optimization", {})
    backend = f"DeepSpeed ZeRO-{zero['stage']}" if zero else "DDP" if launch.several else "alone"
    if not zero and launch.told.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend = "DeepSpeed, its ZeRO stage not known: see below"
    for what in ("optimizer", "param") if zero else ():
        device = (zero.get(f"offload_{what}") or {}).get("device", "none")
        backend += f", {what} on the {device}" if device != "none" else ""
    machines = f" on {launch.machines} machines" if launch.machines > 1 else ""
    ranks = f"{launch.ranks} rank{'s' * (launch.ranks > 1)}{machines}"
    flags = config.mixed_precision or config.bf16 or config.fp16
    source = "the run's settings" if flags else "the accelerate config"
    precision = f"{config.precision.replace('no', 'fp32')}, by {source}"
    if config.mixed_precision == "auto":
        precision = "auto: decided when the run starts; fp32 assumed here"
    rows = [
        ("launch", f"{launch.name}: {backend}; {ranks}"),
        ("precision", precision),
    ]
    if config.deepspeed:
        rows.append(("DeepSpeed JSON", config.deepspeed))
    return rows
