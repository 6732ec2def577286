"""Forecasts a run: steps, memory by part, disk space, trackers and time."""

import os
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

from data.batching.balance import ExampleBatch, assign_micro_batches
from data.batching.shared_prefix import row_segments
from data.errors import UserError
from loop.checkpoint import storage
from loop.checkpoint.identity import run_facts
from loop.checkpoint.resume import find_checkpoint
from loop.checkpoint.saver import planned_saves
from loop.config.flags import Config
from loop.config.preflight import MIN_ADAPTER_BYTES, base_copy, free_room
from loop.distributed.layout import Layout
from loop.distributed.precision import on_gpu
from loop.doctor.launch import memory_per_rank
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

SAMPLED_WINDOWS = 256  # first windows, from which the tokens of the run are extrapolated
OTHER_OUTPUT_BYTES = 4 << 20  # tokenizer, settings and log in the output folder, approximately


@dataclass(frozen=True)
class TokenForecast:
    """Tokens of the run, estimated from its first windows.

    tokens: tokens of all steps. sizes: sizes of the first windows' micro-batches.
    supervised_share: supervised tokens as a share of all tokens.
    """

    tokens: float
    sizes: frozenset[Size]
    supervised_share: float


def forecast_tokens(data: TrainingData, layout: Layout, config: Config) -> TokenForecast:
    """Assign the first windows' micro-batches as training does, and extrapolate to all steps."""
    tokens = supervised = steps = 0
    sizes: set[Size] = set()
    for _, examples in islice(drawn(data.examples, layout, config.seed), SAMPLED_WINDOWS):
        assignment = assign_micro_batches(examples, layout.world_size, layout.limits)
        tokens += sum(example.run_tokens for example in examples)
        supervised += sum(example.supervised_tokens for example in examples)
        batches = [batch for rank in assignment.ranks for batch in rank]
        sizes |= {_size(batch, layout.limits.packed) for batch in batches}
        steps += 1
    return TokenForecast(tokens / steps * layout.total_steps, frozenset(sizes), supervised / tokens)


def _size(batch: ExampleBatch, packed: bool) -> Size:
    """Return the size of a micro-batch.

    A shared prefix counts once per segment, since its keys and values are kept for each of them.
    """
    part = batch.examples
    if packed:
        segments = row_segments(part, batch.shared or [0] * len(part))
        return Size(1, sum(shared + own for shared, own in segments))
    source, target = (max((e.lengths[side] for e in part), default=0) for side in range(2))
    return Size(len(part), source, target)


def step_rows(
    layout: Layout, forecast: TokenForecast, examples: int, config: Config
) -> list[tuple[str, str]]:
    """Return the batch arithmetic, the number of steps, and the curve of the learning rate."""
    batch, accumulation = layout.global_batch_size, layout.accumulation
    product = layout.world_size * accumulation * layout.micro_batch_size
    short = "" if product == batch else f" (room for {product})"
    step = (
        f"{batch} examples = {layout.world_size} rank{'s' * (layout.world_size > 1)} x "
        f"{accumulation} micro-batch{'es' * (accumulation > 1)} of at most "
        f"{layout.micro_batch_size} examples{short}"
    )
    tokens = layout.limits.tokens
    step += f" and {tokens:,} tokens, more micro-batches if needed" if tokens else ""
    left = examples % batch
    passes = layout.total_steps / layout.steps_per_epoch
    last = f", the last of {left}" if left else ""
    rates = [lr_at(step, layout.total_steps, config) for step in range(layout.total_steps)]
    warmup = sum(1 for a, b in pairwise(rates) if b > a)
    columns = max(6, min(WIDTH, layout.total_steps) - 5)
    axis = f" step 1{layout.total_steps:>{columns},}"
    top = f"{config.lr_scheduler_type}, {max(rates):.2e} at most, warm-up: {warmup} steps"
    return [
        ("a step", step),
        (
            "an epoch",
            f"{layout.steps_per_epoch:,} steps{last}: {examples:,} examples, each once",
        ),
        (
            "the run",
            f"{layout.total_steps:,} steps, {passes:.2f} epochs, {forecast.tokens:,.0f} tokens",
        ),
        ("learning rate", "\n".join([top, *curve(rates), axis])),
    ]


def batch_notes(layout: Layout, config: Config) -> list[str]:
    """Return notes on settings that are allowed but probably unintended."""
    notes = []
    if layout.global_batch_size < layout.world_size:
        notes.append(
            f"{layout.global_batch_size} examples per step leave "
            f"{layout.world_size - layout.global_batch_size} of {layout.world_size} ranks idle"
        )
    asked = config.global_batch_size or 0
    if asked > layout.global_batch_size:
        notes.append(f"--global_batch_size {asked} is larger than the data: a step is an epoch")
    if config.save_strategy == "steps" and config.save_steps > layout.total_steps > 1000:
        notes.append(f"--save_steps {config.save_steps}: the only checkpoint is the last step's")
    return notes


