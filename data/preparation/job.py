"""Runs a preparation on all cores in constant memory; a killed run can be resumed."""

import argparse
import json
import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from data.dialogues.sharegpt import Tally
from data.errors import BadRecord, UserError
from data.files.atomic_write import place_of, written_whole
from data.files.containers import check_encoding
from data.files.lock import LockHeld, locked
from data.files.read import find_files, plain
from data.files.splits import DataFile
from data.preparation.duplicates import Seen
from data.preparation.parallel import Chunk, Read, chunks, in_order, records_of, refused

MAX_IDS_PER_CAUSE = 1000  # if a cause has more ids, the report has their number
MAX_ID_CHARACTERS = 100
LOCK_TIMEOUT = 5.0  # seconds; time for the workers of a killed run to end
TABLES = "CREATE TABLE IF NOT EXISTS progress (key TEXT, state TEXT);"


class _Output:
    """An output file of records, written as a partial file that is renamed at the end."""

    stream: BinaryIO

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.array = path.suffix == ".json"
        self.kept = 0

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        line = _encoded(record)
        separator = (b",\n" if self.kept else b"[\n") if self.array else b""
        self.stream.write(separator + line + (b"" if self.array else b"\n"))
        self.kept += 1

    def sync(self) -> dict[str, int]:
        """Flush to disk, and return the size so far."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return {"bytes": self.stream.tell(), "kept": self.kept}

    def finish(self) -> None:
        """Complete the file and rename it to its path."""
        if self.array:
            self.stream.write(b"\n]\n" if self.kept else b"[]\n")
        self.sync()
        self.partial.replace(self.path)


class Journal:
    """The partial outputs, and an SQLite file with their counts and the tables of `Seen`.

    outputs: the path for kept records and, if records are held out, the path for those.
    Memory is constant, because the digests and signatures are in the SQLite file.
    """

    def __init__(self, outputs: list[Path], key: dict[str, Any], near_threshold: float) -> None:
        self.outputs = [_Output(path) for path in outputs]
        self.file = outputs[0].with_name(f".{outputs[0].name}.journal")
        self.near_threshold = near_threshold
        self.key = json.dumps({**key, "outputs": [path.name for path in outputs]}, sort_keys=True)
        self.done = self.read = 0
        self.dropped: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}
        self.noted: Counter[str] = Counter()

    def __enter__(self) -> "Journal":
        saved = self._saved_state()
        if saved is None:
            self._remove()
        self.base = sqlite3.connect(self.file, isolation_level=None)
        self.base.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + TABLES)
        self.seen = Seen(self.base, self.near_threshold)
        self.base.execute("BEGIN")
        empty = [{"bytes": 0, "kept": 0}] * len(self.outputs)
        states = saved["outputs"] if saved else empty
        for output, state in zip(self.outputs, states, strict=True):
            output.stream = open(output.partial, "ab")
            output.stream.truncate(state["bytes"])
            output.stream.seek(0, os.SEEK_END)  # truncate() does not move the position
            output.kept = state["kept"]
        if saved is None:
            self.base.execute("INSERT INTO progress VALUES (?, '')", (self.key,))
        else:
            self.done, self.read = saved["done"], saved["read"]
            self.dropped, self.noted = Counter(saved["dropped"]), Counter(saved["noted"])
            self.named = saved["named"]
        return self

    def __exit__(self, *_: object) -> None:
        for output in self.outputs:
            output.stream.close()
        self.base.close()

    def _saved_state(self) -> dict[str, Any] | None:
        """Return the state of an interrupted run of the same job, or None."""
        if not all(file.exists() for file in (self.file, *(o.partial for o in self.outputs))):
            return None
        try:
            base = sqlite3.connect(self.file)
            with base:
                rows = base.execute("SELECT key, state FROM progress").fetchall()
            base.close()
            if len(rows) != 1 or rows[0][0] != self.key or not rows[0][1]:
                return None
            state: dict[str, Any] = json.loads(rows[0][1])
        except (sqlite3.Error, ValueError):
            return None
        pairs = zip(self.outputs, state["outputs"], strict=True)
        complete = all(output.partial.stat().st_size >= saved["bytes"] for output, saved in pairs)
        return state if complete else None

    def add(self, result: "Result") -> None:
        """Write the records of a result unless they are duplicates, and count them."""
        self.done += 1
        cause = self.seen.cause(result.exact, result.near) if result.records else None
        dropped = result.dropped
        if cause:
            dropped += (cause,) * len(result.records)
        else:
            for record in result.records:
                self.outputs[result.held_out].write(record)
            self.noted.update(result.noted)
        self.read += len(result.records) + len(result.dropped)
        for reason in dropped:
            self.dropped[reason] += 1
            named = self.named.setdefault(reason, [])
            if len(named) < MAX_IDS_PER_CAUSE:
                named.append(result.id.encode("utf-8", "replace").decode()[:MAX_ID_CHARACTERS])

    def commit(self) -> None:
        """Write all added results to disk; a kill cannot lose them afterwards."""
        state = {
            "outputs": [output.sync() for output in self.outputs],
            **{name: getattr(self, name) for name in ("done", "read")},
            **{name: getattr(self, name) for name in ("dropped", "noted", "named")},
        }
        self.base.execute("UPDATE progress SET state = ?", (json.dumps(state),))
        self.base.execute("COMMIT")
        self.base.execute("BEGIN")

    def account(self) -> dict[str, Any]:
        """Return the counts; `dropped` has for each cause the ids, or their number if many."""
        dropped: dict[str, Any] = {}
        for cause, count in sorted(self.dropped.items()):
            named = self.named[cause]
            dropped[cause] = named if len(named) == count else count
        noted = dict(sorted(self.noted.items()))
        kept = [output.kept for output in self.outputs]
        held_out = {"held_out": kept[1]} if len(kept) > 1 else {}
        account = {"read": self.read, "kept": sum(kept), **held_out}
        return {**account, "dropped": dropped, "noted": noted}

    def finish(self) -> None:
        """Rename the outputs to their paths, and remove the journal."""
        # The first output is renamed last, so its existence means that all are complete.
        for output in reversed(self.outputs):
            output.finish()
        self.base.close()
        self._remove()

    def _remove(self) -> None:
        for tail in ("", "-wal", "-shm"):  # SQLite would use old -wal and -shm with a new file
            self.file.with_name(self.file.name + tail).unlink(missing_ok=True)


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:  # NaN or Infinity, which Python parses, although they are not JSON
        record = plain(record)
        text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which must be escaped
        return json.dumps(record).encode("ascii")


@dataclass(frozen=True)
class Result:
    """The result of an input record; each output record and each dropped item counts as read.

    records: the output records. dropped: a cause for each dropped item. noted: changes to count.
    exact: (cause, digest) pairs; a digest of an earlier result drops this one as a duplicate.
    near: a MinHash signature [n] uint32 as bytes, to find near duplicates.
    held_out: whether the records are written to the job's second output.
    """

    id: str
    records: tuple[dict[str, Any], ...] = ()
    dropped: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    exact: tuple[tuple[str, bytes], ...] = ()
    near: bytes = b""
    held_out: bool = False


# Takes a parsed value and its place ("file: record 7"); raises BadRecord.
Transform = Callable[[Any, str], Result]


@dataclass(frozen=True)
class Job:
    """A preparation; its result depends only on the data and on `settings`.

    held_out: the output file for results with `held_out`. read: yields the records.
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
    read: Read = records_of

    @property
    def outputs(self) -> dict[str, Path]:
        """The output files by flag."""
        return {"--out": self.out} | ({"--eval_out": self.held_out} if self.held_out else {})


