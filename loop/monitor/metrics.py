"""The numbers of a log entry: rates over all ranks, shares, memory, and how busy the device is."""

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

    def timed_iter(self, items: Iterator[T], name: str) -> Iterator[T]:
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


# Of the windows since the last log.
COUNTED = ("tokens", "padded_tokens", "busiest_tokens", "squared_tokens", "supervised_tokens")


@dataclass(frozen=True)
class Work:
    """The arithmetic that a decoder's training takes, of which mfu tells how fast it is done.

    A multiplication and an addition for each weight that a token meets, in the forward pass and
    again for the gradient of what goes in; trained weights once more, frozen ones not: 4 or 6
    operations a weight. Attention: scores and sums, 4 T^2 d a layer forward and twice that
    backward, of which the causal half counts. After PaLM (Chowdhery et al. 2022, appendix B),
    less what a frozen weight spares. What is recomputed does not count, nor what 4 bits take, and
    what a row's dialogues begin with alike counts once.

    linear, head, trained: weights of the frozen layers, of the LM head (which meets supervised
    tokens alone), and trained ones. attention: layers x width of the heads. peak: FLOP/s a rank.
    """

    linear: int
    head: int
    trained: int
    attention: int
    peak: float

    def operations(self, count: Mapping[str, int]) -> int:
        """Return the operations for so many tokens."""
        return (
            (4 * self.linear + 6 * self.trained) * min(count["tokens"], count["padded_tokens"])
            + 4 * self.head * count["supervised_tokens"]
            + 6 * self.attention * count["squared_tokens"]
        )


def work_of(model: Any, config: Config) -> Work | None:
    """Return what mfu is reckoned from; None without --peak_tflops, and for encoder-decoders."""
    model = getattr(model, "module", model)
    settings = model.config.get_text_config()
    if config.peak_tflops is None or settings.is_encoder_decoder:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = {id(p) for part in (embedding, head) for p in part.parameters()}
    linear = trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += _count(parameter)
        elif id(parameter) not in apart:
            linear += _count(parameter)
    width = getattr(settings, "head_dim", None) or (
        settings.hidden_size // settings.num_attention_heads
    )
    attention = settings.num_hidden_layers * settings.num_attention_heads * width
    heads = sum(_count(p) for p in head.parameters() if not p.requires_grad)
    return Work(linear, heads, trained, attention, config.peak_tflops * 1e12)


def _count(parameter: nn.Parameter) -> int:
    """Return a parameter's weights, whole: under ZeRO-3 and in 4 bits, too."""
    quantised: Any = getattr(parameter, "quant_state", None)
    if quantised is not None:
        return int(quantised.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def rates(
    count: Mapping[str, int], elapsed: float, ranks: int, work: Work | None
) -> dict[str, float]:
    """Return what the counts of an interval of `elapsed` seconds come to, over all ranks."""
    per_second = {
        f"{name}_per_second": count[name] / elapsed
        for name in ("tokens", "supervised_tokens", "padded_tokens")
    }
    busy = work and {"mfu": work.operations(count) / (elapsed * ranks * work.peak)}
    return {
        **per_second,
        "padding_share": max(0.0, 1 - count["tokens"] / count["padded_tokens"]),
        "shared_share": max(0.0, 1 - count["padded_tokens"] / count["tokens"]),
        "rank_imbalance": 1 - count["padded_tokens"] / (ranks * count["busiest_tokens"]),
        **(busy or {}),
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: of the GPU, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def history_until(file: Path | None, step: int) -> list[dict[str, Any]]:
    """Return the log up to a step, from metrics.jsonl; what a kill has cut off is passed over."""
    history: list[dict[str, Any]] = []
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines() if file else []
    except OSError as error:
        tqdm.write(f"note: {file}: {error.strerror}: the log begins anew at step {step}")
        return history
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            history.append(entry)
    return history
