"""The model's chat template: renders messages, and knows what the template can show."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, NoReturn

from data.dialogues.conversation import Dialogue, Turn
from data.encoding.control_tokens import control_tokens
from data.errors import BadRecord, UserError

Message = dict[str, Any]

# Reasoning at the head of an answer's text, as Qwen3 and DeepSeek-R1 write it.
THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
# The names under which templates read the reasoning (transformers 5.23, _alias_reasoning_fields).
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Arguments by which templates switch reasoning off or on.
SWITCHES = [{name: on} for on in (False, True) for name in ("enable_thinking", "thinking")]
CALL_ID = "call00001"  # Mistral's templates want nine characters
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
REMEDY = "Use another --chat_template, or --template vicuna"


@dataclass(frozen=True)
class Closing:
    """How a template closes an answer.

    rest: the text after the last closing token. appended: the token to add where the template
    closes an answer with the next role's token, or with none.
    """

    rest: str
    appended: str = ""


class ChatTemplate:
    """The chat template of a tokenizer with its arguments; remembers what the template can show."""

    def __init__(
        self,
        tokenizer: Any,
        arguments: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments or {}
        self.control = control_tokens(tokenizer)
        self.closers = re.compile(f"(?:{self.control.pattern})+\\Z")
        self.texts = {tools: template_text(tokenizer, name, tools) for tools in (False, True)}
        self.known: dict[Any, Any] = {}
        self.known["parts"] = self.takes_parts()

    def render(
        self, messages: Sequence[Message], tools: Any = None, generation: bool = False
    ) -> str:
        """Return the text of messages; raises BadRecord for every failure of the template."""
        how = {**self.arguments, "tokenize": False, "add_generation_prompt": generation}
        how["chat_template"] = _dated(self.texts[bool(tools)])
        messages = self._in_parts(messages)
        try:
            return str(self.tokenizer.apply_chat_template([*messages], tools=tools or None, **how))
        # A template is a program by its author: it may raise every exception.
        except Exception as error:
            if isinstance(error, TypeError) and not tools:
                # Command R+'s and Hermes 2 Pro's loop over the tools, of which there are none.
                with suppress(Exception):
                    return str(self.tokenizer.apply_chat_template([*messages], tools=[], **how))
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
            bad("refused by the chat template", f"the chat template fails with {what}. {REMEDY}")

    def _in_parts(self, messages: Sequence[Message]) -> list[Message]:
        if not self.known.get("parts"):
            return [*messages]
        return [{**message, "content": _parts(message["content"])} for message in messages]

    def marked(self, messages: Sequence[Message], tools: Any) -> str | None:
        """Return what {% generation %} marks last in the text of messages; None without marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = _dated(self.texts[bool(tools)])
        if not GENERATION.search(template):
            return None
        special = self.tokenizer.special_tokens_map
        how = {**special, **self.arguments, "return_assistant_tokens_mask": True}
        (text,), (marks,) = render_jinja_template(
            [self._in_parts(messages)], tools or None, chat_template=template, **how
        )
        return str(text[marks[-1][0] : marks[-1][1]]) if marks else ""

    def remembered(self, key: Any, find: Callable[[], Any]) -> Any:
        """Return what `find` returned for the key; the first 4,096 keys are kept."""
        if key in self.known:
            return self.known[key]
        found = find()
        if len(self.known) < 4096:
            self.known[key] = found
        return found

    def takes_parts(self) -> bool:
        """Whether the template wants a message as a list of parts, like those of vision models."""
        message = {"role": "user", "content": "\ue002"}
        for parts in (False, True):
            self.known["parts"] = parts
            with suppress(BadRecord):
                if "\ue002" in self.render([message], generation=True):
                    return parts
        self.known["parts"] = False
        return False

    def shows_reasoning(self, with_calls: bool = False, with_tools: bool = False) -> bool:
        """Whether the template has a place for the reasoning of an answer, or of one with calls.

        Some Gemma 4 templates have a place beside tool calls only.
        """

        def find() -> bool:
            answer = {"role": "assistant", "content": "\ue000", **reasoning_fields("\ue001")}
            if with_calls:
                arguments = _arguments({"\ue003": "\ue004"}, self)
                answer["tool_calls"] = [_call({"name": "\ue005", "arguments": arguments}, CALL_ID)]
            tools = [TOOL] if with_calls or with_tools else []
            for content in ("\ue000", ""):  # gpt-oss: no content beside reasoning and calls
                answer["content"] = content
                with suppress(BadRecord):
                    if "\ue001" in self._after_question([answer], tools):
                        return True
            return False

        return bool(self.remembered(("reasoning", with_calls, with_tools), find))

    def _after_question(
        self, messages: Sequence[Message], tools: Any, generation: bool = False
    ) -> str:
        """Return the text of messages after a user's; raises BadRecord.

        With a system text if one is needed, and with definitions of the tools that the messages
        name if the template refuses calls of others.
        """
        asked = {"role": "user", "content": "\ue002"}
        starts = [[asked], [{"role": "system", "content": "\ue007"}, asked]]
        named = tools_named(messages)
        given = [tools, [*tools, *named]] if tools and named else [tools]
        *first, last = [(start, some) for some in given for start in starts]
        for start, some in first:
            with suppress(BadRecord):
                return self.render([*start, *messages], some, generation)
        return self.render([*last[0], *messages], last[1], generation)

    def sample_answer(self, turn: Turn) -> str | None:
        """Return the text of an answer to a question after the generation prompt.

        None if the template refuses the answer, or does not start it with the generation prompt.
        """
        message, tools = _message(turn, self), [TOOL] if turn.calls else []
        for named in ([], tools_named([message])):
            with suppress(BadRecord):
                prompt = self._after_question([], [*tools, *named], generation=True)
                text = self._after_question([message], [*tools, *named])
                return text[len(prompt) :] if text.startswith(prompt) else None
        return None

    def takes_objects(self) -> bool:
        """Whether the template renders the arguments of a tool call from objects, not JSON text.

        Text in place of an object is quoted once more; an object in place of text is Python's.
        """

        def find() -> bool:
            for as_object in (True, False):
                given: Any = {"\ue003": "\ue004"}
                given = given if as_object else json.dumps(given, ensure_ascii=False)
                call = {"name": "\ue005", "arguments": given}
                answer = {"role": "assistant", "content": "", "tool_calls": [_call(call, CALL_ID)]}
                with suppress(BadRecord):
                    text = self._after_question([answer], [TOOL])
                    wrong = "'\ue003'" in text or '\\"\ue003' in text
                    if "\ue003" in text and "\ue004" in text and not wrong:
                        return as_object
            return True

        return bool(self.remembered("objects", find))

    def closing(self, answer: Message, has_tools: bool) -> Closing:
        """Return how the template closes answers with the same fields as this one."""
        kind = signature_of(answer)
        found: Closing = self.remembered(
            ("closing", kind, has_tools), lambda: self._find_closing(answer, has_tools)
        )
        return found

    def _find_closing(self, answer: Message, has_tools: bool) -> Closing:
        """Find it with an answer of marks, as the last message and before another one.

        The closing tokens are those after the answer that both have:

            last      ... <|end|>\\n<|endoftext|>      Phi-3 ends the dialogue, too
            followed  ... <|end|>\\n<|user|>\\n...       so <|end|> closes the answer
        """
        marked, marks = marked_message(answer, lambda: "\uf000")
        if not marks:  # an answer without content, such as reasoning alone
            marked["content"], marks = "\uf000", {"\uf000": ""}
        tools = [TOOL] if has_tools or "tool_calls" in answer else []
        role = "tool" if "tool_calls" in answer else "user"
        after = {"role": role, "content": "\ue006", "name": "\uf001"}

        def tail(messages: list[Message]) -> str:
            text = self._after_question(messages, tools)
            return text[max(text.rfind(mark) for mark in marks) + 1 :]

        last = followed = tail([marked])
        with suppress(BadRecord):
            followed = tail([marked, after])
        common = common_prefix(last, followed)
        closers = [*self.control.finditer(common)]
        if closers:
            return Closing(last[closers[-1].end() :])
        run = re.search(rf"(?:{self.control.pattern})+", last)  # gpt-oss has another one at the end
        if run:
            return Closing(last[run.end() :])
        opener = re.match(rf"\s*(?:{self.control.pattern})", followed[len(common) :])
        if opener and common == last:
            return Closing("", opener.group())
        return Closing("", self.tokenizer.eos_token or "")


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "\uf100",
        "description": "\uf101",
        "parameters": {
            "type": "object",
            "properties": {"\uf102": {"type": "string", "description": "\uf103"}},
            "required": ["\uf102"],
        },
    },
}


