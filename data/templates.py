"""Renders a dialogue as text and says which characters of it are supervised."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from data.errors import UserError
from data.sharegpt import Dialogue, Turn

TemplateName = Literal["vicuna", "chat", "t5"]

# FastChat 0.2.36, fastchat/conversation.py, `vicuna_v1.1`.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# FastChat 0.2.36, fastchat/conversation.py, `one_shot`, which train_flant5.py falls back to.
T5_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True)
class Rendered:
    """A dialogue as text, with the half-open character spans that are supervised."""

    text: str
    spans: tuple[tuple[int, int], ...]
    add_special_tokens: bool
    """Whether the tokenizer still has to add its own BOS, or EOS."""
    header: int = 0
    """Characters of the t5 template's header."""


def default_template(tokenizer: Any) -> TemplateName:
    """Return "chat" for a tokenizer with a chat template, else "vicuna"."""
    return "chat" if tokenizer.chat_template else "vicuna"


def render(dialogue: Dialogue, template: TemplateName, tokenizer: Any) -> Rendered:
    """Render a dialogue; an answer's span ends with the token that closes it."""
    if template == "vicuna":
        return _render_vicuna(dialogue, tokenizer)
    if template == "t5":
        return _render_t5(dialogue)
    return _render_chat(dialogue, tokenizer)


def render_text(dialogue: Dialogue, template: TemplateName, tokenizer: Any) -> Rendered:
    """Render a dialogue without looking for its answers: quick where only its length counts."""
    if template != "chat":
        return render(dialogue, template, tokenizer)
    text = _apply(tokenizer, _messages(dialogue))
    return Rendered(text, (), add_special_tokens=False)


def prompt(turns: tuple[Turn, ...], template: TemplateName, tokenizer: Any) -> Rendered:
    """Render turns that end with the user's, up to where the assistant's answer begins."""
    if template == "vicuna":
        text = _render_vicuna(Dialogue("", turns), tokenizer).text
        return Rendered(text + "ASSISTANT:", (), add_special_tokens=True)
    if template == "t5":
        return _render_t5(Dialogue("", turns))
    text = _apply(tokenizer, _messages(Dialogue("", turns)), generation=True)
    return Rendered(text, (), add_special_tokens=False)


def _render_vicuna(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    text, spans = (dialogue.system or VICUNA_SYSTEM) + " ", []
    for turn in dialogue.turns:
        if turn.role == "user":
            text += f"USER: {turn.text} "
            continue
        text += "ASSISTANT:"
        start = len(text)  # The space belongs to the answer: SentencePiece joins it to the word.
        text += f" {turn.text}{tokenizer.eos_token}"
        spans.append((start, len(text)))
    return Rendered(text, tuple(spans), add_special_tokens=True)


def _render_t5(dialogue: Dialogue) -> Rendered:
    text = header = (dialogue.system or T5_SYSTEM) + "\n\n"
    spans = []
    for turn in dialogue.turns:
        if turn.role == "user":
            text += f"### Human: {turn.text}\n### Assistant: "
            continue
        spans.append((len(text), len(text) + len(turn.text)))
        text += f"{turn.text}\n"
    return Rendered(text, tuple(spans), add_special_tokens=True, header=len(header))


def _render_chat(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    """Render by the model's own chat template and find each answer by rendering it changed.

    The text that two renderings do not share, one with the answer and one with a stand-in, is the
    answer as the template wrote it (trimmed, say). It works for any template that shows answers.
    """
    messages = _messages(dialogue)
    text = _apply(tokenizer, messages)
    stand_in, end_token = _unused_character(text), _special_tokens(tokenizer)
    spans, closing_limit = [], len(text)
    for number in reversed(range(len(messages))):
        changed = [*messages]
        changed[number] = {**messages[number], "content": stand_in}
        start, end = _difference(text, _apply(tokenizer, changed))
        if start < end and end > closing_limit:
            raise UserError(
                f"dialogue {dialogue.id}: the model's chat template shows turn {number} in more "
                "than one place, so answers cannot be told from it. Use --template vicuna."
            )
        if messages[number]["role"] == "assistant":
            closing = end_token.search(text, end, closing_limit)
            if start == end or closing is None:
                lost = "does not show" if start == end else "does not close with a special token"
                raise UserError(
                    f"dialogue {dialogue.id}: the model's chat template {lost} the answer in turn "
                    f"{number}, so it cannot be supervised exactly. Use --template vicuna."
                )
            spans.append((start, closing.end()))
        closing_limit = start  # What closes an answer stands before the next turn's text.
    return Rendered(text, tuple(reversed(spans)), add_special_tokens=False)


def _messages(dialogue: Dialogue) -> list[dict[str, str]]:
    system = [] if dialogue.system is None else [Turn("system", dialogue.system)]
    return [{"role": turn.role, "content": turn.text} for turn in (*system, *dialogue.turns)]


def _apply(tokenizer: Any, messages: list[dict[str, str]], generation: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template. Use --template vicuna.")
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        raise UserError(
            f"the model's chat template refuses a dialogue of {len(messages)} turns: {error}. "
            "Use --template vicuna, or take out what it refuses (often the system turn)."
        ) from None
    return text


def _unused_character(text: str) -> str:
    """Return a private-use character that the text does not hold."""
    return next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in text)


def _difference(text: str, changed: str) -> tuple[int, int]:
    """Return the span of `text` between its common beginning and common end with `changed`.

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


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the tokenizer's control tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
