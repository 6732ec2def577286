"""The output folder: its lock and settings, the check for a finished run, the final save."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, PartialState

from data.errors import UserError
from data.files.hashes import HASH_VERSION, file_sha256
from data.files.lock import LockHeld, locked
from loop.checkpoint.full_model import save_non_lora
from loop.checkpoint.storage import sync
from loop.config.flags import ADAPTER_FILES, Config, names_of
from loop.config.load import dump, with_current_names, with_new_flags
from loop.config.parser import TRUE
from loop.distributed.accelerator import raise_on_all_ranks
from loop.distributed.layout import Layout, global_batch_size
from loop.distributed.signals import LAUNCH_FILE, is_restart
from loop.inputs.training_data import TrainingData, data_sha256, data_sources
from loop.model import new_tokens
from loop.model.saving_check import saved_shapes
from loop.monitor.plots import draw_at_end
from loop.utils import save_adapter, trained_parameters, write_json

SETTINGS, STATE = "training_config.yaml", "trainer_state.json"
LOCK = ".lock"
GENERATION = "generation_config.json"  # in the format of transformers
LOCK_TIMEOUT = 5.0  # seconds that a killed run may take to exit


def is_finished(config: Config) -> bool:
    """Return whether the output folder holds this run and the run is finished.

    Raises UserError if the folder holds a finished run with other settings or data.
    """
    folder = Path(config.output_dir)
    if config.allow_resume_mismatch or config.resume_from_checkpoint.lower() not in TRUE:
        return False  # These flags request training, even after a finished run.
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # The folder holds no run, or an interrupted one.
    if not isinstance(state, dict) or not isinstance(settings, dict) or not state.get("finished"):
        return False
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        return False
    now = yaml.safe_load(dump(config))
    settings = with_new_flags(with_current_names(settings), now)
    for values in (settings, now):
        for name in names_of(finished_check="no"):
            values.pop(name, None)
        values |= {key: _resolved(values.get(key)) for key in names_of(finished_check="path")}
    settings |= {name: state.get(name) for name in ("data_sha256", "chat_template_sha256")}
    version = int(state.get("hash_version", 1))
    now |= {"data_sha256": data_sha256(config, version), "chat_template_sha256": _template(config)}
    if "data_sources" in state:  # Earlier versions did not record them.
        settings["data_sources"], now["data_sources"] = state["data_sources"], data_sources(config)
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
            f"({'; '.join(changed)}); expected the same. Give another --output_dir; or "
            "--allow_resume_mismatch to resume from its last checkpoint with the new settings."
        )
    return True


def _template(config: Config) -> str | None:
    file = config.chat_template
    return file_sha256(Path(file).expanduser()) if file else None


def _resolved(path: str | None) -> str | None:
    """Return an existing path as an absolute path; other values, such as hub names, unchanged."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


@contextmanager
def locked_output_dir(config: Config) -> Iterator[None]:
    """Create the output folder and hold its lock on rank 0 while the block runs.

    Every rank must enter this. Raises UserError if the folder cannot be written, or if another run
    holds the lock.
    """
    folder = Path(config.output_dir)
    is_new = not folder.exists()
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if is_main := PartialState().is_main_process:
                _lock(folder, stack)
                if not is_restart(folder):
                    _remove_stop(folder / "STOP")  # It was a request to an earlier run.
        try:
            yield
        finally:
            if is_main:
                with suppress(OSError):  # An error of the block is more important.
                    if is_new and {path.name for path in folder.iterdir()} <= {LOCK, LAUNCH_FILE}:
                        # The run wrote nothing else. The lock goes last: without it, another run
                        # may write its own files to the folder, which then stays.
                        (folder / LAUNCH_FILE).unlink(missing_ok=True)
                        (folder / LOCK).unlink()
                        folder.rmdir()


def _remove_stop(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be removed: {error.strerror}. Remove it.") from None


def _lock(folder: Path, stack: ExitStack) -> None:
    """Hold the folder's lock until the stack is closed; raises UserError."""
    try:
        has_lock = stack.enter_context(locked(folder / LOCK, LOCK_TIMEOUT))
    except LockHeld as holder:
        raise UserError(
            f"--output_dir {folder}: another run writes to it: {holder}. "
            "Wait for it, stop it (touch STOP in the folder), or give another folder."
        ) from None
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written: {error.strerror}. Give another folder."
        ) from None
    if not has_lock:
        print(f"note: {folder} cannot be locked; do not start a second run in it")


def write_settings(accelerator: Accelerator, config: Config) -> None:
    """Write training_config.yaml, and remove an earlier run's mark that it is finished."""
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        (folder / STATE).unlink(missing_ok=True)
        (folder / SETTINGS).write_text(dump(config), encoding="utf-8")


def save_run(
    accelerator: Accelerator,
    model: Any,
    data: TrainingData,
    result: dict[str, Any],
    layout: Layout,
    config: Config,
) -> None:
    """Write adapter, tokenizer and, last, trainer_state.json, which marks the run as finished."""
    folder = Path(config.output_dir)
    unwrapped = accelerator.unwrap_model(model)
    main = accelerator.is_main_process
    adapter = new_tokens.rows(unwrapped, trained_parameters(unwrapped, keep=main), keep=main)
    expected = saved_shapes(unwrapped)
    save_adapter(accelerator, unwrapped, adapter, expected, folder, config.save_safetensors)
    save_non_lora(accelerator, unwrapped, folder, config)
    if not main:
        return
    data.base.tokenizer.save_pretrained(folder)
    write_json(folder / GENERATION, {"eos_token_id": data.end_ids})
    for name in ADAPTER_FILES:  # The adapter must be on disk before the run is marked finished.
        if (folder / name).is_file():
            sync(folder / name)
    state = {
        "finished": True,
        "max_steps": layout.total_steps,
        "hash_version": HASH_VERSION,
        "data_sha256": data.sha256,
        "data_sources": data.source_sizes,
        "chat_template_sha256": _template(config),
        "global_batch_size": global_batch_size(config, accelerator.num_processes),
        **result,
    }
    write_json(folder / STATE, state)
    draw_at_end(folder)
