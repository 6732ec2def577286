"""`doctor --estimate`: prints memory by part and bytes sent, for one accelerate config or for all.

It reads the model's config.json only; the weights may be missing.
"""

import dataclasses
from pathlib import Path

from data.errors import UserError
from loop.config.flags import display_path
from loop.doctor.flags import DoctorConfig
from loop.doctor.memory.estimate import host_memory, memory, sent
from loop.doctor.memory.run import Run
from loop.doctor.memory.shape import Backend, Shape, backends, read_backend, read_shape
from loop.model.base import find_base_model
from loop.model.lora_targets import USUAL
from loop.monitor.formatting import gib, table

DEFAULT_RANKS = 8


def print_estimate(config: DoctorConfig) -> None:
    """Print the estimate; raises UserError for an unsupported model or backend."""
    if config.deepspeed:
        raise UserError(
            f"found --deepspeed {config.deepspeed}; the estimate reads stage and offload of "
            "accelerate configs only. Give --accelerate_config, such as "
            "accelerate_configs/zero3.yaml."
        )
    file = config.accelerate_config
    backend = read_backend(Path(file)) if file else None
    base = find_base_model(config)
    shape = read_shape(base, config)
    print(f"{display_path(base)}: {counts(shape)}\n{setting(shape, config)}\n")
    if backend:
        print(parts(launch(shape, config, backend)))
    else:
        print(overview(shape, config))


def launch(shape: Shape, config: DoctorConfig, backend: Backend) -> Run:
    """Return the run; a precision flag overrides the accelerate config, as in training."""
    if not (config.mixed_precision or config.bf16 or config.fp16):
        config = dataclasses.replace(config, mixed_precision=backend.precision)
    return Run(
        shape, config, backend, config.num_processes or DEFAULT_RANKS, config.supervised_share
    )


def counts(shape: Shape) -> str:
    """Return the numbers of base, 4-bit and trained parameters as text."""
    linears = sum(shape.model.linears)
    others = sum(shape.model.held) + sum(shape.model.others)
    return (
        f"base {linears + others:,} parameters, {linears:,} of them 4-bit under QLoRA; "
        f"trained {sum(shape.trained):,}"
    )


def setting(shape: Shape, config: DoctorConfig) -> str:
    """Return as text the settings that the estimate depends on."""
    target = config.max_target_length or config.model_max_length
    sides = f"({config.model_max_length} + {target})" if shape.t5 else config.model_max_length
    names = config.lora_target_modules or USUAL[shape.t5 is not None]
    checkpointing = "on" if config.gradient_checkpointing else "off"
    return (
        f"micro-batch {config.per_device_train_batch_size} x {sides} tokens, "
        f"{100 * config.supervised_share:g} % supervised; checkpointing {checkpointing}; "
        f"logits of {config.loss_chunk_tokens} tokens at once; LoRA r {config.lora_r} on "
        f"{' '.join(names)}"
    )


def parts(run: Run) -> str:
    """Return the table of one run's parts."""
    bytes_by_part = memory(run)
    kind = "QLoRA" if run.config.q_lora else "LoRA"
    rows = [[f"{run.backend.name}, {kind}, {run.config.precision}, rank of {run.world}", "GiB"]]
    rows += [[name, gib(size)] for name, size in bytes_by_part.items()]
    rows.append(["peak, allocated", gib(sum(bytes_by_part.values()))])
    rows.append(["main memory, offloaded", gib(host_memory(run))])
    rows.append(["sent each step", gib(sent(run))])
    return table(rows)


def overview(shape: Shape, config: DoctorConfig) -> str:
    """Return the table of all configs, with LoRA and QLoRA."""
    rows = [
        ["GiB per rank", "", "LoRA", "", "", "QLoRA", "", ""],
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
