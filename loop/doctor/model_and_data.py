"""Examines the base model's folder and the data, each part independently of the others."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.dialogues.sharegpt import Tally, read_dialogues, read_file
from data.dialogues.sources import files_of, parse_source
from data.encoding.encode import Example, check_fast
from data.encoding.templates import TemplateName
from data.errors import UserError, add_errors, collect_errors
from data.preparation.histogram import quantile
from loop.config.flags import DUMMY_DATA, Config, display_path
from loop.config.preflight import WEIGHTS
from loop.doctor.memory.shape import bare_model, check_shape, lora_targets, pair_of, trained_biases
from loop.doctor.show import as_text
from loop.inputs.training_data import TrainingData, read_training_data
from loop.model.base import (
    check_experts,
    check_pairs,
    check_ties,
    find_base_model,
    load_tokenizer,
    read_base_config,
    template_of,
)
from loop.model.quantization import about_zero3, check_quantization
from loop.monitor.formatting import megabytes

SHOWN_EXAMPLES = 3
MAX_SHOWN_TOKENS = 160  # of each example


@dataclass
class Model:
    """The base model as far as it can be read; an error leaves the fields after it None.

    base: folder or hub name. bare: the model on PyTorch's meta device. targets: its modules that
    get a LoRA pair, by name. no_estimate: why memory cannot be estimated.
    """

    base: str | None = None
    base_config: Any = None
    tokenizer: Any = None
    template: TemplateName | None = None
    bare: Any = None
    targets: dict[str, Any] | None = None
    no_estimate: str = ""

    @property
    def usable(self) -> bool:
        """Whether the data can be encoded for this model."""
        return None not in (self.template, self.targets)

    def trained(self, config: Config) -> int:
        """Return the number of trained parameters, without the rows of new tokens."""
        targets = self.targets or {}
        pairs = sum(sum(pair_of(module, config)) for module in targets.values())
        return pairs + sum(trained_biases(self.bare, targets, config).values())


def examine_model(config: Config, zero: dict[str, Any], errors: list[str]) -> Model:
    """Return the base model, read without its weights; errors are added to `errors`."""
    model = Model()
    with collect_errors(errors):
        model.base = find_base_model(config)
        model.base_config = read_base_config(model.base, config)
    if model.base is None or model.base_config is None:
        return model
    base, base_config = model.base, model.base_config
    with collect_errors(errors):
        tokenizer = load_tokenizer(base, config)
        check_fast(tokenizer)
        model.tokenizer = tokenizer
    if model.tokenizer:
        with collect_errors(errors):
            model.template = template_of(base, base_config, model.tokenizer, config)
    with collect_errors(errors):
        check_pairs(base, base_config, config)
    with collect_errors(errors):
        check_quantization(base, base_config, config, zero)
    with collect_errors(errors):
        check_experts(base, base_config, config)
    with collect_errors(errors):
        check_ties(base, base_config, zero.get("stage") == 3)
    with collect_errors(errors):
        model.bare = bare_model(base, base_config, config)
        model.targets = lora_targets(model.bare, config)
    try:
        check_shape(base, base_config)
    except UserError as error:
        model.no_estimate = str(error)
    return model


def weight_bytes(model: Model) -> int | None:
    """Return the bytes of the weight files; None for a model on the hub."""
    folder = Path(model.base or "")
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def check_weights(model: Model) -> None:
    """Raise UserError if the weights that a trial needs are missing."""
    if weight_bytes(model) == 0:
        raise UserError(
            f"--trial: found no weights in {model.base}; expected {' or '.join(WEIGHTS)}. Download "
            "them, or leave --trial out."
        )


def model_rows(
    model: Model, config: Config, zero: dict[str, Any], notes: list[str]
) -> list[tuple[str, str]]:
    """Return type, size and LoRA targets of the model."""
    if model.base is None or model.base_config is None:
        return [("base", "not found: see below")]
    kind = "an encoder-decoder" if model.base_config.is_encoder_decoder else "a decoder"
    rows = [("base", f"{display_path(model.base)}: {model.base_config.model_type}, {kind}")]
    size = weight_bytes(model)
    if size is not None:
        absent = "missing: needed by training and --trial only"
        rows.append(("weights", f"{megabytes(size)} on disk" if size else absent))
    if model.bare is None or model.targets is None:
        return rows
    total, trained = sum(p.numel() for p in model.bare.parameters()), model.trained(config)
    share = 100 * trained / (total + trained)  # as in the training log
    rows.append(("parameters", f"{total:,}; trained {trained:,} ({share:.3f} %)"))
    names = {name.removesuffix(".weight").rpartition(".")[2] for name in model.targets}
    scale = f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}"
    rows.append(("LoRA", f"{scale} on {' '.join(sorted(names))}: {len(model.targets)} modules"))
    longest = getattr(model.base_config, "max_position_embeddings", None)
    if longest and config.model_max_length > longest:
        notes.append(
            f"--model_max_length {config.model_max_length} is more than the {longest} positions "
            "that the model was trained with"
        )
    return rows + backend_rows(config, zero)


def backend_rows(config: Config, zero: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how QLoRA and checkpointing work on the backend."""
    stage = zero.get("stage", 0)
    backend = f"ZeRO-{stage}" if stage else "no DeepSpeed"
    rows = []
    if config.q_lora:
        # Only ZeRO-3 partitions the 4-bit weights.
        text = about_zero3(config) if stage == 3 else f"{backend}: each rank holds all 4-bit codes"
        rows.append(("4 bits", text))
    if config.gradient_checkpointing:
        how = "reentrant, as ZeRO-3 requires" if stage == 3 else "layer by layer"
        rows.append(("checkpointing", f"{backend}: activations are recomputed, {how}"))
    return rows


