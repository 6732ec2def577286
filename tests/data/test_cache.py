"""Cached examples are reused if their key is equal; otherwise, data is encoded again."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dialogues.sharegpt import Tally
from data.encoding import cache
from data.encoding.encode import Example
from data.errors import RunError, UserError
from loop.config.flags import Config
from loop.inputs import training_data as preparing
from tests.data.test_seq2seq import LONG
from tests.support.helpers import HANG, ROOT, adapter_of, write_dialogues

KEY = {"data": "a", "--seed": 1}
EXAMPLES = [
    Example("one", [1, 2, 3], [-100, 2, 3], 2, record=0),
    Example("zwei ☃", [70000], [5, 6], 2, record=3, is_pair=True),
]


def written(folder: Path) -> Path:
    tally = Tally(3, 2)
    tally.drop("too short", "drei")
    tally.noted["cut"] += 3
    cache.write_cache(str(folder / "data.bin"), KEY, EXAMPLES, tally)
    return folder / "data.bin"


def test_a_cache_returns_the_examples_that_were_written(tmp_path: Path) -> None:
    file = written(tmp_path)
    examples = cache.read_cache(str(file), KEY)
    assert examples is not None
    assert [*examples] == EXAMPLES
    assert examples[-1] == EXAMPLES[1]
    assert examples[:1] == EXAMPLES[:1]
    assert str(examples.tally) == "read 3 = kept 2 + dropped 1 (too short: 1 [drei]); cut: 3"
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_examples_are_found_in_any_batch(tmp_path: Path) -> None:
    many = [Example(str(n), [n] * (n % 7), [n], 1, n) for n in range(2 * cache.BATCH + 1)]
    kept = cache.in_memory(iter(many), Tally(len(many), len(many)))
    assert len(kept) == len(many)
    assert [kept[n] for n in (0, 1023, 1024, 2047, 2048, -1)] == [
        many[n] for n in (0, 1023, 1024, 2047, 2048, -1)
    ]
    with pytest.raises(IndexError):
        kept[len(many)]


def test_a_missing_cache_is_no_error(tmp_path: Path) -> None:
    assert cache.read_cache(str(tmp_path / "none"), KEY) is None


def test_another_key_is_named_and_the_data_encoded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    assert cache.read_cache(str(file), {"data": "b", "--seed": 1}) is None
    assert "encoded with other data; encoded again" in capsys.readouterr().out


def test_a_change_of_code_or_libraries_encodes_the_data_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path)
    monkeypatch.setattr(cache, "version", lambda name: f"99 of {name}")
    assert cache.read_cache(str(file), KEY) is None
    assert "encoded with other tokenizers, transformers; encoded again" in capsys.readouterr().out
    monkeypatch.undo()
    code = tmp_path / "code"
    shutil.copytree(ROOT / "data", code)
    monkeypatch.setattr(cache, "ROOT", code)
    assert cache.read_cache(str(file), KEY) is not None
    with (code / "encoding/templates.py").open("a") as opened:
        opened.write("VICUNA_SYSTEM = 'Another.'\n")
    assert cache.read_cache(str(file), KEY) is None
    assert "encoded with other code; encoded again" in capsys.readouterr().out


def test_the_key_covers_all_code_from_record_to_token() -> None:
    found, waiting = (
        set[str](),
        ["dialogues/sources", "encoding/encode", "encoding/seq2seq", "encoding/tokenizer"],
    )
    while waiting:
        name = waiting.pop()
        found.add(name)
        text = (ROOT / f"data/{name}.py").read_text(encoding="utf-8")
        used = re.findall(r"^ *from data\.([\w.]+) import", text, re.MULTILINE)
        waiting += {module.replace(".", "/") for module in used} - found
    assert found == {*cache.CODE}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty tail"])
def test_a_damaged_file_is_encoded_again(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    raw = bytearray(file.read_bytes())
    if damage == "flipped":
        raw[-3] ^= 1
    file.write_bytes({"cut": raw[:-8], "flipped": raw, "empty tail": raw + b"\0" * 8}[damage])
    assert cache.read_cache(str(file), KEY) is None
    assert "damaged; encoded again" in capsys.readouterr().out


def large(folder: Path) -> tuple[Path, list[Example]]:
    """Write a file of three batches."""
    many = [Example(str(n), [n] * (n % 7), [n], 1, n) for n in range(2 * cache.BATCH + 1)]
    cache.write_cache(str(folder / "large.bin"), KEY, many, Tally(len(many), len(many)))
    return folder / "large.bin", many


def test_a_flipped_bit_anywhere_never_gives_other_examples(tmp_path: Path) -> None:
    file, many = large(tmp_path)
    raw = file.read_bytes()
    outcomes = Counter[str]()
    for place in [*range(0, len(raw), len(raw) // 150), *range(len(raw) - 20, len(raw))]:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            kept = cache.read_cache(str(file), KEY, silent=True)
            assert kept is None or [*kept] == many, place
            outcomes["encoded again" if kept is None else "unharmed"] += 1
        except UserError as error:
            outcomes[type(error).__name__] += 1
    assert outcomes["RunError"] > 100
    assert outcomes["encoded again"] > 20
    assert not outcomes["unharmed"]


def test_a_damaged_batch_is_named_when_it_is_read_and_the_file_removed(tmp_path: Path) -> None:
    file, many = large(tmp_path)
    raw = bytearray(file.read_bytes())
    end = cache.Examples(raw_buffer(bytes(raw))).parts[1][1]
    raw[end - 100] ^= 1
    file.write_bytes(raw)
    kept = cache.read_cache(str(file), KEY)
    assert kept is not None
    assert kept[1023] == many[1023]
    assert kept[2048] == many[2048]
    with pytest.raises(
        RunError, match=r"examples 1024 to 2047 are damaged. It was removed; run again"
    ):
        kept[1500]
    assert cache.read_cache(str(file), KEY) is None


def raw_buffer(raw: bytes) -> Any:
    import pyarrow

    return pyarrow.py_buffer(raw)


def test_opening_reads_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, many = large(tmp_path)
    summed: list[int] = []
    crc32 = cache.zlib.crc32
    monkeypatch.setattr(
        cache.zlib, "crc32", lambda data, *more: (summed.append(len(data)), crc32(data, *more))[1]
    )
    kept = cache.read_cache(str(file), KEY)
    assert kept is not None
    assert sum(summed) < 0.1 * file.stat().st_size
    assert kept[0] == many[0]
    assert sum(summed) < 0.6 * file.stat().st_size


def test_a_file_of_an_older_format_is_encoded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes().replace(cache.FORMAT.encode(), cache.OURS + b" 2"))
    assert cache.read_cache(str(file), KEY) is None
    assert "an older format; encoded again" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b'{"input_ids": [], "labels": []}', b"\x08" + b"\0" * 80])
def test_a_file_of_another_kind_is_never_overwritten(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"found a file of another kind"):
        cache.read_cache(str(file), KEY)
    assert file.read_bytes() == content


def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="cannot be written"), cache.locked_cache(place):
        pass
    with pytest.raises(UserError, match="cannot be written"):
        cache.write_cache(place, KEY, EXAMPLES, Tally())


def test_four_processes_with_one_cache_encode_once(tiny_model: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from loop.config.flags import Config\n"
        "from loop.inputs import training_data as reading\n"
        "encode = reading.encode_in_pieces\n"
        "reading.encode_in_pieces = lambda *a: print('made') or encode(*a)\n"
        "config = Config(sys.argv[1], preprocessed_path=sys.argv[2])\n"
        "kept = reading.read_training_data(config).examples\n"
        "print(len(kept), kept[499].supervised_tokens)\n"
    )
    words = [sys.executable, "-c", script, str(tiny_model), str(tmp_path / "new" / "kept")]
    running = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = sorted(process.communicate(timeout=HANG)[0] for process in running)
    assert [text.count("made") for text in said] == [0, 0, 0, 1]
    assert len({text.splitlines()[-1] for text in said}) == 1


def test_a_run_with_another_runs_cache_has_the_same_result(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = adapter_of(train("plain"))
    first = adapter_of(train("first", "--preprocessed_path", tmp_path / "kept"))
    made: list[Any] = []
    encode = preparing.encode_in_pieces
    monkeypatch.setattr(preparing, "encode_in_pieces", lambda *a: (made.append(1), encode(*a))[1])
    again = adapter_of(train("again", "--preprocessed_path", tmp_path / "kept"))
    assert not made
    for name, tensor in plain.items():
        assert torch.equal(tensor, first[name])
        assert torch.equal(tensor, again[name])
    data = write_dialogues(tmp_path / "other.json", ["Hi", "Good morning."])
    train("other", "--preprocessed_path", tmp_path / "kept", "--data_path", data)
    train("shorter", "--preprocessed_path", tmp_path / "kept", "--model_max_length", "100")
    assert len(made) == 2


def test_only_rank_0_prints_why_data_is_encoded_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data, kept = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"]), str(tmp_path / "kept")
    for rank, length, notes in (("0", 512, 0), ("0", 500, 1), ("1", 490, 0)):
        monkeypatch.setenv("RANK", rank)
        config = Config(str(tiny_model), data_path=(str(data),), preprocessed_path=kept)
        preparing.read_training_data(replace(config, model_max_length=length))
        assert capsys.readouterr().out.count("encoded again") == notes


def test_num_data_selects_dialogues_by_the_seed(tiny_t5: Path, tmp_path: Path) -> None:
    texts = [[f"Question {n}?", f"{LONG} {n}"] for n in range(20)]
    data = write_dialogues(tmp_path / "data.json", *texts)

    def chosen(seed: int) -> list[str]:
        config = Config(str(tiny_t5), data_path=(str(data),), num_data=5, seed=seed)
        prepared = preparing.read_training_data(config)
        assert prepared.examples.tally.dropped == {"beyond num_data": 15}
        return [example.id for example in prepared.examples]

    assert chosen(1) == chosen(1)
    assert len({*chosen(1)}) == 5
    assert chosen(1) != chosen(2)