def largest_run(
    model: Model,
    data: TrainingData,
    backend: Backend,
    ranks: int,
    forecast: TokenForecast,
    config: Config,
) -> Run | None:
    """Return the run with the micro-batch that takes most memory; None without an estimate.

    For pairs, this may not be the micro-batch with most tokens, since attention's memory grows with
    the square of the length.
    """
    if model.no_estimate:
        return None
    shape = shape_of(model.bare, model.base_config, config)
    if data.base.new_tokens:  # the LM head has trained rows (loop/model/new_tokens.py)
        shape = replace(shape, head_trained=True)
    share = 1.0 if shape.t5 else forecast.supervised_share
    runs = [Run(shape, config, backend, ranks, share, size, on_gpu()) for size in forecast.sizes]
    return max(runs, key=lambda run: (sum(activations(run).values()), run.tokens))


def memory_rows(
    run: Run | None, no_estimate: str, forecast: TokenForecast, config: Config
) -> tuple[list[tuple[str, str]], float | None, list[str]]:
    """Return the estimate by part, its sum in bytes, and errors; no_estimate: reason for none."""
    if run is None:
        return [("each rank", f"not estimated: {no_estimate} --trial measures it.")], None, []
    parts = {name: size for name, size in memory(run).items() if size}
    if not on_gpu():
        parts.pop("cuBLAS workspace")
    total, room = sum(parts.values()), memory_per_rank()
    place = "on the GPU" if on_gpu() else "in main memory"
    lines = [[place, "GiB"]]
    lines += [[name, gib(size)] for name, size in parts.items()]
    lines += [["peak", gib(total)]]
    rows = [("each rank", "\n".join(f" {line}" for line in table(lines).splitlines()))]
    size = f"{run.size}, {100 * forecast.supervised_share:.0f} % supervised"
    rows.append(("assuming", f"the largest micro-batch of the first windows: {size}"))
    if host_memory(run):
        rows.append(("offloaded", f"{gib(host_memory(run))} GiB of main memory for each rank"))
    copy = 12 * run.adapter
    rows.append(("rank 0", f"{megabytes(copy)} of additional main memory during a save"))
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
            f"memory: found {room / GIB:.1f} GiB per rank {place}; the estimate is "
            f"{total / GIB:.1f} GiB. Give {', or '.join(remedies)}."
        ],
    )


def disk_rows(
    model: Model, data: TrainingData, layout: Layout, config: Config
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the state of the output folder, the disk space that the run needs, and errors."""
    output = Path(config.output_dir).expanduser()
    done, errors = 0, list[str]()
    state = "exists" if output.is_dir() else "new"
    try:
        facts = run_facts(config, data, layout.global_batch_size)
        checkpoint = find_checkpoint(config, data, facts, layout)
        done = checkpoint.step if checkpoint else 0
        if (output / storage.STATE).is_file():
            # Not at the top: it imports peft, which takes seconds.
            from loop.checkpoint.run_folder import is_finished

            state = "holds this run, finished" if is_finished(config) else "holds a run"
        state += f"; resumes from {checkpoint.folder.name}" if checkpoint else ""
    except UserError as error:
        errors.append(str(error))
        state += "; no checkpoint to resume from: see below"
    rows_of_tokens = len(data.base.new_tokens) * getattr(model.base_config, "hidden_size", 0)
    parameters = model.trained(config) + 2 * rows_of_tokens  # embedding and LM head
    saves, keep = planned_saves(config, layout, done)
    needed, more, each = storage.room(output, parameters, saves, keep)
    needed += OTHER_OUTPUT_BYTES + base_copy(config)
    free = free_room(config)
    if MIN_ADAPTER_BYTES + base_copy(config) <= free < needed:  # preflight reports even less
        errors.append(storage.too_little(output, free, needed, more, each))
    many = f"{more} checkpoint{'s' * (more != 1)} of {megabytes(each)}"
    rows = [
        ("output", f"{output}: {state}"),
        ("needed", f"{megabytes(needed)}: {many} and the adapter; free: {megabytes(free)}"),
    ]
    return rows, errors


def tracker_rows(config: Config) -> list[tuple[str, str]]:
    """Return where each tracker shows the run."""
    folder = Path(config.output_dir)
    places = {
        "none": f"none; {folder}/metrics.jsonl and training_curves.png in any case",
        "tensorboard": f"tensorboard --logdir {folder}/tensorboard",
        "trackio": "trackio show",
        "wandb": "found a login",
    }
    if not has_wandb_login():
        places["wandb"] = "no login: kept offline; upload it later with wandb login and wandb sync"
    mode = os.environ.get("WANDB_MODE")
    places["wandb"] = f"WANDB_MODE is {mode}" if mode else places["wandb"]
    return [(kind, places[kind]) for kind in config.report_to]


def time_rows(
    trial: Trial | None, layout: Layout, forecast: TokenForecast, total: float | None
) -> list[tuple[str, str]]:
    """Return the projected run time and the measured peak memory; total: the estimate in bytes."""
    if trial is None:
        return [("time", "not known; --trial measures it in three steps, with the model's weights")]
    seconds = forecast.tokens / trial.tokens_per_second
    rows = [
        (
            "a step",
            f"{duration(trial.step)}, {trial.tokens_per_second:,.0f} tokens/s over all ranks; "
            f"{duration(trial.startup)} until the end of step 1",
        ),
        ("the run", f"about {duration(seconds)}, without evaluation and checkpoints"),
    ]
    text = f"{trial.peak / GIB:.2f} GiB on rank 0"
    text += "" if on_gpu() else ", libraries included"
    text += "" if total is None else f"; estimated {total / GIB:.2f} GiB"
    return [*rows, ("peak memory", text)]
