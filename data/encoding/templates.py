"""Renders a dialogue as text, with the character spans that are supervised."""

import re
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Literal

from jinja2 import TemplateError

from data.dialogues.sharegpt import Dialogue, Turn
from data.errors import UserError

TemplateName = Literal["vicuna", "chat", "t5"]
Span = tuple[int, int]
Messages = list[dict[str, str]]

# FastChat 0.2.36, fastchat/conversation.py, `vicuna_v1.1`.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# FastChat 0.2.36, fastchat/conversation.py, `one_shot`, the default of train_flant5.py.
T5_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

T5_NAMES = {"user": "Human", "tool": "Tool"}


@dataclass(frozen=True)
class Rendered:
    """A dialogue as text; all spans are half-open and in characters.

    spans: the supervised text.
    add_special_tokens: whether the tokenizer has to add BOS or EOS.
    messages: the text of each message, in order; the template adds the rest.
    header: length of the header (system text) of the t5 template.
    """

    text: str
    spans: tuple[Span, ...]
    add_special_tokens: bool
    messages: tuple[Span, ...] = ()
    header: int = 0


def default_template(tokenizer: Any) -> TemplateName:
    """Return "chat" for a tokenizer with a chat template, else "vicuna"."""
    return "chat" if tokenizer.chat_template else "vicuna"


def render(dialogue: Dialogue, template: TemplateName, tokenizer: Any) -> Rendered:
    """Render a dialogue; an answer's span includes the token that ends it."""
    if template == "vicuna":
        return _render_vicuna(dialogue, tokenizer)
    if template == "t5":
        return _render_t5(dialogue)
    return _render_chat(dialogue, tokenizer)


def render_text(dialogue: Dialogue, template: TemplateName, tokenizer: Any) -> Rendered:
    """Render a dialogue for its length; no spans with a chat template, which is faster."""
    if template != "chat":
        return render(dialogue, template, tokenizer)
    text = _apply(tokenizer, _messages(dialogue))
    return Rendered(text, (), add_special_tokens=False)


def prompt(
    turns: tuple[Turn, ...], template: TemplateName, tokenizer: Any, system: str | None = None
) -> Rendered:
    """Render turns, the last by the user, and the generation prompt; without spans.

    system: replaces the template's system text.
    """
    dialogue = Dialogue("", turns, system)
    if template == "vicuna":
        text = _render_vicuna(dialogue, tokenizer).text
        return Rendered(text + "ASSISTANT:", (), add_special_tokens=True)
    if template == "t5":
        return _render_t5(dialogue)
    text = _apply(tokenizer, _messages(dialogue), generation=True)
    return Rendered(text, (), add_special_tokens=False)


