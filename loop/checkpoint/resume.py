"""Where a run begins: afresh, or after a checkpoint that the first rank chooses for all."""

import dataclasses
import datetime
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers.utils import cached_file

from data.errors import UserError
from loop.checkpoint import storage
from loop.checkpoint.storage import Checkpoint, CorruptCheckpoint
from loop.config.flags import Config, names_of
from loop.config.load import with_current_names
from loop.config.parser import FALSE, TRUE
from loop.distributed import optimizer_state
from loop.distributed.accelerator import raise_on_all_ranks
from loop.distributed.layout import Layout
from loop.distributed.signals import is_restart, record_launch
from loop.inputs.training_data import TrainingData
from loop.model.base import tokenizer_sha256
from loop.monitor.history import Progress
from loop.utils import Tensors, shapes

SAMPLE = 1 << 16  # bytes


def run_facts(config: Config, data: TrainingData, global_batch_size: int) -> dict[str, Any]:
    """Return the facts that decide what is trained, each with a name that a person can mend."""
    template = data.base.tokenizer.chat_template if data.base.template == "chat" else ""
    return {
        "data (SHA-256)": data.sha256,
        "base model (sampled SHA-256)": _weights(data.base.name, "config.json", config),
        "--lora_weight_path (sampled SHA-256)": config.lora_weight_path
        and _weights(config.lora_weight_path, "adapter_config.json", config),
        "tokenizer (SHA-256)": tokenizer_sha256(data.base.tokenizer),
        "template": f"{data.base.template} {_sha256(str(template))[:12]}",
        "examples": len(data.examples),
        "examples a step": global_batch_size,
        **{f"--{name}": value for name, value in _plain(_result_settings(config)).items()},
    }


def _result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide what is trained, however the work is split."""
    names = {*names_of(affects="encoding"), *names_of(affects="result")}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k in names}
    return {"precision": config.precision, **settings}


def _weights(base: str, settings: str, config: Config) -> str:
    """Hash the settings' file, and of each weights file its size, beginning, middle and end.

    Reading all of it would take minutes for a large model; another model of the same shape
    differs in every sample. The hub's models are known by their commit.
    """
    folder, hub = Path(base), {"cache_dir": config.cache_dir}
    if not folder.is_dir():
        return f"{base} {Path(str(cached_file(base, settings, **hub))).parent.name}"
    digest = hashlib.sha256((folder / settings).read_bytes())
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    weights = [file for pattern in patterns for file in folder.glob(pattern)]
    for file in sorted(weights):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for start in (0, size // 2, max(0, size - SAMPLE)):
                opened.seek(start)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


FRESH: dict[str, Any] = {"step": 0}


@dataclass
class ResumePoint:
    """A run's beginning, the same on every rank.

    progress: what a checkpoint's progress.json holds; of a fresh run, step 0 alone.
    facts: what the run is made of; on the first rank only, which writes them.
    """

    facts: dict[str, Any]
    folder: Path | None = None
    progress: dict[str, Any] = field(default_factory=lambda: dict(FRESH))
    resumed: bool = False
    parameters: int = 0  # trained ones

    @property
    def step(self) -> int:
        """Steps done before this run."""
        return int(self.progress["step"])

    @property
    def log(self) -> Path | None:
        """The log that the checkpoint's run has left."""
        return self.folder.parent / storage.LOG if self.folder else None

    @property
    def so_far(self) -> Progress:
        """What monitors go on from."""
        return Progress(self.step, self.progress, self.log)

    def agree(self) -> None:
        """Take the first rank's progress; every rank must call this."""
        self.progress, resumed = broadcast_object_list([self.progress, self.folder is not None])
        self.resumed = bool(resumed)

    def put_weights(self, accelerator: Accelerator, model: Any) -> None:
        """Put the checkpoint's adapter into the model; before `prepare`, and on every rank.

        Raises UserError where the adapter has another shape than the model's.
        """
        expected = shapes(model)
        self.parameters = sum(math.prod(shape) for shape in expected.values())
        if not self.resumed:
            return
        self.adapter = self._sent(accelerator, storage.ADAPTER)
        found = {name: tuple(tensor.shape) for name, tensor in self.adapter.items()}
        with raise_on_all_ranks():
            wrong = [
                name for name in {**expected, **found} if expected.get(name) != found.get(name)
            ]
            if wrong:
                name = min(wrong)
                raise UserError(
                    f"the checkpoint's adapter has {name} {found.get(name)}, the model "
                    f"{expected.get(name)}; expected the same shapes, which no flag can change. "
                    "Give LoRA's settings as they were, or --resume_from_checkpoint False."
                )
        optimizer_state.put_weights(model, self.adapter)

    def put_optimizer(self, accelerator: Accelerator, model: Any, optimizer: Any) -> None:
        """Put moments, step count and master weights back; after `prepare`, and on every rank."""
        optimizer_state.freeze_ddp_buckets(model)
        optimizer_state.create_moments(optimizer)
        if not self.resumed:
            return
        moments = self._sent(accelerator, storage.OPTIMIZER)
        model = accelerator.unwrap_model(model)
        optimizer_state.load_optimizer_state(model, optimizer, self.adapter, moments)
        if self.progress["loss_scale"]:
            optimizer_state.put_loss_scale(accelerator, optimizer, self.progress["loss_scale"])
        del self.adapter

    def _sent(self, accelerator: Accelerator, name: str) -> Tensors:
        tensors = load_file(self.folder / name) if self.folder else {}
        return optimizer_state.broadcast_tensors(tensors, accelerator.device)


