"""Reads and encodes the training and evaluation data, for training, `show` and the doctor."""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.batching.collate import Collator
from data.dialogues.conversation import Dialogue
from data.dialogues.keys import is_meaningful
from data.dialogues.sharegpt import Tally, read_dialogues
from data.dialogues.sources import files_of, weighted
from data.encoding.cache import (
    Encode,
    Examples,
    encode_in_pieces,
    in_memory,
    locked_cache,
    read_cache,
)
from data.encoding.encode import encode_dialogues
from data.encoding.seq2seq import SHORT, PairLimits, encode_pairs
from data.encoding.templates import TemplateName
from data.errors import UserError
from data.files.atomic_write import written_whole
from data.files.hashes import HASH_VERSION, file_sha256, value_sha256
from loop.config.flags import DUMMY_DATA, Config, display_path, names_of
from loop.distributed.rank_zero import is_rank0
from loop.model.base import BaseModel, model_end_ids, read_base_model, tokenizer_sha256
from loop.model.packed_attention import row_inputs


def data_sha256(config: Config, hash_version: int = HASH_VERSION) -> str:
    """Return the hash of the data sources: each source's weight and the SHA-256 of its files.

    hash_version: that of a checkpoint or run to compare with. A file next to --preprocessed_path
    caches the files' hashes. Raises UserError for an unreadable file.
    """
    hash_cache = None
    if config.preprocessed_path:
        cache = Path(config.preprocessed_path).expanduser()
        hash_cache = cache.with_name(f".{cache.name}.hashes")
    sources = [
        (
            float(source.weight),
            [file_sha256(file, hash_cache) for file in files_of(source, config.cache_dir)],
        )
        for source in config.sources
    ]
    if hash_version == 1:
        return _data_sha256_1(sources)
    return value_sha256("data", sources)


def _data_sha256_1(sources: list[tuple[float, list[str]]]) -> str:
    """Return the data's hash of version 1, in which sources have no boundaries."""
    hashes: list[str] = []
    for weight, files in sources:
        hashes += files + ([f"x {weight}"] if weight != 1.0 else [])
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(str(hashes).encode()).hexdigest()


def data_sources(config: Config) -> list[list[float]]:
    """Return [number of files, weight] of each data source.

    Together with the hash they identify the data: `folder:0.5` takes half of each file, and
    `folder/a.json folder/b.json:0.5` half of the last one.
    """
    return [[len(files_of(source, config.cache_dir)), source.weight] for source in config.sources]


def _data_names(config: Config) -> str:
    """Return the names of the data sources for display."""
    return ", ".join(map(display_path, config.data_path or [DUMMY_DATA]))


# A dialogue without a supervised token is dropped for a cause that starts with one of these.
UNSUPERVISED_CAUSES = ("no supervised token", "no answer", "no pair")


@dataclass(frozen=True)
class TrainingData:
    """The encoded examples of one run, and the base model whose tokenizer encoded them.

    source: the names of the data sources. sha256: the data files' hash. source_sizes: see
    `data_sources`. held_out: the evaluation examples, read from eval_sources.
    """

    base: BaseModel
    examples: Examples
    source: str
    sha256: str
    held_out: Examples | None = None
    eval_sources: tuple[str, ...] = ()
    eval_sha256: str = ""
    source_sizes: tuple[list[float], ...] = ()

    @property
    def facts(self) -> dict[str, str]:
        """Hashes that must be equal on all ranks, by name."""
        hashes = {"data": self.sha256, "evaluation data": self.eval_sha256}
        return {f"the {name}'s SHA-256": sha256 for name, sha256 in hashes.items() if sha256}

    @property
    def collator(self) -> Collator:
        """The object that collates examples into micro-batches for this model."""
        base = self.base
        start = base.config.decoder_start_token_id if base.config.is_encoder_decoder else None
        row = functools.partial(row_inputs, flash=base.flash) if base.packed else None
        # The loss does not depend on pads, so a model without a row for its pad gets another id.
        pad = base.tokenizer.pad_token_id
        rows = base.embedding_rows
        return Collator(0 if rows and pad >= rows else pad, start, row, base.sharing)

    @property
    def end_ids(self) -> list[int]:
        """The ids of the tokens that close answers in the data, and of the tokenizer's EOS."""
        tokenizer = self.base.tokenizer
        closers = map(tokenizer.convert_tokens_to_ids, self.examples.tally.closers)
        return sorted({*closers, tokenizer.eos_token_id})

    @property
    def end_note(self) -> str:
        """A warning if generation with the base model's settings would not stop; else empty."""
        ends = model_end_ids(self.base.config, self.base.name)
        closers = self.examples.tally.closers
        ids = {self.base.tokenizer.convert_tokens_to_ids(name) for name in closers}
        if not ids or not ends or ids & ends:
            return ""
        expected = ", ".join(map(repr, self.base.tokenizer.convert_ids_to_tokens(sorted(ends))))
        found = " or ".join(map(repr, sorted(closers)))
        return (
            f"\nnote: answers end with {found}, but the model's eos_token_id is {expected}. chat, "
            "samples and merge of this project stop at both; set eos_token_id in other programs."
        )

    def __str__(self) -> str:
        return self._account() + self.end_note

    def _account(self) -> str:
        text = f"{self.source}, template {self.base.template}: {self.examples.tally}"
        if self.held_out is None or self.held_out.tally is self.examples.tally:
            return text
        return f"{text}\nevaluation data: {', '.join(self.eval_sources)}: {self.held_out.tally}"