def tools_named(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return a tool definition for each name of a call or a result in the messages."""
    calls = (call["function"]["name"] for one in messages for call in one.get("tool_calls", ()))
    results = (one["name"] for one in messages if one["role"] == "tool" and one.get("name"))
    names = dict.fromkeys((*calls, *results))
    return [{**TOOL, "function": {**TOOL["function"], "name": name}} for name in names]


def messages_of(dialogue: Dialogue, template: ChatTemplate) -> list[Message]:
    """Return the messages as transformers documents them for chat templates."""
    system = [] if dialogue.system is None else [Turn("system", dialogue.system)]
    return [_message(turn, template) for turn in (*system, *dialogue.turns)]


def _message(turn: Turn, template: ChatTemplate) -> Message:
    message: Message = {"role": turn.role, "content": turn.text}
    reasoning = turn.reasoning
    if turn.role == "assistant" and reasoning is None and "<think>" in turn.text:
        found = THINK.match(turn.text)
        if found and template.shows_reasoning(bool(turn.calls)):
            # As Qwen3's template splits them.
            reasoning, message["content"] = found[1].strip("\n"), found[2].lstrip("\n")
    if reasoning:
        message |= reasoning_fields(reasoning)
    if turn.calls:
        message["tool_calls"] = [
            _call({"name": c.name, "arguments": _arguments(c.arguments, template)}, c.id)
            for c in turn.calls
        ]
    message |= {"name": turn.name} if turn.name else {}
    message |= {"tool_call_id": turn.call_id} if turn.call_id else {}
    return message


def _arguments(given: Any, template: ChatTemplate) -> Any:
    """Return a call's arguments as the template renders them: an object, or JSON text."""
    if template.takes_objects():
        if isinstance(given, str):
            # A model may have written invalid JSON: it stays text.
            with suppress(ValueError, RecursionError):
                return json.loads(given)
        return given
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def reasoning_fields(text: str) -> Message:
    """Return the reasoning under each name that templates read."""
    return dict.fromkeys(REASONING_KEYS, text)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _call(function: dict[str, Any], identity: str | None) -> dict[str, Any]:
    return {**({"id": identity} if identity else {}), "type": "function", "function": function}


def marked_message(message: Message, mark: Callable[[], str]) -> tuple[Message, dict[str, str]]:
    """Return the message with marks in place of its texts, and what each mark stands for.

    The reasoning is not among these: templates drop that of earlier turns.
    """
    changed, marks = {**message}, {}
    if str(message["content"]).strip():
        changed["content"] = mark()
        marks[changed["content"]] = ""
    if message.get("reasoning_content"):
        changed |= reasoning_fields("\ue000")
    calls = []
    for call in message.get("tool_calls", ()):
        name, value = mark(), mark()
        given: Any = {"\ue001": value}
        if isinstance(call["function"]["arguments"], str):
            given = json.dumps(given, ensure_ascii=False)
        calls.append(_call({"name": name, "arguments": given}, call.get("id")))
        marks |= dict.fromkeys((name, value), "a tool call of ")
    return {**changed, "tool_calls": calls} if calls else changed, marks


def signature_of(message: Message) -> tuple[Any, ...]:
    """Return what decides whether a template shows a message, but for the texts."""
    filled = (key for key, value in message.items() if str(value).strip() and value)
    fields = tuple(sorted(key for key in filled if key != "role"))
    return message["role"], fields, len(message.get("tool_calls", ()))


def contains(text: str, part: str) -> bool:
    """Whether the text holds the part, as it is or within JSON text, blanks at its ends aside."""
    part = part.strip()
    return part in text or any(
        json.dumps(part, ensure_ascii=a)[1:-1] in text for a in (False, True)
    )


def with_arguments(template: ChatTemplate, arguments: dict[str, Any]) -> ChatTemplate:
    """Return the template with more arguments, which replace its own of the same names."""
    if not arguments:
        return template

    def find() -> ChatTemplate:
        other = ChatTemplate.__new__(ChatTemplate)
        other.__dict__ |= {**vars(template), "known": {"parts": template.known["parts"]}}
        other.arguments = {**template.arguments, **arguments}
        return other

    key = "arguments", json.dumps(arguments, sort_keys=True)
    found: ChatTemplate = template.remembered(key, find)
    return found


def template_text(tokenizer: Any, name: str | None, tools: bool) -> str:
    """Return the Jinja text of a tokenizer's chat template; raises UserError.

    Of several, `name`; otherwise "tool_use" for dialogues with tools, or "default".
    """
    found = tokenizer.chat_template
    if not found:
        raise UserError("this tokenizer has no chat template. Use --template vicuna.")
    if isinstance(found, str):
        if name is not None:
            raise UserError(
                f"--chat_template_name {name}: found a tokenizer with one chat template; expected "
                "several. Leave the flag out."
            )
        return found
    wanted = [name] if name else ["tool_use", "default"] if tools else ["default"]
    for one in wanted:
        if one in found:
            return str(found[one])
    names = ", ".join(map(str, found))
    raise UserError(
        f"--chat_template_name: found {name or 'no name'} and no such template among the "
        f"tokenizer's: {names}. Give one of these names."
    )


def bad(cause: str, explanation: str) -> NoReturn:
    """Raise BadRecord."""
    raise BadRecord(cause, explanation)


@lru_cache(maxsize=4)
def _dated(template: str) -> str:
    """Return the template with a fixed date instead of today: Llama 3's own default.

    With today's date, a run that is resumed tomorrow would have other ids.
    """
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
        lambda call: repr(date(2024, 7, 26).strftime(call[2])),
        template,
    )


def common_prefix(one: str, other: str) -> str:
    """Return the text that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((n for n, (x, y) in pairs if x != y), min(len(one), len(other)))]
