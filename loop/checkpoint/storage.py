"""Checkpoints on disk: written atomically, verified by SHA-256, pruned.

`checkpoint-<step>/` holds the adapter in peft's format, AdamW's moments and the run's progress. No
file is a pickle. `manifest.json` is written last, with size and SHA-256 of every other file.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.errors import RunError, UserError

FORMAT = 1
MANIFEST, PROGRESS, STATE = "manifest.json", "progress.json", "trainer_state.json"
ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"
FILES = {ADAPTER, OPTIMIZER, PROGRESS, STATE, "adapter_config.json"}
LOG = "metrics.jsonl"
SMALL = 1 << 20  # maximum bytes of the files without tensors


class CorruptCheckpoint(Exception):
    """A checkpoint whose files differ from its manifest."""


@dataclass(frozen=True)
class Snapshot:
    """A run's state after a step, in host memory.

    adapter: fp32 tensors on the CPU, by peft's names. moments: the same, by `exp_avg.<name>` and
    so on. progress: the state of the loop and the log. manifest: facts that a resumed run must
    share.
    """

    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    adapter_config: dict[str, Any]
    progress: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; its files are read on demand."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])

    def progress(self) -> dict[str, Any]:
        """Return the state of the loop and the log."""
        progress: dict[str, Any] = json.loads((self.folder / PROGRESS).read_bytes())
        return progress


def write(output: Path, snapshot: Snapshot, keep: int | None, best: int | None = None) -> None:
    """Write `checkpoint-<step>` durably, then remove all but the newest `keep` and the best.

    best: the step of the best checkpoint. Raises RunError if a weight is not finite or a write
    fails; older checkpoints stay unchanged then.
    """
    step = snapshot.progress["step"]
    infinite = [name for name, tensor in snapshot.adapter.items() if not tensor.isfinite().all()]
    if infinite:
        raise RunError(
            f"step {step}: {infinite[0]} is not finite, so no checkpoint is written. Older "
            "checkpoints are intact. Lower the learning rate, or train in bf16 or fp32."
        )
    final, partial = folder_of(output, step), output / f".checkpoint-{step}.partial"
    progress = snapshot.progress
    # transformers' trainer_state.json without its log, which metrics.jsonl holds.
    state = {"global_step": step, "epoch": progress["epoch"], "max_steps": progress["max_steps"]}
    texts = {"adapter_config.json": snapshot.adapter_config, PROGRESS: progress, STATE: state}
    manifest = {"format": FORMAT, "step": step, **snapshot.manifest}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(snapshot.adapter, partial / ADAPTER, {"format": "pt"})
        save_file(snapshot.moments, partial / OPTIMIZER, {"format": "pt"})
        for name, text in texts.items():
            _write(partial / name, text)
        for name in FILES:
            sync(partial / name)
        manifest["files"] = {name: _size_and_hash(partial / name) for name in sorted(FILES)}
        manifest["manifest_sha256"] = _own_sha256(manifest)
        if (output / LOG).is_file():
            sync(output / LOG)  # The log must be as durable as the checkpoint.
        _write(partial / MANIFEST, manifest)
        sync(partial / MANIFEST)
        sync(partial)
        if final.exists() or final.is_symlink():  # Invalid, or the run would have resumed from it.
            remove(final)
        partial.rename(final)
        sync(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"{final}: cannot be written: {getattr(error, 'strerror', None) or error}. Older "
            "checkpoints are intact. Free disk space (--save_total_limit keeps fewer), then run "
            "the same command again."
        ) from error
    prune(output, step, keep, best)


def prune(output: Path, step: int, keep: int | None, best: int | None = None) -> None:
    """Of the checkpoints up to `step`, remove all but the newest `keep` and the one of step `best`.

    Also removes partial checkpoints of killed runs. Raises RunError if a removal fails.
    """
    older = [folder for folder in list_folders(output) if number(folder) <= step]
    try:
        for folder in older[keep:] if keep else []:
            if number(folder) != best:
                remove(folder)
    except OSError as error:
        raise RunError(
            f"{error.filename}: cannot be removed: {error.strerror}. checkpoint-{step} is intact."
        ) from error
    for partial in output.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint. The manifest goes first, so a partly removed checkpoint is invalid."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()  # Removes a link, but not its target, which may not belong to this run.
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def list_folders(output: Path) -> list[Path]:
    """Return the folders named checkpoint-<step>, the newest first."""
    named = (path for path in output.glob("checkpoint-*") if path.is_dir())
    return sorted((path for path in named if number(path) >= 0), key=number, reverse=True)


def newest_checkpoint(output: Path) -> str | None:
    """Return the name of the newest checkpoint in a run's output folder, or None."""
    folders = list_folders(output)
    return folders[0].name if folders else None


