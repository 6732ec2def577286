"""Every setting of a run: names, defaults and ranges."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.dialogues.sources import Source, parse_source
from loop.config.parser import (
    Epochs,
    Examples,
    File,
    Folder,
    Minutes,
    Model,
    Share,
    Steps,
    Tokens,
    flag,
)

ROOT = Path(__file__).resolve().parents[2]
DUMMY_DATA = ROOT / "data" / "dummy_conversation.json"

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

Precision = Literal["no", "bf16", "fp16"]
AskedPrecision = Literal["no", "bf16", "fp16", "auto"]


@dataclass(frozen=True)
class Config:
    """One run; field names are flag names and YAML keys. `None` means: decided elsewhere."""

    model_name_or_path: Model | None = flag(
        None, "folder or hub name; none: the embedded SmolLM2-135M-Instruct", "model"
    )
    cache_dir: Folder | None = flag(
        None, "where the hub's files are kept; none: its own place", "model"
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with the model", "model", flag_only=True
    )
    flash_attn: bool = flag(False, "FlashAttention-2 in place of PyTorch's SDPA", "model")
    packing: bool = flag(
        True,
        "a micro-batch's dialogues in one row, none seeing another; False: padded",
        "model",
    )
    torch_compile: bool = flag(
        False, "compile the layers: half a minute before step 1, then a little faster", "model"
    )
    loss_chunk_tokens: Tokens = flag(
        1024,
        "supervised tokens whose logits are held at once; 0: all, made by the model itself",
        "model",
        at_least=0,
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower", "model"
    )
    mixed_precision: AskedPrecision | None = flag(
        None,
        "precision of the base model's weights and products; auto: bf16 where it is measured to "
        "be faster, else fp32; none: the accelerate config's",
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
    lora_weight_path: Folder | None = flag(
        None, "continue from this adapter; rank, alpha, targets and bias are its own", "LoRA"
    )
    train_new_tokens: bool = flag(
        True, "train the rows of the tokens that T5 lacked; False: their mean stays", "LoRA"
    )

    data_path: tuple[File, ...] | None = flag(
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
    chat_template: File | None = flag(
        None, "a Jinja file in place of the model's own chat template", "data"
    )
    t5_compat: bool = flag(False, "FastChat's tokens and pairs for T5, id for id", "data")
    model_max_length: Tokens = flag(
        2048,
        "tokens; longer dialogues are cut on the right, a T5's sources on the left",
        "data",
        at_least=8,
    )
    max_target_length: Tokens | None = flag(
        None, "tokens of a T5's target; none: model_max_length", "data", at_least=8
    )
    keep_header: bool = flag(False, "what is cut of a T5's source lies behind its header", "data")
    on_bad_record: Literal["fail", "skip"] = flag(
        "fail", "stop at a record that is wrong, or drop and count it", "data"
    )

    train_on: Literal["all", "last"] = flag(
        "all", "learn every answer of a dialogue, or its last one", "data"
    )
    max_dropped: Share = flag(
        0.05,
        "share of the dialogues that may have no supervised token",
        "data",
        at_least=0,
        at_most=1,
    )
    eval_fraction: Share | None = flag(
        None,
        "share of the dialogues held out by a hash of their content, to evaluate on",
        "data",
        above=0,
        below=1,
    )
    num_data: int = flag(
        -1, "use so many dialogues, chosen by the seed; -1: all", "data", at_least=-1
    )
    preprocessed_path: File | None = flag(
        None, "file that keeps the encoded data, to be used again while it fits", "data"
    )
    data_report: File | None = flag(
        None, "JSON file for the account of the data: read = kept + dropped, by cause", "data"
    )

    num_train_epochs: Epochs = flag(3.0, "passes over the data", "training", above=0)
    max_steps: Steps = flag(-1, "stop after so many steps; -1: by epochs", "training", at_least=-1)
    per_device_train_batch_size: Examples = flag(
        8, "most examples in one micro-batch of one rank", "training", at_least=1
    )
    tokens_per_micro_batch: Tokens | None = flag(
        None,
        "most tokens in one micro-batch of one rank, padding counted; a longer dialogue runs alone",
        "training",
        at_least=1,
    )
    auto_micro_batch: bool = flag(
        False, "before step 1 find the most tokens that fit, the longest examples first", "training"
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "micro-batches a rank a step; none: 1, or what global_batch_size asks for",
        "training",
        at_least=1,
    )
    global_batch_size: Examples | None = flag(
        None,
        "examples a step over all ranks; none: ranks x accumulation x micro-batch",
        "training",
        at_least=1,
    )
    learning_rate: float = flag(2e-5, "peak learning rate", "training", above=0, at_most=1e6)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag(
        "cosine", "shape after the linear warm-up", "training"
    )
    warmup_ratio: Share = flag(
        0.03, "share of the steps that warm up", "training", at_least=0, at_most=1
    )
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay", "training", at_least=0)
    max_grad_norm: float = flag(
        1.0, "clip the gradient's norm to this; 0: never", "training", at_least=0
    )
    seed: int = flag(
        42,
        "of data order, adapter initialisation and dropout",
        "training",
        at_least=0,
        at_most=2**63 - 1,
    )

    max_nonfinite_steps: Steps = flag(
        3, "stop after so many steps in a row without a finite gradient", "training", at_least=1
    )
    deepspeed: File | None = flag(
        None, "a DeepSpeed JSON, where the accelerate config launches DeepSpeed", "training"
    )

    output_dir: Folder = flag("runs/adapter", "adapter, tokenizer, metrics and settings", "output")
    logging_steps: Steps = flag(10, "steps between two log entries", "output", at_least=1)
    logging_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps", "log every logging_steps, at each epoch's end, or only first and last", "output"
    )
    report_to: tuple[Literal["none", "wandb", "tensorboard", "trackio"], ...] = flag(
        ("none",), "trackers, several at once", "output"
    )
    tags: tuple[str, ...] | None = flag(None, "labels of the run at wandb", "output")
    wandb_artifact: bool = flag(False, "give wandb the adapter too, as an artifact", "output")
    run_name: str | None = flag(None, "name in the trackers; none: output_dir's", "output")
    save_safetensors: bool = flag(True, "False: adapter_model.bin", "output")
    save_non_lora_state: Literal["none", "trainable", "all"] = flag(
        "none", "beside the adapter: what else was trained, or the base model whole", "output"
    )

    save_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps", "checkpoint every save_steps, at each epoch's end, or never", "checkpoints"
    )
    save_steps: Steps = flag(500, "steps between two checkpoints", "checkpoints", at_least=1)
    save_minutes: Minutes | None = flag(
        None, "minutes after which a checkpoint is due, too", "checkpoints", above=0
    )
    save_total_limit: int | None = flag(
        None, "keep the newest so many checkpoints; none: all", "checkpoints", at_least=1
    )
    resume_from_checkpoint: str = flag(
        "True", "True: go on from the newest checkpoint; a folder; False: afresh", "checkpoints"
    )
    allow_resume_mismatch: bool = flag(
        False, "go on although settings or data differ from the checkpoint's", "checkpoints"
    )
    max_minutes: Minutes | None = flag(
        None, "stop after so many minutes, with a checkpoint", "checkpoints", above=0
    )

    eval_data_path: tuple[File, ...] | None = flag(
        None, "dialogues to evaluate on, in the forms that data_path takes", "evaluation"
    )
    eval_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps", "evaluate every eval_steps, or at each epoch's end; and at the end", "evaluation"
    )
    eval_steps: Steps = flag(500, "steps between two evaluations", "evaluation", at_least=1)
    per_device_eval_batch_size: Examples | None = flag(
        None,
        "most examples a micro-batch of evaluation; none: training's",
        "evaluation",
        at_least=1,
    )
    sample_prompts: tuple[str, ...] | None = flag(
        None, "questions to answer at every evaluation, or a file with one a line", "evaluation"
    )
    sample_tokens: Tokens = flag(64, "tokens a sample at most", "evaluation", at_least=1)
    load_best_model_at_end: bool = flag(
        False, "keep the checkpoint of the least eval_loss, and save its adapter", "evaluation"
    )
    early_stopping_patience: int | None = flag(
        None, "end after so many evaluations without a lesser eval_loss", "evaluation", at_least=1
    )
    peak_tflops: float | None = flag(
        None, "TFLOP/s of one rank's device at its best, for the log's mfu", "output", above=0
    )
    cost_per_hour: float | None = flag(
        None, "price of an hour of a GPU, or of a core, for the last line", "output", above=0
    )

    @property
    def sources(self) -> list[Source]:
        """The dialogues to train on; raises UserError for a weight that is none."""
        return [parse_source(word) for word in self.data_path or [str(DUMMY_DATA)]]

    @property
    def precision(self) -> Precision:
        """The flags' precision, else the accelerate config's, else fp32; `auto` counts as fp32."""
        short: Precision | None = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        launched: Any = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.mixed_precision == "auto":
            return short or "no"
        return self.mixed_precision or short or launched


# Paths, compared by what lies there; what changes no number; flags of which `precision` is made.
PATHS = {
    *("model_name_or_path", "cache_dir", "lora_weight_path", "data_path", "preprocessed_path"),
    *("output_dir", "chat_template", "data_report", "eval_data_path", "sample_prompts"),
}
TOLD = {
    *("deepspeed", "run_name", "report_to", "tags", "wandb_artifact"),
    *(
        "resume_from_checkpoint",
        "max_dropped",
        "max_nonfinite_steps",
        "peak_tflops",
        "cost_per_hour",
    ),
}
PRECISION = {"mixed_precision", "bf16", "fp16"}


def rank_shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that all ranks must share; paths may differ from machine to machine."""
    values = dataclasses.asdict(config).items()
    told = {f"--{name}": value for name, value in values if name not in PATHS | TOLD | PRECISION}
    return {"the precision": config.precision, **told}


def display_path(path: str | Path) -> str:
    """Return a path as a person reads it: from the working directory where it lies below."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
