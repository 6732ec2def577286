"""`python -m data clean` changes and drops dialogues by rule, and counts them."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import BadRecord, UserError
from data.preparation import clean
from data.preparation.clean import RULES, Settings
from tests.support.helpers import ROOT, write_dialogues

ALL = Settings(tuple(RULES), ("as an ai language model, i", "network error"))
QUESTION = "How do I sort a list in Python?"
ANSWER = "Call sorted() with the list; it returns a new one."


def dialogue(*texts: str, roles: str = "human gpt", **more: Any) -> dict[str, Any]:
    names = roles.split()
    turns = [{"from": names[n % len(names)], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **more}


def without(*rules: str, **more: Any) -> Settings:
    return Settings(tuple(rule for rule in RULES if rule not in rules), ALL.blocked_words, **more)


def dropped(record: dict[str, Any], rules: Settings = ALL) -> tuple[str, ...]:
    return clean.clean(rules, record, "x.json: record 0").dropped


def run(*records: Any, folder: Path, flags: str = "") -> tuple[list[dict[str, Any]], Any]:
    """Clean the records with the command; return the kept records and the report."""
    file, out, report = folder / "in.json", folder / "out.json", folder / "report.json"
    file.write_text(json.dumps(records))
    words = f"--in {file} --out {out} --report {report} --processes 1 {flags}"
    clean.main(words.split())
    return json.loads(out.read_text()), json.loads(report.read_text())


def test_a_dialogue_is_trimmed_to_the_first_question_and_the_last_answer() -> None:
    turns = dialogue(
        "Be brief.", "left over", QUESTION, ANSWER, "Thanks", roles="system gpt human gpt human"
    )
    result = clean.clean(ALL, turns, "x.json: record 0")
    kept = result.records[0]["conversations"]
    assert [turn["value"] for turn in kept] == ["Be brief.", QUESTION, ANSWER]
    assert result.noted == ("trim",)
    cut = clean.clean(ALL, dialogue(QUESTION, ANSWER, "And?", " \u200b", "So?", ANSWER), "x 0")
    assert cut.records == (dialogue(QUESTION, ANSWER),)
    assert cut.noted == ("empty", "invisible", "newlines", "trim")


def test_roles_alternate_but_answers_and_tools_may_follow_one_another() -> None:
    assert dropped(dialogue(QUESTION, "Again?", ANSWER, roles="human human gpt"))
    late = dialogue(QUESTION, ANSWER, "Be brief.", ANSWER, roles="human gpt system gpt")
    assert dropped(late) == ("wrong alternation",)
    tools = "user function_call observation tool assistant gpt"
    assert not dropped(dialogue(QUESTION, "f()", "1", "2", ANSWER, ANSWER, roles=tools))


def test_refusals_plugins_and_short_dialogues_are_dropped() -> None:
    refusal = "Well. As an AI language model, I cannot."
    assert dropped(dialogue(QUESTION, refusal)) == ("blocked words",)
    assert not dropped(dialogue(refusal, ANSWER))
    assert dropped(dialogue(QUESTION, ANSWER, plugins=["web"])) == ("plug-ins",)
    assert not dropped(dialogue(QUESTION, ANSWER, plugins=[]))
    assert dropped(dialogue("Hi", "Hello")) == ("too short",)
    assert dropped(dialogue(QUESTION, "\x00")) == ("no question and answer",)


def test_the_list_of_blocked_words_can_be_replaced(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\ufeffSorted()\n\nit’s\n", encoding="utf-8")
    refusal = dialogue(QUESTION, "As an AI language model, I do.")
    records = [refusal, dialogue(QUESTION, ANSWER), dialogue(QUESTION, "It's good as it is.")]
    kept, report = run(*records, folder=tmp_path, flags=f"--blocked_words {words}")
    assert kept == [refusal]
    assert report["dropped"] == {"blocked words": ["1", "2"]}


WORDS = [f"word{number}" for number in range(400)]


def near_pair(change: int) -> list[dict[str, Any]]:
    """Return two dialogues; every `change`-th word of the second one differs."""
    other = [f"other{n}" if n % change == 5 else word for n, word in enumerate(WORDS)]
    return [dialogue(QUESTION, " ".join(words)) for words in (WORDS, other)]


def test_duplicates_are_dropped_by_id_by_content_and_when_nearly_the_same(tmp_path: Path) -> None:
    alike = near_pair(400)
    records = [
        dialogue(QUESTION, ANSWER, id="a"),
        dialogue(QUESTION, "Another answer.", id="a"),
        dialogue(QUESTION, ANSWER, id="b"),
        *alike,
        near_pair(20)[1],
    ]
    kept, report = run(*records, folder=tmp_path)
    assert kept == [records[0], records[3], records[5]]
    duplicates = {"duplicate id": ["a"], "duplicate content": ["b"], "near duplicate": ["4"]}
    assert report == {"read": 6, "kept": 3, "dropped": duplicates, "noted": {}}
    assert run(*alike, folder=tmp_path, flags="--near_threshold 1")[1]["kept"] == 2
    short = [dialogue(QUESTION, f"{ANSWER} {n}") for n in range(2)]
    assert run(*short, folder=tmp_path)[1]["kept"] == 2


def test_languages_are_kept_or_skipped(tmp_path: Path) -> None:
    german = dialogue("Wie sortiere ich eine Liste?", "Mit sorted() bekommst du eine neue Liste.")
    english = dialogue(QUESTION, ANSWER)
    kept, report = run(german, english, folder=tmp_path, flags="--keep_languages en")
    assert kept == [english]
    assert report["dropped"] == {"language de": ["0"]}
    assert run(german, english, folder=tmp_path, flags="--skip_languages en")[0] == [german]
    with pytest.raises(UserError, match="'eng'; expected an ISO 639-1 code, such as en"):
        run(english, folder=tmp_path, flags="--skip_languages eng")


# For each rule, dialogues that only this rule changes.
EFFECTS: dict[str, list[dict[str, Any]]] = {
    "invisible": [dialogue(QUESTION, "so\u200b it is")],
    "html": [dialogue(QUESTION, "<b>so</b> it is")],
    "residue": [dialogue(QUESTION, "1 / 2\n\nso it is")],
    "fences": [dialogue(QUESTION, "so\n```\n```\nit is")],
    "newlines": [dialogue(QUESTION, "so\n\n\nit is")],
    "empty": [dialogue(QUESTION, ANSWER, "", ANSWER)],
    "trim": [dialogue(QUESTION, ANSWER, QUESTION)],
    "plugins": [dialogue(QUESTION, ANSWER, plugins=[1])],
    "alternation": [dialogue(QUESTION, QUESTION, ANSWER, roles="human human gpt")],
    "short": [dialogue("Hi", "Hello")],
    "blocked": [dialogue(QUESTION, "I'm sorry, but I can't do that.")],
    "ids": [dialogue(QUESTION, ANSWER, id=1), dialogue("And so?", ANSWER, id=1)],
    "content": [dialogue(QUESTION, ANSWER), dialogue(QUESTION, ANSWER)],
    "near": near_pair(400),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_can_be_switched_off(rule: str, tmp_path: Path) -> None:
    records = EFFECTS[rule]
    assert run(*records, folder=tmp_path)[0] != records
    assert run(*records, folder=tmp_path, flags=f"--skip {rule}")[0] == records


def test_an_unknown_rule_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such rule; did you mean newlines"):
        run(dialogue(QUESTION, ANSWER), folder=tmp_path, flags="--skip html newline")


def test_other_keys_of_records_and_turns_stay_as_they_are() -> None:
    record = dialogue("\n" + QUESTION, ANSWER, id="x", model="m", more={"deep": [1, None]})
    record["conversations"][1]["weight"] = 0
    kept = clean.clean(ALL, record, "x.json: record 3").records[0]
    record["conversations"][0]["value"] = QUESTION
    assert kept == record


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (7, "record is not an object"),
        ({"id": 1}, "unknown format"),
        ({"conversations": [None]}, "turn is not an object"),
        ({"conversations": [{"from": "parrot", "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": 7}]}, "value is not text"),
    ],
)
def test_an_invalid_dialogue_is_named_or_counted(record: Any, cause: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecord) as bad:
        clean.clean(ALL, record, "x.json: record 0")
    assert bad.value.cause == cause
    _, report = run(record, folder=tmp_path, flags="--on_bad_record skip")
    assert report == {"read": 1, "kept": 0, "dropped": {cause: ["0"]}, "noted": {}}


def test_cleaning_a_file_again_changes_nothing_and_drops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record for records in EFFECTS.values() for record in records]
    kept, report = run(*records, folder=tmp_path)
    count = sum(map(len, report["dropped"].values()))
    assert report["read"] == len(records) == report["kept"] + count
    assert f"read {len(records)} = kept {len(kept)} + dropped {count}" in capsys.readouterr().err
    again, report = run(*kept, folder=tmp_path)
    assert again == kept
    assert report == {"read": len(kept), "kept": len(kept), "dropped": {}, "noted": {}}


# A run that is killed after 2,100 records, of which 2,000 are committed.
KILLED = """
import os, signal
from data.__main__ import main
from data.preparation.job import Journal
add = Journal.add
def killed(self, result):
    add(self, result)
    if self.done == 2000:
        self.commit()
    if self.done == 2100:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = killed
main()
"""


def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    texts = [[f"{QUESTION} {n}", f"{ANSWER}\n\n\n{n % 500}"] for n in range(3000)]
    file = write_dialogues(tmp_path / "in.json", *texts)
    words = [sys.executable, "-m", "data", "clean", "--in", file, "--processes", "1", "--out"]
    out = tmp_path / "out.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, *words[3:], out], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    resumed = subprocess.run([*words, out], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resumed after record 2,000" in resumed.stderr
    assert "read 3000 = kept 3000" in resumed.stderr
    clean.main([str(word) for word in [*words[4:], tmp_path / "whole.jsonl"]])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
