"""liger-kernel's fused norms, rotary embedding and activation, on a GPU where it is installed."""

import importlib
from typing import Any

from loop.versions import version

# Whose layers are LLaMA's, as tests/test_kernels.py checks; others are left as they are.
KINDS = {"llama", "mistral", "qwen2", "qwen3"}


def use_kernels(model: Any) -> str:
    """Have a base model's layers run liger-kernel's functions, and return what to say about it.

    Not its loss, which reads a number back in each step (liger-kernel 0.8, ops/
    fused_linear_cross_entropy.py, `.item()`) and computes the logits of tokens that nobody learns
    from; loop/objective.py has its own. Empty where liger-kernel is not installed.
    """
    found = version("liger-kernel")
    kind = model.config.model_type
    if not found:
        return ""
    if kind not in KINDS:
        return f"liger-kernel {found}: not used for a {kind} model"
    try:
        patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
        patch = getattr(patches, f"apply_liger_kernel_to_{kind}")
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"liger-kernel {found}: not used, since it cannot be loaded: {error}"
    # It puts SiLU into the place of whatever activation a model has.
    silu = model.config.hidden_act in ("silu", "swish")
    patch(
        rope=True,
        rms_norm=True,
        swiglu=silu,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model,
    )
    return f"liger-kernel {found}: norms, rotary embedding{', activation' * silu}"
