"""What the doctor foresees of a run: steps, memory by part, room on the disk, trackers, time."""

import os
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

from data.batching.balance import Examples, assign_micro_batches, packed_tokens
from data.errors import UserError
from loop.checkpoint import storage
from loop.checkpoint.resume import find_checkpoint, run_facts
from loop.checkpoint.saver import planned_saves
from loop.config.flags import Config
from loop.config.preflight import LEAST, base_copy, free_room
from loop.distributed.layout import Layout
from loop.distributed.precision import on_gpu
from loop.doctor.launch import room_of_a_rank
from loop.doctor.memory.estimate import activations, host_memory, memory, sent
from loop.doctor.memory.run import Run, Size
from loop.doctor.memory.shape import Backend, shape_of
from loop.doctor.model_and_data import Model
from loop.doctor.trial import Trial
from loop.inputs.training_data import TrainingData
from loop.inputs.windows import drawn
from loop.monitor.formatting import GIB, WIDTH, curve, duration, gib, megabytes, table
from loop.monitor.trackers import has_wandb_login
from loop.training.optim import lr_at

DEALT = 256  # windows that are looked at for the largest micro-batch
BESIDE = 4 << 20  # bytes of tokenizer, settings and log in the output folder, about


@dataclass(frozen=True)
class Outlook:
    """What there is to train: tokens of all steps, the first micro-batches, the share learnt."""

    tokens: float
    sizes: frozenset[Size]
    share: float


def outlook_of(data: TrainingData, layout: Layout, config: Config) -> Outlook:
    """Deal the first windows out as training does, and reckon the rest by them."""
    tokens = supervised = steps = 0
    sizes: set[Size] = set()
    for _, chosen in islice(drawn(data.examples, layout, config.seed), DEALT):
        dealt = assign_micro_batches(chosen, layout.world_size, layout.limits)
        tokens += sum(example.run_tokens for example in chosen)
        supervised += sum(example.supervised_tokens for example in chosen)
        sizes |= {_size(part, layout.limits.packed) for rank in dealt.ranks for part in rank}
        steps += 1
    return Outlook(tokens / steps * layout.total_steps, frozenset(sizes), supervised / tokens)


def _size(part: Examples, packed: bool) -> Size:
    """Return a micro-batch's size, as if its dialogues shared nothing.

    Keys and values of what they share are kept for each of them, and their supervised tokens are
    reckoned as a share of all.
    """
    if packed:
        return Size(1, packed_tokens(part))
    source, target = (max((e.lengths[side] for e in part), default=0) for side in range(2))
    return Size(len(part), source, target)


def step_rows(
    layout: Layout, ahead: Outlook, examples: int, config: Config
) -> list[tuple[str, str]]:
    """Return the arithmetic of a step in words, the steps, and the learning rate over them."""
    batch, accumulation = layout.global_batch_size, layout.accumulation
    product = layout.world_size * accumulation * layout.micro_batch_size
    short = "" if product == batch else f" (room for {product})"
    words = (
        f"{batch} examples = {layout.world_size} rank{'s' * (layout.world_size > 1)} x "
        f"{accumulation} micro-batch{'es' * (accumulation > 1)} of at most "
        f"{layout.micro_batch_size} examples{short}"
    )
    tokens = layout.limits.tokens
    words += f" and {tokens:,} tokens, more micro-batches where it takes more" if tokens else ""
    left = examples % batch
    passes = layout.total_steps / layout.steps_per_epoch
    last = f", the last of {left}" if left else ""
    rates = [lr_at(step, layout.total_steps, config) for step in range(layout.total_steps)]
    warmup = sum(1 for a, b in pairwise(rates) if b > a)
    columns = max(6, min(WIDTH, layout.total_steps) - 5)
    axis = f" step 1{layout.total_steps:>{columns},}"
    top = f"{config.lr_scheduler_type}, {max(rates):.2e} at most, warm-up: {warmup} steps"
    return [
        ("a step", words),
        (
            "an epoch",
            f"{layout.steps_per_epoch:,} steps{last}: {examples:,} examples, each once",
        ),
        (
            "the run",
            f"{layout.total_steps:,} steps, {passes:.2f} epochs, {ahead.tokens:,.0f} tokens",
        ),
        ("learning rate", "\n".join([top, *curve(rates), axis])),
    ]


def batch_notes(layout: Layout, config: Config) -> list[str]:
    """Return what is allowed, but hardly meant."""
    notes = []
    if layout.global_batch_size < layout.world_size:
        notes.append(
            f"{layout.global_batch_size} examples a step leave "
            f"{layout.world_size - layout.global_batch_size} of {layout.world_size} ranks idle"
        )
    asked = config.global_batch_size or 0
    if asked > layout.global_batch_size:
        notes.append(f"--global_batch_size {asked} is more than there is: a step is an epoch")
    if config.save_strategy == "steps" and config.save_steps > layout.total_steps > 1000:
        notes.append(f"--save_steps {config.save_steps}: the only checkpoint is the last step's")
    return notes


def largest_run(
    model: Model,
    data: TrainingData,
    backend: Backend,
    ranks: int,
    ahead: Outlook,
    config: Config,
) -> Run | None:
    """Return the run with the largest of the first micro-batches, if the estimate knows its model.

    Of pairs that is not the one with most tokens: attention grows with the square of them.
    """
    if model.unlike:
        return None
    shape = shape_of(model.bare, model.base_config, config)
    if data.base.new_tokens:  # Their rows make the LM head another one (loop/model/new_tokens.py).
        shape = replace(shape, head_trained=True)
    share = 1.0 if shape.t5 else ahead.share
    runs = [Run(shape, config, backend, ranks, share, size, on_gpu()) for size in ahead.sizes]
    return max(runs, key=lambda run: (sum(activations(run).values()), run.tokens))


