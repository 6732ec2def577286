"""Of a folder, an archive or an object with several splits, the training split is read alone."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.sources import Source, files_of
from data.errors import UserError
from data.files.read import find_files, read_records
from loop.config.flags import Config
from loop.inputs.training_data import data_sha256, read_training_data


def dialogue(answer: str) -> dict[str, Any]:
    question = {"role": "user", "content": "And now?"}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def folder_of(folder: Path, *names: str) -> Path:
    """Create files with one dialogue, whose answer is the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(dialogue(name)) + "\n")
    return folder


def read(path: Path) -> tuple[list[str], Counter[str]]:
    """Return the answers of all records of a path, and the notes of the account."""
    answers, notes = list[str](), Counter[str]()
    for file in find_files([path]):
        for _, record in read_records(file, notes):
            answers.append(record["messages"][1]["content"])
    return answers, notes


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (("train.jsonl", "test.jsonl"), ["train.jsonl"]),
        (("train/0.jsonl", "validation/0.jsonl"), ["train/0.jsonl"]),
        (("a_train.jsonl", "a_dev.jsonl", "b_train.jsonl"), ["a_train.jsonl", "b_train.jsonl"]),
        (("train-00000-of-00002.json", "test-00000-of-00001.json"), ["train-00000-of-00002.json"]),
        (("train_sft.jsonl", "test_sft.jsonl"), ["train_sft.jsonl"]),
        (("data.jsonl", "test.jsonl"), ["data.jsonl"]),
        # Without a part for training, a word within a name is a topic.
        (("test_driven.jsonl", "math.jsonl"), ["math.jsonl", "test_driven.jsonl"]),
        (("a.jsonl", "b.jsonl"), ["a.jsonl", "b.jsonl"]),
        (("test.jsonl",), ["test.jsonl"]),
    ],
)
def test_the_parts_for_training_are_read_alone(
    names: tuple[str, ...], trained: list[str], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "dir", *names)
    answers, notes = read(folder)
    left = sorted({*names} - {*trained})
    assert answers == trained
    (note,) = notes
    assert notes[note] == len(trained)
    assert note.startswith(f"files of dir ({', '.join(trained)})")
    assert (f"without {', '.join(left)}, which" in note) == bool(left)
    # The words that the account names select the other part.
    if left:
        other = Path(note.partition("which ")[2].removesuffix(" selects"))
        assert read(other)[0] == left


def test_an_archive_and_an_object_have_splits_as_a_folder_has(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in ("a/train.jsonl", "a/test.jsonl"):
            archive.writestr(name, json.dumps(dialogue(name.partition(".")[0][2:])))
    (tmp_path / "a.zip").write_bytes(made.getvalue())
    parts = {name: [dialogue(name)] for name in ("test", "train", "val")}
    (tmp_path / "a.json").write_text(json.dumps(parts, indent=1))
    for name in ("a.zip", "a.json"):
        file = tmp_path / name
        answers, notes = read(file)
        assert answers == ["train"]
        assert any(f"{file}@test selects" in note for note in notes)
        assert read(Path(f"{file}@test"))[0] == ["test"]
        assert read(Path(f"{file}@train"))[0] == ["train"]
        with pytest.raises(
            UserError, match=r"@nope: no such split; found test, train.* Give .*@test"
        ):
            read(Path(f"{file}@nope"))
    assert read(Path(f"{tmp_path / 'a.json'}@validation"))[0] == ["val"]


def test_an_object_with_test_data_alone_is_refused_with_the_name_that_reads_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"test": [dialogue("yes")]}))
    with pytest.raises(UserError, match="no such split; found test") as raised:
        read(file)
    other = Path(str(raised.value).partition("Give ")[2].removesuffix("."))
    assert read(other)[0] == ["yes"]


def test_a_split_of_a_file_without_splits_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps([dialogue("b")]))
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    for name in ("a.jsonl", "b.json", "c.csv"):
        with pytest.raises(UserError, match=rf"{name}@test: the file has no splits"):
            read(Path(f"{folder / name}@test"))
    with pytest.raises(UserError, match=r"@test: no such split; found a\.jsonl, b\.json, c\.csv"):
        find_files([Path(f"{folder}@test")])


def test_saved_splits_of_datasets_are_read_one_at_a_time(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([dialogue(name)]) for name in ("test", "train")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[0] == ["train"]
    assert read(Path(f"{tmp_path / 'saved'}@test"))[0] == ["test"]


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jsonl", ".cache/b.jsonl", ".c.jsonl", "__MACOSX/d.jsonl")
    assert read(folder)[0] == ["a.jsonl"]


def test_a_file_whose_name_has_the_mark_of_a_split_is_that_file(tmp_path: Path) -> None:
    folder_of(tmp_path, "a@test", "a.jsonl@test")
    assert read(tmp_path / "a.jsonl@test")[0] == ["a.jsonl@test"]
    assert not Source(f"{tmp_path / 'none.jsonl'}@test").is_on_hub
    assert not Source("some/none.jsonl@test").is_on_hub
    assert Source("someone/talks@test").is_on_hub


def test_the_splits_of_a_file_are_different_data(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"train": [dialogue("Yes.")] * 2, "test": [dialogue("No.")]}))
    configs = [Config(str(tiny_model), data_path=(f"{file}{tail}",)) for tail in ("", "@test")]
    assert [len(read_training_data(config).examples) for config in configs] == [2, 1]
    assert len({data_sha256(config) for config in configs}) == 2
    account = str(read_training_data(configs[0]))
    assert f'files with records under "train": 1; files without their test, which {file}' in account
    (found,) = files_of(Source(f"{file}@test"))
    assert str(found) == str(file)
