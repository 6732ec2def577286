"""Splits a generated answer into reasoning, text and tool calls, by the template's own marks."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from data.dialogues.conversation import ToolCall, Turn
from data.encoding.chat_template import CALL_ID, ChatTemplate, common_prefix
from data.encoding.templates import RenderSettings, TemplateName, chat_template, plain_text

# Stand for the parts of an answer in the template's text.
REASONING, TEXT, NAME, NAME_2, KEY, VALUE, KEY_2, VALUE_2 = map(chr, range(0xE010, 0xE018))
PAIR = rf'"{KEY}"\s*:\s*"{VALUE}"'
JSON_ARGUMENTS = re.compile(rf"\{{\s*{PAIR}\s*\}}")
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class CallMarks:
    """What a template writes around tool calls.

    name: before the first name. arguments: between a name and its arguments. between: from the
    arguments to the next name. end: after the last call. pairs: None if the arguments are JSON;
    otherwise what is between a key and its value, and between a value and the next key.
    """

    name: str
    arguments: str
    between: str
    end: str
    pairs: tuple[str, str] | None = None

    def parse(self, text: str, tools: Tools) -> tuple[ToolCall, ...] | None:
        """Return the calls of a text that starts with their mark; None if it has anything else."""
        calls, found = list[ToolCall](), _flexible(self.name).match(text)
        while found:
            named = self._arguments().search(text, found.end())
            if not named:
                return None
            name = text[found.end() : named.start()].strip()
            place = named.end() + len(text[named.end() :]) - len(text[named.end() :].lstrip())
            read = self._pairs(text, place, name, tools) if self.pairs else _json(text, place)
            if read is None:
                return None
            arguments, stop = read
            calls.append(ToolCall(name, arguments))
            found = _flexible(self.between).match(text, stop)
            last = _flexible(self.end).match(text, stop)
            if not found and text[last.end() if last else stop :].strip():
                return None
        return tuple(calls)

    def _arguments(self) -> re.Pattern[str]:
        # Blanks alone are no mark: JSON arguments start with a brace.
        return _flexible(self.arguments) if self.arguments.strip() else re.compile(r"\s*(?=\{)")

    def _pairs(self, text: str, place: int, name: str, tools: Tools) -> tuple[Any, int] | None:
        """Return arguments that are not JSON, and their end; a value has its type of the tools."""
        assert self.pairs
        to_value, to_key = map(_flexible, self.pairs)
        ends = [_flexible(self.between), _flexible(self.end)]
        arguments: dict[str, str] = {}
        while key := to_value.search(text, place):
            found = [end.start() for one in ends if (end := one.search(text, key.end()))]
            if not found:
                break
            following = to_key.search(text, key.end(), min(found))
            stop = following.start() if following else min(found)
            arguments[text[place : key.start()].strip()] = text[key.end() : stop].strip()
            if not following:
                return _typed(arguments, name, tools), stop
            place = following.end()
        return None


@dataclass(frozen=True)
class AnswerMarks:
    """What a template writes around the parts of an answer; "" where it writes nothing.

    reasoning: before and after the reasoning; None if the template has no place for it.
    text: what may open the text. call: None if the template has no place for calls.
    """

    reasoning: tuple[str, str] | None
    text: tuple[str, ...]
    call: CallMarks | None

    def split(self, answer: str, tools: Tools = ()) -> Turn:
        """Return an answer, without its closing tokens, as a turn; the text keeps what is unknown.

        Reasoning that is not closed is reasoning to its end.
        """
        reasoning, rest = self._reasoning(answer)
        for opener in self.text:
            if opener.strip() and (found := _flexible(opener).match(rest)):
                rest = rest[found.end() :]
                break
        text, calls = self._calls(rest, tools)
        return Turn("assistant", text.strip(), reasoning=reasoning.strip() or None, calls=calls)

    def split_unfinished(self, answer: str) -> Turn:
        """Return what no later token changes of an answer, without its calls."""
        rest = self._reasoning(answer)[1]
        found = _flexible(self.call.name).search(rest) if self.call else None
        turn = replace(self, call=None).split(answer)
        if found:
            turn = replace(turn, text=turn.text[: turn.text.find(found.group().strip())].rstrip())
        opener, closer = self.reasoning or ("", "")
        call = self.call.name if self.call else ""
        if turn.text:
            return replace(turn, text=_settled(turn.text, (opener, *self.text, call)))
        return replace(turn, reasoning=_settled(turn.reasoning or "", (closer,)) or None)

    def _reasoning(self, answer: str) -> tuple[str, str]:
        if self.reasoning is None:
            return "", answer
        opener, closer = self.reasoning
        opened = _flexible(opener).match(answer) if opener.strip() else None
        start = opened.end() if opened else 0
        closed = _flexible(closer).search(answer, start)
        if closed and (opened or not opener.strip()):
            return answer[start : closed.start()], answer[closed.end() :]
        # Without a mark before the reasoning, the generation prompt has opened it.
        return (answer[start:], "") if opened or not opener.strip() else ("", answer)

    def _calls(self, answer: str, tools: Tools) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the text before the calls, and the calls; all is text if they do not parse."""
        found = _flexible(self.call.name).search(answer) if self.call else None
        if self.call is None or found is None:
            return answer, ()
        calls = self.call.parse(answer[found.start() :], tools)
        return (answer, ()) if calls is None else (answer[: found.start()], calls)


