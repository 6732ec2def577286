"""Renders a dialogue as text, with the character spans that are supervised."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import yaml

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.keys import reserved_names
from data.encoding.chat_answers import (
    Answer,
    MultiTurn,
    Shown,
    Span,
    answers_of,
    prompt_of,
    whole_text,
)
from data.encoding.chat_template import ChatTemplate
from data.errors import BadRecord, UserError

TemplateName = Literal["vicuna", "chat", "t5"]

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
    """A text with the half-open character spans that are supervised.

    add_special_tokens: whether the tokenizer has to add BOS or EOS. messages: the spans in which
    text like a control token is only text. header: length of the t5 template's header in
    characters. cuts: places at which the text is tokenised apart, the ends of prompts. turn: index
    of the answer's message in a text for one answer. answers: supervised answers; ends: of each
    that is trained to its end, the place of the end. notes: what the account counts. located: the
    answers of a chat template with their parts.
    """

    text: str
    spans: tuple[Span, ...]
    add_special_tokens: bool
    messages: tuple[Span, ...] = ()
    header: int = 0
    cuts: tuple[int, ...] = ()
    turn: int | None = None
    answers: int = 0
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    located: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class RenderSettings:
    """What decides how a dialogue is rendered, beside the template and the tokenizer.

    arguments: a JSON object of arguments of the chat template. chat_template_name: of a tokenizer
    with several. multi_turn: see `answers_of`. train_on_reasoning, train_on_tool_calls: whether
    these parts of an answer are supervised.
    """

    arguments: str = "{}"
    chat_template_name: str | None = None
    multi_turn: MultiTurn | None = None
    train_on_reasoning: bool = True
    train_on_tool_calls: bool = True


DEFAULT = RenderSettings()


def default_template(tokenizer: Any) -> TemplateName:
    """Return "chat" for a tokenizer with a chat template, else "vicuna"."""
    return "chat" if tokenizer.chat_template else "vicuna"


def render_examples(
    dialogue: Dialogue,
    template: TemplateName,
    tokenizer: Any,
    settings: RenderSettings = DEFAULT,
) -> list[Rendered]:
    """Return the texts to train a decoder on: one, or one for each answer; raises BadRecord."""
    if template != "chat":
        return [render(dialogue, template, tokenizer, settings)]
    shown = answers_of(dialogue, chat_template(tokenizer, settings), settings.multi_turn)
    each = len(shown) > 1
    return [_supervise(one, settings, each) for one in shown]


def render(
    dialogue: Dialogue,
    template: TemplateName,
    tokenizer: Any,
    settings: RenderSettings = DEFAULT,
) -> Rendered:
    """Render a dialogue once; an answer's span includes the token that ends it.

    Raises BadRecord for what the template cannot show.
    """
    if template == "vicuna":
        return _render_vicuna(dialogue, tokenizer, settings)
    if template == "t5":
        return _render_t5(dialogue, settings)
    return render_examples(dialogue, "chat", tokenizer, replace(settings, multi_turn="whole"))[0]


def render_text(
    dialogue: Dialogue,
    template: TemplateName,
    tokenizer: Any,
    settings: RenderSettings = DEFAULT,
) -> Rendered:
    """Render a dialogue without spans: faster if only its length is needed."""
    if template != "chat":
        return render(dialogue, template, tokenizer, settings)
    text = whole_text(dialogue, chat_template(tokenizer, settings))
    return Rendered(text, (), add_special_tokens=False)


def prompt(
    dialogue: Dialogue,
    template: TemplateName,
    tokenizer: Any,
    settings: RenderSettings = DEFAULT,
) -> Rendered:
    """Render a dialogue that ends before an answer, with the generation prompt."""
    if template == "vicuna":
        rendered = _render_vicuna(dialogue, tokenizer, settings)
        return replace(rendered, text=rendered.text + "ASSISTANT:", spans=())
    if template == "t5":
        return _render_t5(dialogue, settings)
    shown = prompt_of(dialogue, chat_template(tokenizer, settings))
    return Rendered(shown.text, (), add_special_tokens=False, messages=shown.literal)


def template_arguments(given: str | None) -> str:
    """Return --chat_template_kwargs, JSON or YAML text, as JSON text; raises UserError."""
    if not given:
        return "{}"
    try:
        arguments = yaml.safe_load(given)
        text = json.dumps(arguments, sort_keys=True)
    except (yaml.YAMLError, TypeError, ValueError):
        arguments = None
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise UserError(
            f"--chat_template_kwargs: found {given[:80]!r}; expected an object, such as "
            "'{\"enable_thinking\": false}'."
        )
    if reserved := reserved_names(arguments):
        raise UserError(
            f"--chat_template_kwargs: found {', '.join(reserved)}, which the trainer itself gives "
            "to the chat template; expected variables of the template's own, such as "
            f"enable_thinking. Leave {', '.join(reserved)} out."
        )
    return text


def chat_template(tokenizer: Any, settings: RenderSettings = DEFAULT) -> ChatTemplate:
    """Return the tokenizer's chat template with its arguments; raises UserError."""
    return _chat_template(
        tokenizer, str(tokenizer.chat_template), settings.arguments, settings.chat_template_name
    )


