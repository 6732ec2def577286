"""Resolves --data_path: files, folders and hub data sets, each with a weight."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.dialogues.sharegpt import Dialogue, Tally
from data.errors import UserError
from data.files.read import find_files, kind_of

MAX_WEIGHT = 1000.0  # times that a dialogue may be taken
BLOCK_DIALOGUES = 1024  # dialogues of which a share is drawn at once
# owner/name[/configuration][@split]
HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
HUB_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Source:
    """A file, a folder or a hub data set; each of its dialogues is taken `weight` times."""

    name: str
    weight: float = 1.0

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is that of a hub data set: no such path exists."""
        path = Path(self.name).expanduser()
        return not path.exists() and not kind_of(path) and bool(HUB.fullmatch(self.name))


def parse_source(word: str) -> Source:
    """Parse `path:0.3`, or a path alone; raises UserError."""
    name, colon, tail = word.rpartition(":")
    if not colon or Path(word).expanduser().exists():
        return Source(word)
    try:
        weight = float(tail)
    except ValueError:
        return Source(word)
    if not name or not 0.0 < weight <= MAX_WEIGHT:
        raise UserError(
            f"--data_path {word}: found the weight {tail}; expected one above 0 and up to "
            f"{MAX_WEIGHT:g}: 0.3 takes three of ten dialogues, 2 takes each twice."
        )
    return Source(name, weight)


def files_of(source: Source, cache_dir: str | None = None) -> list[Path]:
    """Return the files of the source's records; a hub data set is downloaded. Raises UserError."""
    if not source.is_on_hub:
        return find_files([Path(source.name).expanduser()])
    return _downloaded(source.name, cache_dir)


def weighted(
    dialogues: Iterable[Dialogue], weight: float, seed: Sequence[int], tally: Tally
) -> Iterator[Dialogue]:
    """Yield each dialogue `weight` times, and count those that are dropped.

    Of a fraction, a random share of each block of dialogues is taken. One pass over n dialogues
    yields n x weight dialogues, rounded down.
    """
    rest, rng, before = iter(dialogues), np.random.default_rng(seed), 0
    copies, share = divmod(weight, 1.0)
    while block := [*islice(rest, BLOCK_DIALOGUES)]:
        end = before + len(block)
        drawn = int(end * share + 1e-9) - int(before * share + 1e-9)
        chosen = {*rng.permutation(len(block))[:drawn].tolist()}
        before = end
        for number, dialogue in enumerate(block):
            times = int(copies) + (number in chosen)
            if times == 0:
                tally.drop("beyond its source's weight", dialogue.id)
            for copy in range(times):
                if copy:  # a copy counts as read, so that read = kept + dropped
                    tally.read += 1
                    tally.noted["copies by weight"] += 1
                yield dialogue


def _downloaded(name: str, cache_dir: str | None) -> list[Path]:
    """Return a hub data set's Arrow files, from the cache if the hub cannot be reached."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    found: Any = HUB.fullmatch(name)
    reason = ""
    try:
        try:
            HfApi().dataset_info(found["name"], timeout=HUB_TIMEOUT)
        except HfHubHTTPError:
            raise
        except Exception as error:  # no route, no name server, offline mode: different classes
            reason = f", which cannot be reached ({' '.join(str(error).split())[:100]})"
            # Otherwise it retries for about 25 s before it reads its cache (datasets 5.2).
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        loaded = datasets.load_dataset(
            found["name"], found["config"], split=found["split"] or "train", cache_dir=cache_dir
        )
    except Exception as error:  # its own classes, and those of all its readers
        detail = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"--data_path {name}: no such file or folder, and as a data set of the "
            f"hub{reason} it cannot be loaded: {detail}. Give a path, or "
            "owner/name[/configuration][@split]."
        ) from None
    return [Path(file["filename"]) for file in loaded.cache_files]
