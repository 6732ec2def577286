"""What the doctor finds in the model's folder and in the data, each part looked at for itself."""

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
from loop.doctor.memory.shape import adapted, bare_model, check_shape, pair_of, trained_biases
from loop.doctor.show import as_text
from loop.inputs.training_data import TrainingData, read_training_data
from loop.model.base import (
    check_pairs,
    check_ties,
    find_base_model,
    load_tokenizer,
    read_base_config,
    template_of,
)
from loop.model.quantization import about_zero3, check_quantization
from loop.monitor.formatting import megabytes

SHOWN, TOKENS = 3, 160  # examples, and of each so many tokens


@dataclass
class Model:
    """What is known of the base model; each is None where something before it is wrong.

    bare: on PyTorch's meta device. targets: its modules that get a LoRA pair, by name.
    """

    base: str | None = None
    base_config: Any = None
    tokenizer: Any = None
    template: TemplateName | None = None
    bare: Any = None
    targets: dict[str, Any] | None = None
    unlike: str = ""  # why memory cannot be estimated

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it."""
        return None not in (self.template, self.targets)

    def trained(self, config: Config) -> int:
        """Return how many parameters are trained, rows of new tokens not counted."""
        targets = self.targets or {}
        pairs = sum(sum(pair_of(module, config)) for module in targets.values())
        return pairs + sum(trained_biases(self.bare, targets, config).values())


def examine_model(config: Config, zero: dict[str, Any], errors: list[str]) -> Model:
    """Return what the model's folder holds; its weights are not needed. Mistakes are added."""
    found = Model()
    with collect_errors(errors):
        found.base = find_base_model(config)
        found.base_config = read_base_config(found.base, config)
    if found.base is None or found.base_config is None:
        return found
    base, base_config = found.base, found.base_config
    with collect_errors(errors):
        tokenizer = load_tokenizer(base, config)
        check_fast(tokenizer)
        found.tokenizer = tokenizer
    if found.tokenizer:
        with collect_errors(errors):
            found.template = template_of(base, base_config, found.tokenizer, config)
    with collect_errors(errors):
        check_pairs(base, base_config, config)
    with collect_errors(errors):
        check_quantization(base, base_config, config, zero)
    with collect_errors(errors):
        check_ties(base, base_config, zero.get("stage") == 3)
    with collect_errors(errors):
        found.bare = bare_model(base, base_config, config)
        found.targets = adapted(found.bare, config)
    try:
        check_shape(base, base_config)
    except UserError as error:
        found.unlike = str(error)
    return found


def weights_of(model: Model) -> int | None:
    """Return the bytes of the weights' files; None for a model of the hub."""
    folder = Path(model.base or "")
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def check_weights(model: Model) -> None:
    """Raise UserError where a trial could not load the weights."""
    if weights_of(model) == 0:
        raise UserError(
            f"--trial: found no weights in {model.base}; expected {' or '.join(WEIGHTS)}. Get "
            "them, or leave --trial out: nothing else needs them."
        )


def model_rows(
    model: Model, config: Config, zero: dict[str, Any], notes: list[str]
) -> list[tuple[str, str]]:
    """Return what the model is, and where the adapter goes."""
    if model.base is None or model.base_config is None:
        return [("base", "not found: see below")]
    kind = "an encoder-decoder" if model.base_config.is_encoder_decoder else "a decoder"
    rows = [("base", f"{display_path(model.base)}: {model.base_config.model_type}, {kind}")]
    size = weights_of(model)
    if size is not None:
        absent = "not here: only training and --trial need them"
        rows.append(("weights", f"{megabytes(size)} on disk" if size else absent))
    if model.bare is None or model.targets is None:
        return rows
    total, trained = sum(p.numel() for p in model.bare.parameters()), model.trained(config)
    share = 100 * trained / (total + trained)  # as training tells it
    rows.append(("parameters", f"{total:,}; trained {trained:,} ({share:.3f} %)"))
    names = {name.rpartition(".")[2] for name in model.targets}
    scale = f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}"
    rows.append(("LoRA", f"{scale} on {' '.join(sorted(names))}: {len(model.targets)} modules"))
    longest = getattr(model.base_config, "max_position_embeddings", None)
    if longest and config.model_max_length > longest:
        notes.append(
            f"--model_max_length {config.model_max_length} is more than the {longest} positions "
            "that the model was trained with"
        )
    return rows + combined(config, zero)


