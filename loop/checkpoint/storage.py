"""Checkpoints on disk: written whole or not at all, proved by their hashes, pruned.

`checkpoint-<step>/` holds the adapter as peft loads it, AdamW's moments and the run's progress; no
file in it is a pickle. `manifest.json` comes last and names size and SHA-256 of every other file.
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
SMALL = 1 << 20  # bytes: what a checkpoint holds beside tensors is less


class CorruptCheckpoint(Exception):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Snapshot:
    """A run after a step, in host memory.

    adapter, moments: fp32 tensors on the CPU, by peft's names and `exp_avg.<name>`.
    progress: what the loop and the log need to go on. manifest: what must not have changed.
    """

    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    adapter_config: dict[str, Any]
    progress: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole; its files are read when they are asked for."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])

    def progress(self) -> dict[str, Any]:
        """Return what the loop and the log need to go on."""
        read: dict[str, Any] = json.loads((self.folder / PROGRESS).read_bytes())
        return read


def write(output: Path, snapshot: Snapshot, keep: int | None, best: int | None = None) -> None:
    """Write `checkpoint-<step>` durably, then remove older ones but for `keep` and the best.

    Raises Fault for weights that are not finite, and where the disk does not take them; what is
    older is left as it was.
    """
    step = snapshot.progress["step"]
    infinite = [name for name, tensor in snapshot.adapter.items() if not tensor.isfinite().all()]
    if infinite:
        raise RunError(
            f"step {step}: {infinite[0]} is not finite: not saved. Older checkpoints are "
            "whole. Lower the learning rate, or train in bf16 or fp32."
        )
    final, partial = folder_of(output, step), output / f".checkpoint-{step}.partial"
    progress = snapshot.progress
    # transformers' file of this name, less the log, which is kept once, in metrics.jsonl.
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
        manifest["files"] = {name: _described(partial / name) for name in sorted(FILES)}
        manifest["manifest_sha256"] = _own_sha256(manifest)
        if (output / LOG).is_file():
            sync(output / LOG)  # A checkpoint must not outlast the log that leads to it.
        _write(partial / MANIFEST, manifest)
        sync(partial / MANIFEST)
        sync(partial)
        if final.exists() or final.is_symlink():  # whatever it is, no run took it for whole
            remove(final)
        partial.rename(final)
        sync(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"{final}: cannot be written: {getattr(error, 'strerror', None) or error}. Older "
            "checkpoints are whole. Make room (--save_total_limit keeps fewer), then run the same "
            "command again."
        ) from error
    prune(output, step, keep, best)


def prune(output: Path, step: int, keep: int | None, best: int | None = None) -> None:
    """Of the checkpoints up to this step keep the newest and that of step `best`.

    What a kill left half written is removed. Raises Fault where one cannot be.
    """
    older = [folder for folder in list_folders(output) if number(folder) <= step]
    try:
        for folder in older[keep:] if keep else []:
            if number(folder) != best:
                remove(folder)
    except OSError as error:
        raise RunError(
            f"{error.filename}: cannot be removed: {error.strerror}. checkpoint-{step} is whole."
        ) from error
    for partial in output.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed has no manifest and is not taken for whole."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()  # What a link leads to belongs to somebody else.
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def list_folders(output: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, the newest first."""
    named = (path for path in output.glob("checkpoint-*") if path.is_dir())
    return sorted((path for path in named if number(path) >= 0), key=number, reverse=True)


def newest_checkpoint(output: Path) -> str | None:
    """Return the name of the newest checkpoint in a run's output folder, if there is one."""
    folders = list_folders(output)
    return folders[0].name if folders else None


def folder_of(output: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return output / f"checkpoint-{step}"


def number(folder: Path) -> int:
    """Return the step that a folder is named after; -1: it has another name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def verify(folder: Path) -> Checkpoint:
    """Return the checkpoint after hashing every file of it.

    Raises CorruptCheckpoint where a file is missing or altered, UserError for a newer format.
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
        raise CorruptCheckpoint(f"renamed, it is checkpoint-{manifest['step']}")
    if lacking := FILES - {*files}:
        raise CorruptCheckpoint(f"{MANIFEST} does not name {', '.join(sorted(lacking))}")
    for name, expected in files.items():
        try:
            found = _described(folder / name)
        except OSError as error:
            raise CorruptCheckpoint(f"{name}: {error.strerror}") from None
        if found != expected:
            raise CorruptCheckpoint(
                f"{name}: found {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}; expected "
                f"{expected['bytes']}, {expected['sha256'][:12]}"
            )
    return Checkpoint(folder, manifest)


def check_room(output: Path, parameters: int, saves: int, keep: int | None) -> None:
    """Raise UserError where the disk has no room for the run's checkpoints and adapter."""
    needed, more, each = room(output, parameters, saves, keep)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(too_little(output, free, needed, more, each))


def room(output: Path, parameters: int, saves: int, keep: int | None) -> tuple[int, int, int]:
    """Return the bytes that a run will write, its checkpoints, and the bytes of one of them.

    Only as many checkpoints count as there will be more than now, all at a time.
    """
    each = 12 * parameters + SMALL  # fp32: weights and two moments
    there = len(list_folders(output))
    # The new one is whole before the oldest is removed; those at hand make room for later ones.
    most = min(there + saves, max(keep, there) + 1) if keep else there + saves
    more = most - there
    return each * more + 4 * parameters + SMALL, more, each


def too_little(output: Path, free: int, needed: int, more: int, each: int) -> str:
    """Say that a disk has no room for so many checkpoints and the adapter (bytes)."""
    limit = f"; --save_total_limit {max(1, free // each - 2)}" if more > 1 else ""
    return (
        f"--output_dir {output}: found {free / 1e6:,.0f} MB free; expected "
        f"{needed / 1e6:,.0f} MB for {more} checkpoints of {each / 1e6:,.1f} MB and the "
        f"adapter. Free some, save less often (--save_steps){limit}, or give another folder."
    )


def _write(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"  # A loss that is not finite is the loop's to tell.
    file.write_text(text, encoding="utf-8")


def _described(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": sha256}


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
