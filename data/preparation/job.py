"""Runs a preparation from files to one file: on all cores, in flat memory, resumable, accounted."""

import argparse
import fcntl
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data.dialogues.sharegpt import Tally
from data.errors import BadRecord, UserError
from data.files.atomic_write import place_of, written_whole
from data.files.read import find_files
from data.preparation.journal import Journal
from data.preparation.parallel import Chunk, chunks, in_order, refused


@dataclass(frozen=True)
class Result:
    """What became of one record: read = records + dropped.

    dropped: a cause for each item that is not written. noted: what was changed, to be counted.
    exact: (cause, digest) pairs; the record is dropped for the first that an earlier one had too.
    near: a MinHash signature [n] uint32 as bytes, by which near duplicates are known.
    held_out: whether it is written to the job's second output.
    """

    id: str
    records: tuple[dict[str, Any], ...] = ()
    dropped: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    exact: tuple[tuple[str, bytes], ...] = ()
    near: bytes = b""
    held_out: bool = False


# A parsed value and its place ("file: record 7"), which errors name; raises BadRecord.
Transform = Callable[[Any, str], Result]


@dataclass(frozen=True)
class Job:
    """A preparation: `settings` are all that decides its result beside the data.

    held_out: the output of the results that say so.
    """

    name: str
    inputs: list[Path]
    out: Path
    report: Path | None
    settings: dict[str, Any]
    transform: Transform
    skip_bad: bool = False
    processes: int = 0
    near_threshold: float = 0.9
    held_out: Path | None = None

    @property
    def outputs(self) -> dict[str, Path]:
        """The files that are written, by the flags that name them."""
        return {"--out": self.out} | ({"--eval_out": self.held_out} if self.held_out else {})


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends each flag's text with its default, unless the text tells it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.required or default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: {'none' if default in (None, []) else default})"


def parser(name: str, description: str, out: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags that every preparation has; `out`: it writes records."""
    made = argparse.ArgumentParser(
        f"python -m data {name}",
        usage=f"python -m data {name} --in FILE ... {'--out FILE ' * out}[--flag value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    files = made.add_argument_group("files")
    files.add_argument(
        "--in", dest="inputs", type=Path, nargs="+", required=True, metavar="FILE",
        help="files or folders: JSON, JSONL, CSV, Parquet, also .gz and .zst",
    )  # fmt: skip
    if out:
        text = "x.jsonl, or x.json: an array"
        files.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    text = "a JSON file for the account: read = kept + dropped, by cause"
    files.add_argument("--report", type=Path, metavar="FILE", help=text)
    how = made.add_argument_group("how it is run")
    how.add_argument(
        "--on_bad_record", choices=("fail", "skip"), default="fail",
        help="stop at a record that is wrong, or drop and count it",
    )  # fmt: skip
    text = "worker processes; 0: one a core, the most"
    how.add_argument("--processes", type=_count, default=0, metavar="N", help=text)
    return made


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"found {word}; expected 0 or more")
    return int(word)


def run(job: Job) -> dict[str, Any]:
    """Write the output and the report, and return the report.

    A run that was killed goes on where it was when it is started again. Raises UserError.
    """
    files = find_files(job.inputs)
    key = {
        "job": job.name,
        "settings": job.settings,
        "files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()],
    }
    outputs = [*job.outputs.values()]
    try:
        _check_outputs(job, files)
        with ExitStack() as stack:
            for out in outputs:
                out.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_claimed(out))
            journal = stack.enter_context(Journal(outputs, key, job.near_threshold))
            _write(job, files, journal)
            account = journal.account()
            if job.report:  # first, so that a run goes on from here when it cannot be written
                with written_whole(job.report, "--report") as partial:
                    text = json.dumps(account, indent=1, ensure_ascii=False)
                    partial.write_text(text + "\n", encoding="utf-8")
            journal.finish()
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {job.out}: cannot be written: {reason}.") from None
    return account


def summary(account: dict[str, Any]) -> str:
    """Return a report in a line: read = kept + dropped, by cause."""
    found = account["dropped"].items()
    dropped = Counter({cause: n if isinstance(n, int) else len(n) for cause, n in found})
    noted = Counter(account["noted"])
    if "held_out" in account:
        noted["held out"] = account["held_out"]
    return str(Tally(account["read"], account["kept"], dropped, noted))


def _check_outputs(job: Job, files: list[Path]) -> None:
    taken = {place_of(file): "one of --in" for file in files}
    for flag, out in job.outputs.items():
        kinds = (".json", ".jsonl")
        if out.suffix not in kinds or out.is_dir():
            raise UserError(f"{flag} {out}: expected a file named {' or '.join(kinds)}.")
        if place_of(out) in taken:
            raise UserError(f"{flag} {out}: it is {taken[place_of(out)]}. Give another file.")
        taken[place_of(out)] = flag
    if job.report and (job.report.is_dir() or place_of(job.report) in taken):
        found = "a folder" if job.report.is_dir() else taken[place_of(job.report)]
        raise UserError(f"--report {job.report}: it is {found}. Give another file.")


def _write(job: Job, files: list[Path], journal: Journal) -> None:
    done = journal.done
    if done:
        print(f"{job.name}: going on behind record {done:,}", file=sys.stderr)
    last = time.monotonic()
    with tqdm(desc=job.name, unit=" records", initial=done, disable=None) as progress:
        work = partial(_transformed, job.transform, job.skip_bad)
        for results in in_order(work, chunks(files, done), job.processes):
            for result in results:
                journal.add(result)
            progress.update(len(results))
            if time.monotonic() - last > 1.0:
                journal.commit()
                last = time.monotonic()
        journal.commit()


def _transformed(transform: Transform, skip_bad: bool, chunk: Chunk) -> list[Result]:
    results = []
    for record, place in chunk:
        try:
            if isinstance(record, BadRecord):
                raise record
            results.append(transform(record, place))
        except BadRecord as bad:
            if not skip_bad:
                raise refused(place, bad) from None
            results.append(Result(place.rpartition(" ")[2], dropped=(bad.cause,)))
    return results


class _claimed:
    """A lock on an output file, which the kernel releases when the process ends."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(f".{out.name}.lock")
        self.lock: IO[str] | None = None

    def __enter__(self) -> None:
        self.lock = open(self.path, "w")
        try:
            # Not flock: processes that this one has forked, and that outlive it, would hold it.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed the file that was opened just before.
            held = self.path.exists() and self.path.samefile(f"/dev/fd/{self.lock.fileno()}")
        except (BlockingIOError, PermissionError):  # either, by POSIX
            held = False
        if not held:
            raise UserError(f"--out {self.out}: another run is writing it.")

    def __exit__(self, *_: object) -> None:
        if self.lock:
            self.path.unlink(missing_ok=True)
            self.lock.close()
