"""A run's last five lines: result, where it is, how to use it, how to resume, what it took."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.config.flags import ADAPTER_FILES, Config
from loop.config.parser import TRUE
from loop.monitor.formatting import duration

Entry = dict[str, Any]  # of the log


@dataclass(frozen=True)
class Spent:
    """What a run took: wall time in seconds, start-ups counted; tokens over all ranks.

    devices: GPUs over all ranks or, where there are none, cores.
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

    stopped: after a checkpoint at this step, before the last one; newest: a finished run's last
    checkpoint that is kept.
    """
    folder = Path(config.output_dir)
    talk = f"python -m loop chat --adapter {shlex.quote(str(folder))}"
    if stopped:
        place = f"{folder / f'checkpoint-{step}'}, whole; the run is not finished"
        talk = f"once it is finished: {talk}"
        on = how_to_go_on(config)
    else:
        file = next((name for name in ADAPTER_FILES if (folder / name).is_file()), ADAPTER_FILES[0])
        place = f"{folder / file}, opened again and checked"
        on = _how_to_train_on(config, newest, step, total)
    lines = {
        "result": _result(config, history, step, total),
        "saved": place,
        "use": talk,
        "resume": on,
        "cost": _cost(spent, config.cost_per_hour),
    }
    return "\n".join(f"{name + ':':7} {text}" for name, text in lines.items())


def how_to_go_on(config: Config) -> str:
    """Say how a run that was stopped goes on."""
    named = config.resume_from_checkpoint.lower() not in TRUE
    without = ", without --resume_from_checkpoint," if named else ""
    return f"the same command{without} goes on from there"


def _how_to_train_on(config: Config, newest: str | None, step: int, total: int) -> str:
    if newest is None:
        return (
            "no checkpoint was kept; a new run begins with this adapter by --lora_weight_path "
            f"{shlex.quote(config.output_dir)}"
        )
    if step < total:
        more = f"--early_stopping_patience {2 * (config.early_stopping_patience or 1)}"
    elif config.max_steps > 0:
        more = f"--max_steps {2 * total}"
    else:
        more = f"--num_train_epochs {2 * config.num_train_epochs:g}"
    return (
        "the same command finds it finished; it trains on, from "
        f"{newest}, with --allow_resume_mismatch {more}"
    )


def _result(config: Config, history: Sequence[Entry], step: int, total: int) -> str:
    trained = [entry for entry in history if "loss" in entry]
    text = f"{step} of {total} steps"
    if trained:
        first, last = trained[0], trained[-1]
        before = trained[-2]["step"] if len(trained) > 1 else 0
        over = f"steps {before + 1} to {last['step']}"
        if before + 1 == last["step"]:
            over = f"step {last['step']}"
        text += f"; loss {_shown(first['loss'])} (step {first['step']})"
        text += f" -> {_shown(last['loss'])} ({over})" if last is not first else ""
    evaluated = [entry for entry in history if entry.get("eval_loss") is not None]
    if evaluated:
        last, best = evaluated[-1], min(evaluated, key=lambda entry: float(entry["eval_loss"]))
        text += f"; eval loss {_shown(last['eval_loss'])}"
        if best["step"] != last["step"]:
            text += f", least {_shown(best['eval_loss'])} (step {best['step']})"
            text += ", which is saved" if config.load_best_model_at_end else ""
    return text


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _cost(spent: Spent, price: float | None) -> str:
    device_hours = spent.seconds * spent.devices / 3600
    unit = "GPU" if spent.on_gpus else "core"
    money = f" ({device_hours * price:,.2f} at {price:g} an hour)" if price else ""
    return (
        f"{duration(spent.seconds)}, {device_hours:,.3f} {unit}-hours{money}; "
        f"{spent.tokens:,} tokens, {spent.supervised_tokens:,} of them supervised"
    )
