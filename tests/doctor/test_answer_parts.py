"""On a terminal, `show` colours reasoning, tool calls and answers differently."""

from pathlib import Path
from typing import Any

import pytest

from data.dialogues.sharegpt import Tally
from data.encoding.encode import encode_dialogues
from data.encoding.templates import RenderSettings, render_examples
from loop.doctor.answer_parts import parts_of
from loop.doctor.show import as_text
from tests.support.chat_templates import CASES, DIALOGUES, tokenizer_with
from tests.support.helpers import command, write_dialogues

YELLOW, CYAN, GREEN, PLAIN = "\033[33m", "\033[36m", "\033[32m", "\033[0m"


def coloured(name: str, settings: RenderSettings, tokenizer: Any) -> list[str]:
    """Return the coloured texts of a dialogue's examples."""
    tokenizer = tokenizer_with(tokenizer, CASES["rewrites"].text)
    dialogue = DIALOGUES[name]
    items = render_examples(dialogue, "chat", tokenizer, settings)
    how = "chat", tokenizer, 1 << 20, Tally(), settings
    examples = [*encode_dialogues([dialogue], *how)]
    texts = []
    for example, item in zip(examples, items, strict=True):
        parts = parts_of(item, example.labels, tokenizer)
        text = as_text(example, tokenizer, True, parts)
        plain = as_text(example, tokenizer, False)
        removed = text
        for code in (YELLOW, CYAN, GREEN, PLAIN):
            removed = removed.replace(code, "")
        assert removed == plain.replace("⟦", "").replace("⟧", "")
        texts.append(text)
    return texts


def piece(text: str, colour: str) -> str:
    """Return the text in a colour, joined."""
    return "".join(part.split(PLAIN)[0] for part in text.split(colour)[1:])


def test_reasoning_and_the_answer_have_their_own_colours(chat_tokenizer: Any) -> None:
    (text,) = coloured("reasoning", RenderSettings(), chat_tokenizer)
    assert "Let me see." in piece(text, YELLOW)
    assert piece(text, GREEN) == "So.<|im_end|>"
    assert CYAN not in text
    (text,) = coloured("reasoning", RenderSettings(train_on_reasoning=False), chat_tokenizer)
    assert YELLOW not in text
    assert piece(text, GREEN) == "So.<|im_end|>"


def test_tool_calls_have_their_own_colour(chat_tokenizer: Any) -> None:
    text = coloured("call_with_text", RenderSettings(), chat_tokenizer)[0]
    assert "Rome" in piece(text, CYAN)
    assert "Looking." in piece(text, GREEN)
    assert "Rome" not in piece(text, GREEN)
    assert piece(text, GREEN).endswith("<|im_end|>")


@pytest.mark.parametrize("turn", [(), ("--turn", "1")])
def test_a_terminal_has_a_legend_and_a_pipe_has_brackets(
    turn: tuple[str, ...], chat_model: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "d.json", ["Why is it so?", "It just is."], ["And?", "No."])
    show = ["python", "-m", "loop", "show", "--data_path", data, "--model_name_or_path", chat_model]
    done = command(*show, *turn, FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == (
        f"supervised: {YELLOW}reasoning{PLAIN}, {CYAN}tool calls{PLAIN}, {GREEN}answer{PLAIN}"
    )
    assert f"{GREEN}It just is." in "\n".join(rest)
    piped = command(*show, *turn).stdout
    assert "\033" not in piped
    assert "supervised:" not in piped
    expected = piped.replace("⟦", GREEN).replace("⟧", PLAIN)
    assert rest == expected.splitlines()
