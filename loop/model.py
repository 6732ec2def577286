"""Loads the base model, plain or in 4 bits, and injects the LoRA adapter."""

import importlib.util
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from data.errors import UserError
from loop.backend import told_to_all, zero_stage
from loop.base import mistakes
from loop.config import Config
from loop.quantize import check_quantization, four_bit, returned_memory

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(base: str, config: Config, accelerator: Accelerator) -> PeftModel:
    """Return the base model in the run's precision with a LoRA adapter to train.

    Raises UserError for a missing FlashAttention, and targets that the model does not have.
    """
    if config.flash_attn and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "--flash_attn: the package flash_attn is not installed. Install it (pip install "
            "flash-attn), or leave the flag out: PyTorch's SDPA is used."
        )
    # Under ZeRO-3 loading is made of collectives, which a rank that fails alone must not add to.
    sharded = zero_stage(accelerator) == 3
    with nullcontext() if sharded else told_to_all():
        model = _load_base(base, config, accelerator)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        # Before DeepSpeed's pull request 8148, which 0.19.8 has, recomputed layers found their
        # parameters shared out again; only the reentrant kind gets by (transformers#47254). It
        # needs inputs with a gradient.
        model.gradient_checkpointing_enable({"use_reentrant": sharded})
        if sharded:
            model.enable_input_require_grads()
    torch.manual_seed(config.seed)  # lora_A's initial values
    # DeepSpeed casts all parameters to one precision and keeps an fp32 master of the trained
    # ones; elsewhere what is trained is fp32 itself and runs under autocast.
    autocast = accelerator.state.deepspeed_plugin is None
    with told_to_all():
        with_adapter = _add_adapter(model, base, config, autocast)
    if autocast:
        # peft casts its own parameters only, not the base's biases.
        for parameter in with_adapter.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return with_adapter


def _add_adapter(model: Any, base: str, config: Config, autocast: bool) -> PeftModel:
    if config.lora_weight_path:
        saved = PeftConfig.from_pretrained(config.lora_weight_path)
        saved.lora_dropout = config.lora_dropout
        with mistakes(f"--lora_weight_path {config.lora_weight_path}"):
            # peft only warns, and would train on from random values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(
                model,
                config.lora_weight_path,
                config=saved,
                is_trainable=True,
                autocast_adapter_dtype=autocast,
            )
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_targets(model, config.lora_target_modules),
        bias=config.lora_bias,
        base_model_name_or_path=base,
    )
    return get_peft_model(model, adapter, autocast_adapter_dtype=autocast)


def _load_base(base: str, config: Config, accelerator: Accelerator) -> Any:
    quiet()
    shared = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    with mistakes(base):
        base_config = AutoConfig.from_pretrained(base, **shared)
    kind = base_config.model_type
    if "t5" in kind and config.precision == "fp16":
        raise UserError(
            f"{base}: found precision fp16 with {kind}, whose activations overflow it; expected "
            "bf16. Give --mixed_precision bf16, or no."
        )
    if base_config.is_encoder_decoder:
        raise UserError(f"{base}: an encoder-decoder ({kind}); expected a decoder.")
    zero3 = zero_stage(accelerator) == 3
    check_quantization(base, base_config, config, accelerator)
    options: dict[str, Any] = {}
    if config.q_lora:
        settings = four_bit(DTYPES[config.precision])  # makes bitsandbytes ready, too
        # A 4-bit model brings its own, which are checked above and would win with a warning.
        if not getattr(base_config, "quantization_config", None):
            options["quantization_config"] = settings
    if not zero3 and (config.q_lora or accelerator.device.type == "cuda"):
        # Straight from the mapped file to this rank's device; ZeRO-3 has its own way to load.
        options["device_map"] = {"": accelerator.device}
    with mistakes(base), returned_memory() if config.q_lora else nullcontext():
        model, loaded = AutoModelForCausalLM.from_pretrained(
            base,
            config=base_config,
            dtype=DTYPES[config.precision],
            attn_implementation="flash_attention_2" if config.flash_attn else "sdpa",
            output_loading_info=True,
            **options,
            **shared,
        )
    if loaded["missing_keys"]:
        names = ", ".join(sorted(loaded["missing_keys"])[:5])
        raise UserError(f"{base}: the weights lack {names}, which would be random. Mend the model.")
    return model


def quiet() -> None:
    """Silence what other packages say about themselves while a model is loaded."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # DeepSpeed 0.19 asks every module for every attribute, this deprecated one included.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # DeepSpeed 0.19 calls torch.distributed by names that torch 2.13 calls deprecated.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    # It waits on a barrier without a device, too.
    warnings.filterwarnings("ignore", message=".*using the device under current context")
    # transformers 5.23 has a new name for it, which 5.17 does not know.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")


def _targets(model: nn.Module, asked: tuple[str, ...]) -> list[str] | str:
    """Return the targets for peft, after making sure that each one matches a module."""
    if asked == ("all-linear",):
        return "all-linear"
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for target in asked:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(
                f"--lora_target_modules: nothing in the model is named {target}. It has: {known}; "
                "or give all-linear."
            )
    return list(asked)
