"""Sources and targets of encoder-decoders: complete, truncated, and like FastChat's."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.sharegpt import Tally
from data.encoding.encode import Example
from data.encoding.seq2seq import SHORT, UNKNOWN, PairLimits, encode_pairs
from data.encoding.templates import T5_SYSTEM, render
from data.encoding.tokenizer import with_missing_characters
from data.errors import UserError
from loop.config.flags import DUMMY_DATA
from tests.support.helpers import command, dialogues_in
from tests.support.small_t5 import t5_tokenizer

LIMITS = PairLimits(2048, 2048, keep_header=False)
HEADER = T5_SYSTEM + "\n\n"
LONG = "This is a dialogue of many words and I am happy to tell you about it."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_missing_characters(t5_tokenizer())[0]


def dialogue(*texts: str) -> Dialogue:
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Dialogue("d", tuple(turns))


def pairs_of(
    dialogues: list[Dialogue], tokenizer: Any, limits: PairLimits = LIMITS
) -> tuple[list[Example], Tally]:
    tally = Tally(len(dialogues))
    return [*encode_pairs(dialogues, tokenizer, limits, False, tally)], tally


@pytest.mark.parametrize(
    ("data", "golden", "equal"),
    [("fastchat_dummy_conversation", "t5_dummy", 500), ("oasst_en", "t5_oasst_en", 558)],
)
def test_show_prints_fastchats_pairs_id_for_id(
    data: str, golden: str, equal: int, shared: Path, tmp_path: Path
) -> None:
    # 6 of 564 pairs differ. Two have equally likely pieces. Four have characters that the slow
    # tokenizer normalised, but this tokenizer.json does not (…, ¹, a letter and a separate accent).
    (tmp_path / "t5").mkdir()
    for file in (shared / "tokenizers/t5").iterdir():
        (tmp_path / "t5" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "t5/config.json").write_text(
        '{"model_type": "t5", "is_encoder_decoder": true, "decoder_start_token_id": 0}'
    )
    done = command(
        *("python", "-m", "loop", "show", "--jsonl", "--template", "t5", "--t5_compat", "True"),
        *("--model_name_or_path", tmp_path / "t5", "--data_path", shared / f"data/{data}.json"),
    )
    assert done.returncode == 0, done.stderr
    with gzip.open(shared / f"golden/{golden}.jsonl.gz", "rt") as lines:
        expected = [json.loads(line) for line in lines]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    same = [mine == theirs for mine, theirs in zip(found, expected, strict=True)]
    assert sum(same) >= equal


def test_a_source_has_the_ids_of_its_text_alone_and_a_target_of_its_answer(
    tokenizer: Any,
) -> None:
    dialogues, tally = dialogues_in(DUMMY_DATA)
    dialogues.append(dialogue("Tab\tand {brace}", f"\n{LONG}\n", "More?", f" {LONG} \\ `x`  "))
    examples = [*encode_pairs(dialogues, tokenizer, LIMITS, False, tally)]
    texts = []
    for record in dialogues:
        rendered = render(record, "t5", tokenizer)
        texts += [
            (rendered.text[:start], rendered.text[start:end]) for start, end in rendered.spans
        ]
    direct = [tuple(tokenizer(text)["input_ids"] for text in pair) for pair in texts]
    direct = [pair for pair in direct if min(map(len, pair)) > 5]
    assert len(direct) > 600
    assert direct == [(example.input_ids, example.labels) for example in examples]


def test_a_pair_is_the_dialogue_before_an_answer_and_the_answer_with_eos(tokenizer: Any) -> None:
    (first, second), _ = pairs_of([dialogue("Hello.", LONG, "Who are you?", LONG)], tokenizer)
    asked = f"{HEADER}### Human: Hello.\n### Assistant: "
    assert tokenizer.decode(first.input_ids) == f"{asked}</s>"
    assert tokenizer.decode(first.labels) == f"{LONG}</s>"
    more = f"{asked}{LONG}\n### Human: Who are you?\n### Assistant: </s>"
    assert tokenizer.decode(second.input_ids) == more
    assert (first.record, second.record, first.is_pair) == (0, 0, True)
    assert first.supervised_tokens == len(first.labels)


def test_a_source_is_truncated_on_the_left_and_a_target_on_the_right(tokenizer: Any) -> None:
    (whole,), _ = pairs_of([dialogue(LONG, LONG)], tokenizer)
    (cut,), tally = pairs_of([dialogue(LONG, LONG)], tokenizer, PairLimits(30, 10, False))
    assert cut.input_ids == whole.input_ids[-30:]
    assert cut.labels == whole.labels[:10]  # without EOS, which would train the model to end there
    assert tally.noted["sources cut on the left"] == 1
    assert tally.noted["targets cut on the right, without EOS"] == 1


def test_keep_header_truncates_after_the_header(tokenizer: Any) -> None:
    (whole,), _ = pairs_of([dialogue(LONG, LONG)], tokenizer)
    header = tokenizer(HEADER, add_special_tokens=False)["input_ids"]
    limits = PairLimits(len(header) + 10, 2048, keep_header=True)
    (cut,), _ = pairs_of([dialogue(LONG, LONG)], tokenizer, limits)
    assert cut.input_ids == header + whole.input_ids[-10:]
    # A header longer than the limit is truncated, too.
    (cut,), _ = pairs_of([dialogue(LONG, LONG)], tokenizer, PairLimits(20, 2048, True))
    assert cut.input_ids == whole.input_ids[-20:]


def test_a_long_turn_does_not_shift_later_pairs(tokenizer: Any) -> None:
    texts = ["Hello.", " ".join([LONG] * 20), "Who are you?", LONG]
    examples, _ = pairs_of([dialogue(*texts)], tokenizer, PairLimits(64, 64, False))
    assert tokenizer.decode(examples[1].labels) == f"{LONG}</s>"
    assert tokenizer.decode(examples[1].input_ids).endswith("you?\n### Assistant: </s>")


def test_short_pairs_empty_answers_and_unknown_characters_are_counted(tokenizer: Any) -> None:
    records = [dialogue("Hi", "No"), dialogue("Hi", "", "And?", LONG), dialogue("Hi", f"{LONG} ☃")]
    examples, tally = pairs_of(records, tokenizer)
    assert [example.record for example in examples] == [1, 2]
    assert tally.noted[SHORT] == 2
    assert tally.noted[UNKNOWN] == 1
    assert (tally.kept, tally.dropped) == (2, {"no pair left": 1})


def test_empty_answers_are_an_error_for_decoders_only(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(UserError, match='"value" is empty'):
        dialogues_in(file)
    assert dialogues_in(file, empty_answers=True)[0][0].turns[1].text == ""