def examine_data(model: Model, config: Config, errors: list[str]) -> TrainingData | None:
    """Return the encoded data; None after errors in the data or the model.

    After an error, each file is read separately, so that the errors of all files are reported.
    """
    sources, complete = _files_by_source(config, errors)
    if model.usable and complete:
        try:
            return read_training_data(config)
        except UserError as error:
            add_errors([str(error)], errors)
    pairs = model.base_config is not None and model.base_config.is_encoder_decoder
    how = (config.on_bad_record, pairs, config.train_on, config.reading)
    for files in sources:
        source_errors: list[str] = []
        with collect_errors(source_errors):
            deque(read_dialogues(files, Tally(), *how), maxlen=0)
        # read_dialogues stops at the first bad file of a source.
        for file in files if source_errors else ():
            with collect_errors(source_errors):
                deque(read_file(file, Tally(), *how), maxlen=0)
        add_errors(source_errors, errors)
    return None


def _files_by_source(config: Config, errors: list[str]) -> tuple[list[list[Path]], bool]:
    """Return the files of each valid source, and whether all sources are valid."""
    named = [("--data_path", word) for word in config.data_path or [str(DUMMY_DATA)]]
    named += [("--eval_data_path", word) for word in config.eval_data_path or ()]
    sources = []
    for flag, word in named:
        with collect_errors(errors):
            files = files_of(parse_source(word), config.cache_dir, config.encoding)
            for file in files:
                if not file.is_file():
                    raise UserError(f"{flag} {file}: no such file. Give an existing path.")
            sources.append(files)
    return sources, len(sources) == len(named)


def data_rows(data: TrainingData, config: Config, page_colour: bool) -> list[tuple[str, str]]:
    """Return counts of records and tokens, and a few examples with supervised tokens marked."""
    examples = data.examples
    lengths: dict[int, int] = {}
    for example in examples:
        longer = max(example.sides)  # the limit applies to each side
        lengths[longer] = lengths.get(longer, 0) + 1
    tokens = sum(example.tokens for example in examples)
    supervised = sum(example.supervised_tokens for example in examples)
    median, longest = quantile(lengths, 0.5), max(lengths)
    rows = [
        ("data", str(data)),
        (
            "tokens",
            f"{tokens:,} in {len(examples):,} examples; median {median:,}, longest {longest:,}, "
            f"limit {config.model_max_length:,}",
        ),
        ("supervised", f"{supervised:,} tokens ({100 * supervised / tokens:.1f} %), marked below"),
    ]
    last, count = len(examples) - 1, SHOWN_EXAMPLES
    places = dict.fromkeys(n * last // (count - 1) for n in range(count))
    for number, place in enumerate(places, 1):
        text = "\n".join(_shown_lines(examples[place], data.base.tokenizer, page_colour))
        rows.append((f"example {number}", text))
    return rows


def _shown_lines(example: Example, tokenizer: Any, colour: bool) -> Iterator[str]:
    """Yield the lines of an example's first tokens; of a pair's source, the last tokens."""
    ids, labels = example.input_ids, example.labels[:MAX_SHOWN_TOKENS]
    left = max(0, len(ids) - MAX_SHOWN_TOKENS)
    shown = ids[left:] if example.is_pair else ids[:MAX_SHOWN_TOKENS]
    cut = dataclasses.replace(example, input_ids=shown, labels=labels)
    # Indented lines are not wrapped: a break within a marked run would split the mark.
    for line in as_text(cut, tokenizer, colour).splitlines():
        yield f" {line}" if line.strip() else " "
    if left:
        yield f" ... and {left:,} more tokens"