def _render_vicuna(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    text, spans = (dialogue.system or VICUNA_SYSTEM) + " ", []
    messages = [(0, len(text) - 1)]
    for turn in dialogue.turns:
        text += f"{turn.role.upper()}:"
        # The span includes the space, because SentencePiece joins it to the answer's first word.
        start, end = len(text), len(text) + 1 + len(turn.text)
        messages.append((start + 1, end))
        if turn.role != "assistant":
            text += f" {turn.text} "
            continue
        text += f" {turn.text}{tokenizer.eos_token}"
        if turn.supervised:
            spans.append((start, len(text)))
    return Rendered(text, tuple(spans), add_special_tokens=True, messages=tuple(messages))


def _render_t5(dialogue: Dialogue) -> Rendered:
    text = header = (dialogue.system or T5_SYSTEM) + "\n\n"
    spans, generation_prompt = [], "### Assistant: "
    for turn in dialogue.turns:
        if turn.role != "assistant":
            text = text.removesuffix(generation_prompt) if turn.role == "tool" else text
            text += f"### {T5_NAMES[turn.role]}: {turn.text}\n{generation_prompt}"
            continue
        if not text.endswith(generation_prompt):  # a second answer in a row
            text += generation_prompt
        if turn.supervised:
            spans.append((len(text), len(text) + len(turn.text)))
        text += f"{turn.text}\n"
    return Rendered(text, tuple(spans), add_special_tokens=True, header=len(header))


def _render_chat(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    """Render with the chat template; an answer's span ends after the next control token."""
    messages = _messages(dialogue)
    text = _apply(tokenizer, messages)
    shown = _locate_by_marks(text, messages, tokenizer) or _locate_by_changes(
        dialogue, text, tokenizer
    )
    end_token, spans = control_tokens(tokenizer), []
    skipped = len(messages) - len(dialogue.turns)
    for number, (start, end) in enumerate(shown):
        if messages[number]["role"] != "assistant":
            continue
        # The control token that ends an answer is before the text of the next turn.
        later = (span[0] for span in shown[number + 1 :] if span[0] < span[1])
        limit = min(later, default=len(text))
        closing = end_token.search(text, end, limit)
        if start == end or closing is None:
            fault = "does not show" if start == end else "writes no control token after"
            raise UserError(
                f"dialogue {dialogue.id}: the model's chat template {fault} the answer in turn "
                f"{number}, so this answer cannot be supervised. Use --template vicuna."
            )
        if dialogue.turns[number - skipped].supervised:
            spans.append((start, closing.end()))
    written = tuple((start, end) for start, end in shown if start < end)
    return Rendered(text, tuple(spans), add_special_tokens=False, messages=written)


def _locate_by_marks(text: str, messages: Messages, tokenizer: Any) -> list[Span] | None:
    """Return the span of each message, found with marks; None if the check of the marks fails.

    The template is rendered with a mark in place of each message. Then each mark is replaced by its
    message, unchanged or stripped. The result must equal the text.
    """
    between = _between(tokenizer, tokenizer.chat_template, tuple(m["role"] for m in messages))
    if between is None:
        return None
    for written in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        if "".join(x + y for x, y in zip(between, [*written, ""], strict=True)) != text:
            continue
        spans, end = [], 0
        for before, content in zip(between, written, strict=False):
            start = end + len(before)
            end = start + len(content)
            spans.append((start, end))
        return spans
    return None


@lru_cache(maxsize=256)
def _between(tokenizer: Any, template: str, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the template's text before, between and after messages of these roles.

    Returns None for a template that repeats, moves or drops a message.
    """
    marks = unused_characters(template, len(roles))
    marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    between = re.split(f"([{''.join(marks)}])", _apply(tokenizer, marked))
    return tuple(between[::2]) if between[1::2] == marks else None


def _locate_by_changes(dialogue: Dialogue, text: str, tokenizer: Any) -> list[Span]:
    """Return the span of each message: the text that changes if the message is replaced.

    Raises UserError for a template that shows a message in more than one place.
    """
    messages, stand_in = _messages(dialogue), unused_characters(text, 1)[0]
    shown: list[Span] = []
    for number in range(len(messages)):
        changed = [*messages]
        changed[number] = {**messages[number], "content": stand_in}
        start, end = _difference(text, _apply(tokenizer, changed))
        if start < end and shown and start < max(end for _, end in shown):
            raise UserError(
                f"dialogue {dialogue.id}: the model's chat template shows turn {number} in more "
                "than one place, so answers cannot be located. Use --template vicuna."
            )
        shown.append((start, end))
    return shown


def _messages(dialogue: Dialogue) -> Messages:
    system = [] if dialogue.system is None else [Turn("system", dialogue.system)]
    return [{"role": turn.role, "content": turn.text} for turn in (*system, *dialogue.turns)]


def _apply(tokenizer: Any, messages: Messages, generation: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template. Use --template vicuna.")
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=_dated(tokenizer.chat_template),
            tokenize=False,
            add_generation_prompt=generation,
        )
    except TemplateError as error:
        raise UserError(
            f"the model's chat template refuses a dialogue of {len(messages)} turns: {error}. "
            "Use --template vicuna, or remove the refused turn (often the system turn)."
        ) from None
    return text


@lru_cache(maxsize=1)
def _dated(template: str) -> str:
    """Return the template with a fixed date (Llama 3's default) instead of the current date.

    With the current date, a run that is resumed on another day would have other ids.
    """
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
        lambda call: repr(date(2024, 7, 26).strftime(call[2])),
        template,
    )


def unused_characters(text: str, count: int) -> list[str]:
    """Return `count` private-use characters that are not in the text.

    Raises UserError if the text leaves too few.
    """
    private = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    found = [*islice((char for char in map(chr, private) if char not in text), count)]
    if len(found) < count:
        raise UserError(
            f"a dialogue of {len(text):,} characters has nearly all private-use characters; "
            f"expected {count} unused ones. Remove the dialogue."
        )
    return found


def _difference(text: str, changed: str) -> tuple[int, int]:
    """Return the span of `text` between the prefix and the suffix that `changed` shares.

    >>> _difference("<a>yes</a><b>", "<a>?</a><b>")
    (3, 6)
    """
    start, shortest = 0, min(len(text), len(changed))
    while start < shortest and text[start] == changed[start]:
        start += 1
    end = 0
    while end < shortest - start and text[-1 - end] == changed[-1 - end]:
        end += 1
    return start, len(text) - end


@lru_cache(maxsize=8)  # called for each dialogue
def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the tokenizer's control tokens, longer ones first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