def printed(answer: Turn) -> str:
    """Return an answer as lines: its reasoning, its text, and a line for each tool call."""
    lines = [f"reasoning: {answer.reasoning}"] if answer.reasoning else []
    lines += [answer.text] if answer.text else []
    for call in answer.calls:
        lines.append(f"call: {call.name}({json.dumps(call.arguments, ensure_ascii=False)})")
    return "\n".join(lines)


def answer_marks(template: TemplateName, tokenizer: Any, settings: RenderSettings) -> AnswerMarks:
    """Return the marks of a template, found by rendering answers of sample parts."""
    if template != "chat":
        return _find(lambda turn: plain_text(turn)[0])
    own = chat_template(tokenizer, settings)
    found: AnswerMarks = own.remembered("marks", lambda: _find(lambda turn: _shown(turn, own)))
    return found


def without_closers(text: str, tokenizer: Any) -> str:
    """Return an answer's text without the control tokens at its end."""
    from data.encoding.control_tokens import control_tokens

    return re.sub(rf"(?:\s*(?:{control_tokens(tokenizer).pattern}))*\s*\Z", "", text)


def _shown(turn: Turn, template: ChatTemplate) -> str | None:
    """Return the template's text of an answer after its generation prompt; None without one."""
    text = template.sample_answer(turn)
    return None if text is None else without_closers(text, template.tokenizer)


