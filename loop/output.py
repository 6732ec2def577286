"""The output folder: recognises a finished run, and leaves one."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from peft import PeftModel

from data.errors import UserError
from loop.config import ADAPTER_FILES, Config, dump
from loop.utils import save_adapter, write_json
from loop.windows import global_batch_size

SETTINGS, STATE = "training_config.yaml", "trainer_state.json"
PATHS = ("model_name_or_path", "data_path", "lora_weight_path", "cache_dir")


def is_finished(config: Config) -> bool:
    """Say whether the folder holds this very run, finished.

    Raises UserError where it holds a finished run with other settings or other data.
    """
    folder = Path(config.output_dir)
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # Nothing, or a run that was cut off.
    if not isinstance(state, dict) or not isinstance(settings, dict) or not state.get("finished"):
        return False
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        return False
    now = yaml.safe_load(dump(config))
    for values in (settings, now):
        values.pop("output_dir", None)  # However it was spelt, it is this folder.
        values |= {key: _resolved(values.get(key)) for key in PATHS}
    settings["data_sha256"] = state.get("data_sha256")
    now["data_sha256"] = fingerprint(config.data_file)
    settings["examples a step"] = state.get("global_batch_size")
    now["examples a step"] = global_batch_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    changed = [
        f"{key} was {settings.get(key)}, is {now.get(key)}"
        for key in {**settings, **now}
        if settings.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"--output_dir {folder}: found a finished run with other settings "
            f"({'; '.join(changed)}). Give another --output_dir, or remove the folder."
        )
    return True


def _resolved(path: str | None) -> str | None:
    """Return an existing path in one spelling; hub names stay as they are."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def claim_output(config: Config) -> None:
    """Make the folder, on the first rank, before the long work."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written: {error.strerror}. Give another folder."
        ) from None


def write_settings(accelerator: Accelerator, config: Config) -> None:
    """Write training_config.yaml, before the first step."""
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        (folder / STATE).unlink(missing_ok=True)
        (folder / SETTINGS).write_text(dump(config), encoding="utf-8")


def save_run(
    accelerator: Accelerator,
    model: PeftModel,
    tokenizer: Any,
    history: list[dict[str, Any]],
    config: Config,
    data_sha256: str,
) -> None:
    """Write adapter and tokenizer, and last trainer_state.json, by which the run is finished."""
    folder = Path(config.output_dir)
    save_adapter(accelerator, model, folder, config.save_safetensors)
    if not accelerator.is_main_process:
        return
    tokenizer.save_pretrained(folder)
    last = history[-1]
    state = {
        "finished": True,
        "global_step": last["step"],
        "max_steps": last["step"],
        "epoch": last["epoch"],
        "data_sha256": data_sha256,
        "global_batch_size": global_batch_size(config, accelerator.num_processes),
        "log_history": history,
    }
    write_json(folder / STATE, state)
    print(f"Saved and checked: {folder}. Talk to it: python -m loop chat --adapter {folder}")


def fingerprint(file: Path) -> str:
    """Return the SHA-256 of a file; raises UserError where it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
