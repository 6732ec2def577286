"""`python -m loop chat`: chats with adapters, and compares their answers with the base's."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from data.dialogues.conversation import Dialogue, ToolCall, Turn
from data.dialogues.tools import tools_of
from data.encoding.encoder import prompt_ids
from data.encoding.generated import AnswerMarks, answer_marks, printed, without_closers
from data.encoding.templates import RenderSettings, prompt, template_arguments
from data.errors import BadRecord, UserError
from data.files.atomic_write import check_output, written_whole
from loop.adapters.adapter import Adapter, load_base, read_adapter, with_adapter
from loop.adapters.printed_answer import AnswerPrinter, as_json
from loop.config.parser import File, Folder, Model, Tokens, flag, nearest, parse
from loop.model.base import as_user_error
from loop.model.new_tokens import set_up


@dataclass(frozen=True)
class Question:
    """One question of a --prompts file."""

    id: Any
    text: str
    system: str | None


def read_prompts(file: Path) -> list[Question]:
    """Return a file's questions; raises UserError with the number of an invalid line."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {file}: cannot be read: {reason}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {file}: found an empty file; expected one question per line.")
    return [_question(line, number, file) for number, line in numbered]


def _question(line: str, number: int, file: Path) -> Question:
    if file.suffix != ".jsonl":
        return Question(number, line, None)
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"--prompts {file}: line {number}: not valid JSON: {error}.") from None
    known = value if isinstance(value, dict) else {}
    text, system = known.get("prompt"), known.get("system")
    if not isinstance(text, str) or not text.strip() or not isinstance(system, str | None):
        raise UserError(
            f"--prompts {file}: line {number}: found {line[:80]}; expected an object with a "
            'string "prompt", and optionally a string "system".'
        )
    return Question(known.get("id", number), text, system)


def read_tools(file: Path) -> tuple[dict[str, Any], ...]:
    """Return a file's tool definitions, a list or an object with "tools"; raises UserError."""
    try:
        value = json.loads(file.expanduser().read_text(encoding="utf-8"))
        found = tools_of(
            value if isinstance(value, dict) and "tools" in value else {"tools": value}
        )
    except OSError as error:
        raise UserError(f"--tools {file}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--tools {file}: not valid JSON: {error}.") from None
    except BadRecord as error:
        raise UserError(f"--tools {file}: {error}.") from None
    if not found:
        raise UserError(f"--tools {file}: found no tool; expected a list of tool definitions.")
    return tuple(found["tools"])


BASE = "base"  # the base model's name in commands and files
HELP = """/adapter NAME  answer with this model: {names}
/system TEXT   start a new dialogue with this system prompt; without TEXT: the template's default
/result TEXT   give the result of a tool call
/clear         start a new dialogue
/help          show this text; Ctrl-C interrupts an answer, Ctrl-D or /quit exits"""


@dataclass(frozen=True)
class ChatConfig:
    """The adapters, the questions, and how answers are generated."""

    adapter: tuple[Folder, ...] = flag(
        ("runs/main_job",),
        "output folders of runs with one base model; the first adapter answers",
        "chat",
    )
    base: Model | None = flag(None, "base model; none: the one in adapter_config.json", "chat")
    trust_remote_code: bool = flag(
        False, "run Python code that comes with the base or the adapter", "chat", flag_only=True
    )
    prompt: tuple[str, ...] = flag((), "questions to answer; none: an interactive dialogue", "chat")
    prompts: File | None = flag(
        None,
        'file of questions, one per line: text, or in .jsonl an object with "prompt" and '
        'optionally "id" and "system"',
        "chat",
    )
    out: File | None = flag(None, "JSONL file for the answers to --prompts", "chat")
    system: str | None = flag(None, "system prompt; none: the template's", "chat")
    tools: File | None = flag(
        None, "JSON file with tool definitions, as in the training data", "chat"
    )
    chat_template_kwargs: str | None = flag(
        None, "arguments of the chat template, as in training; none: those of training", "chat"
    )
    compare: bool = flag(False, "print the answers of base and adapters side by side", "chat")
    max_new_tokens: Tokens = flag(128, "maximum tokens of an answer", "chat", at_least=1)
    temperature: float = flag(0.0, "sampling temperature; 0: greedy", "chat", at_least=0)


