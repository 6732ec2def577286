"""Renders a dialogue with the model's chat template, each answer as it will be generated.

For a supervised answer, `prompt` is the template's text of the messages before it with the
generation prompt, and `shown` is its text of the messages up to the answer. The rule:

    shown = prompt + the answer, to the token that closes it + text that follows every answer

An answer for which a template breaks the rule is a BadRecord that says how.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from data.dialogues.conversation import Dialogue
from data.encoding.chat_template import (
    REMEDY,
    SWITCHES,
    TOOL,
    ChatTemplate,
    Message,
    bad,
    common_prefix,
    contains,
    marked_message,
    messages_of,
    signature_of,
    tools_named,
    with_arguments,
)
from data.encoding.control_tokens import unused_characters
from data.errors import BadRecord

Span = tuple[int, int]
MultiTurn = Literal["whole", "each"]
MAX_CLOSERS = 200  # characters of the closing tokens of an answer, at most
MIN_HEADER = 8  # characters by which the header of an answer is found
REMOVED = "answers whose reasoning the template removes"
OTHERWISE = "answers that the template's {% generation %} marks otherwise"
ALTERED = "answers of which the template removes text"
UNDESCRIBED = "dialogues of which the template leaves out tool descriptions"
OWN_ARGUMENTS = "dialogues whose chat_template_kwargs replace the flag's"


@dataclass(frozen=True)
class Answer:
    """A supervised answer of a text: `text[:start]` is its prompt, `text[start:end]` the answer.

    turn: index of the message, a system message included. reasoning, calls: the spans before and
    after the answer's content; the closing tokens follow the calls.
    """

    turn: int
    start: int
    end: int
    reasoning: Span
    calls: Span


@dataclass(frozen=True)
class Shown:
    """A dialogue as text, with the answers to train.

    literal: spans of messages that look like control tokens. notes: what the account counts.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    literal: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()


def answers_of(
    dialogue: Dialogue, template: ChatTemplate, multi_turn: MultiTurn | None = None
) -> list[Shown]:
    """Return the dialogue once, or a part of it for each supervised answer; raises BadRecord.

    multi_turn: None renders the dialogue once if that gives each answer the context in which it is
    generated, and otherwise once for each answer.
    """
    own = dialogue.template_arguments
    rendering = _Rendering(with_arguments(template, own), dialogue)
    if any(own[name] != value for name, value in template.arguments.items() if name in own):
        rendering.notes.append(OWN_ARGUMENTS)
    return rendering.examples(multi_turn)


def prompt_of(dialogue: Dialogue, template: ChatTemplate) -> Shown:
    """Return the text from which an answer to the dialogue's last turn is generated."""
    rendering = _Rendering(with_arguments(template, dialogue.template_arguments), dialogue)
    text = rendering.text(generation=True)
    rendering.check_shown(text)
    return Shown(text, literal=rendering.literal(text, None, generation=True))


def whole_text(dialogue: Dialogue, template: ChatTemplate) -> str:
    """Return the text of the dialogue, without the answers' places."""
    return _Rendering(with_arguments(template, dialogue.template_arguments), dialogue).text()


