"""`show --turn N` shows one answer after the prompt from which it is generated."""

import json
from pathlib import Path
from typing import Any

from tests.support.helpers import command, write_dialogues

TEXTS = ["Why is it so?", "It just is.", "And now?", "Now it is not."]


def test_an_answer_follows_its_generation_prompt_and_is_supervised(
    chat_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "d.json", TEXTS, TEXTS[:2])
    show = ["python", "-m", "loop", "show", "--data_path", data, "--model_name_or_path", chat_model]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": text} for r, text in zip(roles, TEXTS, strict=True)]
    for turn, dialogues in ((1, 2), (3, 1)):
        prompt = chat_tokenizer.apply_chat_template(
            messages[:turn], add_generation_prompt=True, tokenize=False
        )
        ids = chat_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        done = command(*show, "--turn", str(turn), "--jsonl")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(rows) == dialogues
        for row in rows:
            assert row["turn"] == turn
            assert row["input_ids"][: len(ids)] == ids
            assert {*row["labels"][: len(ids)]} == {-100}
            assert row["labels"][len(ids)] == row["input_ids"][len(ids)]
            trained = [one for one in row["labels"] if one != -100]
            assert TEXTS[turn] in chat_tokenizer.decode(trained)
        text = command(*show, "--turn", str(turn))
        assert f"turn {turn}\n{prompt}⟦{TEXTS[turn]}" in text.stdout


def test_a_turn_that_is_no_answer_is_refused_with_the_valid_ones(
    chat_model: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "d.json", TEXTS)
    show = ["python", "-m", "loop", "show", "--data_path", data, "--model_name_or_path", chat_model]
    for turn in ("0", "2", "9"):
        done = command(*show, "--turn", turn)
        assert done.returncode == 2
        assert "expected one of: 1, 3." in done.stderr
        assert not done.stdout
