"""The dtype and the bytes of each precision; importing this module does not import torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# As in accelerate, --mixed_precision no means fp32.
DTYPE_NAMES = {"no": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BYTES = {"no": 4, "fp32": 4, "bf16": 2, "fp16": 2}  # per element


def torch_dtype(precision: str) -> "torch.dtype":
    """Return the dtype of a precision: no, fp32, bf16 or fp16."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[precision])
    return dtype
