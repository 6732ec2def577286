"""`python -m loop doctor`: what a run will need, before it costs anything: memory, communication.

--estimate reads the model's config.json, not its weights; a folder with that file alone will do.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from loop.base import find_base_model
from loop.config import Config, shown
from loop.estimate import Run, host_memory, memory, sent
from loop.flags import flag
from loop.settings import read_config
from loop.shape import Backend, Shape, backends, read_backend, read_shape
from loop.targets import USUAL

GIB = 2**30


@dataclass(frozen=True)
class DoctorConfig(Config):
    """Training's settings, and what to examine."""

    estimate: bool = flag(False, "memory by part and bytes sent, for one rank", "doctor")
    accelerate_config: str | None = flag(
        None, "one config, by its parts; none: a row for each in accelerate_configs/", "doctor"
    )
    num_processes: int = flag(8, "ranks of the launch", "doctor", at_least=1)
    supervised_share: float = flag(
        1.0, "supervised tokens of all tokens in a micro-batch", "doctor", above=0, at_most=1
    )


def main(argv: Sequence[str]) -> None:
    """Print the estimate; raises UserError where nothing was asked for, or not understood."""
    config = read_config(argv, DoctorConfig, __doc__ or "")
    if not config.estimate:
        raise UserError("found no --estimate; the doctor does nothing else yet. Give --estimate.")
    if config.deepspeed:
        raise UserError(
            f"found --deepspeed {config.deepspeed}; the estimate knows the stages and offloads of "
            "accelerate configs only. Give --accelerate_config, such as "
            "accelerate_configs/zero3.yaml."
        )
    named = config.accelerate_config
    backend = read_backend(Path(named)) if named else None
    base = find_base_model(config)
    shape = read_shape(base, config)
    print(f"{shown(base)}: {counts(shape)}\n{setting(config)}\n")
    if backend:
        print(parts(launch(shape, config, backend)))
    else:
        print(overview(shape, config))


def launch(shape: Shape, config: DoctorConfig, backend: Backend) -> Run:
    """Return the run; the flags' precision goes before the accelerate config's, as in training."""
    if not (config.mixed_precision or config.bf16 or config.fp16):
        config = dataclasses.replace(config, mixed_precision=backend.precision)
    return Run(shape, config, backend, config.num_processes, config.supervised_share)


def counts(shape: Shape) -> str:
    """Say how many parameters there are, of each kind."""
    linears, others = sum(shape.model.linears), sum(shape.model.others)
    return (
        f"base {linears + others:,} parameters, {linears:,} of them 4-bit under QLoRA; "
        f"trained {sum(shape.trained):,}"
    )


def setting(config: DoctorConfig) -> str:
    """Say which settings the numbers depend on."""
    checkpointing = "on" if config.gradient_checkpointing else "off"
    return (
        f"micro-batch {config.per_device_train_batch_size} x {config.model_max_length} tokens, "
        f"{100 * config.supervised_share:g} % supervised; checkpointing {checkpointing}; "
        f"LoRA r {config.lora_r} on {' '.join(config.lora_target_modules or USUAL[0])}"
    )


def parts(run: Run) -> str:
    """Return the table of one run's parts."""
    found = memory(run)
    kind = "QLoRA" if run.config.q_lora else "LoRA"
    rows = [[f"{run.backend.name}, {kind}, {run.config.precision}, rank of {run.world}", "GiB"]]
    rows += [[name, gib(size)] for name, size in found.items()]
    rows.append(["allocated at the peak", gib(sum(found.values()))])
    rows.append(["main memory, offloaded", gib(host_memory(run))])
    rows.append(["sent each step", gib(sent(run))])
    return table(rows)


def overview(shape: Shape, config: DoctorConfig) -> str:
    """Return the table of all configs, LoRA and QLoRA side by side."""
    rows = [
        ["GiB a rank", "", "LoRA", "", "", "QLoRA", "", ""],
        ["config", "ranks", *("GPU", "host", "sent/step") * 2],
    ]
    for backend in backends():
        row = [backend.name]
        for q_lora in (False, True):
            run = launch(shape, dataclasses.replace(config, q_lora=q_lora), backend)
            total = sum(memory(run).values())
            row += [] if q_lora else [str(run.world)]
            row += [gib(total), gib(host_memory(run)), gib(sent(run))]
        rows.append(row)
    return table(rows)


def gib(size: float) -> str:
    """Return bytes as GiB; a MiB is 0.001."""
    return f"{size / GIB:.3f}"


def table(rows: list[list[str]]) -> str:
    """Return the rows in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)
