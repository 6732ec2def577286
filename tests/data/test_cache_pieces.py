"""A killed encoding resumes after its last piece; the result equals an uninterrupted encoding."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import Tally, read_dialogues
from data.encoding.cache import Encode, encode_in_pieces, in_memory, read_cache
from data.encoding.encode import Example, encode_dialogues
from data.encoding.seq2seq import PairLimits, encode_pairs
from data.encoding.tokenizer import with_missing_characters
from data.errors import RunError
from data.preparation.split import load_tokenizer
from tests.support.helpers import ROOT, write_dialogues

KEY = {"data": "a"}
SIZE = 30  # dialogues in a piece
COUNT = 100


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues; some are truncated, some have no supervised token within the limit."""
    texts = [["Hi " * (1 + n % 50), "Yo " * (n % 7 + 1), "And?", "So."] for n in range(COUNT)]
    return write_dialogues(tmp_path_factory.mktemp("pieces") / "data.json", *texts)


def encoder(kind: str, model: Path) -> Encode:
    tokenizer = load_tokenizer(str(model))
    if kind == "decoder":
        return lambda dialogues, tally: encode_dialogues(dialogues, "chat", tokenizer, 60, tally)
    tokenizer, _ = with_missing_characters(tokenizer)
    limits = PairLimits(40, 20, False)
    return lambda dialogues, tally: encode_pairs(dialogues, tokenizer, limits, False, tally)


def dialogues_in(file: Path, tally: Tally) -> Iterator[Dialogue]:
    return read_dialogues([file], tally)


def whole(file: Path, encode: Encode) -> Any:
    """Return the examples of an uninterrupted encoding."""
    tally = Tally()
    return in_memory(encode(dialogues_in(file, tally), tally), tally)


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_pieces_give_the_examples_and_the_tally_of_one_encoding(
    kind: str, file: Path, tiny_model: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    encode, tally = encoder(kind, tiny_model if kind == "decoder" else tiny_t5), Tally()
    path = str(tmp_path / "kept")
    encode_in_pieces(path, KEY, dialogues_in(file, tally), encode, tally, SIZE)
    expected, kept = whole(file, encode), read_cache(path, KEY)
    assert kept is not None
    assert [*kept] == [*expected]
    assert kept[-1].record > SIZE  # the index among all dialogues, not within a piece
    assert kept.tally == expected.tally
    assert sum(kept.tally.dropped.values()) > 0 or kind == "t5"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def counted(encode: Encode, seen: list[str]) -> Encode:
    """Return an encoding that records ids, and stops at the dialogue `stop`."""

    def noting(dialogues: Iterator[Dialogue], stop: str) -> Iterator[Dialogue]:
        for dialogue in dialogues:
            if dialogue.id == stop:
                raise KeyboardInterrupt
            seen.append(dialogue.id)
            yield dialogue

    def run(dialogues: Iterator[Dialogue], tally: Tally, stop: str = "") -> Iterator[Example]:
        return encode(noting(dialogues, stop), tally)

    return run


def test_finished_pieces_are_not_encoded_again(
    file: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, path = encoder("decoder", tiny_model), str(tmp_path / "kept")
    ids = [dialogue.id for dialogue in dialogues_in(file, Tally())]
    seen: list[str] = []
    stopped = partial(counted(encode, seen), stop=ids[70])
    with pytest.raises(KeyboardInterrupt):
        encode_in_pieces(path, KEY, dialogues_in(file, Tally()), stopped, Tally(), SIZE)
    again: list[str] = []
    tally = Tally()
    encode_in_pieces(path, KEY, dialogues_in(file, tally), counted(encode, again), tally, SIZE)
    assert again == ids[2 * SIZE :]
    assert "resumed after dialogue 60" in capsys.readouterr().out
    kept = read_cache(path, KEY)
    assert kept is not None
    assert [*kept] == [*whole(file, encode)]
    # With another key, no piece is reused.
    seen.clear()
    encode_in_pieces(
        path, {"data": "b"}, dialogues_in(file, Tally()), counted(encode, seen), Tally(), SIZE
    )
    assert seen == ids


def test_a_damaged_piece_is_named_and_encoded_again(
    file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    encode, path = encoder("decoder", tiny_model), str(tmp_path / "kept")
    ids = [dialogue.id for dialogue in dialogues_in(file, Tally())]
    stopped = partial(counted(encode, []), stop=ids[70])
    with pytest.raises(KeyboardInterrupt):
        encode_in_pieces(path, KEY, dialogues_in(file, Tally()), stopped, Tally(), SIZE)
    piece = tmp_path / ".kept.piece-1"
    raw = bytearray(piece.read_bytes())
    raw[len(raw) // 3] ^= 1  # within the examples
    piece.write_bytes(raw)
    with pytest.raises(RunError, match="are damaged"):
        encode_in_pieces(path, KEY, dialogues_in(file, Tally()), encode, Tally(), SIZE)
    again: list[str] = []
    encode_in_pieces(path, KEY, dialogues_in(file, Tally()), counted(encode, again), Tally(), SIZE)
    assert again == ids[SIZE : 2 * SIZE]
    kept = read_cache(path, KEY)
    assert kept is not None
    assert [*kept] == [*whole(file, encode)]


# Encodes in pieces of 200 dialogues. With a fourth argument, it is killed before its fourth piece.
IN_PIECES = """
import os, signal, sys
from functools import partial
from data.encoding import cache
from loop.config.flags import Config
from loop.inputs import training_data as reading
write = cache.write_cache
def killed(name, *rest):
    if name.endswith("piece-3"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(name, *rest)
if len(sys.argv) > 4:
    cache.write_cache = killed
reading.encode_in_pieces = partial(cache.encode_in_pieces, size=200)
model, data, kept = sys.argv[1:4]
config = Config(model_name_or_path=model, data_path=(data,), preprocessed_path=kept)
print(len(reading.read_training_data(config).examples))
"""


def test_the_next_run_takes_the_pieces_of_a_killed_one(tiny_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", *[[f"Hi {n}", f"Yo {n}"] for n in range(1000)])
    words = [sys.executable, "-c", IN_PIECES, tiny_model, data, tmp_path / "kept"]
    first = subprocess.run([*words, "killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "kept").exists()
    second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resumed after dialogue 600\n" in second.stdout
    assert second.stdout.splitlines()[-1] == "1000"
    assert not [path for path in tmp_path.iterdir() if "piece" in path.name]