@lru_cache(maxsize=8)
def _chat_template(tokenizer: Any, _text: str, arguments: str, name: str | None) -> ChatTemplate:
    return ChatTemplate(tokenizer, json.loads(arguments), name)


def _supervise(shown: Shown, settings: RenderSettings, each: bool) -> Rendered:
    """Return the text with the spans of the answers that the settings train."""
    spans, ends = [], []
    for answer in shown.answers:
        start, end = _trained_part(answer, settings)
        if start < end:
            spans.append((start, end))
            ends += [end] if end == answer.end else []
    return Rendered(
        shown.text,
        tuple(spans),
        add_special_tokens=False,
        messages=shown.literal,
        cuts=tuple(answer.start for answer in shown.answers),
        turn=shown.answers[0].turn if each else None,
        answers=len(spans),
        ends=tuple(ends),
        notes=shown.notes,
        located=shown.answers,
    )


def _trained_part(answer: Answer, settings: RenderSettings) -> Span:
    """Return the span that is supervised; without tool calls it ends before them."""
    start, end = answer.start, answer.end
    if not settings.train_on_reasoning:
        start = answer.reasoning[1]
    if not settings.train_on_tool_calls and answer.calls[0] < answer.calls[1]:
        end = answer.calls[0]
    return start, end


def _render_vicuna(dialogue: Dialogue, tokenizer: Any, settings: RenderSettings) -> Rendered:
    _check_tools(dialogue, "vicuna")
    text, spans = (dialogue.system or VICUNA_SYSTEM) + " ", []
    messages = [(0, len(text) - 1)]
    for turn in dialogue.turns:
        text += f"{turn.role.upper()}:"
        shown, start, end = plain_text(turn, settings)
        # The space belongs to the answer: SentencePiece joins it to the first word.
        begin = len(text)
        messages.append((begin + 1, begin + 1 + len(shown)))
        if turn.role != "assistant":
            text += f" {shown} "
            continue
        text += f" {shown}{tokenizer.eos_token}"
        if turn.supervised and start < max(end, 1):
            first = begin + 1 + start if start else begin
            spans.append((first, len(text) if end == len(shown) else begin + 1 + end))
    answers = len(spans)
    ends = tuple(end for _, end in spans)
    return Rendered(
        text,
        tuple(spans),
        add_special_tokens=True,
        messages=tuple(messages),
        answers=answers,
        ends=ends,
    )


def _render_t5(dialogue: Dialogue, settings: RenderSettings) -> Rendered:
    _check_tools(dialogue, "t5")
    text = header = (dialogue.system or T5_SYSTEM) + "\n\n"
    spans, generation_prompt = [], "### Assistant: "
    for turn in dialogue.turns:
        if turn.role != "assistant":
            text = text.removesuffix(generation_prompt) if turn.role == "tool" else text
            text += f"### {T5_NAMES[turn.role]}: {turn.text}\n{generation_prompt}"
            continue
        text += (
            "" if text.endswith(generation_prompt) else generation_prompt
        )  # a second answer in a row
        shown, start, end = plain_text(turn, settings)
        shown = shown[start:end]  # A target is supervised as a whole.
        if turn.supervised:
            spans.append((len(text), len(text) + len(shown)))
        text += f"{shown}\n"
    return Rendered(text, tuple(spans), add_special_tokens=True, header=len(header))


def plain_text(turn: Turn, settings: RenderSettings = DEFAULT) -> tuple[str, int, int]:
    """Return a turn as text for a template without places of its own, and its trained part.

    The reasoning comes first in <think> tags, the tool calls last, each as JSON in <tool_call>
    tags.
    """
    thought = f"<think>\n{turn.reasoning}\n</think>\n\n" if turn.reasoning else ""
    calls = "".join(f"{_call_text(call.name, call.arguments)}\n" for call in turn.calls)
    calls = calls.removesuffix("\n")
    separator = "\n" * bool(calls and turn.text)
    text = f"{thought}{turn.text}{separator}{calls}"
    start = 0 if settings.train_on_reasoning else len(thought)
    end = len(text)
    if calls and not settings.train_on_tool_calls:
        end -= len(separator) + len(calls)
    return text, start, end


def _call_text(name: str, arguments: Any) -> str:
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # A model may write invalid JSON.
            arguments = json.loads(arguments)
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _check_tools(dialogue: Dialogue, template: str) -> None:
    if dialogue.tools:
        raise BadRecord(
            "not shown by the template",
            f"found {len(dialogue.tools)} tool definitions, which template {template} has no place "
            "for; expected none. Use a model with a chat template for tools",
        )
