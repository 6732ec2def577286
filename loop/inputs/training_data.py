"""Finds the base model and encodes the examples: one way for training and for `show`."""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.batching.collate import Collator
from data.dialogues.sharegpt import Dialogue, Tally, read_dialogues
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
from data.files.hashes import file_sha256
from loop.config.flags import DUMMY_DATA, Config, display_path, names_of
from loop.distributed.rank_zero import is_rank0
from loop.model.base import BaseModel, read_base_model, tokenizer_sha256
from loop.model.packed_attention import row_inputs


def data_sha256(config: Config) -> str:
    """Return the SHA-256 of the data's file, or of the hashes of several and of their weights.

    Beside --preprocessed_path they are remembered. Raises UserError where a file cannot be read.
    """
    hashes, memory = [], None
    if config.preprocessed_path:
        kept = Path(config.preprocessed_path).expanduser()
        memory = kept.with_name(f".{kept.name}.hashes")
    for source in config.sources:
        hashes += [file_sha256(file, memory) for file in files_of(source, config.cache_dir)]
        hashes += [f"x {source.weight}"] if source.weight != 1.0 else []
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(str(hashes).encode()).hexdigest()


def data_shown(config: Config) -> str:
    """Return the names of the data as a person reads them."""
    return ", ".join(map(display_path, config.data_path or [DUMMY_DATA]))


# How the causes of dialogues that teach nothing begin.
UNSUPERVISED = ("no supervised token", "no answer", "no pair")


@dataclass(frozen=True)
class TrainingData:
    """The encoded examples of one run, and the base model whose tokenizer encoded them.

    source: the data's names; sha256: of its files. held_out: the examples of the evaluation, from
    eval_sources.
    """

    base: BaseModel
    examples: Examples
    source: str
    sha256: str
    held_out: Examples | None = None
    eval_sources: tuple[str, ...] = ()
    eval_sha256: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """What must be equal on all machines."""
        hashes = {"data": self.sha256, "evaluation data": self.eval_sha256}
        return {f"the {name}'s SHA-256": sha256 for name, sha256 in hashes.items() if sha256}

    @property
    def collator(self) -> Collator:
        """The function that makes micro-batches of this model's examples."""
        base = self.base
        start = base.config.decoder_start_token_id if base.config.is_encoder_decoder else None
        row = functools.partial(row_inputs, flash=base.flash) if base.packed else None
        return Collator(base.tokenizer.pad_token_id, start, row, sharing=not base.flash)

    def __str__(self) -> str:
        text = f"{self.source}, template {self.base.template}: {self.examples.tally}"
        if self.held_out is None or self.held_out.tally is self.examples.tally:
            return text
        return f"{text}\nevaluation data: {', '.join(self.eval_sources)}: {self.held_out.tally}"


def read_training_data(config: Config) -> TrainingData:
    """Return the examples to train on and to evaluate on; raises UserError for unusable data."""
    base = read_base_model(config)
    sha256 = data_sha256(config)
    examples = _encoded(config, base, sha256)
    trained, held_out, eval_sha256 = examples, None, ""
    if config.eval_fraction:
        trained, held_out = _parted(examples, config.eval_fraction)
    if config.data_report:
        _write_report(Path(config.data_report).expanduser(), examples.tally, sha256)
    _check_account(examples.tally, config)
    if config.eval_data_path:
        held_out, eval_sha256 = _evaluation_data(config, base)
    names = tuple(map(display_path, config.eval_data_path or config.data_path or (DUMMY_DATA,)))
    source = data_shown(config)
    return TrainingData(base, trained, source, sha256, held_out, names, eval_sha256)


def _evaluation_data(config: Config, base: BaseModel) -> tuple[Examples, str]:
    """Return the examples of --eval_data_path, and the hash of its files."""
    cache = config.preprocessed_path and f"{config.preprocessed_path}.eval"
    path = config.eval_data_path
    config = replace(config, data_path=path, num_data=-1, preprocessed_path=cache)
    sha256 = data_sha256(config)
    examples = _encoded(config, base, sha256)
    _check_account(examples.tally, config)
    return examples, sha256