def combined(config: Config, zero: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is to be known of flags that meet a backend; contradictions are mistakes."""
    stage = zero.get("stage", 0)
    backend = f"ZeRO-{stage}" if stage else "no DeepSpeed"
    rows = []
    if config.q_lora:
        # Without DeepSpeed as under ZeRO-1 and -2 each rank holds the 4-bit weights whole.
        text = about_zero3(config) if stage == 3 else f"{backend}: each rank holds all 4-bit codes"
        rows.append(("4 bits", text))
    if config.gradient_checkpointing:
        how = "by the reentrant kind, the one that ZeRO-3 takes" if stage == 3 else "layer by layer"
        rows.append(("checkpointing", f"{backend}: activations are recomputed {how}"))
    return rows


def examine_data(model: Model, config: Config, errors: list[str]) -> TrainingData | None:
    """Return the encoded data; where it is wrong, or the model, each source is read for itself."""
    files, complete = _files(config, errors)
    if model.whole and complete:
        try:
            return read_training_data(config)
        except UserError as error:
            add_errors([str(error)], errors)
    pairs = model.base_config is not None and model.base_config.is_encoder_decoder
    how = (config.on_bad_record, pairs, config.train_on)
    for found in files:
        wrong: list[str] = []
        with collect_errors(wrong):
            deque(read_dialogues(found, Tally(), *how), maxlen=0)
        # Of a folder that tells the first bad file, and the others are wanted, too.
        for file in found if wrong else ():
            with collect_errors(wrong):
                deque(read_file(file, Tally(), *how), maxlen=0)
        add_errors(wrong, errors)
    return None


def _files(config: Config, errors: list[str]) -> tuple[list[list[Path]], bool]:
    """Return the files of each source that has any, and whether all have."""
    named = [("--data_path", word) for word in config.data_path or [str(DUMMY_DATA)]]
    named += [("--eval_data_path", word) for word in config.eval_data_path or ()]
    found = []
    for flag, word in named:
        with collect_errors(errors):
            files = files_of(parse_source(word), config.cache_dir)
            for file in files:
                if not file.is_file():
                    raise UserError(f"{flag} {file}: no such file. Give a path that there is.")
            found.append(files)
    return found, len(found) == len(named)


def data_rows(data: TrainingData, config: Config, page_colour: bool) -> list[tuple[str, str]]:
    """Return the account of the records, lengths, and a few examples with what is learnt."""
    examples = data.examples
    lengths: dict[int, int] = {}
    for example in examples:
        longer = max(example.sides)  # the limit is each side's
        lengths[longer] = lengths.get(longer, 0) + 1
    tokens = sum(example.tokens for example in examples)
    supervised = sum(example.supervised_tokens for example in examples)
    median, most = quantile(lengths, 0.5), max(lengths)
    rows = [
        ("data", str(data)),
        (
            "tokens",
            f"{tokens:,} in {len(examples):,} examples; {median:,} the median, {most:,} the "
            f"longest, {config.model_max_length:,} at most",
        ),
        ("learnt", f"{supervised:,} tokens ({100 * supervised / tokens:.1f} %), as marked below"),
    ]
    places = dict.fromkeys(n * (len(examples) - 1) // (SHOWN - 1) for n in range(SHOWN))
    for number, place in enumerate(places, 1):
        text = "\n".join(_lines(examples[place], data.base.tokenizer, page_colour))
        rows.append((f"example {number}", text))
    return rows


def _lines(example: Example, tokenizer: Any, colour: bool) -> Iterator[str]:
    """Yield the lines of an example's beginning; of a pair the source's end."""
    ids, labels = example.input_ids, example.labels
    left = max(0, len(ids) - TOKENS)
    if example.is_pair:
        cut = dataclasses.replace(example, input_ids=ids[left:], labels=labels[:TOKENS])
    else:
        cut = dataclasses.replace(example, input_ids=ids[:TOKENS], labels=labels[:TOKENS])
    # A line may begin inside of what is marked: nothing is wrapped that is not at least indented.
    for line in as_text(cut, tokenizer, colour).splitlines():
        yield f" {line}" if line.strip() else " "
    if left:
        yield f" ... and {left:,} tokens more"
