"""Faster kernels: liger-kernel's layers on a GPU; dropout and memory settings on a CPU."""

import ctypes
import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from loop.config.preflight import version

# Models with LLaMA's layers (tests/model/test_kernels.py). Others are not changed.
LIGER_MODELS = {"llama", "mistral", "qwen2", "qwen3"}


def use_kernels(model: Any) -> str:
    """Patch a base model's layers with liger-kernel's functions; return a line for the log.

    Its norms, rotary embedding and activation are used. Its loss is not: it synchronises with the
    GPU in each step (liger-kernel 0.8, ops/fused_linear_cross_entropy.py, `.item()`) and computes
    the logits of unsupervised tokens (see loop/training/loss.py). The line is empty if liger-kernel
    is not installed.
    """
    found = version("liger-kernel")
    kind = model.config.model_type
    if not found:
        return ""
    if kind not in LIGER_MODELS or not _is_known(model, kind):
        return f"liger-kernel {found}: not used for this {kind} model"
    # Its MLP always uses SiLU.
    silu = model.config.hidden_act in ("silu", "swish")
    try:
        patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
        patch = getattr(patches, f"apply_liger_kernel_to_{kind}")
        patch(
            rope=True,
            rms_norm=True,
            swiglu=silu,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
            model=model,
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"liger-kernel {found}: not used, since it cannot be loaded: {error}"
    return f"liger-kernel {found}: norms, rotary embedding{', activation' * silu}"


def _is_known(model: Any, kind: str) -> bool:
    """Return whether the code is transformers' own, with every module that liger-kernel patches.

    Otherwise the patch could fail with half of the layers changed.
    """
    code = sys.modules.get(type(model).__module__)
    layers = getattr(getattr(model, "model", None), "layers", [])
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn")
    return (
        getattr(code, "__name__", "") == f"transformers.models.{kind}.modeling_{kind}"
        and hasattr(code, "apply_rotary_pos_emb")
        and hasattr(model.model, "norm")
        and all(
            {*names, "input_layernorm", "post_attention_layernorm"}
            <= {name for name, _ in layer.named_modules()}
            for layer in layers
        )
    )


DROPOUT_LEVELS = 1 << 16  # A probability is rounded to a multiple of 1 / DROPOUT_LEVELS.


class Dropout(nn.Dropout):
    """torch.nn.Dropout for CPUs, with torch's generator; `p` is rounded to a multiple of 2^-16."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the values, some set to 0 and the others scaled up; any shape and dtype."""
        dropped = round(self.p * DROPOUT_LEVELS)
        if not self.training or not dropped or dropped == DROPOUT_LEVELS:
            return super().forward(values)
        output: Tensor = _Dropout.apply(values, dropped)  # type: ignore[no-untyped-call]
        return output


class _Dropout(Function):
    # The backward pass keeps one byte per element; torch 2.13 keeps a factor in the values' dtype.
    @staticmethod
    def forward(ctx: Any, values: Tensor, dropped: int) -> Tensor:
        # torch draws on one thread, and a 64-bit number costs as much as a 16-bit one.
        draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = draws.view(torch.int16)[: values.numel()].view(values.shape)
        kept = bits >= dropped - DROPOUT_LEVELS // 2
        ctx.save_for_backward(kept)
        ctx.scale = DROPOUT_LEVELS / (DROPOUT_LEVELS - dropped)
        return (values * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def replace_dropout(model: nn.Module) -> None:
    """Replace all dropout modules of a model; this dropout takes half of the time of PyTorch's."""
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:  # also a module with two names
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))


def keep_memory() -> None:
    """Make glibc keep freed memory, which the next step allocates again.

    Memory that was returned to the system costs a page fault and zeroing for each page of 4 KiB.
    The numbers are those of glibc's malloc.h.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, -1)  # never
        # glibc 2.33 accepts 32 MiB at most. The line above has disabled its dynamic threshold.
        if not libc.mallopt(mmap_threshold, 1 << 30):
            libc.mallopt(mmap_threshold, 32 << 20)
