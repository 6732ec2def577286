"""Processes chunks of records in several processes, and yields the results in order."""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, TypeVar

from data.dialogues.sharegpt import bad_record_error
from data.errors import BadRecord, RunError, UserError
from data.files.read import placed_records

CHUNK = 256  # records per chunk, unless they are large
LARGE = 1 << 20  # characters; a chunk with more ends
IN_FLIGHT = 32 << 20  # characters of all chunks in memory, except the last chunk
# Parsed records, each with its place ("file: record 7").
Chunk = list[tuple[Any, str]]
# Yields the records of files with their places, and adds notes on the files.
Read = Callable[[list[Path], Counter[str] | None], Iterator[tuple[Any, str]]]
R = TypeVar("R")


def records_of(files: list[Path], notes: Counter[str] | None) -> Iterator[tuple[Any, str]]:
    """Yield each record of the files with its place ("file: record 7")."""
    for file in files:
        yield from placed_records(file, notes)


def chunks(
    files: list[Path], done: int = 0, notes: Counter[str] | None = None, read: Read = records_of
) -> Iterator[tuple[Chunk, int]]:
    """Yield chunks of the records after the first `done`, each with its size in characters.

    notes: what the account says of the files. read: yields the records.
    """
    records = read(files, notes)
    chunk: Chunk = []
    size = 0
    for record, place in islice(records, done, None):
        chunk.append((record, place))
        size += characters(record)
        if len(chunk) == CHUNK or size >= LARGE:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def characters(record: Any) -> int:
    """Return the approximate number of characters of a parsed value."""
    count, waiting = 0, [record]  # a stack, because nesting may exceed the recursion limit
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        else:
            count += len(value) if isinstance(value, str) else 8
    return count


def in_order(
    work: Callable[[Chunk], R], given: Iterable[tuple[Chunk, int]], processes: int
) -> Iterator[R]:
    """Yield work(chunk) for each chunk, in order.

    processes: at most one per core; 0: one per core. Raises the errors of `work`, and RunError if a
    process dies.
    """
    cores = len(os.sched_getaffinity(0))
    processes = min(processes, cores) or cores
    if processes == 1:
        for chunk, _ in given:
            yield work(chunk)
        return
    with ProcessPoolExecutor(processes, initializer=_initialize_worker) as pool:
        waiting: deque[tuple[Future[R], int]] = deque()
        held = 0
        try:
            for chunk, size in given:
                with _no_ctrl_c():
                    waiting.append((pool.submit(work, chunk), size))
                held += size
                while len(waiting) > 2 * processes or (held > IN_FLIGHT and waiting):
                    future, size = waiting.popleft()
                    held -= size
                    yield future.result()
            while waiting:
                yield waiting.popleft()[0].result()
        except BrokenProcessPool:
            raise RunError(
                "a worker process was killed. The system may have run out of memory. Run again, or "
                "with fewer --processes."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Block SIGINT while workers start; they inherit the mask, and only the parent handles SIGINT.

    A worker cannot block SIGINT itself: it would die of a SIGINT that arrives before. In the
    parent, another thread may receive SIGINT. Python then interrupts the main thread, although that
    thread blocks SIGINT. A pool that is interrupted while it starts never ends its workers. So a
    handler delays SIGINT until the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pending: list[int] = []
    in_main = current_thread() is main_thread()  # only this thread may set a handler
    handler = (
        signal.signal(signal.SIGINT, lambda number, _: pending.append(number)) if in_main else 0
    )
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if pending:
            signal.raise_signal(signal.SIGINT)


def _initialize_worker() -> None:
    """Limit tokenizers to one thread, since each core has a process; exit with the parent."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is killed; otherwise a worker would wait forever and keep its memory."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def refused(place: str, bad: BadRecord) -> UserError:
    """Return the error for a bad record with --on_bad_record fail."""
    return bad_record_error(place, None, bad)
