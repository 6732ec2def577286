"""Runs a preparation from files to one file: on all cores, in flat memory, resumable, accounted."""

import argparse
import fcntl
import json
import os
import sqlite3
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data.errors import BadRecord, UserError
from data.files import find_files, read_records
from data.journal import Journal
from data.sharegpt import Tally

CHUNK = 256  # records that a process is given at a time


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
Chunk = list[tuple[Any, str]]


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


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every preparation has."""
    made = argparse.ArgumentParser(
        f"python -m data {name}", description=description, allow_abbrev=False
    )
    made.add_argument("--in", dest="inputs", type=Path, nargs="+", required=True, metavar="FILE")
    made.add_argument("--out", type=Path, required=True, help="x.jsonl, or x.json for an array")
    made.add_argument("--report", type=Path, help="a JSON file: read = kept + dropped, by cause")
    made.add_argument("--on_bad_record", choices=("fail", "skip"), default="fail")
    made.add_argument("--processes", type=int, default=0, help="0: one a core")
    return made


def run(job: Job) -> dict[str, Any]:
    """Write the output and the report, and return the report.

    A run that was killed goes on where it was when it is started again. Raises UserError.
    """
    files = find_files(job.inputs)
    _check_outputs(job, files)
    key = {
        "job": job.name,
        "settings": job.settings,
        "files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()],
    }
    outputs = [*job.outputs.values()]
    try:
        with ExitStack() as stack:
            for out in outputs:
                out.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_claimed(out))
            journal = stack.enter_context(Journal(outputs, key, job.near_threshold))
            _write(job, files, journal)
            account = journal.account()
            journal.finish()
            if job.report:
                _write_atomically(job.report, json.dumps(account, indent=1, ensure_ascii=False))
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
    taken = {file.resolve(): "one of --in" for file in files}
    for flag, out in job.outputs.items():
        kinds = (".json", ".jsonl")
        if out.suffix not in kinds or out.is_dir():
            raise UserError(f"{flag} {out}: expected a file named {' or '.join(kinds)}.")
        if out.resolve() in taken:
            raise UserError(f"{flag} {out}: it is {taken[out.resolve()]}. Give another file.")
        taken[out.resolve()] = flag
    if job.report and (job.report.is_dir() or job.report.resolve() in taken):
        found = "a folder" if job.report.is_dir() else taken[job.report.resolve()]
        raise UserError(f"--report {job.report}: it is {found}. Give another file.")


def _write(job: Job, files: list[Path], journal: Journal) -> None:
    done = journal.done
    if done:
        print(f"{job.name}: going on behind record {done:,}", file=sys.stderr)
    last = time.monotonic()
    with tqdm(desc=job.name, unit=" records", initial=done, disable=None) as progress:
        for results in _results(job, _chunks(files, done)):
            for result in results:
                journal.add(result)
            progress.update(len(results))
            if time.monotonic() - last > 1.0:
                journal.commit()
                last = time.monotonic()


def _chunks(files: list[Path], done: int) -> Iterator[Chunk]:
    """Yield the records that are not done yet, each with its place."""
    records = ((record, f"{f}: record {index}") for f in files for index, record in read_records(f))
    waiting = islice(records, done, None)
    while chunk := [*islice(waiting, CHUNK)]:
        yield chunk


def _results(job: Job, chunks: Iterator[Chunk]) -> Iterator[list[Result]]:
    """Transform the chunks, on several processes, in their order."""
    processes = job.processes or len(os.sched_getaffinity(0))
    if processes == 1:
        for chunk in chunks:
            yield _transformed(job.transform, job.skip_bad, chunk)
        return
    with ProcessPoolExecutor(processes) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_transformed, job.transform, job.skip_bad, chunk))
                # So many at most are held in memory.
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _transformed(transform: Transform, skip_bad: bool, chunk: Chunk) -> list[Result]:
    results = []
    for record, place in chunk:
        try:
            if isinstance(record, BadRecord):
                raise record
            results.append(transform(record, place))
        except BadRecord as bad:
            if not skip_bad:
                raise UserError(
                    f"{place}: {bad}. Correct the record, or drop all such records with "
                    "--on_bad_record skip."
                ) from None
            results.append(Result(place.rpartition(" ")[2], dropped=(bad.cause,)))
    return results


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


class _claimed:
    """A lock on an output file, which the kernel releases when the process ends."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(f".{out.name}.lock")
        self.lock: IO[str] | None = None

    def __enter__(self) -> None:
        self.lock = open(self.path, "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed the file that was opened just before.
            held = self.path.exists() and self.path.samefile(f"/dev/fd/{self.lock.fileno()}")
        except BlockingIOError:
            held = False
        if not held:
            raise UserError(f"--out {self.out}: another run is writing it.")

    def __exit__(self, *_: object) -> None:
        if self.lock:
            self.path.unlink(missing_ok=True)
            self.lock.close()
