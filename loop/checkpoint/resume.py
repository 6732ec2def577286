"""Finds the point where a run starts: step 0, or a checkpoint chosen by rank 0."""

import datetime
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from data.errors import UserError
from loop.checkpoint import storage
from loop.checkpoint.identity import VERSION_FACT, hash_facts, run_facts
from loop.checkpoint.storage import Checkpoint, CorruptCheckpoint
from loop.config.flags import Config
from loop.config.load import with_current_names, with_new_flags
from loop.config.parser import FALSE, TRUE
from loop.distributed import optimizer_state
from loop.distributed.accelerator import raise_on_all_ranks
from loop.distributed.layout import Layout
from loop.distributed.signals import is_restart, record_launch
from loop.inputs.training_data import TrainingData
from loop.monitor.history import PriorRun
from loop.utils import Tensors, file_name, shapes

FRESH: dict[str, Any] = {"step": 0}


@dataclass
class ResumePoint:
    """The point where a run starts; `agree` makes it the same on every rank.

    facts: determine the result (rank 0 only). folder: the checkpoint's (rank 0 only). progress: the
    content of progress.json; step 0 for a fresh run. parameters: number of trained parameters.
    """

    facts: dict[str, Any]
    folder: Path | None = None
    progress: dict[str, Any] = field(default_factory=lambda: dict(FRESH))
    resumed: bool = False
    parameters: int = 0

    @property
    def step(self) -> int:
        """Optimizer steps done before this launch."""
        return int(self.progress["step"])

    @property
    def log(self) -> Path | None:
        """The log of the run that wrote the checkpoint."""
        return self.folder.parent / storage.LOG if self.folder else None

    @property
    def prior(self) -> PriorRun:
        """The part of the run before this launch."""
        return PriorRun(self.step, self.progress, self.log)

    def agree(self) -> None:
        """Broadcast rank 0's progress; every rank must call this."""
        self.progress, resumed = broadcast_object_list([self.progress, self.folder is not None])
        self.resumed = bool(resumed)

    def put_weights(self, accelerator: Accelerator, model: Any) -> None:
        """Load the checkpoint's adapter; every rank must call this, before `accelerator.prepare`.

        Raises UserError if the shapes of the checkpoint and the model differ.
        """
        expected = shapes(model)
        self.parameters = sum(math.prod(shape) for shape in expected.values())
        if not self.resumed:
            return
        self.adapter = self._broadcast(accelerator, storage.ADAPTER)
        found = {name: tuple(tensor.shape) for name, tensor in self.adapter.items()}
        with raise_on_all_ranks():
            wrong = [
                name for name in {**expected, **found} if expected.get(name) != found.get(name)
            ]
            if wrong:
                name = min(wrong)
                raise UserError(
                    f"the checkpoint's adapter has {name} {found.get(name)}, the model "
                    f"{expected.get(name)}; expected the same shapes. Give the checkpoint's LoRA "
                    "settings, or --resume_from_checkpoint False."
                )
        optimizer_state.put_weights(model, self.adapter)

    def put_optimizer(self, accelerator: Accelerator, model: Any, optimizer: Any) -> None:
        """Load the optimizer's state; every rank must call this, after `accelerator.prepare`."""
        optimizer_state.freeze_ddp_buckets(model)
        optimizer_state.create_moments(optimizer)
        if not self.resumed:
            return
        moments = self._broadcast(accelerator, storage.OPTIMIZER)
        model = accelerator.unwrap_model(model)
        optimizer_state.load_optimizer_state(model, optimizer, self.adapter, moments)
        if self.progress["loss_scale"]:
            optimizer_state.put_loss_scale(accelerator, optimizer, self.progress["loss_scale"])
        del self.adapter

    def _broadcast(self, accelerator: Accelerator, name: str) -> Tensors:
        tensors = load_file(self.folder / name) if self.folder else {}
        # Older checkpoints have other names for DoRA's magnitudes and modules trained whole.
        tensors = {file_name(key): tensor for key, tensor in tensors.items()}
        return optimizer_state.broadcast_tensors(tensors, accelerator.device)


def find_resume_point(
    config: Config, data: TrainingData, layout: Layout, reads: bool
) -> ResumePoint:
    """Return the newest valid checkpoint's resume point, or step 0; only rank 0 `reads`.

    Checkpoints in the output folder that the run does not continue are moved to discarded-<time>.
    Raises UserError if all checkpoints are corrupt, or if data or settings differ.
    """
    if not reads:
        return ResumePoint({})
    point = ResumePoint(run_facts(config, data, layout.global_batch_size))
    output = Path(config.output_dir)
    own = storage.list_folders(output)
    checkpoint = find_checkpoint(config, data, point.facts, layout)
    if checkpoint:
        point.folder, point.progress = checkpoint.folder, checkpoint.progress()
        print(f"resume: {checkpoint.folder}, after step {checkpoint.step} of {layout.total_steps}")
    is_own = checkpoint and checkpoint.folder.parent.resolve() == output.resolve()
    _set_aside([folder for folder in own if not (is_own and storage.number(folder) <= point.step)])
    record_launch(output)
    return point


