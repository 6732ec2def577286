"""A split holds out dialogues by their content, and writes them to a second file."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.preparation.job import Journal, Result
from data.preparation.split import Settings, split
from tests.preparation.test_split import record, run


def sources(file: Path) -> set[str]:
    return {record["id"].rpartition("_")[0] for record in json.loads(file.read_text())}


def test_growing_the_data_moves_no_dialogue_into_or_out_of_the_held_out_part(
    tmp_path: Path, tiny_model: Path
) -> None:
    def dialogue(number: int) -> dict[str, Any]:
        texts = [(f"Question {number}", "Because it is so. " * 8)] * 3
        return {**record(texts), "id": f"d{number}"}

    flags = ("--model_max_length", "128", "--eval", "0.3")
    account = run(tmp_path, tiny_model, [dialogue(n) for n in range(40)], *flags)
    before, held_out = sources(tmp_path / "out.json"), sources(tmp_path / "out.eval.json")
    assert account["held_out"] == len(json.loads((tmp_path / "out.eval.json").read_text()))
    # Some dialogues are cut. All pieces of a dialogue are on the same side.
    assert account["held_out"] > len(held_out)
    assert 4 <= len(held_out) <= 20
    assert not before & held_out
    assert len(before | held_out) == account["noted"]["dialogues"] == 40
    # New dialogues are inserted, ids are permuted, and roles have other names.
    more = [dialogue(n) for n in reversed(range(80))]
    run(tmp_path, tiny_model, more, *flags)
    grown, grown_held_out = sources(tmp_path / "out.json"), sources(tmp_path / "out.eval.json")
    assert before <= grown
    assert held_out <= grown_held_out


def test_held_out_dialogues_do_not_depend_on_ids_limits_or_role_names(tiny_model: Path) -> None:
    def held_out(limit: int, human: str, identity: str) -> list[bool]:
        how = Settings(str(tiny_model), "chat", limit, "drop", 0.5)
        asked = [record([(f"Question {n}", "Yes")]) for n in range(30)]
        for one in asked:
            one["conversations"][0]["from"], one["id"] = human, identity
        return [split(how, one, "").held_out for one in asked]

    first = held_out(2048, "human", "a")
    assert first == held_out(64, "user", "b")
    assert 5 <= sum(first) <= 25


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_both_outputs_of_a_killed_run_are_resumed(suffix: str, tmp_path: Path) -> None:
    outputs = [tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"]
    results = [Result(str(n), ({"n": n},), held_out=n % 3 == 0) for n in range(30)]
    with Journal(outputs, {}, 0.9) as journal:
        for number, result in enumerate(results[:20]):
            journal.add(result)
            if number == 11:
                journal.commit()
    with Journal(outputs, {}, 0.9) as journal:
        assert journal.done == 12
        for result in results[12:]:
            journal.add(result)
        account = journal.account()
        journal.finish()
    assert (account["read"], account["kept"], account["held_out"]) == (30, 30, 10)
    for output, held_out in zip(outputs, (False, True), strict=True):
        found = output.read_text()
        rows = json.loads(found) if suffix == ".json" else map(json.loads, found.splitlines())
        assert [row["n"] for row in rows] == [n for n in range(30) if (n % 3 == 0) == held_out]
    assert {file.name for file in tmp_path.iterdir()} == {output.name for output in outputs}


def test_half_a_surrogate_pair_can_be_read_after_it_is_written(tmp_path: Path) -> None:
    with Journal([tmp_path / "a.jsonl"], {}, 0.9) as journal:
        journal.add(Result("0", ({"key": "\ud800é"},)))
        journal.finish()
    assert json.loads((tmp_path / "a.jsonl").read_text("utf-8")) == {"key": "\ud800é"}


def test_two_kills_with_nothing_written_between_them_write_nothing_twice(tmp_path: Path) -> None:
    results = [Result(str(n), ({"n": n},)) for n in range(30)]
    results[10:15] = [Result(str(n), dropped=("cause",)) for n in range(10, 15)]

    def begin(stop: int, commit: int) -> None:
        with Journal([tmp_path / "a.jsonl"], {}, 0.9) as journal:
            for number in range(journal.done, stop):
                journal.add(results[number])
                if number + 1 == commit:
                    journal.commit()
            if stop == len(results):
                journal.finish()

    begin(stop=28, commit=10)
    begin(stop=25, commit=15)
    begin(stop=30, commit=0)
    found = [json.loads(line)["n"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found == [n for n in range(30) if not 10 <= n < 15]