def read_training_data(config: Config) -> TrainingData:
    """Return the training and evaluation examples; raises UserError for unusable data."""
    base = read_base_model(config)
    sha256 = data_sha256(config)
    examples = _encode_or_read_cache(config, base, sha256)
    _check_ids(examples, base)
    trained, held_out, eval_sha256 = examples, None, ""
    if config.eval_fraction:
        trained, held_out = _split_held_out(examples, config.eval_fraction)
    if config.data_report:
        _write_report(Path(config.data_report).expanduser(), examples.tally, sha256)
    _check_dropped(examples.tally, config)
    if config.eval_data_path:
        held_out, eval_sha256 = _read_eval_data(config, base)
    names = tuple(map(display_path, config.eval_data_path or config.data_path or (DUMMY_DATA,)))
    source = _data_names(config)
    sizes = tuple(data_sources(config))
    return TrainingData(base, trained, source, sha256, held_out, names, eval_sha256, sizes)


def _read_eval_data(config: Config, base: BaseModel) -> tuple[Examples, str]:
    """Return the examples of --eval_data_path, and the hash of its files."""
    cache = config.preprocessed_path and f"{config.preprocessed_path}.eval"
    path = config.eval_data_path
    config = replace(config, data_path=path, num_data=-1, preprocessed_path=cache)
    sha256 = data_sha256(config)
    examples = _encode_or_read_cache(config, base, sha256)
    _check_ids(examples, base)
    _check_dropped(examples.tally, config)
    return examples, sha256


def _check_ids(examples: Examples, base: BaseModel) -> None:
    """Raise UserError for a token id that has no row in the model's embedding."""
    largest, example = examples.largest_id()
    rows = base.embedding_rows
    if rows and largest >= rows:
        token = base.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{base.name}: found token id {largest} ({token!r}) in the example {example}; expected "
            f"ids below {rows}, the rows of the model's embedding. Give a tokenizer or a chat "
            "template without this token, or add rows: model.resize_token_embeddings("
            f"{largest + 1}), then model.save_pretrained."
        )


