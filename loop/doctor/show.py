"""`python -m loop show`: prints examples as the loop sees them, supervised tokens coloured."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data.encoding.encode import IGNORE_INDEX, Example
from data.errors import UserError
from data.files.atomic_write import check_output, place_of, written_whole
from loop.config.flags import Config
from loop.config.load import read_config
from loop.config.parser import File, flag
from loop.doctor.page import as_page, page_end
from loop.inputs.training_data import Prepared, prepare
from loop.monitor.formatting import GREEN, PLAIN, in_colour


@dataclass(frozen=True)
class ShowConfig(Config):
    """Training's settings, and how to print."""

    jsonl: bool = flag(False, "one JSON object an example: id, input_ids, labels", "show")
    html: File | None = flag(None, "write a page: tokens that are learnt, and every id", "show")


def main(argv: Sequence[str]) -> None:
    """Print every example; the account of the records goes to stderr."""
    config = read_config(argv, ShowConfig, __doc__ or "")
    _check_page(config)
    prepared = prepare(config)
    examples = prepared.examples
    if config.html:
        account, place = _account(prepared), Path(config.html).expanduser()
        with (
            written_whole(place, "--html") as partial,
            open(partial, "w", encoding="utf-8") as page,
        ):
            page.writelines(as_page(examples, prepared.tokenizer, prepared.source))
            page.write(page_end(account))
        print(account, file=sys.stderr)
        return
    colour = in_colour()
    try:
        for _, group in groupby(examples, key=lambda example: example.record):
            dialogue = [*group]
            if config.jsonl:
                print(as_json(dialogue))
                continue
            for example in dialogue:
                print(as_text(example, prepared.tokenizer, colour))
        sys.stdout.flush()
    except BrokenPipeError:  # `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    print(_account(prepared), file=sys.stderr)


def _check_page(config: ShowConfig) -> None:
    """Refuse a page beside other output, or in place of the data."""
    if config.html is None:
        return
    if config.jsonl:
        raise UserError("found both --jsonl and --html; expected one of them.")
    data = [place_of(Path(source.name).expanduser()) for source in config.sources]
    check_output("--html", Path(config.html).expanduser(), dict.fromkeys(data, "the data"))


def _account(prepared: Prepared) -> str:
    tokens = sum(example.tokens for example in prepared.examples)
    supervised = sum(example.supervised_tokens for example in prepared.examples)
    share = f"{supervised:,} of {tokens:,} tokens supervised ({100 * supervised / tokens:.1f} %)"
    return f"{prepared}; {share}"


def as_json(dialogue: Sequence[Example]) -> str:
    """Return a dialogue as one line of JSON: labels -100 where unsupervised, or its pairs."""
    encoded = [{"input_ids": one.input_ids, "labels": one.labels} for one in dialogue]
    fields = {"pairs": encoded} if dialogue[0].is_pair else encoded[0]
    return json.dumps({"id": dialogue[0].id, **fields}, ensure_ascii=False)


def as_text(example: Example, tokenizer: Any, colour: bool) -> str:
    """Return the decoded example, supervised runs green, or in brackets where there is no colour.

    Each run is what decoding one run more adds: decoded alone it would lose its leading space.
    Of a pair the source is plain, and the target, all of it supervised, has a line of its own.
    """
    before, after = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    if example.is_pair:
        source, target = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (example.input_ids, example.labels)
        )
        return f"--- {example.id}\n{source}\n{before}{target}{after}"
    text, end, decoded = f"--- {example.id}\n", 0, ""
    for supervised, run in groupby(example.labels, key=lambda label: label != IGNORE_INDEX):
        end += len(list(run))
        longer = tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False)
        piece = longer[len(decoded) :]
        text += f"{before}{piece}{after}" if supervised else piece
        decoded = longer
    return text
