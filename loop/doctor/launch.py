"""Finds the launch that the doctor examines: accelerate config, ranks, and their environment."""

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
from loop.doctor.memory.shape import CONFIGS, SINGLE_PROCESS, Backend, read_accelerate
from loop.monitor.formatting import GIB

DEFAULT_CONFIG = CONFIGS / "zero2.yaml"  # as in launch.sh


@dataclass(frozen=True)
class Launch:
    """One launch: its accelerate config, ranks and machines.

    multi_rank: the config allows several ranks. variables: environment variables that the launcher
    sets for rank 0.
    """

    file: Path
    ranks: int
    machines: int
    multi_rank: bool
    variables: dict[str, str]

    @property
    def process_index(self) -> int:
        """The index of rank 0, under accelerate's name."""
        return 0

    @property
    def num_processes(self) -> int:
        """The number of ranks, under accelerate's name."""
        return self.ranks

    @property
    def name(self) -> str:
        """The path of the config for display."""
        return display_path(self.file)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Set the environment of rank 0 in this process, and restore it afterwards."""
        before = dict(os.environ)
        os.environ.update(self.variables)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def backend(self, deepspeed: dict[str, Any], config: Config) -> Backend:
        """Return the backend for the estimate; deepspeed: DeepSpeed's JSON, or empty."""
        zero = deepspeed.get("zero_optimization", {})
        devices = {
            part: (zero.get(f"offload_{part}") or {}).get("device") or "none"
            for part in ("optimizer", "param")
        }
        return Backend(
            name=self.file.stem,
            stage=zero.get("stage", 0),
            offload_optimizer=devices["optimizer"] != "none",
            offload_param=devices["param"] != "none",
            multi_rank=self.multi_rank,
            precision=config.precision,
        )


def find_launch(config: DoctorConfig, errors: list[str]) -> Launch:
    """Return the launch for the flags and the environment, with ranks counted as in launch.sh.

    Errors of the accelerate config are added to `errors`. After such an error, the launch is one
    process without DeepSpeed.
    """
    import torch

    file = Path(config.accelerate_config or DEFAULT_CONFIG).expanduser()
    values: dict[str, Any] = {}
    with collect_errors(errors):
        values = read_accelerate(file)
    multi_rank = values.get("distributed_type", "NO") not in SINGLE_PROCESS
    machines = _read_count("NNODES", errors) or int(values.get("num_machines") or 1)
    local = _read_count("NUM_PROCESSES", errors) or torch.cuda.device_count() or 1
    ranks = config.num_processes or local * machines if multi_rank else 1
    if ranks % machines:
        errors.append(
            f"--num_processes: found {ranks} on {machines} machines; expected the same number on "
            f"each. Give a multiple of {machines}."
        )
    local = max(1, ranks // machines)
    counts = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local, "RANK": 0, "LOCAL_RANK": 0}
    exported: dict[str, str] = {}
    if values:
        with collect_errors(errors):
            exported = _exported_variables(file, ranks, machines)
    variables = exported | {name: str(count) for name, count in counts.items()}
    return Launch(file, ranks, machines, multi_rank, variables)


def _read_count(name: str, errors: list[str]) -> int | None:
    """Return an environment variable as a number, or None; add an error if it is invalid."""
    given = os.environ.get(name)
    if given and not given.isdigit():
        errors.append(f"{name}: found {given}; expected a whole number. Give one, or unset it.")
    return int(given) if given and given.isdigit() else None


def _exported_variables(file: Path, ranks: int, machines: int) -> dict[str, str]:
    """Return the variables that `accelerate launch` exports for a config (accelerate 1.15).

    Raises UserError for a config that accelerate rejects.
    """
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    words = ["--config_file", str(file), "--num_processes", str(ranks), "--main_process_port", "0"]
    if machines > 1:
        words += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    parser = launch.launch_command_parser()
    try:
        # Without --num_cpu_threads_per_process, accelerate prints a note.
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
    except Exception as error:  # any type: accelerate does not check the keys
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--accelerate_config {file}: accelerate launch rejects it: "
            f"{type(error).__name__}: {reason} Correct it, or give one of accelerate_configs/."
        ) from None
    return {name: value for name, value in values.items() if name.startswith("ACCELERATE_")}


def hardware_rows(launch: Launch) -> list[tuple[str, str]]:
    """Return CPU, memory and GPUs of this machine, and the memory for each rank."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    rows = [("CPU", f"{_processor()}, {cores} cores, {memory:.1f} GiB of memory")]
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        same = [gpu for gpu in gpus if gpu.name == name]
        capability = f"compute capability {same[0].major}.{same[0].minor}"
        memory = same[0].total_memory / GIB
        rows.append(("GPU", f"{len(same)} x {name}, {memory:.1f} GiB, {capability}"))
    rows += [] if gpus else [("GPU", "none")]
    place = "on the GPU" if on_gpu() else "in main memory"
    room = f"{memory_per_rank() / GIB:.1f} GiB {place}, 90 % of the free memory"
    return [*rows, ("memory per rank", room + (", divided evenly" if launch.ranks > 1 else ""))]


def memory_per_rank() -> int:
    """Return the bytes that each rank may use on its device: the least of all GPUs."""
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


def launch_rows(launch: Launch, deepspeed: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """Return backend, number of ranks, and precision."""
    zero: dict[str, Any] = deepspeed.get("zero_optimization", {})
    without = "DDP" if launch.multi_rank else "one process"
    backend = f"DeepSpeed ZeRO-{zero['stage']}" if zero else without
    if not zero and launch.variables.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend = "DeepSpeed, ZeRO stage unknown: see below"
    for part in ("optimizer", "param") if zero else ():
        device = (zero.get(f"offload_{part}") or {}).get("device", "none")
        backend += f", {part} on the {device}" if device != "none" else ""
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