class _Parser(argparse.ArgumentParser):
    """Gives the input files the encoding of --encoding."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = super().parse_args(args, namespace)
        given.inputs = [DataFile.of(path, encoding=given.encoding) for path in given.inputs]
        check_encoding(given.encoding)
        return given


class _Help(argparse.RawDescriptionHelpFormatter):
    """Appends the default to the help of a flag, unless the help mentions it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.required or default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: {'none' if default in (None, []) else default})"


def parser(name: str, description: str, out: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags that all preparations have; out: whether --out is one."""
    command = _Parser(
        f"python -m data {name}",
        usage=f"python -m data {name} --in FILE ... {'--out FILE ' * out}[--flag value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    files = command.add_argument_group("files")
    files.add_argument(
        "--in", dest="inputs", type=Path, nargs="+", required=True, metavar="FILE",
        help="files or folders: JSON, JSONL, CSV, Parquet, also compressed or in a zip archive; "
        "folder@test selects a split",
    )  # fmt: skip
    if out:
        text = "x.jsonl for one record per line, or x.json for an array"
        files.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    text = "write a JSON file with the counts: read = kept + dropped, by cause"
    files.add_argument("--report", type=Path, metavar="FILE", help=text)
    text = "of text files, such as utf-16, cp1252 or gb18030 (default: UTF-8)"
    files.add_argument("--encoding", metavar="NAME", help=text)
    how = command.add_argument_group("execution")
    how.add_argument(
        "--on_bad_record", choices=("fail", "skip"), default="fail",
        help="stop at an invalid record, or drop and count it",
    )  # fmt: skip
    text = "worker processes, at most one per core; 0: one per core"
    how.add_argument("--processes", type=_count, default=0, metavar="N", help=text)
    return command


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"found {word}; expected a whole number, 0 or more")
    return int(word)


def run(job: Job) -> dict[str, Any]:
    """Write the output and the report, and return the report.

    A killed run is resumed when it is started again. Raises UserError.
    """
    files = find_files(job.inputs)
    key = {
        "job": job.name,
        "settings": job.settings,
        "files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()],
        "how": [(getattr(f, "part", None), getattr(f, "encoding", None)) for f in files],
    }
    outputs = [*job.outputs.values()]
    try:
        _check_outputs(job, files)
        with ExitStack() as stack:
            for out in outputs:
                stack.enter_context(locked_output(out))
            journal = stack.enter_context(Journal(outputs, key, job.near_threshold))
            _write(job, files, journal)
            account = journal.account()
            if job.report:  # before `finish`: if this fails, the next run resumes here
                with written_whole(job.report, "--report") as partial:
                    text = json.dumps(account, indent=1, ensure_ascii=False)
                    partial.write_text(text + "\n", encoding="utf-8")
            journal.finish()
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {job.out}: cannot be written: {reason}.") from None
    return account


def summary(account: dict[str, Any]) -> str:
    """Return a report as one line: read = kept + dropped, by cause."""
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
            raise UserError(f"{flag} {out}: the path is {taken[place_of(out)]}. Give another file.")
        taken[place_of(out)] = flag
    if job.report and (job.report.is_dir() or place_of(job.report) in taken):
        found = "a folder" if job.report.is_dir() else taken[place_of(job.report)]
        raise UserError(f"--report {job.report}: the path is {found}. Give another file.")


def _write(job: Job, files: list[Path], journal: Journal) -> None:
    done = journal.done
    if done:
        print(f"{job.name}: resumed after record {done:,}", file=sys.stderr)
    last, notes = time.monotonic(), Counter[str]()
    with tqdm(desc=job.name, unit=" records", initial=done, disable=None) as progress:
        work = partial(_transformed, job.transform, job.skip_bad)
        for results in in_order(work, chunks(files, done, notes, job.read), job.processes):
            for result in results:
                journal.add(result)
            progress.update(len(results))
            if time.monotonic() - last > 1.0:
                journal.commit()
                last = time.monotonic()
        journal.noted |= notes  # a resumed run reads the files from their start
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


@contextmanager
def locked_output(out: Path) -> Iterator[None]:
    """Hold the lock on an output file; raises UserError if another run holds it."""
    lock = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, timeout=LOCK_TIMEOUT, unlink=True))
        except LockHeld as holder:
            raise UserError(f"--out {out}: another run is writing it: {holder}.") from None
        yield
