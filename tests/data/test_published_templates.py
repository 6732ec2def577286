"""Under published chat templates, prompt and answer are their own, or the reason given is true."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.conversation import Dialogue
from data.encoding.templates import chat_template
from data.errors import UserError
from tests.data.test_chat_templates import encoded, messages_of, trained
from tests.support.chat_templates import CASES, DIALOGUES, tokenizer_with

# The wheel of TRL carries templates of current models; TRL itself is not imported.
FOUND = find_spec("trl")
FOLDER = Path(str(FOUND.origin)).parent / "chat_templates" if FOUND else Path("nowhere")
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
CONTROL = re.compile(
    r"<\|[\w▁/｜ -]+?\|>|<｜[^｜]+｜>|</?s>|<\w*_of_\w+>|<eos>|<bos>|<\|\w+>|<\w+\|>"
)
TODAY = re.compile(r"strftime_now\([^)]*\)")


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request: pytest.FixtureRequest, chat_tokenizer: Any) -> Any:
    """Return a tokenizer with the template, and with what looks like its control tokens."""
    text = FILES[request.param].read_text(encoding="utf-8")
    changed = tokenizer_with(chat_tokenizer, TODAY.sub("'26 Jul 2024'", text))
    names = sorted({*CONTROL.findall(text)})
    changed.add_special_tokens({"additional_special_tokens": names})
    return changed


def test_there_are_as_many_templates_as_when_this_was_written() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize("kind", DIALOGUES)
def test_prompt_and_answer_are_the_templates_own_or_the_reason_is_true(
    tokenizer: Any, kind: str
) -> None:
    dialogue, template = DIALOGUES[kind], chat_template(tokenizer)
    case = replace(
        CASES["rewrites" if template.shows_reasoning() else "two_closers"],
        arguments_as_text=not template.takes_objects(),
    )
    messages = messages_of(dialogue, case)
    if template.known["parts"]:
        for one in messages:
            one["content"] = [{"type": "text", "text": one["content"]}]
    tools = [*dialogue.tools] or None

    def apply(stop: int | None = None, **how: Any) -> str:
        return str(
            tokenizer.apply_chat_template(messages[:stop], tools=tools, tokenize=False, **how)
        )

    places = supervised(dialogue, messages)
    try:
        found = [*trained(encoded(dialogue, tokenizer)[0], tokenizer)]
    except UserError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith(f'file.json: record 0 (id "{kind}"): the chat template')
        check_reason(refused, dialogue, places, apply)
        return
    assert len(found) == len(places)
    for place, (start, answer) in zip(places, found, strict=True):
        assert start == apply(place, add_generation_prompt=True)
        shown = apply(place + 1)
        both = start + answer
        # What follows an answer is control tokens; a token that is appended comes after all.
        longer, shorter = (shown, both) if shown.startswith(both) else (both, shown)
        assert longer.startswith(shorter)
        assert not CONTROL.sub("", longer[len(shorter) :]).replace("<|im_end|>", "").strip()


def supervised(dialogue: Dialogue, messages: list[Any]) -> list[int]:
    skipped = len(messages) - len(dialogue.turns)
    turns = enumerate(dialogue.turns, skipped)
    return [n for n, turn in turns if turn.role == "assistant" and turn.supervised]


def check_reason(error: str, dialogue: Dialogue, places: list[int], apply: Any) -> None:
    """Check that the template does what the message says."""

    def fails(stop: int | None) -> bool:
        try:
            apply(stop, add_generation_prompt=stop in places)
        except Exception:
            return True
        return False

    if "fails with" in error:
        assert any(map(fails, [*places, *(place + 1 for place in places), None]))
    elif "opens the answer" in error:
        pairs = [(apply(place, add_generation_prompt=True), apply(place + 1)) for place in places]
        assert any(not shown.startswith(start) for start, shown in pairs)
    else:
        assert "does not show" in error
        shown = [apply(place + 1) for place in places] + [apply()]
        turn = re.search(r"(reasoning of )?turn (\d+)( \((\w+)\))?", error)
        if turn is None:
            assert not any("Look up the weather." in text for text in shown)
            return
        offset = int(turn[2]) - (dialogue.system is not None)
        said = dialogue.turns[offset] if offset >= 0 else None
        texts = [dialogue.system] if said is None else [said.text, said.reasoning]
        texts += [] if said is None else [value for call in said.calls for value in ("Rome",)]
        missing = [
            text
            for text in filter(None, texts)
            if not all(
                text.strip() in one or json.dumps(text.strip())[1:-1] in one for one in shown
            )
        ]
        assert missing, error