def _parted(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Return what is trained on and what is held out; raises UserError where one is empty."""
    trained, held_out = examples.held_out(fraction)
    if not trained or not held_out:
        raise UserError(
            f"--eval_fraction {fraction:g}: found {len(held_out)} of {len(examples)} examples held "
            "out; expected some, and some to train on. Give another fraction, or --eval_data_path."
        )
    examples.tally.noted["examples held out for evaluation"] = len(held_out)
    return trained, held_out


def _encoded(config: Config, base: BaseModel, sha256: str) -> Examples:
    """Return the encoded data; one rank a machine makes the file that the others then open.

    They wait for a lock, in no collective, so no time-out counts.
    """
    template, tokenizer = base.template, base.tokenizer
    key = {
        "data": sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": f"{template} {tokenizer.chat_template if template == 'chat' else ''}",
        **{f"--{name}": getattr(config, name) for name in names_of(affects="encoding")},
    }
    path, tally = config.preprocessed_path, Tally()
    encode = _encoder(config, base)
    if path is None:
        return in_memory(encode(_shown(config, template, tally), tally), tally)
    cached = read_cache(path, key, silent=not is_rank0())
    if cached is not None:
        return cached
    with locked_cache(path):
        cached = read_cache(path, key, silent=True)
        if cached is None:
            encode_in_pieces(path, key, _shown(config, template, tally), encode, tally)
            cached = read_cache(path, key)
    if cached is None:
        raise UserError(f"--preprocessed_path {path}: it changes while it is used. Run again.")
    return cached


def _encoder(config: Config, base: BaseModel) -> Encode:
    if base.template != "t5":
        return lambda dialogues, tally: encode_dialogues(
            dialogues, base.template, base.tokenizer, config.model_max_length, tally
        )
    target = config.max_target_length or config.model_max_length
    limits = PairLimits(config.model_max_length, target, config.keep_header)
    return lambda dialogues, tally: encode_pairs(
        dialogues, base.tokenizer, limits, config.t5_compat, tally
    )


def _shown(config: Config, template: TemplateName, tally: Tally) -> Iterator[Dialogue]:
    """Yield the dialogues, with a bar for one rank's work: very much data takes an hour."""
    chosen = _chosen(config, template == "t5", tally)
    return iter(tqdm(chosen, "encoding", unit=" dialogues", disable=None if is_rank0() else True))


def _chosen(config: Config, empty_answers: bool, tally: Tally) -> Iterator[Dialogue]:
    """Yield the dialogues that are asked for, one at a time, however many there are."""

    def read(into: Tally) -> Iterator[tuple[int, Dialogue]]:
        how = (config.on_bad_record, empty_answers, config.train_on)
        for number, source in enumerate(config.sources):
            found = read_dialogues(files_of(source, config.cache_dir), into, *how)
            weighs = source.weight != 1.0
            taken = weighted(found, source.weight, [config.seed, number], into) if weighs else found
            for dialogue in taken:
                yield number, dialogue

    chosen = None
    if config.num_data >= 0:
        count = sum(1 for _ in read(Tally()))
        order = np.random.default_rng(config.seed).permutation(count)
        chosen = {*order[: config.num_data].tolist()}
    tally.sources = [0] * len(config.sources)
    for place, (number, dialogue) in enumerate(read(tally)):
        if chosen is None or place in chosen:
            tally.sources[number] += 1
            yield dialogue
        else:
            tally.drop("beyond num_data", dialogue.id)


def _write_report(file: Path, tally: Tally, data_hash: str) -> None:
    """Write the account of all records, also where it is about to be refused."""
    dropped = {
        cause: {"count": count, "first": tally.named.get(cause, [])}
        for cause, count in tally.dropped.items()
    }
    account = {**vars(tally), "dropped": dropped, "data_sha256": data_hash}
    del account["named"], account["sources"]
    with written_whole(file, "--data_report") as partial:
        text = json.dumps(account, indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def _check_account(tally: Tally, config: Config) -> None:
    """Refuse data of which too much teaches nothing, or that does not add up."""
    if tally.read != tally.kept + tally.dropped.total():
        raise RuntimeError(f"records are lost: {tally}")
    useless = sum(n for cause, n in tally.dropped.items() if cause.startswith(UNSUPERVISED))
    share = useless / max(1, tally.kept + useless)
    if share > config.max_dropped or not tally.kept:
        raise UserError(
            f"{data_shown(config)}: {useless} of {tally.kept + useless} dialogues ({share:.1%}) "
            f"have nothing to learn; expected {config.max_dropped:.1%} at most. {tally}. Mend the "
            f"data ({SHORT} of a T5's), give a larger --model_max_length, or allow more by "
            "--max_dropped."
        )
