"""The settings of the base model and of its adapter; the first part of flags.py's Config."""

from dataclasses import dataclass
from typing import Literal

from loop.config.parser import Folder, Model, Tokens, flag

Precision = Literal["no", "bf16", "fp16"]
AskedPrecision = Literal["no", "bf16", "fp16", "auto"]


@dataclass(frozen=True)
class ModelFlags:
    """The flags of the groups "model" and "LoRA"."""

    model_name_or_path: Model | None = flag(
        None,
        "folder or hub name; none: the bundled SmolLM2-135M-Instruct",
        "model",
        is_path=True,
        finished_check="path",
    )
    cache_dir: Folder | None = flag(
        None,
        "cache of files from the hub; none: the hub's default",
        "model",
        is_path=True,
        finished_check="path",
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with the model", "model", flag_only=True
    )
    flash_attn: bool = flag(
        False, "FlashAttention-2 instead of PyTorch's SDPA", "model", affects="layout"
    )
    packing: bool = flag(
        True, "pack a micro-batch into one row; False: pad its dialogues", "model", affects="layout"
    )
    torch_compile: bool = flag(
        False, "compile the layers: half a minute, then slightly faster", "model", affects="layout"
    )
    loss_chunk_tokens: Tokens = flag(
        1024,
        "supervised tokens whose logits are held at once; 0: all, made by the model itself",
        "model",
        at_least=0,
        affects="layout",
    )
    check_model: bool = flag(
        True,
        "before step 1, compare the run's passes with the model's own; fall back if they differ",
        "model",
        affects="layout",
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations: less memory, slower", "model", affects="layout"
    )
    mixed_precision: AskedPrecision | None = flag(
        None,
        "precision of the base model's weights and products; auto: bf16 where it is measured to "
        "be faster, else fp32; none: the accelerate config's",
        "model",
        affects="precision",
    )
    bf16: bool = flag(False, "short for --mixed_precision bf16", "model", affects="precision")
    fp16: bool = flag(False, "short for --mixed_precision fp16", "model", affects="precision")
    tf32: bool = flag(
        False, "TensorFloat-32 for fp32 products on GPUs that have it", "model", affects="layout"
    )
    q_lora: bool = flag(
        False,
        "hold base linear layers in 4 bits: NF4, double quantisation",
        "model",
        affects="result",
    )

    lora_r: int = flag(
        8, "rank of the adapter", "LoRA", at_least=1, at_most=65536, affects="result"
    )
    lora_alpha: int = flag(
        16,
        "scale: the update is multiplied by alpha / r",
        "LoRA",
        at_least=1,
        at_most=10**9,
        affects="result",
    )
    lora_dropout: float = flag(
        0.05, "dropout before the adapter", "LoRA", at_least=0, below=1, affects="result"
    )
    lora_target_modules: tuple[str, ...] | None = flag(
        None,
        "names, all-linear or all-linear-but-experts; none: attention's query and value",
        "LoRA",
        affects="result",
    )
    lora_bias: Literal["none", "all", "lora_only"] = flag(
        "none", "which biases are trained", "LoRA", affects="result"
    )
    lora_weight_path: Folder | None = flag(
        None,
        "continue this adapter; rank, alpha, targets and bias are read from it",
        "LoRA",
        is_path=True,
        finished_check="path",
    )
    train_new_tokens: bool = flag(
        True,
        "train the rows of tokens added to T5; False: keep their mean",
        "LoRA",
        affects="result",
    )
