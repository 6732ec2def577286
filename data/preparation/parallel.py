"""Gives records in chunks to several processes, and takes what they make of them in order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, TypeVar

from data.errors import BadRecord, RunError, UserError
from data.files.read import read_records

CHUNK = 256  # records that a process is given at a time, unless they are large
LARGE = 1 << 20  # characters of a chunk, with which it ends
IN_FLIGHT = 32 << 20  # characters of all the chunks that are held in memory, but for the last one
# Records as they were parsed, each with its place: "file: record 7".
Chunk = list[tuple[Any, str]]
Made = TypeVar("Made")


def chunks(files: list[Path], done: int = 0) -> Iterator[tuple[Chunk, int]]:
    """Yield the records behind the first `done` in chunks, each with its size in characters."""
    records = ((record, f"{f}: record {index}") for f in files for index, record in read_records(f))
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
    """Return about how many characters a parsed value takes, however deep it is."""
    count, waiting = 0, [record]
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
    work: Callable[[Chunk], Made], given: Iterable[tuple[Chunk, int]], processes: int
) -> Iterator[Made]:
    """Yield what the work makes of each chunk, in their order; 0 processes: one a core, the most.

    Raises what the work raises, and Fault where a process dies.
    """
    cores = len(os.sched_getaffinity(0))
    processes = min(processes, cores) or cores
    if processes == 1:
        for chunk, _ in given:
            yield work(chunk)
        return
    with ProcessPoolExecutor(processes, initializer=_alone) as pool:
        waiting: deque[tuple[Future[Made], int]] = deque()
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
                "a process that prepares data was killed, as the system does when memory runs "
                "out. Run again, or with fewer --processes."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: they inherit that, and leave it to the parent.

    To have them ignore it once they run comes too late for one that is told of it before. Another
    thread of the parent may take the signal, and Python then interrupts the main one although it
    blocks it: a pool that is interrupted while it starts never ends its processes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came: list[int] = []
    in_main = current_thread() is main_thread()  # no other may set what is done about a signal
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if in_main else 0
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _alone() -> None:
    """Have a tokenizer use one thread, as there is a process a core; do not outlive the parent."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent has been killed: it would be waited for, in vain, and in full memory."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def refused(place: str, bad: BadRecord) -> UserError:
    """Return the error that a bad record is, unless such records are to be dropped."""
    return UserError(
        f"{place}: {bad}. Correct the record, or drop all such records with --on_bad_record skip."
    )