def _split_held_out(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Return the training and the held-out examples; raises UserError if one of them is empty."""
    trained, held_out = examples.held_out(fraction)
    if not trained or not held_out:
        raise UserError(
            f"--eval_fraction {fraction:g}: found {len(held_out)} of {len(examples)} examples held "
            "out; expected some, and some to train on. Give another fraction, or --eval_data_path."
        )
    examples.tally.noted["examples held out for evaluation"] = len(held_out)
    return trained, held_out


def _encode_or_read_cache(config: Config, base: BaseModel, sha256: str) -> Examples:
    """Return the encoded data, from --preprocessed_path if that cache has the same key.

    One rank per machine writes the cache. The other ranks wait for a file lock. In a collective
    they could time out while the data is encoded.
    """
    template, tokenizer = base.template, base.tokenizer
    key = {
        "data": sha256,
        "sources": data_sources(config),
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": f"{template} {tokenizer.chat_template if template == 'chat' else ''}",
        **{f"--{name}": getattr(config, name) for name in names_of(affects="encoding")},
    }
    path, tally = config.preprocessed_path, Tally()
    encode = _encoder(config, base)
    if path is None:
        return in_memory(encode(_with_progress_bar(config, template, tally), tally), tally)
    cached = read_cache(path, key, silent=not is_rank0())
    if cached is not None:
        return cached
    with locked_cache(path):
        cached = read_cache(path, key, silent=True)
        if cached is None:
            dialogues = _with_progress_bar(config, template, tally)
            encode_in_pieces(path, key, dialogues, encode, tally)
            cached = read_cache(path, key)
    if cached is None:
        raise UserError(
            f"--preprocessed_path {path}: another process changes this file. Run again when that "
            "process has ended."
        )
    return cached


def _encoder(config: Config, base: BaseModel) -> Encode:
    """Return the function that encodes dialogues for a decoder, or as pairs for a T5."""
    how = config.rendering, config.on_bad_record
    if base.template != "t5":
        return lambda dialogues, tally: encode_dialogues(
            dialogues, base.template, base.tokenizer, config.model_max_length, tally, *how
        )
    target = config.max_target_length or config.model_max_length
    limits = PairLimits(config.model_max_length, target, config.keep_header)
    return lambda dialogues, tally: encode_pairs(
        dialogues, base.tokenizer, limits, config.t5_compat, tally, *how
    )


def _with_progress_bar(config: Config, template: TemplateName, tally: Tally) -> Iterator[Dialogue]:
    """Yield the selected dialogues, with a progress bar on rank 0."""
    selected = select_dialogues(config, template == "t5", tally)
    return iter(tqdm(selected, "encoding", unit=" dialogues", disable=None if is_rank0() else True))


def select_dialogues(config: Config, empty_answers: bool, tally: Tally) -> Iterator[Dialogue]:
    """Yield the dialogues of all sources, or a random selection of --num_data dialogues."""
    selected = None
    if config.num_data >= 0:
        count = sum(1 for _ in _read_sources(config, empty_answers, Tally()))
        order = np.random.default_rng(config.seed).permutation(count)
        selected = {*order[: config.num_data].tolist()}
    tally.sources = [0] * len(config.sources)
    for place, (source, dialogue) in enumerate(_read_sources(config, empty_answers, tally)):
        if selected is None or place in selected:
            tally.sources[source] += 1
            yield dialogue
        else:
            tally.drop("beyond num_data", dialogue.id)


def _read_sources(
    config: Config, empty_answers: bool, tally: Tally
) -> Iterator[tuple[int, Dialogue]]:
    """Yield each dialogue with its source's number, as often as the source's weight requires."""
    settings = (config.on_bad_record, empty_answers, config.train_on)
    for number, source in enumerate(config.sources):
        dialogues = read_dialogues(files_of(source, config.cache_dir), tally, *settings)
        if source.weight != 1.0:
            dialogues = weighted(dialogues, source.weight, [config.seed, number], tally)
        for dialogue in dialogues:
            yield number, dialogue


def _write_report(file: Path, tally: Tally, data_hash: str) -> None:
    """Write the counts of all records. Call this before `_check_dropped`, which may raise."""
    dropped = {
        cause: {"count": count, "first": tally.named.get(cause, [])}
        for cause, count in tally.dropped.items()
    }
    account = {**vars(tally), "dropped": dropped, "data_sha256": data_hash}
    del account["named"], account["sources"]
    with written_whole(file, "--data_report") as partial:
        text = json.dumps(account, indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def _check_dropped(tally: Tally, config: Config) -> None:
    """Raise UserError if too many dialogues were dropped without a supervised token."""
    if tally.read != tally.kept + tally.dropped.total():
        raise RuntimeError(f"the counts of read, kept and dropped records do not add up: {tally}")
    lost = max((n for key, n in tally.unused.items() if is_meaningful(key)), default=0)
    if lost > config.max_dropped * tally.read:
        raise UserError(
            f"{_data_names(config)}: found {lost} of {tally.read} records with a key that changes "
            f"their meaning and is not used; expected at most {config.max_dropped:.1%}. {tally}. "
            "Remove the key from the records, or allow more with --max_dropped."
        )
    dropped = sum(n for cause, n in tally.dropped.items() if cause.startswith(UNSUPERVISED_CAUSES))
    share = dropped / max(1, tally.kept + dropped)
    if share > config.max_dropped or not tally.kept:
        raise UserError(
            f"{_data_names(config)}: found {dropped} of {tally.kept + dropped} dialogues "
            f"({share:.1%}) without a supervised token; expected at most {config.max_dropped:.1%}. "
            f"{tally}. Correct the data ({SHORT} of a T5's), give a larger --model_max_length, or "
            "allow more with --max_dropped."
        )
