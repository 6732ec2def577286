"""liger-kernel's fused norms, rotary embedding and activation, on a GPU where it is installed."""

import ctypes
import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from loop.config.preflight import version

# Whose layers are LLaMA's, as tests/model/test_kernels.py checks; others are left as they are.
KINDS = {"llama", "mistral", "qwen2", "qwen3"}


def use_kernels(model: Any) -> str:
    """Have a base model's layers run liger-kernel's functions, and return what to say about it.

    Not its loss, which reads a number back in each step (liger-kernel 0.8, ops/
    fused_linear_cross_entropy.py, `.item()`) and computes the logits of tokens that nobody learns
    from; loop/training/loss.py has its own. Empty where liger-kernel is not installed.
    """
    found = version("liger-kernel")
    kind = model.config.model_type
    if not found:
        return ""
    if kind not in KINDS or not _is_known(model, kind):
        return f"liger-kernel {found}: not used for this {kind} model"
    # It puts SiLU into the place of whatever activation a model has.
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
    """Whether the code is transformers' own, and has what liger-kernel takes the place of.

    So that it cannot fail with half of the layers changed.
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


LEVELS = 1 << 16  # A probability is rounded to a multiple of one part of these.


class Dropout(nn.Dropout):
    """torch.nn.Dropout, but that `p` is rounded to 2^-16; the seed is torch's, on a CPU alone."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the values with some set to 0 and the others scaled up, in any shape and dtype."""
        dropped = round(self.p * LEVELS)
        if not self.training or not dropped or dropped == LEVELS:
            return super().forward(values)
        kept: Tensor = _Kept.apply(values, dropped)  # type: ignore[no-untyped-call]
        return kept


class _Kept(Function):
    # Only which are kept is saved, a byte each; torch 2.13 saves a factor in the values' dtype.
    @staticmethod
    def forward(ctx: Any, values: Tensor, dropped: int) -> Tensor:
        # torch draws its numbers on one thread, whatever their width.
        draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = draws.view(torch.int16)[: values.numel()].view(values.shape)
        kept = bits >= dropped - LEVELS // 2
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return (values * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def replace_dropout(model: nn.Module) -> None:
    """Put this dropout in place of all of a model's; it takes half of the time of PyTorch's own."""
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:  # one under two names, too
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))


def keep_memory() -> None:
    """Have the C library keep what is freed: a step asks for the same again, 4 KiB at a time.

    Numbers of glibc's malloc.h. Given back, it costs a page fault and zeroes for each page.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, -1)  # never
        # glibc 2.33 takes 32 MiB at most, and the line above has ended its own choice.
        if not libc.mallopt(mmap_threshold, 1 << 30):
            libc.mallopt(mmap_threshold, 32 << 20)
