"""Speeds up layers: liger-kernel on a GPU; another dropout and malloc settings on a CPU."""

import ctypes
import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from loop.config.preflight import version

# Models with LLaMA's layers (tests/model/test_kernels.py). Other models are not changed.
LIGER_MODELS = {"llama", "mistral", "qwen2", "qwen3"}


def use_kernels(model: Any) -> str:
    """Patch a base model's layers with liger-kernel; return a summary, "" if it is not installed.

    Norms, rotary embedding and activation are patched. The loss is not: liger-kernel's loss
    synchronises with the GPU in each step (0.8, ops/fused_linear_cross_entropy.py, `.item()`), and
    computes the logits of unsupervised tokens, too. See loop/training/loss.py.
    """
    found = version("liger-kernel")
    kind = model.config.model_type
    if not found:
        return ""
    if kind not in LIGER_MODELS or not _is_known(model, kind):
        return f"liger-kernel {found}: not used for this {kind} model"
    # liger-kernel's MLP always uses SiLU.
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
    """Return whether the model is transformers' own and has all modules that liger-kernel patches.

    For another model, the patch could fail after it has changed some of the layers.
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
    """A faster torch.nn.Dropout for CPUs; `p` is rounded to a multiple of 2^-16."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the values, some set to 0 and the others scaled up; any shape and dtype."""
        dropped = round(self.p * DROPOUT_LEVELS)
        if not self.training or not dropped or dropped == DROPOUT_LEVELS:
            return super().forward(values)
        output: Tensor = _Dropout.apply(values, dropped)  # type: ignore[no-untyped-call]
        return output


class _Dropout(Function):
    # Keeps one byte per element for the backward pass. torch 2.13 keeps a factor per element, in
    # the dtype of the values.
    @staticmethod
    def forward(ctx: Any, values: Tensor, dropped: int) -> Tensor:
        # torch draws on one thread, and 64 bits cost as much as 16: one draw for four elements.
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
    """Replace a model's dropout modules by `Dropout`, which takes half of PyTorch's time."""
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:  # unlike named_children(), duplicates too
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step.

    Memory returned to the system would cost a page fault and zeroing for each page of 4 KiB.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # parameter numbers in glibc's malloc.h
        libc.mallopt(trim_threshold, -1)  # -1: never return memory
        # Setting a threshold disables glibc's automatic one. glibc 2.33 accepts 32 MiB at most.
        if not libc.mallopt(mmap_threshold, 1 << 30):
            libc.mallopt(mmap_threshold, 32 << 20)
