"""A file's hash is cached until the file changes, or may have changed."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.files import hashes
from data.files.hashes import file_sha256
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
    assert data_sha256(config) == first == sha256(data)
    assert len(reads) == 1
    write_dialogues(data, ["Hi", "Hm"])
    assert data_sha256(config) == sha256(data) != first
