"""`python -m loop show`: prints encoded examples with their supervised tokens marked."""

import html
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from data.encoding.encode import IGNORE_INDEX, Example
from data.errors import UserError
from data.files.atomic_write import check_output, place_of, written_whole
from loop.config.flags import Config
from loop.config.load import read_config
from loop.config.parser import File, flag
from loop.doctor.answer_parts import Part, with_parts
from loop.doctor.show_turn import examples_of_turn
from loop.inputs.training_data import read_training_data
from loop.model.base import BaseModel, read_base_model
from loop.monitor.formatting import CYAN, GREEN, PLAIN, YELLOW, in_colour

COLOURS: dict[Part, str] = {"reasoning": YELLOW, "tool calls": CYAN, "answer": GREEN}
CONTEXT_TOKENS = 4  # decoded before a token, whose leading space depends on them
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes; each may be a token
REPLACEMENT_CHARACTER = "\ufffd"
HTML_ALTERS = {"\0": "\u2400", "\r": "&#13;"}  # characters that HTML would change
STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#5a5a5a;--trained:#0b5a28;--mark:#d9f2e0;
--line:#c8c8c8}
@media(prefers-color-scheme:dark){:root{--back:#16181a;--text:#a8acb0;--trained:#9be8b4;
--mark:#17361f;--line:#44484c}}
body{background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;margin:2em auto;
max-width:60em;padding:0 1em}
h2{font-size:1em;margin:2em 0 .3em;overflow-wrap:anywhere}
pre{border:1px solid var(--line);border-radius:4px;padding:.7em;margin:.3em 0;
white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.7 ui-monospace,monospace}
b,i{font-weight:400;font-style:normal}
b{background:var(--mark);color:var(--trained);text-decoration:underline dotted;
text-underline-offset:.25em}
pre:hover b,pre:hover i{box-shadow:inset 1px 0 var(--line)}
pre b:hover,pre i:hover{outline:1px solid currentColor}
.n::before{content:"\\21b5";opacity:.45}
footer{border-top:1px solid var(--line);margin-top:3em;padding-top:1em}
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
<p><b>Marked tokens</b> are supervised, <i>others</i> are context. Hover a token for its id.</p>
"""


def as_page(examples: Iterable[Example], tokenizer: Any, title: str) -> Iterator[str]:
    """Yield the HTML page in pieces, without its end (see page_end)."""
    yield HEAD.format(title=_escaped(title), style=STYLE)
    for _, group in groupby(examples, key=lambda example: example.record):
        dialogue = [*group]
        yield f"<h2>{_escaped(dialogue[0].id)}</h2>\n"
        for example in dialogue:
            if example.is_pair:
                unsupervised_prefix = [IGNORE_INDEX] * len(example.input_ids)
                yield _block(example.input_ids, unsupervised_prefix, tokenizer)
                yield _block(example.labels, example.labels, tokenizer)
            else:
                yield _block(example.input_ids, example.labels, tokenizer)


def page_end(account: str) -> str:
    """Return the end of the HTML page, with the counts of all records."""
    return f"<footer>{_escaped(account)}</footer>\n</body></html>\n"


def pieces(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, int, str]]:
    """Yield (begin, end, text) for each token; tokens that form one character come together.

    The concatenated texts are the decoded sequence. Each token is decoded together with the tokens
    before it, since a token decoded alone would lose its leading space.
    """
    decode = tokenizer.backend_tokenizer.decode
    begin = 0
    for end in range(1, len(ids) + 1):
        context = max(0, begin - CONTEXT_TOKENS)
        text = decode(ids[context:end], skip_special_tokens=False)
        incomplete = text.endswith(REPLACEMENT_CHARACTER) and end - begin < MAX_CHARACTER_TOKENS
        if incomplete and end < len(ids):
            continue
        before = decode(ids[context:begin], skip_special_tokens=False)
        yield begin, end, text[len(before) :]
        begin = end


def _block(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    tokens = []
    for begin, end, text in pieces(ids, tokenizer):
        supervised = any(label != IGNORE_INDEX for label in labels[begin:end])
        tag, breaks = "b" if supervised else "i", ' class="n"' if "\n" in text else ""
        numbers = " ".join(map(str, ids[begin:end]))
        tokens.append(f'<{tag}{breaks} title="{numbers}">{_escaped(text)}</{tag}>')
    # Browsers drop a newline directly after <pre>. Without this one, they drop the text's own.
    return f"<pre>\n{''.join(tokens)}</pre>\n"


def _escaped(text: str) -> str:
    escaped = html.escape(text.encode("utf-8", "replace").decode())
    for character, shown in HTML_ALTERS.items():
        escaped = escaped.replace(character, shown)
    return escaped


@dataclass(frozen=True)
class ShowConfig(Config):
    """The settings of training, and the format of the output."""

    jsonl: bool = flag(False, "print a JSON object per example: id, input_ids, labels", "show")
    turn: int | None = flag(
        None,
        "show one answer after its generation prompt, as --multi_turn each makes it: the index of "
        "its message; none: show all",
        "show",
    )
    html: File | None = flag(None, "write an HTML page with all tokens and ids", "show")


def main(argv: Sequence[str]) -> None:
    """Print every example to stdout, and the counts of the records to stderr."""
    config = read_config(argv, ShowConfig, __doc__ or "")
    _check_page(config)
    turn = config.turn
    if turn is None:
        data = read_training_data(config)
        examples: Sequence[Example] = data.examples
        base, source = data.base, data.source
        account = _account(str(data), examples)
    else:
        config = replace(config, multi_turn="each")
        base, source = read_base_model(config), f"turn {turn}"
        examples = [*examples_of_turn(config, base, turn)]
        account = _account(f"turn {turn}: {len(examples):,} answers", examples)
    if config.html:
        place = Path(config.html).expanduser()
        with (
            written_whole(place, "--html") as partial,
            open(partial, "w", encoding="utf-8") as page,
        ):
            page.writelines(as_page(examples, base.tokenizer, source))
            page.write(page_end(account))
        print(account, file=sys.stderr)
        return
    try:
        for text in _printed(config, base, examples):
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    print(account, file=sys.stderr)


def _printed(config: ShowConfig, base: BaseModel, examples: Sequence[Example]) -> Iterator[str]:
    """Yield the texts to print: JSON, or decoded examples, in colour after a legend."""
    if config.jsonl:
        for _, group in groupby(examples, key=lambda example: example.record):
            dialogue = [*group]
            parts = [dialogue] if dialogue[0].turn is None else [[one] for one in dialogue]
            yield from map(as_json, parts)
    elif in_colour() and base.template == "chat":
        legend = ", ".join(f"{colour}{part}{PLAIN}" for part, colour in COLOURS.items())
        yield f"supervised: {legend}"
        for example, parts_of_tokens in with_parts(config, base, examples):
            yield as_text(example, base.tokenizer, True, parts_of_tokens)
    else:
        colour = in_colour()
        yield from (as_text(example, base.tokenizer, colour) for example in examples)


def _check_page(config: ShowConfig) -> None:
    """Raise UserError for --html with --jsonl, or for a page that would replace the data."""
    if config.html is None:
        return
    if config.jsonl:
        raise UserError("found both --jsonl and --html; expected one. Leave one of them out.")
    data = [place_of(Path(source.name).expanduser()) for source in config.sources]
    check_output("--html", Path(config.html).expanduser(), dict.fromkeys(data, "the data"))


def _account(counts: str, examples: Sequence[Example]) -> str:
    tokens = sum(example.tokens for example in examples)
    supervised = sum(example.supervised_tokens for example in examples)
    share = f"{supervised:,} of {tokens:,} tokens supervised ({100 * supervised / tokens:.1f} %)"
    return f"{counts}; {share}"


def as_json(dialogue: Sequence[Example]) -> str:
    """Return a dialogue, or its pairs, as one line of JSON; unsupervised labels are -100."""
    encoded = [{"input_ids": one.input_ids, "labels": one.labels} for one in dialogue]
    fields = {"pairs": encoded} if dialogue[0].is_pair else encoded[0]
    turn = {} if dialogue[0].turn is None else {"turn": dialogue[0].turn}
    return json.dumps({"id": dialogue[0].id, **turn, **fields}, ensure_ascii=False)


def as_text(
    example: Example, tokenizer: Any, colour: bool, parts: Sequence[Part] | None = None
) -> str:
    """Return the decoded example; supervised tokens are green, or in brackets without colour.

    parts: of each token, whose colours then replace green.

    Each run of tokens is decoded together with the tokens before it, since a run decoded alone
    would lose its leading space. A pair has two lines: its source, and its supervised target.
    """
    before, after = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    if example.is_pair:
        source, target = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (example.input_ids, example.labels)
        )
        return f"--- {example.id}\n{source}\n{before}{target}{after}"
    turn = "" if example.turn is None else f" turn {example.turn}"
    text, end, decoded = f"--- {example.id}{turn}\n", 0, ""
    parts = parts or ["context" if one == IGNORE_INDEX else "answer" for one in example.labels]
    for part, run in groupby(parts):
        end += len(list(run))
        longer = tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False)
        piece = longer[len(decoded) :]
        start = COLOURS[part] if colour and part != "context" else before
        text += piece if part == "context" else f"{start}{piece}{after}"
        decoded = longer
    return text
