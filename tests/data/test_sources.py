"""--data_path: several files with weights, Arrow files, and hub data sets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.sharegpt import Tally
from data.dialogues.sources import Source, parse_source, weighted
from data.errors import UserError
from data.files.read import read_records
from loop.config.flags import Config
from loop.inputs.training_data import data_sha256, read_training_data
from tests.support.helpers import command, write_dialogues
from tests.support.small_hub import small_hub


def records(count: int) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Now this."}]
    return [{"id": f"r{n}", "messages": turns} for n in range(count)]


def taken(count: int, weight: float, seed: int = 0) -> tuple[Counter[str], Tally]:
    tally = Tally(read=count)
    one = (Turn("user", "a"),)
    dialogues = (Dialogue(str(n), one) for n in range(count))
    found = Counter(dialogue.id for dialogue in weighted(dialogues, weight, [seed], tally))
    assert tally.read == found.total() + tally.dropped.total()
    return found, tally


@pytest.mark.parametrize(("count", "weight"), [(2500, 0.3), (1, 0.3), (10, 0.25), (3000, 1 / 3)])
def test_a_weight_below_one_takes_an_exact_share_without_repeats(count: int, weight: float) -> None:
    found, tally = taken(count, weight)
    assert found.total() == int(count * weight + 1e-9)
    assert {*found.values()} <= {1}
    assert tally.dropped == {"beyond its source's weight": count - found.total()}


def test_a_weight_above_one_takes_all_and_repeats_some() -> None:
    found, tally = taken(1500, 2.5)
    assert Counter(found.values()) == {2: 750, 3: 750}
    assert tally.noted == {"copies by weight": 1500 + 750}
    assert not tally.dropped


def test_the_seed_decides_which_dialogues_are_taken() -> None:
    chosen = [{*taken(2000, 0.5, seed)[0]} for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    # The taken ones are neither the first dialogues nor every second dialogue.
    assert 400 < sum(int(one) < 1000 for one in chosen[0]) < 600
    assert 400 < sum(int(one) % 2 for one in chosen[0]) < 600


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("a.json", Source("a.json")),
        ("a.json:0.3", Source("a.json", 0.3)),
        ("dir/a:b.json:2", Source("dir/a:b.json", 2.0)),
        ("a:b.json", Source("a:b.json")),
        ("someone/talks@test:0.5", Source("someone/talks@test", 0.5)),
    ],
)
def test_the_number_after_the_last_colon_is_a_weight(word: str, source: Source) -> None:
    assert parse_source(word) == source


def test_a_file_whose_name_looks_like_a_weight_is_that_file(tmp_path: Path) -> None:
    file = write_dialogues(tmp_path / "a.json:0.3", ["Hi", "Yes."])
    assert parse_source(str(file)) == Source(str(file))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9"])
def test_an_invalid_weight_is_refused(weight: str) -> None:
    with pytest.raises(UserError, match=f"found the weight {weight}; expected a number above 0"):
        parse_source(f"a.json:{weight}")


def test_several_paths_are_read_in_order_and_counted_together(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = write_dialogues(tmp_path / "one.json", *[["Hi", "Yes."]] * 10)
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, records(4))))
    paths = (f"{first}:0.5", str(tmp_path / "two.jsonl"))
    report = tmp_path / "made" / "report.json"
    config = Config(str(tiny_model), data_path=paths, data_report=str(report))
    prepared = read_training_data(config)
    assert [one.id for one in prepared.examples][5:] == ["r0", "r1", "r2", "r3"]
    account = json.loads(report.read_text())
    assert (account["read"], account["kept"]) == (14, 9)
    dropped = account["dropped"]["beyond its source's weight"]
    assert dropped["count"] == 5 == len(dropped["first"])
    assert account["data_sha256"] == prepared.sha256
    others = [paths[::-1], (str(first), paths[1]), (paths[0],)]
    hashes = {data_sha256(Config(data_path=other)) for other in (paths, *others)}
    assert len(hashes) == 4


def test_the_report_of_refused_data_is_written(tiny_model: Path, tmp_path: Path) -> None:
    file = write_dialogues(tmp_path / "one.json", ["Hi", "Yes."], ["Long " * 50, "Yes."])
    report = tmp_path / "report.json"
    with pytest.raises(UserError, match="without a supervised token; expected at most"):
        read_training_data(
            Config(
                str(tiny_model),
                data_path=(str(file),),
                data_report=str(report),
                model_max_length=20,
            )
        )
    account = json.loads(report.read_text())
    assert account["read"] == account["kept"] + sum(
        cause["count"] for cause in account["dropped"].values()
    )


def test_arrow_files_of_datasets_and_feather_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import feather

    given = records(700)
    Dataset.from_list(given).save_to_disk(tmp_path / "saved")
    feather.write_feather(pa.Table.from_pylist(given), tmp_path / "rows.arrow", "uncompressed")
    from data.files.read import find_files

    saved = find_files([tmp_path / "saved"])
    assert [file.suffix for file in saved] == [".arrow"]
    for file in (*saved, tmp_path / "rows.arrow"):
        assert [record for _, record in read_records(file)] == given
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(UserError, match="not a complete Arrow file"):
            [*read_records(file)]


def test_a_hub_data_set_is_trained_on_and_then_read_from_the_cache(
    tiny_model: Path, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    for split, count in (("train", 6), ("test", 2)):
        lines = map(json.dumps, records(count))
        (served / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    show = ["python", "-m", "loop", "show", "--jsonl", "--model_name_or_path", tiny_model]
    online = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    online["LORA_LOOP_WARM"] = ""  # the warm server has imported the hub's client offline

    def show_sources(address: str, *names: str) -> Any:
        return command(*show, "--data_path", *names, HF_ENDPOINT=address, **online)

    with small_hub("someone/talks", served) as address:
        both = show_sources(address, "someone/talks:0.5", "someone/talks@test")
        assert len(both.stdout.splitlines()) == 5, both.stderr
        wrong = show_sources(address, "someone/talks@nope")
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "someone/talks@nope: no such file or folder" in wrong.stderr
    again = show_sources(address, "someone/talks")
    assert len(again.stdout.splitlines()) == 6, again.stderr
    other = show_sources(address, "someone/other")
    assert other.returncode == 2
    assert "from the hub (not reached: " in other.stderr
    assert "Traceback" not in other.stderr
