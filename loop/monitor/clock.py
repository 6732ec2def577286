"""Where the time of a step goes: seconds by name, without waiting for a GPU."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def seconds_since_start() -> float:
    """Return how long this process has run, its imports counted."""
    # Fields behind the name, which may hold spaces: man proc_pid_stat, 22 is the start in ticks.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Clock:
    """Adds up seconds by name; on a GPU between events, which are read when they are asked for.

    A GPU works behind the program: to look at the time there would first have to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        begun = self._now()
        try:
            yield
        finally:
            self._count(name, begun)

    def waits(self, items: Iterator[T], name: str) -> Iterator[T]:
        """Yield the items, and count what they are waited for."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Return the seconds by name since the last call; on a GPU this waits for its work."""
        for name, begun, ended in self.events:
            ended.synchronize()
            self.seconds[name] += begun.elapsed_time(ended) / 1000
        found = dict(self.seconds)
        self.seconds, self.events = defaultdict(float), []
        return found

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _count(self, name: str, begun: Any) -> None:
        if self.on_gpu:
            self.events.append((name, begun, self._now()))
        else:
            self.seconds[name] += time.perf_counter() - begun
