"""`python -m loop show`: prints examples as the loop sees them, supervised tokens coloured."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data.encode import IGNORE_INDEX, Example
from loop.config import Config, read_config
from loop.flags import flag
from loop.prepare import prepare

GREEN, PLAIN = "\033[32m", "\033[0m"


@dataclass(frozen=True)
class ShowConfig(Config):
    """Training's settings, and how to print."""

    jsonl: bool = flag(False, "one JSON object an example: id, input_ids, labels", "show")


def main(argv: Sequence[str]) -> None:
    """Print every example; the account of the records goes to stderr."""
    config = read_config(argv, ShowConfig, __doc__ or "")
    prepared = prepare(config)
    examples = prepared.examples
    colour = "FORCE_COLOR" in os.environ or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    try:
        for example in examples:
            print(
                as_json(example) if config.jsonl else as_text(example, prepared.tokenizer, colour)
            )
        sys.stdout.flush()
    except BrokenPipeError:  # `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    tokens = sum(len(example.input_ids) for example in examples)
    supervised = sum(example.supervised_tokens for example in examples)
    share = f"{supervised:,} of {tokens:,} tokens supervised ({100 * supervised / tokens:.1f} %)"
    print(f"{prepared}; {share}", file=sys.stderr)


def as_json(example: Example) -> str:
    """Return the example as one line of JSON, labels -100 where unsupervised."""
    fields = {"id": example.id, "input_ids": example.input_ids, "labels": example.labels}
    return json.dumps(fields, ensure_ascii=False)


def as_text(example: Example, tokenizer: Any, colour: bool) -> str:
    """Return the decoded example, supervised runs green, or in brackets where there is no colour.

    Each run is what decoding one run more adds: decoded alone it would lose its leading space.
    """
    before, after = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    text, end, decoded = f"--- {example.id}\n", 0, ""
    for supervised, run in groupby(example.labels, key=lambda label: label != IGNORE_INDEX):
        end += len(list(run))
        longer = tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False)
        piece = longer[len(decoded) :]
        text += f"{before}{piece}{after}" if supervised else piece
        decoded = longer
    return text
