"""A file's hash is cached until the file changes, or may have changed."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.files import hashes
from data.files.hashes import HASH_VERSION, file_sha256, value_sha256
from loop.config.flags import Config
from loop.inputs.training_data import data_sha256
from tests.support.helpers import wait_until, write_dialogues


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with an entry per file that is read; hashes of just changed files are cached, too."""
    made: list[int] = []
    digest = hashlib.file_digest

    def counted(*words: Any) -> Any:
        made.append(1)
        return digest(*words)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setattr(hashes, "UNSETTLED_NANOSECONDS", 0)
    return made


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def changed(file: Path, text: str) -> None:
    """Write text with a newer time stamp by the file system's clock."""
    await_tick(file.parent)
    file.write_text(text)
    await_tick(file.parent)


def await_tick(folder: Path) -> None:
    """Wait for the next tick of the file system's clock, which ticks a few times per second."""
    probe = folder / "clock"

    def now() -> int:
        probe.write_text("")
        return probe.stat().st_ctime_ns

    began = now()
    wait_until(lambda: now() > began)
    probe.unlink()


def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: list[int]) -> None:
    file, memory = tmp_path / "a", tmp_path / "new" / "memory"
    changed(file, "one")
    assert [file_sha256(file, memory) for _ in range(3)] == [sha256(file)] * 3
    assert len(reads) == 1
    assert [path.name for path in memory.parent.iterdir()] == ["memory"]
    assert file_sha256(file) == sha256(file)
    assert len(reads) == 2


def test_a_replaced_file_of_equal_size_and_time_is_read_again(
    tmp_path: Path, reads: list[int]
) -> None:
    file, memory = tmp_path / "a", tmp_path / "memory"
    changed(file, "one")
    file_sha256(file, memory)
    was = file.stat()
    changed(file, "two")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert file_sha256(file, memory) == sha256(file)
    other = tmp_path / "b"
    changed(other, "six")
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    other.replace(file)
    assert file_sha256(file, memory) == sha256(file)
    assert len(reads) == 3


def test_the_hash_of_a_file_that_has_just_changed_is_not_cached(tmp_path: Path) -> None:
    file, memory = tmp_path / "a", tmp_path / "memory"
    file.write_text("one")
    assert file_sha256(file, memory) == sha256(file)
    assert not memory.exists()


def test_the_hash_of_a_file_that_changes_while_it_is_read_is_not_cached(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memory = tmp_path / "a", tmp_path / "memory"
    changed(file, "one")
    digest = hashlib.file_digest

    def meanwhile(*words: Any) -> Any:
        found = digest(*words)
        changed(file, "two")
        return found

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    file_sha256(file, memory)
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"%s": 5}', '{"%s": {"state": 1}}'])
def test_a_damaged_hash_cache_is_replaced(damage: str, tmp_path: Path, reads: list[int]) -> None:
    file, memory = tmp_path / "a", tmp_path / "memory"
    changed(file, "one")
    memory.write_text(damage.replace("%s", str(file.resolve())))
    assert [file_sha256(file, memory) for _ in range(2)] == [sha256(file)] * 2
    assert len(reads) == 1


def test_hashes_work_without_a_cache_and_missing_files_are_named(
    tmp_path: Path, reads: list[int]
) -> None:
    file = tmp_path / "a"
    with pytest.raises(UserError, match="a: cannot be read: No such file"):
        file_sha256(file, tmp_path / "memory")
    changed(file, "one")
    assert file_sha256(file, Path("/proc/none/memory")) == sha256(file)


def test_a_run_that_keeps_its_data_reads_it_once_and_sees_a_change(
    tmp_path: Path, reads: list[int]
) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"])
    await_tick(tmp_path)
    config = Config(data_path=(str(data),), preprocessed_path=str(tmp_path / "kept"))
    first = data_sha256(config)
    assert data_sha256(config) == first == value_sha256("data", [[1.0, [sha256(data)]]])
    assert len(reads) == 1
    write_dialogues(data, ["Hi", "Hm"])
    assert data_sha256(config) == value_sha256("data", [[1.0, [sha256(data)]]]) != first


def test_values_that_differ_in_a_type_or_a_boundary_have_different_hashes() -> None:
    values: list[Any] = [
        *(None, True, False, 0, 1, 1.0, "1", "", b"1", b"", "None", "ab"),
        *([], {}, [1], [[1]], [1, 2], [[1], 2], ["a", "b"], ["ab"], ["a", ["b"]], [b"a", b"b"]),
        *({"a": 1}, {"a": "1"}, {"a": {"b": 1}}, {"a.b": 1}, ["a", 1], [["a", 1]], ["int", "1"]),
        *(["dict", [["a", 1]]], ["list", [1]], 0.1, 0.1 + 2**-56, -1, [b"ab", b""]),
    ]
    hashes = [value_sha256("a", value) for value in values]
    assert len({*hashes}) == len(values)
    assert value_sha256("b", 1) != value_sha256("a", 1)
    assert value_sha256("a", {"x": 1, "y": (1, 2)}) == value_sha256("a", {"y": [1, 2], "x": 1})
    for unknown in ({1: 2}, {1}, Path("a"), object()):
        with pytest.raises(TypeError, match="is not defined"):
            value_sha256("a", [unknown])


def test_a_change_of_the_serialisation_needs_a_new_version() -> None:
    found = value_sha256("pinned", {"a": [None, True, 1, 0.5, "ä", b"\x00"]})
    expected = "f8b41b75fdd52c7feaf61274bafd8044a41cc22a0210253728ae1d21e73367af"
    assert (HASH_VERSION, found) == (2, expected)


def test_sources_that_are_named_otherwise_have_other_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    one = write_dialogues(folder / "a.json", ["Hi", "Yo"])
    two = write_dialogues(folder / "b.json", ["And", "So"])
    named = [
        (f"{folder}:0.5",),
        (str(one), f"{two}:0.5"),
        (str(folder),),
        (str(one), str(two)),
        (f"{one}:0.5", f"{two}:0.5"),
    ]
    configs = [Config(data_path=names) for names in named]
    assert len({data_sha256(config) for config in configs}) == len(named)
    # The first two had the same hash, which runs and checkpoints of that time contain.
    old = [data_sha256(config, hash_version=1) for config in configs]
    assert old[0] == old[1]
    assert old[0] == hashlib.sha256(str([sha256(one), sha256(two), "x 0.5"]).encode()).hexdigest()
    assert data_sha256(Config(data_path=(str(one),)), hash_version=1) == sha256(one)
