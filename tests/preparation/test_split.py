"""Pieces fit; they contain each round that fits, once and in order."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.sharegpt import Tally
from data.encoding.encode import encode_dialogues
from data.encoding.seq2seq import NO_LIMIT, encode_pairs
from data.encoding.templates import RenderSettings
from data.encoding.tokenizer import load_tokenizer
from data.errors import UserError
from data.preparation.split import Settings, bytewise, main, split
from tests.support.helpers import dialogues_in

HUGE = 1 << 30
NAMES: dict[str, Any] = {"human": "user", "gpt": "assistant", "tool": "tool"}
Texts = list[tuple[str, str]]


def record(rounds: Texts, system: str | None = None, **keys: Any) -> dict[str, Any]:
    turns = [{"from": "system", "value": system}] if system is not None else []
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "d", "conversations": turns, **keys}


def rounds_of(piece: dict[str, Any]) -> Texts:
    values = [turn["value"] for turn in piece["conversations"] if turn["from"] != "system"]
    return [*zip(values[::2], values[1::2], strict=True)]


def length(piece: dict[str, Any], how: Settings) -> int:
    """Return the number of tokens of a piece in training."""
    turns = piece["conversations"]
    system = turns[0]["value"] if turns[0]["from"] == "system" else None
    parsed = tuple(Turn(NAMES[t["from"]], t["value"]) for t in turns if t["from"] in NAMES)
    tokenizer, tally = load_tokenizer(*how.kind), Tally()
    if how.template == "t5":
        pairs = encode_pairs([Dialogue("", parsed, system)], tokenizer, NO_LIMIT, False, tally)
        return max(max(pair.lengths) for pair in pairs)
    (example,) = encode_dialogues(
        [Dialogue("", parsed, system)], how.template, tokenizer, HUGE, tally
    )
    return len(example.input_ids)


def settings_of(model: Path, template: str, limit: int, long_round: str = "drop") -> Settings:
    return Settings(str(model), template, limit, long_round, 0.0)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def with_bos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA-like tokenizer that adds BOS."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("models") / "mistral"
    tokenizer = LlamaTokenizer.from_pretrained(
        shared / "tokenizers/mistral_v1", add_bos_token=True, legacy=False
    )
    tokenizer.save_pretrained(folder)
    return folder


words = st.sampled_from(["yes", "No.", " ", "\n", "über", "日本", "😀", "x" * 40, "<|im_end|>"])
text = st.lists(words, min_size=1, max_size=30).map("".join).map(lambda made: f"a{made}")


def check(texts: Texts, system: str | None, how: Settings) -> None:
    """Check that each round that fits is in a piece, once and in order, and pieces are longest."""
    found = split(how, record(texts, system, model="m"), "f: record 3")
    pieces = [*found.records]
    fitting = [one for one in texts if length(record([one], system), how) <= how.max_length]
    assert [one for piece in pieces for one in rounds_of(piece)] == fitting
    assert len(found.dropped) == len(texts) - len(fitting)
    for piece in pieces:
        assert length(piece, how) <= how.max_length
        start = int(piece["id"].removeprefix("d_"))
        opening = piece["conversations"][0]
        assert opening == {"from": "system", "value": system} or system is None
        assert piece["model"] == "m"
        # The rounds are consecutive in the source. With one more round, the piece would not fit.
        number = (start - (system is not None)) // 2
        size = len(rounds_of(piece))
        assert rounds_of(piece) == texts[number : number + size]
        longer = record(texts[number : number + size + 1], system)
        assert number + size == len(texts) or length(longer, how) > how.max_length


@pytest.mark.parametrize("template", ["chat", "vicuna"])
def test_every_round_that_fits_comes_out_once_in_order_in_pieces_that_fit(
    template: str, tiny_model: Path
) -> None:
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.tuples(text, text), min_size=1, max_size=8),
        st.none() | st.just("Be brief."),
        st.integers(80, 260),
    )
    def holds(texts: Texts, system: str | None, limit: int) -> None:
        check(texts, system, settings_of(tiny_model, template, limit))

    holds()


def test_a_bos_and_sentencepieces_joins_are_counted(with_bos: Path) -> None:
    texts = [("Why?" + " and why?" * n, "Because.\n" * (n % 5 + 1)) for n in range(12)]
    for limit in range(64, 110):
        check(texts, None, settings_of(with_bos, "vicuna", limit))


def test_the_sources_and_targets_of_a_t5s_piece_fit(tiny_t5: Path, tmp_path: Path) -> None:
    texts = [("Why {not}?" + " and why?" * n, "Because.\n" * (n % 9 + 5)) for n in range(12)]
    for limit in range(64, 110, 3):
        check(texts, None, settings_of(tiny_t5, "t5", limit))
    account = run(tmp_path, tiny_t5, [record(texts)], "--model_max_length", "90")
    how = settings_of(tiny_t5, "t5", 90)
    pieces = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert account["kept"] == len(pieces) > 1
    assert pieces == [*split(how, record(texts), "f: record 3").records]


def test_the_tokens_of_an_own_chat_template_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    template, texts = tmp_path / "own.jinja", [("Why?", "Because.")] * 12
    template.write_text(f"{'x ' * 40}{load_tokenizer(str(tiny_model)).chat_template}")
    flags = ["--model_max_length", "160", "--chat_template", str(template)]
    run(tmp_path, tiny_model, [record(texts)], *flags)
    pieces = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    own = Settings(str(tiny_model), "chat", 160, "drop", 0.0, template.read_text())
    assert pieces == [*split(own, record(texts), "f: record 3").records]
    assert all(length(piece, own) <= 160 for piece in pieces)
    plain = settings_of(tiny_model, "chat", 160)
    assert len(pieces) > len(split(plain, record(texts), "f: record 3").records)


def test_the_arguments_of_the_chat_template_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    template, texts = tmp_path / "own.jinja", [("Why?", "Because.")] * 12
    own = load_tokenizer(str(tiny_model)).chat_template
    template.write_text(f"{{% if long %}}{'x ' * 40}{{% endif %}}{own}")
    flags = ["--model_max_length", "160", "--chat_template", str(template)]

    def pieces(*more: str) -> list[Any]:
        run(tmp_path, tiny_model, [record(texts)], *flags, *more)
        found: list[Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        return found

    plain = pieces()
    (tmp_path / "out.json").unlink()
    long = pieces("--chat_template_kwargs", "long: true")
    assert len(long) > len(plain)
    how = Settings(str(tiny_model), "chat", 160, "drop", 0.0, template.read_text())
    own_arguments = record(texts, chat_template_kwargs={"long": True})
    assert len(split(how, own_arguments, "f: record 1").records) == len(long)
    rendering = RenderSettings('{"long": true}')
    tokenizer = load_tokenizer(str(tiny_model), "chat", template.read_text())
    for piece in long:
        turns = tuple(Turn(NAMES[t["from"]], t["value"]) for t in piece["conversations"])
        dialogue = Dialogue("", turns, None)
        (example,) = encode_dialogues([dialogue], "chat", tokenizer, HUGE, Tally(), rendering)
        assert len(example.input_ids) <= 160


def test_every_token_of_a_bytewise_vocabulary_is_at_least_one_byte(
    chat_model: Path, tiny_model: Path
) -> None:
    @settings(max_examples=50, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])) | text)
    def holds(any_text: str) -> None:
        for name in tokenizers:
            tokens = tokenizers[name](any_text, add_special_tokens=False)["input_ids"]
            assert len(tokens) <= len(any_text.encode())

    tokenizers = {str(name): load_tokenizer(str(name)) for name in (chat_model, tiny_model)}
    assert all(map(bytewise, tokenizers))
    holds()


def test_a_sentencepiece_vocabulary_is_not_taken_for_bytewise(with_bos: Path) -> None:
    assert not bytewise(str(with_bos))


def test_the_last_round_is_never_lost(tiny_model: Path) -> None:
    texts = [("Why?", "Because. " * 10)] * 3
    two = length(record(texts[:2]), settings_of(tiny_model, "chat", 1))
    found = split(settings_of(tiny_model, "chat", two), record(texts), "")
    assert [len(rounds_of(piece)) for piece in found.records] == [2, 1]
    assert [piece["id"] for piece in found.records] == ["d_0", "d_4"]
    assert found.noted == ("dialogues", "dialogues cut")


def test_a_round_at_the_limit_fits_and_one_token_more_does_not(tiny_model: Path) -> None:
    whole = record([("Why?", "Because.")])
    limit = length(whole, settings_of(tiny_model, "chat", 1))
    assert len(split(settings_of(tiny_model, "chat", limit), whole, "").records) == 1
    found = split(settings_of(tiny_model, "chat", limit - 1), whole, "")
    assert found.records == ()
    assert found.dropped == ("round longer than --model_max_length",)


def test_turns_that_follow_an_answer_stay_in_its_round_as_they_are(tiny_model: Path) -> None:
    turns = [
        {"from": "gpt", "value": "left out"},
        {"from": "human", "value": "Add."},
        {"from": "gpt", "value": "<tool_call>", "train": False},
        {"from": "tool", "value": "2"},
        {"from": "gpt", "value": "Two."},
        {"from": "human", "value": "Why?"},
    ]
    whole = {"conversations": turns, "id": 7}
    how = settings_of(tiny_model, "chat", 256)
    (piece,) = split(how, whole, "").records
    assert piece == {"id": "7_1", "conversations": turns[1:]}
    assert "turn before the first question left out" in split(how, whole, "").noted
    tight = settings_of(tiny_model, "chat", length({"conversations": turns[1:5]}, how))
    assert [p["conversations"] for p in split(tight, whole, "").records] == [turns[1:5], turns[5:]]


@pytest.mark.parametrize("template", ["chat", "vicuna"])
def test_truncate_cuts_the_last_answer_so_that_the_piece_fits(
    template: str, tiny_model: Path
) -> None:
    long = "Because it is so. " * 60
    texts = [("Hi", "Yo"), ("Why?", long), ("So", "No")]
    how = settings_of(tiny_model, template, 160, "truncate")
    found = split(how, record(texts), "")
    first, cut, last = found.records
    assert [rounds_of(first), rounds_of(last)] == [texts[:1], texts[2:]]
    ((question, answer),) = rounds_of(cut)
    assert question == "Why?"
    assert long.startswith(answer)
    assert how.max_length - 8 <= length(cut, how) <= how.max_length
    assert found.dropped == ()
    assert "answer cut to fit" in found.noted


def test_a_question_that_alone_does_not_fit_is_dropped_in_both_cases(tiny_model: Path) -> None:
    texts = [("Why? " * 300, "Because."), ("Hi", "Yo")]
    for long_round in ("drop", "truncate"):
        found = split(settings_of(tiny_model, "chat", 128, long_round), record(texts), "")
        assert [rounds_of(piece) for piece in found.records] == [texts[1:]]
        assert len(found.dropped) == 1


def test_a_huge_dialogue_is_cut_like_its_beginning(tiny_model: Path) -> None:
    texts = [(f"Why {n}?", "Because it is so. " * (n % 7 + 1)) for n in range(400)]
    how = settings_of(tiny_model, "chat", 128)
    assert sum(map(len, (a + b for a, b in texts))) > 3 * 64 * how.max_length
    check(texts, None, how)
    giant = [("Hi", "Yo"), ("Why?", "Because. " * 200_000), ("So", "No")]
    for long_round, kept in (("drop", 2), ("truncate", 3)):
        how = settings_of(tiny_model, "chat", 128, long_round)
        pieces = split(how, record(giant), "").records
        assert len(pieces) == kept
        assert all(length(piece, how) <= 128 for piece in pieces)


def run(tmp_path: Path, model: Path, records: list[Any], *flags: str) -> dict[str, Any]:
    """Split the records; check read = kept + dropped, and return the report."""
    data, report = tmp_path / "data.json", tmp_path / "report.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    words = ["--in", data, "--out", tmp_path / "out.json", "--report", report]
    words += ["--model_name_or_path", model, "--processes", "1", *flags]
    main([str(word) for word in words])
    account: dict[str, Any] = json.loads(report.read_text())
    dropped = sum(n if isinstance(n, int) else len(n) for n in account["dropped"].values())
    assert account["read"] == account["kept"] + dropped
    return account


def test_without_eval_there_is_one_output(tmp_path: Path, tiny_model: Path) -> None:
    account = run(tmp_path, tiny_model, [record([("Hi", "Yo")])])
    assert "held_out" not in account
    assert {file.name for file in tmp_path.iterdir()} == {"data.json", "out.json", "report.json"}
    (dialogue,) = dialogues_in(tmp_path / "out.json")[0]
    assert dialogue.id == "d_0"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model_max_length", "0"], "expected at least 1 token"),
        (["--eval", "2"], "--eval 2: expected a share"),
        (["--eval_out", "x.json"], "nothing is held out"),
        (["--eval", "0.1", "--eval_out", "x.txt"], "--eval_out x.txt: expected a file named"),
        (["--model_name_or_path", "nowhere"], "nowhere: no such folder"),
        (["--model_name_or_path", "data"], "data: its tokenizer cannot be loaded"),
    ],
)
def test_an_error_in_flags_is_named(
    flags: list[str], complaint: str, tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        run(tmp_path, tiny_model, [record([("Hi", "Yo")])], *flags)
    taken = ["--eval", "0.1", "--eval_out", str(tmp_path / "out.json")]
    with pytest.raises(UserError, match="the path is --out"):
        run(tmp_path, tiny_model, [record([("Hi", "Yo")])], *taken)


def test_a_dialogue_without_a_question_is_named(tmp_path: Path, tiny_model: Path) -> None:
    alone = {"conversations": [{"from": "gpt", "value": "Yo"}]}
    with pytest.raises(UserError, match="record 0: found no human turn"):
        run(tmp_path, tiny_model, [alone])
    account = run(tmp_path, tiny_model, [alone, record([("Hi", "Yo")])], "--on_bad_record", "skip")
    assert account["dropped"] == {"no human turn": ["0"]}


def test_real_dialogues_are_complete_after_a_split(
    tmp_path: Path, chat_model: Path, shared: Path
) -> None:
    data = json.loads((shared / "data/oasst_en.json").read_text(encoding="utf-8"))[:60]
    run(tmp_path, chat_model, data, "--model_max_length", "400")
    pieces = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    how = settings_of(chat_model, "chat", 400)
    for one in data:
        mine = [p for p in pieces if p["id"].rpartition("_")[0] == one["id"]]
        expected = [r for r in rounds_of(one) if length(record([r]), how) <= 400]
        assert [found for piece in mine for found in rounds_of(piece)] == expected
    assert all(length(piece, how) <= 400 for piece in pieces)
