"""Finds the base model and encodes the examples: one way for training and for `show`."""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.batching.collate import Collator
from data.dialogues.sharegpt import Dialogue, Tally, read_dialogues
from data.dialogues.sources import files_of, weighted
from data.encoding.cache import Encode, Examples, claimed, encode_in_pieces, in_memory, read_cache
from data.encoding.encode import check_fast, encode_dialogues
from data.encoding.seq2seq import SHORT, PairLimits, encode_pairs
from data.encoding.templates import TemplateName, default_template
from data.encoding.tokenizer import with_fastchat_tokens, with_missing_characters
from data.errors import UserError
from data.files.atomic_write import written_whole
from data.files.hashes import file_sha256
from loop.config.flags import DUMMY_DATA, Config, shown
from loop.distributed.rank_zero import speaks
from loop.model.base import find_base_model, load_tokenizer, read_base_config, tokenizer_sha256
from loop.model.packed_attention import can_pack, row_inputs


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
    return ", ".join(map(shown, config.data_path or [DUMMY_DATA]))


# Settings that decide the encoded data, beside the data itself and the tokenizer.
ENCODING = (
    *("t5_compat", "model_max_length", "max_target_length", "keep_header", "on_bad_record"),
    *("num_data", "seed", "supervise"),
)
# How the causes of dialogues that teach nothing begin.
UNSUPERVISED = ("no supervised token", "no answer", "no pair")


@dataclass(frozen=True)
class Prepared:
    """What a run trains, and on what; `base` is a folder or a hub name.

    new_tokens: ids that the tokenizer was given because it lacked characters.
    packed: whether micro-batches are rows without padding; flash: whether by FlashAttention-2.
    held_out: what is evaluated on, and eval_sources where it is from.
    """

    base: str
    base_config: Any
    tokenizer: Any
    new_tokens: list[int]
    template: TemplateName
    examples: Examples
    source: str
    data_sha256: str
    packed: bool
    flash: bool
    held_out: Examples | None = None
    eval_sources: tuple[str, ...] = ()
    eval_sha256: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """What all machines must have found alike."""
        hashes = {"data": self.data_sha256, "evaluation data": self.eval_sha256}
        return {f"the {name}'s SHA-256": sha256 for name, sha256 in hashes.items() if sha256}

    @property
    def collator(self) -> Collator:
        """How examples become micro-batches of this model."""
        pairs = self.base_config.is_encoder_decoder
        start = self.base_config.decoder_start_token_id if pairs else None
        row = functools.partial(row_inputs, flash=self.flash) if self.packed else None
        return Collator(self.tokenizer.pad_token_id, start, row, sharing=not self.flash)

    def __str__(self) -> str:
        text = f"{self.source}, template {self.template}: {self.examples.tally}"
        if self.held_out is None or self.held_out.tally is self.examples.tally:
            return text
        return f"{text}\nevaluation data: {', '.join(self.eval_sources)}: {self.held_out.tally}"


def prepare(config: Config) -> Prepared:
    """Return tokenizer and examples; raises UserError for a model or data that cannot be used."""
    base = find_base_model(config)
    base_config = read_base_config(base, config)
    tokenizer = load_tokenizer(base, config)
    check_fast(tokenizer)
    new_tokens: list[int] = []
    template = template_of(base, base_config, tokenizer, config)
    check_pairs(base, base_config, config)
    if template == "t5":
        added = with_fastchat_tokens if config.t5_compat else with_missing_characters
        tokenizer, new_tokens = added(tokenizer)
    data_hash = data_sha256(config)
    examples = _examples(config, data_hash, template, tokenizer)
    trained, held_out, eval_hash = examples, None, ""
    if config.eval_fraction:
        trained, held_out = _parted(examples, config.eval_fraction)
    if config.report:
        _write_report(Path(config.report).expanduser(), examples.tally, data_hash)
    _check_account(examples.tally, config)
    if config.eval_data_path:
        kept = config.preprocessed_path and f"{config.preprocessed_path}.eval"
        path = config.eval_data_path
        other = replace(config, data_path=path, num_data=-1, preprocessed_path=kept)
        eval_hash = data_sha256(other)
        held_out = _examples(other, eval_hash, template, tokenizer)
        _check_account(held_out.tally, other)
    source = data_shown(config)
    packed = config.packing and can_pack(base_config)
    return Prepared(
        *(base, base_config, tokenizer, new_tokens, template, trained, source, data_hash),
        *(packed, config.flash_attn, held_out, _source_names(config), eval_hash),
    )


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


def _source_names(config: Config) -> tuple[str, ...]:
    """Return the names of what is evaluated on."""
    return tuple(map(shown, config.eval_data_path or config.data_path or (DUMMY_DATA,)))


