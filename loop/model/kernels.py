"""liger-kernel's fused norms, rotary embedding and activation, on a GPU where it is installed."""

import importlib
import sys
from typing import Any

from loop.config.versions import version

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
