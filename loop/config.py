"""Every setting of a run: names, defaults and ranges."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import UserError
from data.sources import Source, files_of, parse_source
from loop.flags import flag

ROOT = Path(__file__).resolve().parent.parent
DUMMY_DATA = ROOT / "data" / "dummy_conversation.json"

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Config:
    """One run; field names are flag names and YAML keys. `None` means: decided elsewhere."""

    model_name_or_path: str | None = flag(
        None, "folder or hub name; none: the embedded SmolLM2-135M-Instruct", "model"
    )
    cache_dir: str | None = flag(None, "where the hub's files are kept", "model")
    trust_remote_code: bool = flag(False, "run code that comes with the model", "model")
    flash_attn: bool = flag(False, "FlashAttention-2 in place of PyTorch's SDPA", "model")
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower", "model"
    )
    mixed_precision: Precision | None = flag(
        None,
        "precision of the base model's weights and products; beats the accelerate config",
        "model",
    )
    bf16: bool = flag(False, "short for --mixed_precision bf16", "model")
    fp16: bool = flag(False, "short for --mixed_precision fp16", "model")
    tf32: bool = flag(False, "TensorFloat-32 for fp32 products on GPUs that have it", "model")
    q_lora: bool = flag(
        False, "hold the base model's linear layers in 4 bits: NF4, double quantisation", "model"
    )

    lora_r: int = flag(8, "rank of the adapter", "LoRA", at_least=1, at_most=65536)
    lora_alpha: int = flag(
        16, "scale: the update is multiplied by alpha / r", "LoRA", at_least=1, at_most=10**9
    )
    lora_dropout: float = flag(0.05, "dropout before the adapter", "LoRA", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] | None = flag(
        None, "module names, or all-linear; none: q_proj v_proj, or T5's q v", "LoRA"
    )
    lora_bias: Literal["none", "all", "lora_only"] = flag(
        "none", "which biases are trained", "LoRA"
    )
    lora_weight_path: str | None = flag(
        None, "continue from this adapter; rank, alpha, targets and bias are its own", "LoRA"
    )
    train_new_tokens: bool = flag(
        True, "train the rows of the tokens that T5 lacked; False: their mean stays", "LoRA"
    )

    data_path: tuple[str, ...] | None = flag(
        None,
        "dialogues: JSON, JSONL, CSV, Parquet, Arrow, .gz, .zst, folders of them, or the hub's "
        "owner/name[/configuration][@split]; path:0.3 takes three of ten; none: the bundled ones",
        "data",
    )
    template: Literal["vicuna", "chat", "t5"] | None = flag(
        None,
        "vicuna; chat: the model's own; t5: pairs; none: chat where the model has one, t5 for an "
        "encoder-decoder",
        "data",
    )
    chat_template: str | None = flag(
        None, "a Jinja file in place of the model's own chat template", "data"
    )
    t5_compat: bool = flag(False, "FastChat's tokens and pairs for T5, id for id", "data")
    model_max_length: int = flag(
        2048,
        "tokens; longer dialogues are cut on the right, a T5's sources on the left",
        "data",
        at_least=8,
    )
    max_target_length: int | None = flag(
        None, "tokens of a T5's target; none: model_max_length", "data", at_least=8
    )
    keep_header: bool = flag(False, "what is cut of a T5's source lies behind its header", "data")
    on_bad_record: Literal["fail", "skip"] = flag(
        "fail", "stop at a record that is wrong, or drop and count it", "data"
    )

    supervise: Literal["all", "last"] = flag(
        "all", "learn every answer of a dialogue, or its last one", "data"
    )
    max_dropped: float = flag(
        0.05,
        "share of the dialogues that may have no supervised token",
        "data",
        at_least=0,
        at_most=1,
    )
    num_data: int = flag(
        -1, "use so many dialogues, chosen by the seed; -1: all", "data", at_least=-1
    )
    preprocessed_path: str | None = flag(
        None, "file that keeps the encoded data, to be used again while it fits", "data"
    )
    report: str | None = flag(
        None, "JSON file for the account of the data: read = kept + dropped, by cause", "data"
    )

    num_train_epochs: float = flag(3.0, "passes over the data", "training", above=0)
    max_steps: int = flag(-1, "stop after so many steps; -1: by epochs", "training", at_least=-1)
    per_device_train_batch_size: int = flag(
        8, "most examples in one micro-batch of one rank", "training", at_least=1
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "micro-batches a rank a step; none: 1, or what global_batch_size asks for",
        "training",
        at_least=1,
    )
    global_batch_size: int | None = flag(
        None,
        "examples a step over all ranks; none: ranks x accumulation x micro-batch",
        "training",
        at_least=1,
    )
    learning_rate: float = flag(2e-5, "peak learning rate", "training", above=0, at_most=1e6)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag(
        "cosine", "shape after the linear warm-up", "training"
    )
    warmup_ratio: float = flag(
        0.03, "share of the steps that warm up", "training", at_least=0, at_most=1
    )
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay", "training", at_least=0)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; 0: never", "training", at_least=0)
    seed: int = flag(
        42,
        "of data order, adapter initialisation and dropout",
        "training",
        at_least=0,
        at_most=2**63 - 1,
    )

    deepspeed: str | None = flag(
        None, "a DeepSpeed JSON, where the accelerate config launches DeepSpeed", "training"
    )

    output_dir: str = flag("runs/adapter", "adapter, tokenizer, metrics and settings", "output")
    logging_steps: int = flag(10, "steps between two log entries", "output", at_least=1)
    logging_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps", "log every logging_steps, at each epoch's end, or only first and last", "output"
    )
    report_to: tuple[Literal["none", "wandb", "tensorboard"], ...] = flag(
        ("none",), "trackers, several at once", "output"
    )
    run_name: str | None = flag(None, "name in the trackers; none: output_dir's", "output")
    save_safetensors: bool = flag(True, "False: adapter_model.bin", "output")
    save_non_lora_state: Literal["none", "trainable", "all"] = flag(
        "none", "beside the adapter: what else was trained, or the base model whole", "output"
    )

    save_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps", "checkpoint every save_steps, at each epoch's end, or never", "checkpoints"
    )
    save_steps: int = flag(500, "steps between two checkpoints", "checkpoints", at_least=1)
    save_minutes: float | None = flag(
        None, "minutes after which a checkpoint is due, too", "checkpoints", above=0
    )
    save_total_limit: int | None = flag(
        None, "keep the newest so many checkpoints; none: all", "checkpoints", at_least=1
    )
    resume_from_checkpoint: str = flag(
        "True", "True: go on from the newest checkpoint; a folder; False: afresh", "checkpoints"
    )
    resume_anyway: bool = flag(
        False, "go on although settings or data differ from the checkpoint's", "checkpoints"
    )
    max_minutes: float | None = flag(
        None, "stop after so many minutes, with a checkpoint", "checkpoints", above=0
    )

    @property
    def sources(self) -> list[Source]:
        """The dialogues to train on; raises UserError for a weight that is none."""
        return [parse_source(word) for word in self.data_path or [str(DUMMY_DATA)]]

    @property
    def precision(self) -> Precision:
        """The flags' precision, else the accelerate config's, else fp32."""
        short: Precision | None = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        launched: Any = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        return self.mixed_precision or short or launched


# Paths, compared by what lies there; what changes no number; flags of which `precision` is made.
PATHS = {
    *("model_name_or_path", "cache_dir", "lora_weight_path", "data_path", "preprocessed_path"),
    *("output_dir", "chat_template", "report"),
}
TOLD = {"deepspeed", "run_name", "report_to", "resume_from_checkpoint", "max_dropped"}
PRECISION = {"mixed_precision", "bf16", "fp16"}


def decisive(config: Config) -> dict[str, Any]:
    """Return the settings that all ranks must share; paths may differ from machine to machine."""
    values = dataclasses.asdict(config).items()
    told = {f"--{name}": value for name, value in values if name not in PATHS | TOLD | PRECISION}
    return {"the precision": config.precision, **told}


def data_sha256(config: Config) -> str:
    """Return the SHA-256 of the data's file, or of the hashes of several and of their weights.

    Raises UserError where one cannot be read.
    """
    hashes = []
    for source in config.sources:
        hashes += [file_sha256(file) for file in files_of(source, config.cache_dir)]
        hashes += [f"x {source.weight}"] if source.weight != 1.0 else []
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(str(hashes).encode()).hexdigest()


def data_shown(config: Config) -> str:
    """Return the names of the data as a person reads them."""
    return ", ".join(map(shown, config.data_path or [DUMMY_DATA]))


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file; raises UserError where it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None


def shown(path: str | Path) -> str:
    """Return a path as a person reads it: from the working directory where it lies below."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