def _examples(config: Config, data_hash: str, template: TemplateName, tokenizer: Any) -> Examples:
    """Return the encoded data; one rank a machine makes the file that the others then open.

    They wait for a lock, in no collective, so no time-out counts.
    """
    key = {
        "data": data_hash,
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": f"{template} {tokenizer.chat_template if template == 'chat' else ''}",
        **{f"--{name}": getattr(config, name) for name in ENCODING},
    }
    path, tally = config.preprocessed_path, Tally()
    encode = _encoder(config, template, tokenizer)
    if path is None:
        return in_memory(encode(_shown(config, template, tally), tally), tally)
    kept = read_cache(path, key, silent=not speaks())
    if kept is not None:
        return kept
    with claimed(path):
        kept = read_cache(path, key, silent=True)
        if kept is None:
            encode_in_pieces(path, key, _shown(config, template, tally), encode, tally)
            kept = read_cache(path, key)
    if kept is None:
        raise UserError(f"--preprocessed_path {path}: it changes while it is used. Run again.")
    return kept


def _shown(config: Config, template: TemplateName, tally: Tally) -> Iterator[Dialogue]:
    """Yield the dialogues, with a bar for one rank's work: very much data takes an hour."""
    chosen = _chosen(config, template == "t5", tally)
    return iter(tqdm(chosen, "encoding", unit=" dialogues", disable=None if speaks() else True))


def _encoder(config: Config, template: TemplateName, tokenizer: Any) -> Encode:
    if template != "t5":
        return lambda dialogues, tally: encode_dialogues(
            dialogues, template, tokenizer, config.model_max_length, tally
        )
    target = config.max_target_length or config.model_max_length
    limits = PairLimits(config.model_max_length, target, config.keep_header)
    return lambda dialogues, tally: encode_pairs(
        dialogues, tokenizer, limits, config.t5_compat, tally
    )


def _chosen(config: Config, empty_answers: bool, tally: Tally) -> Iterator[Dialogue]:
    """Yield the dialogues that are asked for, one at a time, however many there are."""

    def read(into: Tally) -> Iterator[tuple[int, Dialogue]]:
        how = (config.on_bad_record, empty_answers, config.supervise)
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
    with written_whole(file, "--report") as partial:
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


def check_pairs(base: str, base_config: Any, config: Config) -> None:
    """Refuse a precision and limits that the model does not have, or that nothing would heed.

    Raises UserError.
    """
    pairs, kind = base_config.is_encoder_decoder, base_config.model_type
    if "t5" in kind and config.precision == "fp16":
        raise UserError(
            f"{base}: found precision fp16 with {kind}, whose activations overflow it; expected "
            "bf16. Give --mixed_precision bf16, or no."
        )
    given = {"max_target_length": config.max_target_length, "keep_header": config.keep_header}
    unheeded = [f"--{name}" for name, value in given.items() if value]
    if unheeded and (config.t5_compat or not pairs):
        why = "--t5_compat True, FastChat's one limit" if pairs else f"{base}, a decoder ({kind})"
        raise UserError(f"found {' and '.join(unheeded)} with {why}. Leave it out.")
    positions = getattr(base_config, "max_position_embeddings", None)
    longest = max(config.model_max_length, config.max_target_length or 0)
    if pairs and positions and longest > positions:
        raise UserError(
            f"{base}: found --model_max_length or --max_target_length {longest} with {kind}, which "
            f"has {positions} positions; expected no more. Give --model_max_length {positions}."
        )


def template_of(base: str, base_config: Any, tokenizer: Any, config: Config) -> TemplateName:
    """Return the template's name, as asked for or as fits the model; raises UserError."""
    pairs = base_config.is_encoder_decoder
    template = config.template or ("t5" if pairs else default_template(tokenizer))
    if pairs != (template == "t5"):
        kind = "an encoder-decoder" if pairs else "a decoder"
        fitting = "t5" if pairs else default_template(tokenizer)
        raise UserError(
            f"--template: found {template} with {base}, {kind} ({base_config.model_type}); "
            f"expected {fitting}. Give --template {fitting}, or leave it out."
        )
    if pairs and base_config.decoder_start_token_id is None:
        raise UserError(
            f"{base}: its config.json has no decoder_start_token_id, with which every answer "
            "begins; expected one. Write it there (T5's is that of the pad token, 0)."
        )
    if config.chat_template and template != "chat":
        raise UserError(
            f"--chat_template {config.chat_template}: found --template {template}, which does "
            "not use it. Leave one of the two out."
        )
    if config.t5_compat and not pairs:
        raise UserError(
            f"--t5_compat: {base} is a decoder ({base_config.model_type}); expected a T5."
        )
    return template
