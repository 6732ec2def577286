"""The counts of `python -m data stats` equal those of training."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from data.dialogues.sharegpt import Tally
from data.encoding.encode import encode_dialogues
from data.encoding.seq2seq import PairLimits, encode_pairs
from data.encoding.templates import RenderSettings, default_template
from data.encoding.tokenizer import load_tokenizer, with_missing_characters
from data.errors import UserError
from data.preparation.stats import LIMITS, main
from loop.config.flags import DUMMY_DATA, Config
from loop.distributed.layout import plan_layout
from tests.support.helpers import command, dialogues_in, write_dialogues

LONG = ["Why?", "Because. " * 600, "And?", "So. " * 900]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Dialogues of all lengths: each limit truncates some; one has no supervised token left."""
    short = [[f"Question {n}?", f"It is {n}. " * n] for n in range(1, 40)]
    return write_dialogues(tmp_path / "data.json", *short, LONG, ["x " * 2000, "Yes."])


def stats(tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    report = tmp_path / "report.json"
    main([str(word) for word in (*words, "--report", report)])
    facts: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    dropped = sum(n if isinstance(n, int) else len(n) for n in facts["dropped"].values())
    assert facts["read"] == facts["kept"] + dropped
    return facts


@pytest.mark.parametrize("processes", ["1", "2"])
def test_tokens_and_cuts_equal_those_of_training(
    processes: str, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    words = ("--in", data, "--model_name_or_path", tiny_model, "--processes", processes)
    facts = stats(tmp_path, *words, "--model_max_length", "100")
    tokenizer = load_tokenizer(str(tiny_model))
    dialogues, _ = dialogues_in(data)

    def encoded(limit: int) -> list[Any]:
        how = (default_template(tokenizer), tokenizer, limit, Tally())
        return [*encode_dialogues(dialogues, *how)]

    whole = encoded(1 << 30)
    assert facts["length"] == sum(one.tokens for one in whole)
    assert facts["supervised"] == sum(one.supervised_tokens for one in whole)
    assert (facts["dialogues"], facts["rounds"], facts["answers"]) == (41, 42, 42)
    assert facts["quantiles"]["1"] == max(one.tokens for one in whole)
    assert sum(facts["histogram"].values()) == facts["examples"] == len(whole)
    assert {*facts["cut_at"]} == {str(limit) for limit in (*LIMITS, 100)}
    for limit, cut in facts["cut_at"].items():
        left = encoded(int(limit))
        gone = {one.id for one in whole} - {one.id for one in left}
        assert cut["nothing_left"] == len(gone)
        lost = sum(one.tokens - min(one.tokens, int(limit)) for one in whole)
        assert cut["tokens"] == lost
        supervised = sum(one.supervised_tokens for one in left)
        assert cut["supervised"] == facts["supervised"] - supervised
        assert cut["examples"] == sum(one.tokens > int(limit) for one in whole)
    assert facts["cut_at"]["512"]["nothing_left"] == 1
    assert facts["cut_at"]["8192"]["examples"] == 0


def test_the_arguments_of_the_chat_template_are_counted_as_in_training(
    data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    own, tokenizer = tmp_path / "own.jinja", load_tokenizer(str(tiny_model))
    own.write_text("{% if short %}Be short. {% endif %}" + tokenizer.chat_template)
    words = ("--in", data, "--model_name_or_path", tiny_model, "--chat_template", own)
    plain = stats(tmp_path, *words)
    facts = stats(tmp_path, *words, "--chat_template_kwargs", '{"short": true}')
    trained = load_tokenizer(str(tiny_model), "chat", own.read_text())
    how = ("chat", trained, 1 << 30, Tally(), RenderSettings('{"short": true}'))
    examples = [*encode_dialogues(dialogues_in(data)[0], *how)]
    assert facts["length"] == sum(one.tokens for one in examples) > plain["length"]


def test_the_examples_of_a_t5_are_pairs(tiny_t5: Path, data: Path, tmp_path: Path) -> None:
    facts = stats(tmp_path, "--in", data, "--model_name_or_path", tiny_t5, "--processes", "1")
    tokenizer, _ = with_missing_characters(load_tokenizer(str(tiny_t5)))
    limits = PairLimits(1 << 30, 1 << 30, False)
    pairs = [*encode_pairs(dialogues_in(data)[0], tokenizer, limits, False, Tally())]
    assert facts["template"] == "t5"
    assert facts["examples"] == len(pairs) > facts["dialogues"] - 1
    assert facts["length"] == sum(one.tokens for one in pairs)
    assert facts["supervised"] == sum(len(one.labels) for one in pairs)


def test_steps_equal_those_of_training(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    words = ("--in", data, "--model_name_or_path", tiny_model, "--processes", "1")
    for batch, epochs, length in (("8", "1.5", "512"), ("64", "2", "2048")):
        flags = ("--global_batch_size", batch, "--num_train_epochs", epochs)
        facts = stats(tmp_path, *words, *flags, "--model_max_length", length)
        config = Config(global_batch_size=int(batch), num_train_epochs=float(epochs))
        kept = facts["examples"] - facts["cut_at"][length]["nothing_left"]
        layout = plan_layout(config, kept, PartialState())
        estimate = facts["estimate"]
        assert estimate["steps"] == layout.total_steps
        assert estimate["steps_per_epoch"] == layout.steps_per_epoch
        assert estimate["examples_per_step"] == layout.global_batch_size


def test_the_time_is_the_tokens_divided_by_the_rate_of_a_run(
    data: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"step": n, "tokens_per_second": r}) for n, r in enumerate((1, 90, 110))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    words = ("--in", data, "--model_name_or_path", tiny_model, "--model_max_length", "512")
    facts = stats(tmp_path, *words, "--like", tmp_path, "--num_train_epochs", "2")
    tokens = facts["length"] - facts["cut_at"]["512"]["tokens"]
    assert facts["estimate"]["seconds"] == pytest.approx(2 * tokens / 100)
    assert "100 tokens/s (the median of" in capsys.readouterr().out
    given = stats(tmp_path, *words, "--tokens_per_second", "100", "--num_train_epochs", "2")
    assert given["estimate"] == facts["estimate"]


def test_duplicates_languages_and_bad_records_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = "Das ist ein ganz gewöhnlicher Satz in deutscher Sprache, den jeder versteht."
    words = " ".join(f"word{n}" for n in range(200))
    file = tmp_path / "data.jsonl"
    texts = [("Hi", "Hello there, how are you?")] * 2
    texts += [("Was?", german), ("List", words), ("List", f"{words} more")]
    records = [
        {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
        for a, b in texts
    ]
    lines = [json.dumps(record) for record in records]
    file.write_text("\n".join([*lines, '{"conversations": 1}', "{"]))
    with pytest.raises(UserError, match="record 5"):
        stats(tmp_path, "--in", file)
    facts = stats(tmp_path, "--in", file, "--on_bad_record", "skip")
    assert (facts["read"], facts["kept"]) == (7, 5)
    assert facts["dropped"] == {"no conversations": ["5"], "not valid JSON": ["6"]}
    file.write_text("\n".join([*lines, *["{"] * 9]))
    capsys.readouterr()
    facts = stats(tmp_path, "--in", file, "--on_bad_record", "skip")
    assert facts["dropped"] == {"not valid JSON": 9}
    assert "(not valid JSON: 9 [5, 6, 7, 8, 9, …])" in capsys.readouterr().err
    assert facts["duplicates"] == {"duplicate content": 1, "near duplicate": 1}
    assert facts["languages"]["de"] == 1


def test_without_a_model_only_counts_without_a_tokenizer_are_printed(tmp_path: Path) -> None:
    out = tmp_path / "lengths.png"
    words = ("--in", DUMMY_DATA, "--out", out, "--tokens_per_second", "5")
    done = command("python", "-m", "data", "stats", *words)
    assert done.returncode == 0, done.stderr
    assert "read 500 = kept 500 + dropped 0" in done.stderr
    assert "Tokens, cuts and training time need --model_name_or_path." in done.stdout
    assert "189 steps" in done.stdout
    assert "tokens/s" not in done.stdout
    from PIL import Image

    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--template vicuna", "needs a tokenizer"),
        ("--chat_template_name tool_use", "--chat_template_name: needs a tokenizer"),
        ("--model_name_or_path /nowhere", "no such folder"),
        ("--like /nowhere", "metrics.jsonl: No such file"),
        ("--like /nowhere --tokens_per_second 3", "found both"),
        ("--global_batch_size 0", "--global_batch_size 0: expected a number above 0"),
        (f"--out {DUMMY_DATA}", "the path is one of --in"),
        ("--out /proc/none/x.png", "cannot be written"),
    ],
)
def test_invalid_flags_are_named(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--in", str(DUMMY_DATA), *flags.split()])
