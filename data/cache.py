"""Keeps encoded data in one file, to be used again for as long as it is made of the same."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.encode import Example
from data.errors import UserError
from data.sharegpt import Tally

FORMAT = "lora-loop encoded data 1"  # to be raised when the same key would give other ids
Arrays = dict[str, NDArray[Any]]


def read_cache(path: str, key: dict[str, Any]) -> tuple[list[Example], Tally] | None:
    """Return what the file keeps; None where there is none, or where it has to be made anew.

    Raises UserError for a file of another kind, which is not ours to overwrite.
    """
    file = Path(path).expanduser()
    if not file.exists():
        return None
    try:
        with safe_open(file, "np") as opened:
            facts = opened.metadata() or {}
            if facts.get("format", "")[:9] != FORMAT[:9]:
                raise _foreign(path)
            found = json.loads(facts["key"])
            if facts["format"] != FORMAT or found != _plain(key):
                print(f"note: --preprocessed_path {path}: {_difference(found, _plain(key))}")
                return None
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"--preprocessed_path {path}: cannot be read: {error.strerror}.") from None
    except (SafetensorError, KeyError, ValueError):
        if not _begins_as_ours(file):
            raise _foreign(path) from None
        facts, arrays = {}, {}
    if facts.get("sha256") != _sha256(arrays):
        print(f"note: --preprocessed_path {path}: damaged; made anew")
        return None
    return _examples(arrays), _tally(json.loads(facts["tally"]))


def write_cache(path: str, key: dict[str, Any], examples: Sequence[Example], tally: Tally) -> None:
    """Write the file whole or not at all; of several that write it at once, the last one stays.

    Raises UserError where it cannot be written.
    """
    file = Path(path).expanduser()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    arrays = {
        "input_ids": _flat([example.input_ids for example in examples]),
        "input_ends": _ends([example.input_ids for example in examples]),
        "labels": _flat([example.labels for example in examples]),
        "label_ends": _ends([example.labels for example in examples]),
        "counts": np.array(
            [(e.supervised_tokens, e.record, e.is_pair) for e in examples], dtype=np.int64
        ),
        "ids": np.frombuffer(json.dumps([e.id for e in examples]).encode(), dtype=np.uint8),
    }
    facts = {
        "format": FORMAT,
        "key": json.dumps(_plain(key)),
        "tally": json.dumps([tally.read, tally.kept, tally.dropped, tally.noted]),
        "sha256": _sha256(arrays),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata=facts)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(
            f"--preprocessed_path {path}: cannot be written: {error}. Give another file, or "
            "leave it out."
        ) from None


def _examples(arrays: Arrays) -> list[Example]:
    inputs = _rows(arrays["input_ids"], arrays["input_ends"])
    labels = _rows(arrays["labels"], arrays["label_ends"])
    ids = json.loads(arrays["ids"].tobytes())
    rows = zip(ids, inputs, labels, arrays["counts"].tolist(), strict=True)
    return [
        Example(name, source, target, supervised, record, bool(is_pair))
        for name, source, target, (supervised, record, is_pair) in rows
    ]


def _tally(values: list[Any]) -> Tally:
    read, kept, dropped, noted = values
    return Tally(read, kept, Counter(dropped), Counter(noted))


def _flat(rows: Sequence[Sequence[int]]) -> NDArray[Any]:
    return np.array([number for row in rows for number in row], dtype=np.int32)


def _ends(rows: Sequence[Sequence[int]]) -> NDArray[Any]:
    return np.array([*accumulate(map(len, rows))], dtype=np.int64)


def _rows(flat: NDArray[Any], ends: NDArray[Any]) -> list[list[int]]:
    whole = flat.tolist()
    return [whole[start:end] for start, end in pairwise([0, *ends.tolist()])]


def _sha256(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} ".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """Return the key as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    text = f"made of another {', '.join(changed)}" if changed else "of an older format"
    return f"{text}; made anew"


def _begins_as_ours(file: Path) -> bool:
    with open(file, "rb") as opened:
        return FORMAT[:9].encode() in opened.read(1 << 16)


def _foreign(path: str) -> UserError:
    return UserError(
        f"--preprocessed_path {path}: found a file of another kind; expected none, or one that "
        "this flag has made. Give another file name."
    )
