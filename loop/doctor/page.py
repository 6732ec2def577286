"""Examples as one HTML page that needs nothing else: each token, and whether it is learnt."""

import html
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from data.encoding.encode import IGNORE_INDEX, Example

CONTEXT = 4  # tokens before one that decide how it is decoded
MOST_BYTES = 4  # of a character: so many tokens may stand for a part of it each
REPLACED = "\ufffd"
UNSEEN = {"\0": "\u2400", "\r": "&#13;"}  # what HTML would change
STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#5a5a5a;--learnt:#0b5a28;--mark:#d9f2e0;
--line:#c8c8c8}
@media(prefers-color-scheme:dark){:root{--back:#16181a;--text:#a8acb0;--learnt:#9be8b4;
--mark:#17361f;--line:#44484c}}
body{background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;margin:2em auto;
max-width:60em;padding:0 1em}
h2{font-size:1em;margin:2em 0 .3em;overflow-wrap:anywhere}
pre{border:1px solid var(--line);border-radius:4px;padding:.7em;margin:.3em 0;
white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.7 ui-monospace,monospace}
b,i{font-weight:400;font-style:normal}
b{background:var(--mark);color:var(--learnt);text-decoration:underline dotted;
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
<p><b>Marked tokens</b> are learnt, <i>the others</i> only read. Over a token its id is shown.</p>
"""


def as_page(examples: Iterable[Example], tokenizer: Any, title: str) -> Iterator[str]:
    """Yield the page piece by piece up to its end, which `page_end` is."""
    yield HEAD.format(title=_escaped(title), style=STYLE)
    for _, group in groupby(examples, key=lambda example: example.record):
        dialogue = [*group]
        yield f"<h2>{_escaped(dialogue[0].id)}</h2>\n"
        for example in dialogue:
            if example.is_pair:
                unlearnt = [IGNORE_INDEX] * len(example.input_ids)
                yield _block(example.input_ids, unlearnt, tokenizer)
                yield _block(example.labels, example.labels, tokenizer)
            else:
                yield _block(example.input_ids, example.labels, tokenizer)


def page_end(account: str) -> str:
    """Return the end of the page, with the account of all records."""
    return f"<footer>{_escaped(account)}</footer>\n</body></html>\n"


def pieces(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, int, str]]:
    """Yield (first, behind, text) of the tokens: several where they are one character's parts.

    The texts one behind the other are the decoded whole. Each is what one token more adds: decoded
    alone it would lose its leading space.
    """
    decode = tokenizer.backend_tokenizer.decode
    first = 0
    for behind in range(1, len(ids) + 1):
        before = max(0, first - CONTEXT)
        text = decode(ids[before:behind], skip_special_tokens=False)
        unfinished = text.endswith(REPLACED) and behind - first < MOST_BYTES
        if unfinished and behind < len(ids):
            continue
        known = decode(ids[before:first], skip_special_tokens=False)
        yield first, behind, text[len(known) :]
        first = behind


def _block(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    made = []
    for first, behind, text in pieces(ids, tokenizer):
        learnt = any(label != IGNORE_INDEX for label in labels[first:behind])
        tag, breaks = "b" if learnt else "i", ' class="n"' if "\n" in text else ""
        numbers = " ".join(map(str, ids[first:behind]))
        made.append(f'<{tag}{breaks} title="{numbers}">{_escaped(text)}</{tag}>')
    # A newline right behind <pre> would not be shown: this one.
    return f"<pre>\n{''.join(made)}</pre>\n"


def _escaped(text: str) -> str:
    escaped = html.escape(text.encode("utf-8", "replace").decode())
    for character, shown in UNSEEN.items():
        escaped = escaped.replace(character, shown)
    return escaped