def memory_rows(
    run: Run | None, unlike: str, ahead: Outlook, config: Config
) -> tuple[list[tuple[str, str]], float | None, list[str]]:
    """Return the estimate by part, its sum in bytes, and what is wrong with it."""
    if run is None:
        return [("each rank", f"not estimated: {unlike} --trial measures it.")], None, []
    parts = {name: size for name, size in memory(run).items() if size}
    if not on_gpu():
        parts.pop("cuBLAS workspace")
    total, room = sum(parts.values()), room_of_a_rank()
    device = "GPU" if on_gpu() else "main memory"
    lines = [["in main memory" if device == "main memory" else "on the GPU", "GiB"]]
    lines += [[name, gib(size)] for name, size in parts.items()]
    lines += [["at the peak", gib(total)]]
    rows = [("each rank", "\n".join(f" {line}" for line in table(lines).splitlines()))]
    how = f"of {run.size}, {100 * ahead.share:.0f} % learnt"
    rows.append(("reckoned for", f"the largest micro-batch of the first windows, {how}"))
    if host_memory(run):
        rows.append(("offloaded", f"{gib(host_memory(run))} GiB of main memory for each rank"))
    copy = 12 * run.adapter
    rows.append(("the first rank", f"{megabytes(copy)} of main memory more while it saves"))
    if sent(run):
        rows.append(("sent", f"{megabytes(sent(run))} by each rank, each step"))
    if total <= room:
        return rows, total, []
    remedies = ["--gradient_checkpointing True"] * (not config.gradient_checkpointing)
    remedies += ["a smaller --per_device_train_batch_size or --tokens_per_micro_batch"]
    remedies += ["--q_lora True"] * (not config.q_lora)
    remedies += ["accelerate_configs/zero3.yaml on more GPUs"] * (run.backend.stage != 3)
    return (
        rows,
        total,
        [
            f"memory: found {room / GIB:.1f} GiB of {device} that a rank may hold; the estimate "
            f"is {total / GIB:.1f} GiB. Give {', or '.join(remedies)}."
        ],
    )


def disk_rows(
    model: Model, data: TrainingData, layout: Layout, config: Config
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what the run leaves on the disk, what is there, and what is wrong with it."""
    output = Path(config.output_dir).expanduser()
    done, errors = 0, list[str]()
    state = "there already" if output.is_dir() else "new"
    try:
        facts = run_facts(config, data, layout.global_batch_size)
        found = find_checkpoint(config, facts, layout)
        done = found.step if found else 0
        if (output / storage.STATE).is_file():
            from loop.checkpoint.run_folder import (
                is_finished,  # here: it brings peft, which takes seconds
            )

            state = "holds this very run, finished" if is_finished(config) else "holds a run"
        state += f"; goes on from {found.folder.name}" if found else ""
    except UserError as error:
        errors.append(str(error))
        state += "; where to go on from: see below"
    rows_of_tokens = len(data.base.new_tokens) * getattr(model.base_config, "hidden_size", 0)
    parameters = model.trained(config) + 2 * rows_of_tokens  # embedding and LM head
    saves, keep = planned_saves(config, layout, done)
    needed, more, each = storage.room(output, parameters, saves, keep)
    needed += BESIDE + base_copy(config)
    free = free_room(config)
    if LEAST + base_copy(config) <= free < needed:  # less than that was told before
        errors.append(storage.too_little(output, free, needed, more, each))
    many = f"{more} checkpoint{'s' * (more != 1)} of {megabytes(each)}"
    rows = [
        ("output", f"{output}: {state}"),
        ("needed", f"{megabytes(needed)}: {many}, the adapter; free: {megabytes(free)}"),
    ]
    return rows, errors


def tracker_rows(config: Config) -> list[tuple[str, str]]:
    """Return where the run will be seen."""
    folder = Path(config.output_dir)
    told = {
        "none": f"none; {folder}/metrics.jsonl and training_curves.png, as ever",
        "tensorboard": f"tensorboard --logdir {folder}/tensorboard",
        "trackio": "trackio show",
        "wandb": "found a login",
    }
    if not has_wandb_login():
        told["wandb"] = "no login: kept offline, until wandb login and wandb sync"
    mode = os.environ.get("WANDB_MODE")
    told["wandb"] = f"as WANDB_MODE says: {mode}" if mode else told["wandb"]
    return [(kind, told[kind]) for kind in config.report_to]


def time_rows(
    trial: Trial | None, layout: Layout, ahead: Outlook, total: float | None
) -> list[tuple[str, str]]:
    """Return how long the run will take, by a trial."""
    if trial is None:
        return [("time", "not known: --trial runs three steps, with the model's weights")]
    seconds = ahead.tokens / trial.tokens_per_second
    rows = [
        (
            "a step",
            f"{duration(trial.step)}, {trial.tokens_per_second:,.0f} tokens/s over all ranks; "
            f"{duration(trial.startup)} until the first was done",
        ),
        ("the run", f"about {duration(seconds)}; evaluation and checkpoints not counted"),
    ]
    text = f"{trial.peak / GIB:.2f} GiB on the first rank"
    text += "" if on_gpu() else ", its libraries' GiB counted"
    text += "" if total is None else f"; estimated {total / GIB:.2f} GiB"
    return [*rows, ("peak memory", text)]
