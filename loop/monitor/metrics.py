"""The numbers of a log entry: rates over all ranks, shares, memory, and how busy the device is."""

import json
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from loop.config.flags import Config

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
