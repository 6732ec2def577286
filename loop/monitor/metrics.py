"""Computes a log entry's metrics: rates, padding and prefix shares, MFU, memory, phase times."""

import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from loop.config.flags import Config

T = TypeVar("T")


def seconds_since_start() -> float:
    """Return the seconds since this process started, imports included."""
    # Field 22 is the start time in clock ticks (man proc_pid_stat). The text is split after field
    # 2, the process name, which may hold spaces.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Clock:
    """Adds up the seconds of each phase; on a GPU it records CUDA events, which `take` reads.

    GPU kernels run asynchronously. Reading an event at once would wait for the kernels before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        started = self._now()
        try:
            yield
        finally:
            self._add(name, started)

    def timed_iter(self, items: Iterator[T], name: str) -> Iterator[T]:
        """Yield the items, and add the waiting time for each to the phase `name`."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Return the seconds per phase since the last call; on a GPU, wait for its events."""
        for name, started, ended in self.events:
            ended.synchronize()
            self.seconds[name] += started.elapsed_time(ended) / 1000
        seconds = dict(self.seconds)
        self.seconds, self.events = defaultdict(float), []
        return seconds

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _add(self, name: str, started: Any) -> None:
        if self.on_gpu:
            self.events.append((name, started, self._now()))
        else:
            self.seconds[name] += time.perf_counter() - started


# The fields of `Window` that are summed between two log entries.
COUNTED = ("tokens", "padded_tokens", "busiest_tokens", "squared_tokens", "supervised_tokens")


@dataclass(frozen=True)
class Work:
    """The size of a decoder, for computing MFU (model FLOPs utilisation).

    The formula is PaLM's (Chowdhery et al. 2022, appendix B). Per token, a frozen weight takes 4
    operations: 2 in the forward pass and 2 for the input gradient. A trained weight takes 6: its
    own gradient takes 2 more. Attention takes 4 T^2 d per layer in the forward pass and 8 T^2 d in
    the backward pass; only the causal half counts.
    Recomputation and dequantisation do not count. Shared prefixes count once.

    linear: frozen weights outside the embedding and the LM head. head: frozen weights of the LM
    head, which runs on supervised tokens only. trained: trained weights. attention: layers x width
    of all heads. peak: FLOP/s per rank.
    """

    linear: int
    head: int
    trained: int
    attention: int
    peak: float

    def operations(self, count: Mapping[str, int]) -> int:
        """Return the floating-point operations of an interval, from its counts (`COUNTED`)."""
        return (
            (4 * self.linear + 6 * self.trained) * min(count["tokens"], count["padded_tokens"])
            + 4 * self.head * count["supervised_tokens"]
            + 6 * self.attention * count["squared_tokens"]
        )


def work_of(model: Any, config: Config) -> Work | None:
    """Return the model's `Work`; None without --peak_tflops, and for encoder-decoders."""
    model = getattr(model, "module", model)
    settings = model.config.get_text_config()
    if config.peak_tflops is None or settings.is_encoder_decoder:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    not_linear = {id(p) for module in (embedding, head) for p in module.parameters()}
    linear = trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += _count(parameter)
        elif id(parameter) not in not_linear:
            linear += _count(parameter)
    width = getattr(settings, "head_dim", None) or (
        settings.hidden_size // settings.num_attention_heads
    )
    attention = settings.num_hidden_layers * settings.num_attention_heads * width
    heads = sum(_count(p) for p in head.parameters() if not p.requires_grad)
    return Work(linear, heads, trained, attention, config.peak_tflops * 1e12)


def _count(parameter: nn.Parameter) -> int:
    """Return the full number of weights of a parameter, even if partitioned or in 4 bits."""
    quantised: Any = getattr(parameter, "quant_state", None)
    if quantised is not None:
        return int(quantised.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def rates(
    count: Mapping[str, int], elapsed: float, ranks: int, work: Work | None
) -> dict[str, float]:
    """Return the rates and shares of an interval over all ranks; `elapsed` is in seconds."""
    per_second = {
        f"{name}_per_second": count[name] / elapsed
        for name in ("tokens", "supervised_tokens", "padded_tokens")
    }
    mfu = work and {"mfu": work.operations(count) / (elapsed * ranks * work.peak)}
    return {
        **per_second,
        "padding_share": max(0.0, 1 - count["tokens"] / count["padded_tokens"]),
        "shared_share": max(0.0, 1 - count["padded_tokens"] / count["tokens"]),
        "rank_imbalance": 1 - count["padded_tokens"] / (ranks * count["busiest_tokens"]),
        **(mfu or {}),
    }


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def history_until(file: Path | None, step: int) -> list[dict[str, Any]]:
    """Return the entries of metrics.jsonl up to a step; invalid lines are skipped."""
    history: list[dict[str, Any]] = []
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines() if file else []
    except OSError as error:
        tqdm.write(
            f"note: {file}: cannot be read: {error.strerror}; the log restarts at step {step}"
        )
        return history
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            history.append(entry)
    return history
