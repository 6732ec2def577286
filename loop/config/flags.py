"""Every setting of a training run: name, default, range, help, and what it affects."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.dialogues.columns import parse_columns, parse_roles
from data.dialogues.forms import Reading
from data.dialogues.sources import Source, parse_source
from data.encoding.templates import RenderSettings, template_arguments
from loop.config.model_flags import ModelFlags, Precision
from loop.config.parser import (
    Epochs,
    Examples,
    File,
    Folder,
    Minutes,
    Share,
    Steps,
    Tokens,
    flag,
)

ROOT = Path(__file__).resolve().parents[2]
DUMMY_DATA = ROOT / "data" / "dummy_conversation.json"

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Config(ModelFlags):
    """One run; field names are flag names and YAML keys. `None`: the loop chooses the value."""

    data_path: tuple[File, ...] | None = flag(
        None,
        "dialogues: JSON, JSONL, CSV, Parquet or Arrow files (also .gz, .zst, .xz, .zip), folders, "
        "or the hub's owner/name[/configuration]; name@test selects a split; path:0.3 takes 30 %; "
        "none: bundled dialogues",
        "data",
        is_path=True,
        finished_check="no",
    )
    encoding: str | None = flag(
        None,
        "of text files, such as utf-16, cp1252 or gb18030; none: UTF-8",
        "data",
        affects="encoding",
    )
    template: Literal["vicuna", "chat", "t5"] | None = flag(
        None,
        "vicuna; chat: the model's chat template; t5: pairs; none: t5 for an encoder-decoder, else "
        "chat if the model has a chat template, else vicuna",
        "data",
    )
    chat_template: File | None = flag(
        None,
        "a Jinja file instead of the model's template",
        "data",
        is_path=True,
        finished_check="no",
    )
    chat_template_name: str | None = flag(
        None,
        "which of a tokenizer's chat templates; none: default, or tool_use with tools",
        "data",
        affects="encoding",
    )
    chat_template_kwargs: str | None = flag(
        None,
        "arguments of the chat template, as JSON or YAML, such as '{\"enable_thinking\": false}'",
        "data",
        affects="encoding",
    )
    multi_turn: Literal["whole", "each"] | None = flag(
        None,
        "whole: render a dialogue once; each: once for each answer, as it is generated; none: each "
        "where the template rewrites earlier turns",
        "data",
        affects="encoding",
    )
    t5_compat: bool = flag(
        False, "for T5: the same token ids and pairs as FastChat", "data", affects="encoding"
    )
    model_max_length: Tokens = flag(
        2048,
        "longer dialogues are truncated on the right, T5's sources on the left",
        "data",
        at_least=8,
        affects="encoding",
    )
    max_target_length: Tokens | None = flag(
        None,
        "longer targets of a T5 are truncated; none: model_max_length",
        "data",
        at_least=8,
        affects="encoding",
    )
    keep_header: bool = flag(
        False, "keep the header when truncating a T5 source", "data", affects="encoding"
    )
    on_bad_record: Literal["fail", "skip"] = flag(
        "fail", "at an invalid record: stop, or drop and count it", "data", affects="encoding"
    )
    columns: tuple[str, ...] | None = flag(
        None, "columns of a table: user=question assistant=answer", "data", affects="encoding"
    )
    roles: tuple[str, ...] | None = flag(
        None, "role names of the data: user=human,Human assistant=bot", "data", affects="encoding"
    )
    preference: Literal["refuse", "chosen"] = flag(
        "refuse", "preference data: refuse it, or take the chosen answers", "data",
        affects="encoding",
    )  # fmt: skip
    train_on: Literal["all", "last"] = flag(
        "all", "supervise every answer of a dialogue, or its last one", "data", affects="encoding"
    )
    train_on_reasoning: bool = flag(
        True,
        "supervise the reasoning of an answer; False: it is context",
        "data",
        affects="encoding",
    )
    train_on_tool_calls: bool = flag(
        True,
        "supervise tool calls; False: an answer is trained up to them",
        "data",
        affects="encoding",
    )
    max_dropped: Share = flag(
        0.05,
        "stop if a larger share of dialogues has no supervised token",
        "data",
        at_least=0,
        at_most=1,
        affects="report only",
    )
    eval_fraction: Share | None = flag(
        None,
        "share of the dialogues held out for evaluation, chosen by a hash of their content",
        "data",
        above=0,
        below=1,
        affects="result",
    )
    num_data: int = flag(
        -1,
        "number of dialogues to use, chosen by the seed; -1: all",
        "data",
        at_least=-1,
        affects="encoding",
    )
    preprocessed_path: File | None = flag(
        None,
        "cache of the encoded data, reused while data and settings are the same",
        "data",
        is_path=True,
        finished_check="no",
    )
    data_report: File | None = flag(
        None,
        "JSON file for the record counts: read, kept, and dropped by cause",
        "data",
        is_path=True,
        finished_check="no",
        in_trial=None,
    )

    num_train_epochs: Epochs = flag(
        3.0, "passes over the data", "training", above=0, affects="result"
    )
    max_steps: Steps = flag(
        -1, "steps of the run; -1: by epochs", "training", at_least=-1, affects="result"
    )
    per_device_train_batch_size: Examples = flag(
        8, "maximum examples of a rank's micro-batch", "training", at_least=1, affects="layout"
    )
    tokens_per_micro_batch: Tokens | None = flag(
        None,
        "maximum tokens of a rank's micro-batch, with padding; a longer dialogue gets its own",
        "training",
        at_least=1,
        affects="layout",
    )
    auto_micro_batch: bool = flag(
        False, "find the largest micro-batch that fits in memory", "training", affects="layout"
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "micro-batches of a rank per step; none: 1, or derived from global_batch_size",
        "training",
        at_least=1,
        affects="layout",
    )
    global_batch_size: Examples | None = flag(
        None,
        "examples per step over all ranks; none: ranks x accumulation x micro-batch",
        "training",
        at_least=1,
        affects="layout",
    )
    learning_rate: float = flag(
        2e-5, "peak learning rate", "training", above=0, at_most=1e6, affects="result"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag(
        "cosine", "learning rate after the linear warm-up", "training", affects="result"
    )
    warmup_ratio: Share = flag(
        0.03, "share of warm-up steps", "training", at_least=0, at_most=1, affects="result"
    )
    weight_decay: float = flag(
        0.0, "AdamW's decoupled weight decay", "training", at_least=0, affects="result"
    )
    max_grad_norm: float = flag(
        1.0, "maximum gradient norm; 0: no clipping", "training", at_least=0, affects="result"
    )
    seed: int = flag(
        42,
        "seed of data order, adapter initialisation and dropout",
        "training",
        at_least=0,
        at_most=2**63 - 1,
        affects="encoding",
    )
    max_nonfinite_steps: Steps = flag(
        3,
        "stop after this many consecutive steps without a finite gradient",
        "training",
        at_least=1,
        affects="report only",
    )
    deepspeed: File | None = flag(
        None, "DeepSpeed JSON; needs a launch with DeepSpeed", "training", is_path=True
    )

    output_dir: Folder = flag(
        "runs/adapter",
        "where adapter, tokenizer, metrics and settings are written",
        "output",
        is_path=True,
        finished_check="no",
    )
    logging_steps: Steps = flag(10, "steps between two log entries", "output", at_least=1)
    logging_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps", "log every logging_steps, at each epoch's end, or first and last step", "output"
    )
    report_to: tuple[Literal["none", "wandb", "tensorboard", "trackio"], ...] = flag(
        ("none",), "one or more trackers", "output", affects="report only", in_trial=("none",)
    )
    tags: tuple[str, ...] | None = flag(
        None, "labels of the run in wandb", "output", affects="report only"
    )
    wandb_artifact: bool = flag(
        False,
        "upload the adapter to wandb as an artifact",
        "output",
        affects="report only",
        in_trial=False,
    )
    run_name: str | None = flag(
        None, "name in the trackers; none: output_dir's name", "output", affects="report only"
    )
    save_safetensors: bool = flag(True, "save .safetensors; False: adapter_model.bin", "output")
    save_non_lora_state: Literal["none", "trainable", "all"] = flag(
        "none",
        "also save the other trained parameters, or the complete base model",
        "output",
        in_trial="none",
    )

    save_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps",
        "checkpoint every save_steps, at each epoch's end, or never",
        "checkpoints",
        finished_check="no",
        in_trial="no",
    )
    save_steps: Steps = flag(
        500, "steps between two checkpoints", "checkpoints", at_least=1, finished_check="no"
    )
    save_minutes: Minutes | None = flag(
        None,
        "also save a checkpoint this long after the last one",
        "checkpoints",
        above=0,
        finished_check="no",
        in_trial=None,
    )
    save_total_limit: int | None = flag(
        None,
        "number of newest checkpoints to keep; none: all",
        "checkpoints",
        at_least=1,
        finished_check="no",
    )
    resume_from_checkpoint: str = flag(
        "True",
        "True: resume from the newest checkpoint; a folder: from that one; False: start at step 0",
        "checkpoints",
        is_path=True,
        finished_check="no",
        in_trial="True",
    )
    allow_resume_mismatch: bool = flag(
        False,
        "resume although settings or data differ from the checkpoint's",
        "checkpoints",
        finished_check="no",
    )
    max_minutes: Minutes | None = flag(
        None,
        "save a checkpoint and stop after this time",
        "checkpoints",
        above=0,
        finished_check="no",
        in_trial=None,
    )

    eval_data_path: tuple[File, ...] | None = flag(
        None, "evaluation dialogues, as in data_path", "evaluation", is_path=True, in_trial=None
    )
    eval_strategy: Literal["steps", "epoch", "no"] = flag(
        "steps",
        "evaluate every eval_steps or at each epoch's end, and at the run's end; no: never",
        "evaluation",
        in_trial="no",
    )
    eval_steps: Steps = flag(500, "steps between two evaluations", "evaluation", at_least=1)
    per_device_eval_batch_size: Examples | None = flag(
        None, "maximum examples of a micro-batch; none: as in training", "evaluation", at_least=1
    )
    sample_prompts: tuple[str, ...] | None = flag(
        None,
        "questions to answer at every evaluation, or a file with one per line",
        "evaluation",
        is_path=True,
        in_trial=None,
    )
    sample_tokens: Tokens = flag(64, "maximum tokens of a sample answer", "evaluation", at_least=1)
    load_best_model_at_end: bool = flag(
        False,
        "keep the checkpoint with the lowest eval_loss, and save its adapter",
        "evaluation",
        in_trial=False,
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after this many evaluations in a row without a lower eval_loss",
        "evaluation",
        at_least=1,
        in_trial=None,
    )
    peak_tflops: float | None = flag(
        None, "peak TFLOP/s of one rank's device, for mfu", "output", above=0, affects="report only"
    )
    cost_per_hour: float | None = flag(
        None,
        "price of a GPU hour, or of a core hour on CPUs, for the cost in the last line",
        "output",
        above=0,
        affects="report only",
        finished_check="no",
    )

    @property
    def sources(self) -> list[Source]:
        """The sources of the training data; raises UserError for an invalid weight."""
        return [parse_source(word) for word in self.data_path or [str(DUMMY_DATA)]]

    @property
    def reading(self) -> Reading:
        """How records are read; raises UserError for invalid columns or roles."""
        return Reading(
            self.preference,
            parse_roles(self.roles or ()),
            parse_columns(self.columns) if self.columns else {},
        )

    @property
    def rendering(self) -> RenderSettings:
        """How dialogues are rendered; raises UserError for invalid template arguments."""
        return RenderSettings(
            template_arguments(self.chat_template_kwargs),
            self.chat_template_name,
            self.multi_turn,
            self.train_on_reasoning,
            self.train_on_tool_calls,
        )

    @property
    def precision(self) -> Precision:
        """The flags' precision, else the accelerate config's, else `no` (fp32); `auto` is `no`."""
        short: Precision | None = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        launched: Any = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.mixed_precision == "auto":
            return short or "no"
        return self.mixed_precision or short or launched


def names_of(**metadata: Any) -> tuple[str, ...]:
    """Return the names of the Config flags that have this metadata, in the order of --help.

    >>> names_of(affects="precision")
    ('mixed_precision', 'bf16', 'fp16')
    """
    return tuple(
        field.name
        for field in dataclasses.fields(Config)
        if all(field.metadata[key] == value for key, value in metadata.items())
    )


def rank_shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that must be equal on all ranks. Paths may differ between machines."""
    other = {*names_of(is_path=True), *names_of(affects="report only")}
    other |= {*names_of(affects="precision")}
    values = dataclasses.asdict(config).items()
    shared = {f"--{name}": value for name, value in values if name not in other}
    return {"the precision": config.precision, **shared}


def display_path(path: str | Path) -> str:
    """Return a path for display: relative if it is inside the working directory."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