class _Rendering:
    """One dialogue under one template."""

    def __init__(self, template: ChatTemplate, dialogue: Dialogue) -> None:
        self.template, self.dialogue = template, dialogue
        self.tools = [*dialogue.tools]
        self.messages = messages_of(dialogue, template)
        self.notes: list[str] = []

    def text(self, stop: int | None = None, generation: bool = False) -> str:
        """Return the text of the messages before `stop`."""
        return self.template.render(self.messages[:stop], self.tools, generation)

    def examples(self, multi_turn: MultiTurn | None) -> list[Shown]:
        full = self.text()
        self.check_shown(full)
        skipped = len(self.messages) - len(self.dialogue.turns)
        turns = enumerate(self.dialogue.turns, skipped)
        trained = [n for n, turn in turns if turn.role == "assistant" and turn.supervised]
        parts = [self._answer(n, full) for n in trained]
        once = not any(_may_merge(text, answer.start) for text, answer in parts[:-1]) and all(
            full.startswith(text[: answer.end]) or text.startswith(full) for text, answer in parts
        )
        if multi_turn == "whole" or (once and multi_turn is None) or not parts:
            answers = tuple(self._in_whole(full, *part) for part in parts)
            text = max([full, *(text for text, _ in parts if text.startswith(full))], key=len)
            return [Shown(text, answers, self.literal(full, None), tuple(self.notes))]
        # What is counted belongs to the dialogue: it is counted with its first example.
        notes = [tuple(self.notes), *([()] * (len(parts) - 1))]
        return [
            Shown(text, (answer,), self.literal(text, answer.turn + 1), note)
            for (text, answer), note in zip(parts, notes, strict=True)
        ]

    def _answer(self, number: int, full: str) -> tuple[str, Answer]:
        """Return the text up to the answer, and the answer's place in it; raises BadRecord."""
        message = self.messages[number]
        prompt = self.text(number, generation=True)
        shown = full if number == len(self.messages) - 1 else self.text(number + 1)
        if not shown.startswith(prompt):
            self._refuse_opening(number, prompt, shown)
        closing = self.template.closing(message, bool(self.tools))
        if closing.appended:
            shown = text = shown + closing.appended
        else:
            text = shown.removesuffix(closing.rest)
            if not self._closers(text):
                bad(
                    "not closed by the chat template",
                    f"the chat template closes the answer of turn {number} with {text[-20:]!r}; "
                    f"expected a control token. {REMEDY}",
                )
        self._check_answer(number, text[len(prompt) :])
        marked = self.template.marked(self.messages[: number + 1], self.tools)
        if marked is not None and marked.strip() != text[len(prompt) :].strip():
            self.notes.append(OTHERWISE)
        start, end = len(prompt), len(text)
        return shown, Answer(number, start, end, *self._parts(number, text, start))

    def _refuse_opening(self, number: int, prompt: str, shown: str) -> NoReturn:
        """Raise BadRecord: generation would not start where the template's answer starts."""
        same, remedy = len(common_prefix(prompt, shown)), REMEDY
        for arguments in SWITCHES:
            other = with_arguments(self.template, arguments)
            with suppress(BadRecord):
                start = other.render(self.messages[:number], self.tools, generation=True)
                if other.render(self.messages[: number + 1], self.tools).startswith(start):
                    own = self.dialogue.template_arguments.keys() & arguments.keys()
                    where = 'the record "chat_template_kwargs"' if own else "--chat_template_kwargs"
                    remedy = f"Give {where} '{json.dumps(arguments)}'"
                    break
        bad(
            "opened otherwise than generated",
            f"the chat template opens the answer of turn {number} with {shown[same:][:40]!r} where "
            f"generation starts from {prompt[same:][:40]!r}. {remedy}",
        )

    def _closers(self, text: str) -> str:
        """Return the control tokens that the text ends with."""
        found = self.template.closers.search(text, max(0, len(text) - MAX_CLOSERS))
        return found.group() if found else ""

    def _parts(self, number: int, text: str, start: int) -> tuple[Span, Span]:
        """Return the spans of the reasoning and of the tool calls of the answer that ends a text.

        They are what stands before and after a mark in place of the content.
        """
        message, end = self.messages[number], len(text)
        closed = end - len(self._closers(text))
        if not (message.get("reasoning_content") or message.get("tool_calls")):
            return (start, start), (closed, closed)
        content, reasoning = str(message["content"]).strip(), message.get("reasoning_content") or ""
        mark = unused_characters(text, 1)[0]
        messages = [*self.messages[:number], {**message, "content": mark}]
        place = -1
        with suppress(BadRecord):  # gpt-oss takes no content beside reasoning and calls.
            place = self.template.render(messages, self.tools).find(mark, start)
        if place < 0:
            place = text.find(reasoning.strip(), start) + len(reasoning.strip())
        first = max(start, min(place, closed))
        found = text.find(content, first, closed) if content else -1
        last = found + len(content) if found >= 0 else first
        return (
            (start, first) if reasoning else (start, start),
            (last, closed) if message.get("tool_calls") else (closed, closed),
        )

    def _check_answer(self, number: int, answer: str) -> None:
        """Raise BadRecord if the template cannot show the reasoning; count what it removes."""
        message = self.messages[number]
        reasoning = message.get("reasoning_content")
        if reasoning and not contains(answer, reasoning):
            self.notes.append(REMOVED)
        if not contains(answer, str(message["content"])):
            self.notes.append(ALTERED)

    def check_shown(self, full: str) -> None:
        """Raise BadRecord for a turn, tool call or tool definition that the template leaves out.

        A tool that is shown without its description is counted.
        """
        signature = tuple(map(signature_of, self.messages)), bool(self.tools)
        missing = self.template.remembered(("shown", signature), self._missing)
        if missing is None:  # The template refuses marks: look for the texts themselves.
            missing = [
                f"turn {number} ({message['role']})"
                for number, message in enumerate(self.messages)
                if not contains(full, str(message["content"]))
            ]
        reasoned = [n for n, one in enumerate(self.messages) if one.get("reasoning_content")]
        for number in reasoned:
            with_calls = "tool_calls" in self.messages[number]
            if not missing and not self.template.shows_reasoning(with_calls, bool(self.tools)):
                missing = [f"the reasoning (thinking) of turn {number}"]
        names = [str(tool.get("function", tool).get("name")) for tool in self.tools]
        if not missing and not all(contains(full, name) for name in names):
            missing = ["the tool definitions"]
        if not all(_is_described(tool, full) for tool in self.tools):
            self.notes.append(UNDESCRIBED)
        if missing:
            what = f"the chat template does not show {missing[0]}"
            bad("not shown by the chat template", f"{what}. {REMEDY}")

    def _missing(self) -> list[str] | None:
        """Return what the template leaves out of such a dialogue; None if it refuses marks."""
        marked, wanted, unused = [], [], iter(map(chr, range(0xE100, 0xF000)))
        try:
            for number, message in enumerate(self.messages):
                changed, marks = marked_message(message, lambda: next(unused))
                marked.append(changed)
                turn = f"turn {number} ({message['role']})"
                wanted += [(mark, f"{what}{turn}") for mark, what in marks.items()]
            text = self._marked_text(marked)
        except (BadRecord, StopIteration):
            return None
        missing = [what for mark, what in wanted if not contains(text, mark)]
        if self.tools and TOOL["function"]["name"] not in text:
            missing.append("the tool definitions")
        return missing

    def _marked_text(self, marked: list[Message]) -> str:
        """Return the text of messages of marks; raises BadRecord.

        If the template refuses calls of tools that are not among the given ones, these are.
        """
        tools = [TOOL] if self.tools else []
        named = tools_named(marked)
        if tools and named:
            with suppress(BadRecord):
                return self.template.render(marked, tools)
            tools = [*tools, *named]
        return self.template.render(marked, tools)

    def literal(self, text: str, stop: int | None, generation: bool = False) -> tuple[Span, ...]:
        """Return the spans of the text that are messages' own and look like control tokens.

        The messages are rendered with a character in place of each such token. If the template
        then gives the same text, but for these, their places are known.
        """
        messages, control = self.messages[:stop], self.template.control
        if control.search(_all_text(self.dialogue.template_arguments)):
            bad("control tokens in a message", "chat_template_kwargs has a control token's text")
        names = sorted({*control.findall(_all_text([messages, self.tools]))})
        if not names:
            return ()
        marks = dict(zip(names, unused_characters(text, len(names)), strict=True))
        hidden_tools = _replaced(self.tools, control, marks)
        hidden = self.template.render(_replaced(messages, control, marks), hidden_tools, generation)
        name_of, spans, restored = {mark: name for name, mark in marks.items()}, [], ""
        for piece in re.split(f"([{''.join(name_of)}])", hidden):
            begin = len(restored)
            restored += name_of.get(str(piece), str(piece))
            spans += [(begin, len(restored))] if piece in name_of else []
        if text.startswith(restored):
            return tuple(spans)
        own = control.findall(hidden)
        found = control.findall(text)
        appended = len(found) - len(control.findall(self.text(stop, generation)))
        if found[: len(own)] != own or len(found) != len(own) + appended:
            bad(
                "control tokens in a message",
                "the chat template alters text of a message that looks like a control token, so "
                f"the two cannot be told apart. {REMEDY}",
            )
        return ()  # The template has removed such text: what is left is its own.

    def _in_whole(self, full: str, text: str, answer: Answer) -> Answer:
        """Return the answer's place in the dialogue rendered once; raises BadRecord.

        The template may have rewritten the answer, as turns follow it: a mark locates its content.
        """
        if full.startswith(text[: answer.end]) or text.startswith(full):
            return answer
        number, mark = answer.turn, unused_characters(full, 1)[0]
        message = self.messages[number]
        changed = [*self.messages]
        changed[number] = {**message, "content": mark}
        place = (other := self.template.render(changed, self.tools)).find(mark)
        after = other[place + 1 :]
        # As many tokens as close the answer at the end; the next role's may be adjacent.
        most = len(self.template.control.findall(self._closers(text[: answer.end])))
        closers = re.match(rf"[^\S\n]*(?:{self.template.control.pattern}){{1,{most}}}", after)
        prompt, before = self.text(number, generation=True), self.text(number)
        header = prompt[len(common_prefix(prompt, before)) :]
        header_start = full.rfind(header[:MIN_HEADER], 0, place)
        if min(place, header_start) < 0 or not full.endswith(after) or closers is None:
            bad(
                "rewritten by the chat template",
                f"the chat template rewrites the answer of turn {number} where other turns follow, "
                "and it cannot be located. Give --multi_turn each",
            )
        start = header_start + len(common_prefix(full[header_start:], header))
        end = len(full) - len(after)
        content = place if full.startswith(other[:place]) else start
        reasoning = message.get("reasoning_content")
        if reasoning and not contains(full[start:end], reasoning):
            self.notes.append(REMOVED)
        return Answer(number, start, end + closers.end(), (start, content), (end, end))


def _is_described(tool: dict[str, Any], text: str) -> bool:
    """Return whether the text holds the tool's description; templates may indent its lines."""
    function = tool.get("function", tool)
    description = function.get("description") if isinstance(function, dict) else None
    lines = description.splitlines() if isinstance(description, str) else []
    return all(contains(text, line) for line in lines)


def _may_merge(text: str, place: int) -> bool:
    """Return whether the tokens on both sides of a place may be others if it is not a cut."""
    before, after = text[place - 1 : place], text[place : place + 1]
    return before == " " or (before.isspace() and after.isspace())


def _all_text(value: Any) -> str:
    """Return all strings within a JSON value, apart from each other."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return "\n".join(map(_all_text, value)) if isinstance(value, list) else ""


def _replaced(value: Any, pattern: re.Pattern[str], marks: dict[str, str]) -> Any:
    """Return a JSON value with the matches of a pattern replaced in all its strings."""
    if isinstance(value, str):
        return pattern.sub(lambda found: marks[found.group()], value)
    if isinstance(value, dict):
        both = (_replaced([*pair], pattern, marks) for pair in value.items())
        return {str(key): item for key, item in both}
    return [_replaced(one, pattern, marks) for one in value] if isinstance(value, list) else value
