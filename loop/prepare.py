"""Finds the base model and encodes the examples: one way for training and for `show`."""

from dataclasses import dataclass
from typing import Any

from data.encode import Example, encode_dialogues
from data.sharegpt import Tally, read_dialogues
from data.templates import default_template
from loop.base import find_base_model, load_tokenizer
from loop.config import Config, file_sha256, shown


@dataclass(frozen=True)
class Prepared:
    """What a run trains, and on what; `base` is a folder or a hub name."""

    base: str
    tokenizer: Any
    template: str
    examples: list[Example]
    tally: Tally
    source: str
    data_sha256: str

    def __str__(self) -> str:
        return f"{self.source}, template {self.template}: {self.tally}"


def prepare(config: Config) -> Prepared:
    """Return tokenizer and examples; raises UserError for a model or data that cannot be used."""
    base = find_base_model(config)
    tokenizer = load_tokenizer(base, config)
    data_sha256 = file_sha256(config.data_file)
    template = config.template or default_template(tokenizer)
    dialogues, tally = read_dialogues(config.data_file, config.on_bad_record)
    if config.num_data >= 0:
        for _ in dialogues[config.num_data :]:
            tally.drop("beyond num_data")
        dialogues = dialogues[: config.num_data]
    examples = encode_dialogues(dialogues, template, tokenizer, config.model_max_length, tally)
    source = shown(config.data_file)
    return Prepared(base, tokenizer, template, examples, tally, source, data_sha256)