def find_resume_point(
    config: Config, data: TrainingData, layout: Layout, reads: bool
) -> ResumePoint:
    """Choose the newest checkpoint that is whole; none: step 0. Only the first rank `reads`.

    Raises UserError where none is whole, or where it was made of other data or settings.
    """
    if not reads:
        return ResumePoint({})
    start = ResumePoint(run_facts(config, data, layout.global_batch_size))
    output = Path(config.output_dir)
    own = storage.list_folders(output)
    found = find_checkpoint(config, start.facts, layout)
    if found:
        start.folder, start.progress = found.folder, found.progress()
        print(f"resume: {found.folder}, after step {found.step} of {layout.total_steps}")
    beside = found and found.folder.parent.resolve() == output.resolve()
    _set_aside([mine for mine in own if not (beside and storage.number(mine) <= start.step)])
    record_launch(output)
    return start


def find_checkpoint(config: Config, facts: dict[str, Any], layout: Layout) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, and fits; changes nothing. Raises UserError."""
    output, asked = Path(config.output_dir), config.resume_from_checkpoint
    folders = own = storage.list_folders(output)
    again = is_restart(output)
    if asked.lower() in FALSE:
        folders = own if again else []
    elif asked.lower() not in TRUE:
        folders = _named(Path(asked).expanduser().resolve())
        if again:  # Those that the launch has saved itself.
            newest = storage.number(folders[0])
            folders = [mine for mine in own if storage.number(mine) > newest] or folders
    found = _newest_whole(folders)
    if found:
        _check_facts(found, facts, config, layout)
    return found


def _named(folder: Path) -> list[Path]:
    if (folder / storage.MANIFEST).is_file():
        return [folder]
    folders = storage.list_folders(folder)
    if not folders:
        raise UserError(
            f"--resume_from_checkpoint {folder}: found no checkpoint; expected a folder "
            "checkpoint-<step>, or one that holds such folders. Or give True or False."
        )
    return folders


def _newest_whole(folders: list[Path]) -> Checkpoint | None:
    """Return the newest checkpoint whose files are all as they were written."""
    damages = []
    for folder in folders:
        try:
            found = storage.verify(folder)
        except CorruptCheckpoint as damage:
            damages.append(f"{folder}: damaged: {damage}")
            continue
        for told in damages:
            print(f"note: {told}; going on from an older one")
        return found
    if damages:
        raise UserError(
            f"{'; '.join(damages)}. Found no checkpoint that is whole. Give "
            "--resume_from_checkpoint False to start afresh: they are kept, set aside."
        )
    return None


def _check_facts(found: Checkpoint, facts: dict[str, Any], config: Config, layout: Layout) -> None:
    old = with_current_names(found.manifest["facts"])
    if found.step > layout.total_steps:
        raise UserError(
            f"{found.folder}: found {found.step} steps done; expected at most the "
            f"{layout.total_steps} of this run. Give a larger --max_steps, or an older checkpoint."
        )
    changed = [
        f"{name} was {_short(old.get(name))}, is {_short(facts.get(name))}"
        for name in {**old, **facts}
        if old.get(name) != facts.get(name)
    ]
    if changed and config.allow_resume_mismatch:
        for line in changed:
            print(f"note: {line}; going on at step {found.step}, as --allow_resume_mismatch says")
    elif changed:
        batch = old.get("examples a step")
        split = _splits(batch, layout) if batch != layout.global_batch_size else ""
        raise UserError(
            f"{found.folder}: made of something else: {'; '.join(changed)}. {split}Give it as it "
            "was; or --allow_resume_mismatch to go on with the new; or "
            "--resume_from_checkpoint False to start afresh; or another --output_dir."
        )


def _splits(batch: Any, layout: Layout) -> str:
    """Name the ways in which these ranks can run the checkpoint's global batch."""
    each, left = divmod(int(batch), layout.world_size)
    even = [] if left else [size for size in range(1, each + 1) if each % size == 0]
    words = [
        f"--per_device_train_batch_size {size} --gradient_accumulation_steps {each // size}"
        for size in even
        if size <= max(8, layout.micro_batch_size)
    ]
    ways = ", or ".join([f"--global_batch_size {batch}", *words[::-1][:3]])
    return f"On {layout.world_size} rank(s) {batch} examples a step are: {ways}. "


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def _set_aside(stale: list[Path]) -> None:
    """Move what a run would take for checkpoints of its own out of its way, with their log."""
    if not stale:
        return
    output = stale[0].parent
    aside = output / f"discarded-{datetime.datetime.now():%Y%m%d-%H%M%S.%f}"
    aside.mkdir()
    for folder in stale:
        folder.rename(aside / folder.name)
    if (output / storage.LOG).is_file():
        shutil.copy2(output / storage.LOG, aside)
    print(f"note: {len(stale)} checkpoints that this run does not go on from are now in {aside}")