def _find(shown: Callable[[Turn], str | None]) -> AnswerMarks:
    """Return the marks from the texts of sample answers; `shown` gives None for a refused one."""
    call, second = (ToolCall(name, {KEY: VALUE}, CALL_ID) for name in (NAME, NAME_2))
    pair = ToolCall(NAME, {KEY: VALUE, KEY_2: VALUE_2}, CALL_ID)

    def pieces(*marks: str, **more: Any) -> list[str]:
        """Return what is before, between and after the marks in an answer; [] without one."""
        answer = shown(Turn("assistant", TEXT if TEXT in marks else "", **more)) or ""
        found = re.match("(.*?)" + "(.*?)".join(marks) + "(.*)", answer, re.DOTALL)
        return [*found.groups()] if found else []

    thought = pieces(REASONING, TEXT, reasoning=REASONING)
    thought_call = pieces(REASONING, NAME, reasoning=REASONING, calls=(call,))
    plain, alone, both = (
        pieces(TEXT),
        pieces(NAME, calls=(call,)),
        pieces(TEXT, NAME, calls=(call,)),
    )
    opener = _common_end([*alone[:1], *both[1:2], *thought_call[1:2]])
    if not alone and not both and thought:  # The call follows what closes the reasoning.
        opener = opener[len(common_prefix(opener, thought[1])) :]
    reasoning, texts = None, plain[:1]
    closers = [*thought[1:2], *(one.removesuffix(opener) for one in thought_call[1:2])]
    closer = common_prefix(closers[0], closers[-1]) if closers else ""
    if closer.strip():
        reasoning = (thought or thought_call)[0], closer
        texts += [one[len(closer) :] for one in thought[1:2]]
    calls = None
    if opener.strip():
        how: dict[str, Any] = {} if alone else {"reasoning": REASONING}
        calls = _call_marks(
            opener,
            (alone or thought_call)[-1],
            pieces(NAME, NAME_2, calls=(call, second), **how),
            pieces(NAME, KEY, VALUE, calls=(call,), **how),
            pieces(NAME, KEY, VALUE, KEY_2, VALUE_2, calls=(pair,), **how),
        )
    return AnswerMarks(reasoning, tuple(sorted({*texts}, key=len, reverse=True)), calls)


def _call_marks(
    opener: str, after_name: str, two: list[str], keys: list[str], pairs: list[str]
) -> CallMarks | None:
    """Return the marks of calls, from what is around the marks in one call, two, and two pairs."""
    found = JSON_ARGUMENTS.search(after_name)
    if found:
        middle, end = after_name[: found.start()], after_name[found.end() :]
        between = two[1][found.end() :] if two else ""
        return CallMarks(opener, middle, between, end) if middle else None
    if not keys or not pairs or not all(mark.strip() for mark in keys[1:]):
        return None
    between = two[1].rpartition(VALUE)[2] if two else ""
    return CallMarks(opener, keys[1], between, keys[3], (keys[2], pairs[3]))


def _common_end(texts: list[str]) -> str:
    """Return what all texts end with."""
    found = texts[0][::-1] if texts else ""
    for text in texts[1:]:
        found = common_prefix(found, text[::-1])
    return found[::-1]


def _settled(text: str, marks: Sequence[str]) -> str:
    """Return the text without an end that may be the start of a mark."""
    most = 0
    for mark in map(str.strip, marks):
        head = re.split(f"{CALL_ID}|{NAME}", mark)[0]
        if head != mark and head in text:  # What follows differs from call to call.
            text = text[: text.find(head)]
        sizes = range(min(len(mark), len(text)), most, -1)
        most = next((size for size in sizes if text.endswith(mark[:size])), most)
    return text[: len(text) - most].removesuffix("\ufffd").rstrip()


def _json(text: str, place: int) -> tuple[Any, int] | None:
    """Return the JSON value at a place, and its end."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None


def _typed(arguments: dict[str, str], name: str, tools: Tools) -> dict[str, Any]:
    """Return arguments in which a value that the tools define as no string is read as JSON."""
    functions = (tool.get("function", tool) for tool in tools)
    defined: dict[str, Any] = next((one for one in functions if one.get("name") == name), {})
    properties = (defined.get("parameters") or {}).get("properties") or {}
    typed: dict[str, Any] = {}
    for key, value in arguments.items():
        read = (
            _json(value, 0) if properties.get(key, {}).get("type", "string") != "string" else None
        )
        typed[key] = read[0] if read and read[1] == len(value) else value
    return typed


@lru_cache
def _flexible(mark: str) -> re.Pattern[str]:
    """Return a pattern of a mark with any blanks in place of its blanks, and any id of a call."""
    words = (
        re.escape(word).replace(CALL_ID, r"\w+").replace(NAME, r"\S+?") for word in mark.split()
    )
    inner = r"\s*".join(words)
    return re.compile(rf"\s*{inner}" if inner else r"(?!)")