def folder_of(output: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return output / f"checkpoint-{step}"


def number(folder: Path) -> int:
    """Return the step in a checkpoint folder's name; -1 for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def verify(folder: Path) -> Checkpoint:
    """Return a folder's checkpoint after its files are compared with the manifest's hashes.

    Raises CorruptCheckpoint if a file is missing or altered, UserError for a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        claimed, version = manifest["manifest_sha256"], manifest["format"]
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(
            f"{MANIFEST} is missing or unreadable ({type(error).__name__})"
        ) from None
    if isinstance(version, int) and version > FORMAT and claimed == _own_sha256(manifest):
        raise UserError(
            f"{folder}: written in format {version} by a newer LoRA Loop; this one reads up to "
            f"{FORMAT}. Update, or give --resume_from_checkpoint False."
        )
    if claimed != _own_sha256(manifest):
        raise CorruptCheckpoint(f"{MANIFEST} was altered")
    if number(folder) not in (-1, manifest["step"]):
        raise CorruptCheckpoint(f"the folder was renamed from checkpoint-{manifest['step']}")
    if lacking := FILES - {*files}:
        raise CorruptCheckpoint(f"{MANIFEST} does not list {', '.join(sorted(lacking))}")
    for name, expected in files.items():
        try:
            found = _size_and_hash(folder / name)
        except OSError as error:
            raise CorruptCheckpoint(f"{name}: {error.strerror}") from None
        if found != expected:
            raise CorruptCheckpoint(
                f"{name}: found {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}; expected "
                f"{expected['bytes']}, {expected['sha256'][:12]}"
            )
    return Checkpoint(folder, manifest)


def check_room(output: Path, parameters: int, saves: int, keep: int | None) -> None:
    """Raise UserError if the disk lacks space for the run's checkpoints and adapter."""
    needed, more, each = room(output, parameters, saves, keep)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(too_little(output, free, needed, more, each))


def room(output: Path, parameters: int, saves: int, keep: int | None) -> tuple[int, int, int]:
    """Return the maximum bytes and checkpoints that a run adds, and the bytes of a checkpoint.

    saves: checkpoints that the run writes. keep: checkpoints kept at a time; None: all.
    """
    each = 12 * parameters + SMALL  # fp32: weights and two moments
    existing = len(list_folders(output))
    # A new checkpoint is complete before the oldest is removed, so for a moment there is one more.
    most = min(existing + saves, max(keep, existing) + 1) if keep else existing + saves
    more = most - existing
    return each * more + 4 * parameters + SMALL, more, each


def too_little(output: Path, free: int, needed: int, more: int, each: int) -> str:
    """Return the error for a full disk. more: number of checkpoints; other numbers: bytes."""
    limit = f"; --save_total_limit {max(1, free // each - 2)}" if more > 1 else ""
    return (
        f"--output_dir {output}: found {free / 1e6:,.0f} MB free; expected "
        f"{needed / 1e6:,.0f} MB for {more} checkpoints of {each / 1e6:,.1f} MB and the "
        f"adapter. Free disk space, save less often (--save_steps){limit}, or give another folder."
    )


def _write(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"  # NaN is allowed, since the loop reports it.
    file.write_text(text, encoding="utf-8")


def _size_and_hash(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": sha256}


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