@dataclass(frozen=True)
class Speaker:
    """A base model with adapters, by folder name; each adapter has its own tokenizer."""

    model: PeftModel
    adapters: dict[str, Adapter]
    config: ChatConfig
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def names(self) -> list[str]:
        """Return the names of the base and the adapters."""
        return [BASE, *self.adapters]

    @property
    def first(self) -> str:
        """Return the name of the adapter that answers by default."""
        return next(iter(self.adapters))

    def printer(self, name: str) -> AnswerPrinter:
        """Return a streamer that prints an answer while it is generated."""
        adapter = self.adapters.get(name, self.adapters[self.first])
        return AnswerPrinter(self._marks(adapter), adapter.tokenizer, self.tools)

    def answer(
        self,
        turns: tuple[Turn, ...],
        name: str | None = None,
        system: str | None = None,
        printer: AnswerPrinter | None = None,
    ) -> Turn:
        """Return the assistant's next answer; a `printer` prints it while it is generated."""
        name = name or self.first
        if name == BASE:
            with self.model.disable_adapter():
                return self._generate(turns, self.adapters[self.first], system, printer)
        self.model.set_adapter(_inner(self.adapters, name))
        return self._generate(turns, self.adapters[name], system, printer)

    def _generate(
        self,
        turns: tuple[Turn, ...],
        adapter: Adapter,
        system: str | None,
        printer: AnswerPrinter | None,
    ) -> Turn:
        tokenizer, template = adapter.tokenizer, adapter.template
        dialogue = Dialogue("", turns, system, self.tools)
        try:
            rendered = prompt(dialogue, template, tokenizer, self._rendering(adapter))
        except BadRecord as error:
            raise UserError(f"{error}.") from None
        asked = torch.tensor([prompt_ids(rendered, template, tokenizer)])
        inputs = {"input_ids": asked.to(self.model.device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        ends = self.model.generation_config.eos_token_id or []
        ends = {*(ends if isinstance(ends, list) else [ends]), *adapter.end_ids}
        sampling = {"do_sample": True, "temperature": self.config.temperature}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=self.config.max_new_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                streamer=printer,
                **(sampling if self.config.temperature else {"do_sample": False}),
            )
        # A decoder returns prompt and answer, an encoder-decoder its start token and the answer.
        new = ids[0, 1 if adapter.pairs else inputs["input_ids"].shape[1] :]
        if printer and len(new) >= self.config.max_new_tokens and int(new[-1]) not in ends:
            print("(truncated at --max_new_tokens)")
        text = without_closers(tokenizer.decode(new), tokenizer)
        return self._marks(adapter).split(text, self.tools)

    def _marks(self, adapter: Adapter) -> AnswerMarks:
        return answer_marks(adapter.template, adapter.tokenizer, self._rendering(adapter))

    def _rendering(self, adapter: Adapter) -> RenderSettings:
        """Return how the adapter's prompts are rendered: as in training, but for the flag."""
        if not self.config.chat_template_kwargs:
            return adapter.rendering
        arguments = template_arguments(self.config.chat_template_kwargs)
        return replace(adapter.rendering, arguments=arguments)


def main(argv: Sequence[str]) -> None:
    """Answer --prompt or --prompts, or start a dialogue."""
    values = parse(ChatConfig, argv, __doc__ or "")
    values.pop("config", None)
    config = ChatConfig(**values)
    if bool(config.prompts) != bool(config.out):
        raise UserError("found one of --prompts and --out; expected both. Give the other one too.")
    if config.prompts and config.out:
        if config.prompt:
            raise UserError(
                "found both --prompt and --prompts; expected one of them. Leave one out."
            )
        questions = read_prompts(Path(config.prompts))
        check_output("--out", Path(config.out), {Path(config.prompts).resolve(): "--prompts"})
        answer_all(load_speaker(config), questions, Path(config.out))
        return
    speaker = load_speaker(config)
    for text in config.prompt:
        print(f"\n> {text}" if config.compare else f"> {text}")
        print_answer(speaker, (Turn("user", text),), speaker.first, config.system)
    if not config.prompt:
        chat_loop(speaker)


def load_speaker(config: ChatConfig) -> Speaker:
    """Load the adapters and their base, in the training precision of the first adapter.

    Raises UserError if a folder holds no adapter, or an adapter of another base.
    """
    tools = read_tools(Path(config.tools)) if config.tools else ()
    adapters: dict[str, Adapter] = {}
    for word in config.adapter:
        adapter = read_adapter(Path(word), config.base, config.trust_remote_code)
        name = adapter.folder.resolve().name
        adapters[word if name in adapters or name == BASE else name] = adapter
    first = adapters[next(iter(adapters))]
    for adapter in adapters.values():
        if adapter.base != first.base or len(adapter.tokenizer) != len(first.tokenizer):
            raise UserError(
                f"--adapter {adapter.folder}: trained on {adapter.base}, {len(adapter.tokenizer)} "
                f"tokens; expected the first adapter's base, {first.base}, with "
                f"{len(first.tokenizer)} tokens. "
                "Load it alone, or give --base if both bases are the same model."
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = with_adapter(load_base(first, first.base, first.dtype).to(device), first)
    for name, adapter in [*adapters.items()][1:]:
        with as_user_error(f"--adapter {adapter.folder}"):
            model.load_adapter(str(adapter.folder), _inner(adapters, name))
    set_up(model, None, train=False)
    return Speaker(model.eval(), adapters, config, tools)


def _inner(adapters: dict[str, Adapter], name: str) -> str:
    """Return the name that peft uses for an adapter; it must not contain dots."""
    number = [*adapters].index(name)
    return f"adapter_{number}" if number else "default"


def print_answer(speaker: Speaker, turns: tuple[Turn, ...], name: str, system: str | None) -> Turn:
    """Stream the named model's answer and return it; --compare prints a table of all answers."""
    if not speaker.config.compare:
        return speaker.answer(turns, name, system, speaker.printer(name))
    answers = {who: speaker.answer(turns, who, system) for who in speaker.names}
    print(answers_in_columns({who: printed(answer) for who, answer in answers.items()}))
    return answers[name]


def answers_in_columns(answers: dict[str, str]) -> str:
    """Return a table with a column for each answer, as wide as the terminal."""
    separator = " | "
    columns = shutil.get_terminal_size((100, 24)).columns - len(separator) * (len(answers) - 1)
    width = max(12, columns // len(answers))
    wrapped = [
        [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        for text in answers.values()
    ]
    names = [name if name != BASE else "BASE" for name in answers]
    if len(names) == 2:
        names[1] = "BASE + ADAPTER"
    rows = [[name[:width] for name in names], *zip_longest(*wrapped, fillvalue="")]
    return "\n".join(separator.join(f"{text:{width}}" for text in row).rstrip() for row in rows)


def answer_all(speaker: Speaker, questions: list[Question], out: Path) -> None:
    """Write the first adapter's answers as JSONL; --compare adds all other models' answers."""
    names = speaker.names if speaker.config.compare else [speaker.first]
    with written_whole(out, "--out") as partial, partial.open("w", encoding="utf-8") as file:
        for question in questions:
            system = question.system or speaker.config.system
            for name in names:
                answer = speaker.answer((Turn("user", question.text),), name, system)
                line = {"id": question.id, "prompt": question.text}
                line |= {"system": system} if system else {}
                line |= {"adapter": name, **as_json(answer)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{out}: {len(questions)} questions, answered by {', '.join(names)}")


def chat_loop(speaker: Speaker) -> None:
    """Read messages from the terminal and answer them; each prompt holds all previous turns."""
    turns: tuple[Turn, ...] = ()
    name, system = speaker.first, speaker.config.system
    print("Type a message, or /help; Ctrl-D exits.")
    for text in _typed():
        word, _, rest = text.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/adapter" and rest.strip() in speaker.names:
            name = rest.strip()
            print(f"{name} answers")
        elif word in ("/system", "/clear"):
            turns = ()
            system = (rest.strip() or None) if word == "/system" else system
            print("new dialogue")
        elif word == "/result" and (call := _open_call(turns)):
            turns = (*turns, Turn("tool", rest.strip(), name=call.name, call_id=call.id))
            if not _open_call(turns):
                turns = _answered(speaker, turns, name, system) or turns[:-1]
        elif word.startswith("/") and "/" not in word[1:]:  # A path is a message.
            if word == "/adapter":
                print(f"found {rest.strip() or 'no name'}.{nearest(rest.strip(), speaker.names)}")
            if word == "/result":
                print("found no tool call without a result.")
            print(HELP.format(names=", ".join(speaker.names)))
        else:
            turns = _answered(speaker, (*turns, Turn("user", text)), name, system) or turns


def _open_call(turns: tuple[Turn, ...]) -> ToolCall | None:
    """Return the first call of the last answer that has no result yet."""
    results = len([*takewhile(lambda turn: turn.role == "tool", reversed(turns))])
    calls = turns[-1 - results].calls if results < len(turns) else ()
    return calls[results] if results < len(calls) else None


def _answered(
    speaker: Speaker, asked: tuple[Turn, ...], name: str, system: str | None
) -> tuple[Turn, ...] | None:
    """Print the answer and return the turns with it; None if it is interrupted or refused."""
    sys.stdout.write("" if speaker.config.compare else f"{name}: ")
    try:
        return (*asked, print_answer(speaker, asked, name, system))
    except KeyboardInterrupt:
        print("\n(interrupted; the question is dropped)")
    except UserError as error:  # The template refuses the turns.
        print(f"({error} The question is dropped)")
    return None


def _typed() -> Iterator[str]:
    """Yield non-empty messages until Ctrl-C or Ctrl-D."""
    while True:
        try:
            text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            yield text
