"""Formats a run's last five lines: result, saved, use, resume, cost."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.config.flags import ADAPTER_FILES, Config
from loop.config.parser import TRUE
from loop.monitor.formatting import duration, loss_text

Entry = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Spent:
    """The cost of a run: wall time in seconds, start-ups included; tokens over all ranks.

    devices: GPUs over all ranks, or cores if there is no GPU.
    """

    seconds: float
    tokens: int
    supervised_tokens: int
    devices: int
    on_gpus: bool


def summary(
    config: Config,
    history: Sequence[Entry],
    step: int,
    total: int,
    spent: Spent,
    stopped: bool,
    newest: str | None = None,
) -> str:
    """Return the five lines.

    step, total: steps done and planned. stopped: the run stopped early, with a checkpoint at
    `step`. newest: the name of a finished run's newest checkpoint.
    """
    folder = Path(config.output_dir)
    chat = f"python -m loop chat --adapter {shlex.quote(str(folder))}"
    if stopped:
        saved = f"{folder / f'checkpoint-{step}'}, complete; the run is not finished"
        chat = f"once the run is finished: {chat}"
        resume = how_to_resume(config)
    else:
        file = next((name for name in ADAPTER_FILES if (folder / name).is_file()), ADAPTER_FILES[0])
        saved = f"{folder / file}, reloaded and checked"
        resume = _how_to_train_longer(config, newest, step, total)
    lines = {
        "result": _result(config, history, step, total),
        "saved": saved,
        "use": chat,
        "resume": resume,
        "cost": _cost(spent, config.cost_per_hour),
    }
    return "\n".join(f"{name + ':':7} {text}" for name, text in lines.items())


def how_to_resume(config: Config) -> str:
    """Return how to resume a stopped run."""
    named = config.resume_from_checkpoint.lower() not in TRUE
    without = ", without --resume_from_checkpoint," if named else ""
    return f"the same command{without} resumes from this checkpoint"


def _how_to_train_longer(config: Config, newest: str | None, step: int, total: int) -> str:
    if newest is None:
        return (
            "no checkpoint was kept; a new run starts from this adapter with --lora_weight_path "
            f"{shlex.quote(config.output_dir)}"
        )
    if step < total:
        more = f"--early_stopping_patience {2 * (config.early_stopping_patience or 1)}"
    elif config.max_steps > 0:
        more = f"--max_steps {2 * total}"
    else:
        more = f"--num_train_epochs {2 * config.num_train_epochs:g}"
    return (
        f"the run is finished; to train longer from {newest}, repeat the command with "
        f"--allow_resume_mismatch {more}"
    )


def _result(config: Config, history: Sequence[Entry], step: int, total: int) -> str:
    losses = [entry for entry in history if "loss" in entry]
    text = f"{step} of {total} steps"
    if losses:
        first, last = losses[0], losses[-1]
        before = losses[-2]["step"] if len(losses) > 1 else 0
        steps = f"steps {before + 1} to {last['step']}"
        if before + 1 == last["step"]:
            steps = f"step {last['step']}"
        text += f"; loss {loss_text(first['loss'])} (step {first['step']})"
        text += f" -> {loss_text(last['loss'])} ({steps})" if last is not first else ""
    evaluated = [entry for entry in history if entry.get("eval_loss") is not None]
    if evaluated:
        last, best = evaluated[-1], min(evaluated, key=lambda entry: float(entry["eval_loss"]))
        text += f"; eval loss {loss_text(last['eval_loss'])}"
        if best["step"] != last["step"]:
            text += f", lowest {loss_text(best['eval_loss'])} (step {best['step']})"
            text += ", which is saved" if config.load_best_model_at_end else ""
    return text


def _cost(spent: Spent, price: float | None) -> str:
    device_hours = spent.seconds * spent.devices / 3600
    unit = "GPU" if spent.on_gpus else "core"
    money = f" ({device_hours * price:,.2f} at {price:g} an hour)" if price else ""
    return (
        f"{duration(spent.seconds)}, {device_hours:,.3f} {unit}-hours{money}; "
        f"{spent.tokens:,} tokens, {spent.supervised_tokens:,} of them supervised"
    )
