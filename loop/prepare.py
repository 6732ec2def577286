"""Finds the base model and encodes the examples: one way for training and for `show`."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache import read_cache, write_cache
from data.collate import Collator
from data.encode import Example, encode_dialogues
from data.errors import UserError
from data.pairs import PairLimits, encode_pairs
from data.sharegpt import Tally, read_dialogues
from data.templates import TemplateName, default_template
from data.tokens import with_fastchat_tokens, with_missing_characters
from loop.base import find_base_model, load_tokenizer, read_base_config, tokenizer_sha256
from loop.config import Config, file_sha256, shown

# Settings that decide the encoded data, beside the data itself and the tokenizer.
ENCODING = (
    *("t5_compat", "model_max_length", "max_target_length", "keep_header", "on_bad_record"),
    *("num_data", "seed"),
)


@dataclass(frozen=True)
class Prepared:
    """What a run trains, and on what; `base` is a folder or a hub name.

    new_tokens: ids that the tokenizer was given because it lacked characters.
    """

    base: str
    base_config: Any
    tokenizer: Any
    new_tokens: list[int]
    template: TemplateName
    examples: list[Example]
    tally: Tally
    source: str
    data_sha256: str

    @property
    def collator(self) -> Collator:
        """How examples become micro-batches of this model."""
        pairs = self.base_config.is_encoder_decoder
        start = self.base_config.decoder_start_token_id if pairs else None
        return Collator(self.tokenizer.pad_token_id, start)

    def __str__(self) -> str:
        return f"{self.source}, template {self.template}: {self.tally}"


def prepare(config: Config) -> Prepared:
    """Return tokenizer and examples; raises UserError for a model or data that cannot be used."""
    base = find_base_model(config)
    base_config = read_base_config(base, config)
    tokenizer = load_tokenizer(base, config)
    new_tokens: list[int] = []
    template = _template(base, base_config, tokenizer, config)
    if template == "t5":
        added = with_fastchat_tokens if config.t5_compat else with_missing_characters
        tokenizer, new_tokens = added(tokenizer)
    data_sha256 = file_sha256(config.data_file)
    key = {
        "data": data_sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": f"{template} {tokenizer.chat_template if template == 'chat' else ''}",
        **{f"--{name}": getattr(config, name) for name in ENCODING},
    }
    cached = read_cache(config.preprocessed_path, key) if config.preprocessed_path else None
    examples, tally = cached or _encode(config, template, tokenizer)
    # One rank a machine writes; the others have encoded the same meanwhile, so none waits.
    if config.preprocessed_path and not cached and os.environ.get("LOCAL_RANK", "0") == "0":
        write_cache(config.preprocessed_path, key, examples, tally)
    source = shown(config.data_file)
    return Prepared(
        *(base, base_config, tokenizer, new_tokens, template, examples, tally, source, data_sha256)
    )


def _encode(config: Config, template: TemplateName, tokenizer: Any) -> tuple[list[Example], Tally]:
    pairs = template == "t5"
    dialogues, tally = read_dialogues(config.data_file, config.on_bad_record, empty_answers=pairs)
    if 0 <= config.num_data < len(dialogues):
        tally.drop("beyond num_data", len(dialogues) - config.num_data)
        order = np.random.default_rng(config.seed).permutation(len(dialogues))
        dialogues = [dialogues[i] for i in sorted(order[: config.num_data])]
    if not pairs:
        longest = config.model_max_length
        return encode_dialogues(dialogues, template, tokenizer, longest, tally), tally
    target = config.max_target_length or config.model_max_length
    limits = PairLimits(config.model_max_length, target, config.keep_header)
    return encode_pairs(dialogues, tokenizer, limits, config.t5_compat, tally), tally


def _template(base: str, base_config: Any, tokenizer: Any, config: Config) -> TemplateName:
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
    if config.t5_compat and not pairs:
        raise UserError(
            f"--t5_compat: {base} is a decoder ({base_config.model_type}); expected a T5."
        )
    return template
