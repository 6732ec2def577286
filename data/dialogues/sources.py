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

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import Tally
from data.errors import UserError
from data.files.read import find_files, kind_of
from data.files.splits import DataFile, listed, without_split

MAX_WEIGHT = 1000.0  # copies of a dialogue
BLOCK_DIALOGUES = 1024  # dialogues in a block; a fraction is drawn from each block
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
        """Whether the source is a hub data set: the name has its form, and no such path exists."""
        path, _ = without_split(Path(self.name).expanduser())
        named = kind_of(path) or kind_of(Path(self.name.rpartition("@")[0]))
        return not path.exists() and not named and bool(HUB.fullmatch(self.name))


def parse_source(word: str) -> Source:
    """Parse `path` or `path:weight`, such as `a.json:0.3`; raises UserError."""
    name, colon, tail = word.rpartition(":")
    if not colon or Path(word).expanduser().exists():
        return Source(word)
    try:
        weight = float(tail)
    except ValueError:
        return Source(word)
    if not name or not 0.0 < weight <= MAX_WEIGHT:
        raise UserError(
            f"--data_path {word}: found the weight {tail}; expected a number above 0 and up to "
            f"{MAX_WEIGHT:g}. 0.3 takes three of ten dialogues; 2 takes each dialogue twice."
        )
    return Source(name, weight)


def files_of(
    source: Source, cache_dir: str | None = None, encoding: str | None = None
) -> list[Path]:
    """Return the files of the source; a hub data set is downloaded. Raises UserError.

    encoding: of text files; None: UTF-8.
    """
    if not source.is_on_hub:
        return find_files([Path(source.name).expanduser()], encoding)
    return _downloaded(source.name, cache_dir)


def weighted(
    dialogues: Iterable[Dialogue], weight: float, seed: Sequence[int], tally: Tally
) -> Iterator[Dialogue]:
    """Yield each dialogue `weight` times, and count the dropped dialogues.

    n dialogues yield n x weight dialogues, rounded down. For the fraction of a weight, dialogues
    are drawn at random from each block.
    """
    rest, rng, before = iter(dialogues), np.random.default_rng(seed), 0
    copies, fraction = divmod(weight, 1.0)
    while block := [*islice(rest, BLOCK_DIALOGUES)]:
        end = before + len(block)
        drawn = int(end * fraction + 1e-9) - int(before * fraction + 1e-9)
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
        except Exception as error:  # no route, no name server and offline mode differ in class
            reason = f" (not reached: {' '.join(str(error).split())[:100]})"
            # Without this, datasets 5.2 retries for about 25 s before it reads its cache.
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        loaded = datasets.load_dataset(
            found["name"], found["config"], split=found["split"] or "train", cache_dir=cache_dir
        )
    except Exception as error:  # datasets and each of its readers raise classes of their own
        detail = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"--data_path {name}: no such file or folder, and it cannot be loaded from the "
            f"hub{reason}: {detail}. Give a path, or owner/name[/configuration][@split]."
        ) from None
    split = str(loaded.split)
    left = [name for name in loaded.info.splits or () if name != split]
    note = f"files of {name}, split {split}" + (f" without {listed(left)}" if left else "")
    return [DataFile.of(Path(file["filename"]), note=note) for file in loaded.cache_files]