def find_checkpoint(
    config: Config, data: TrainingData, facts: dict[str, Any], layout: Layout
) -> Checkpoint | None:
    """Return the checkpoint to resume from, None for step 0; changes no files.

    Raises UserError if all checkpoints are corrupt, or if data or settings differ.
    """
    output, flag = Path(config.output_dir), config.resume_from_checkpoint
    folders = own = storage.list_folders(output)
    restarted = is_restart(output)
    if flag.lower() in FALSE:
        folders = own if restarted else []
    elif flag.lower() not in TRUE:
        folders = _named(Path(flag).expanduser().resolve())
        if restarted:  # Prefer newer checkpoints that this command has saved.
            newest = storage.number(folders[0])
            folders = [folder for folder in own if storage.number(folder) > newest] or folders
    checkpoint = _newest_valid(folders)
    if checkpoint:
        if VERSION_FACT not in checkpoint.manifest["facts"]:
            facts = {**facts, **hash_facts(config, data, hash_version=1)}
            del facts[VERSION_FACT]
        _check_facts(checkpoint, facts, config, layout)
    return checkpoint


def _named(folder: Path) -> list[Path]:
    if (folder / storage.MANIFEST).is_file():
        return [folder]
    folders = storage.list_folders(folder)
    if not folders:
        raise UserError(
            f"--resume_from_checkpoint {folder}: found no checkpoint; expected a folder "
            "checkpoint-<step>, or one that contains such folders. Or give True or False."
        )
    return folders


def _newest_valid(folders: list[Path]) -> Checkpoint | None:
    """Return the first checkpoint that passes verification; None without folders.

    folders: the newest first. Raises UserError if all are corrupt.
    """
    corrupt: list[str] = []
    for folder in folders:
        try:
            checkpoint = storage.verify(folder)
        except CorruptCheckpoint as error:
            corrupt.append(f"{folder}: corrupt: {error}")
            continue
        for text in corrupt:
            print(f"note: {text}; resuming from an older one")
        return checkpoint
    if corrupt:
        raise UserError(
            f"{'; '.join(corrupt)}. Found no valid checkpoint. Give --resume_from_checkpoint False "
            "to start at step 0; the checkpoints are then moved aside."
        )
    return None


def _check_facts(
    checkpoint: Checkpoint, facts: dict[str, Any], config: Config, layout: Layout
) -> None:
    old = with_new_flags(with_current_names(checkpoint.manifest["facts"]), facts)
    if checkpoint.step > layout.total_steps:
        raise UserError(
            f"{checkpoint.folder}: found {checkpoint.step} steps done; expected at most the "
            f"{layout.total_steps} of this run. Give a larger --max_steps, or an older checkpoint."
        )
    # A checkpoint that was saved before a fact was recorded says nothing about it.
    known = {name: value for name, value in facts.items() if name in old or name[:2] == "--"}
    changed = [
        f"{name} was {_short(old.get(name))}, is {_short(known.get(name))}"
        for name in {**old, **known}
        if old.get(name) != known.get(name)
    ]
    if changed and config.allow_resume_mismatch:
        for line in changed:
            print(f"note: {line}; resuming at step {checkpoint.step} (--allow_resume_mismatch)")
    elif changed:
        batch = old.get("examples a step")
        split = _splits(batch, layout) if batch != layout.global_batch_size else ""
        raise UserError(
            f"{checkpoint.folder}: other data or settings: {'; '.join(changed)}; expected the "
            f"same. {split}Restore them; or give --allow_resume_mismatch to resume with the new "
            "ones, --resume_from_checkpoint False to start at step 0, or another --output_dir."
        )


def _splits(batch: Any, layout: Layout) -> str:
    """Return the flags that give the checkpoint's global batch on this number of ranks."""
    each, left = divmod(int(batch), layout.world_size)
    even = [] if left else [size for size in range(1, each + 1) if each % size == 0]
    words = [
        f"--per_device_train_batch_size {size} --gradient_accumulation_steps {each // size}"
        for size in even
        if size <= max(8, layout.micro_batch_size)
    ]
    ways = ", or ".join([f"--global_batch_size {batch}", *words[::-1][:3]])
    return f"{batch} examples a step on {layout.world_size} rank(s): {ways}. "


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def _set_aside(stale: list[Path]) -> None:
    """Move checkpoints that the run does not continue to discarded-<time>, with their log."""
    if not stale:
        return
    output = stale[0].parent
    aside = output / f"discarded-{datetime.datetime.now():%Y%m%d-%H%M%S.%f}"
    aside.mkdir()
    for folder in stale:
        folder.rename(aside / folder.name)
    if (output / storage.LOG).is_file():
        shutil.copy2(output / storage.LOG, aside)
    print(f"note: {len(stale)} checkpoints that this run does not continue are now in {aside}")
