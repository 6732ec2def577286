"""Loads the base model, plain or in 4 bits, and injects the LoRA adapter."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.accelerator import raise_on_all_ranks, zero_stage
from loop.distributed.rank_zero import print_rank0
from loop.model import new_tokens
from loop.model.base import BaseModel, as_user_error, check_ties, compares_ties
from loop.model.kernels import keep_memory, replace_dropout, use_kernels
from loop.model.lora_targets import ALL_LINEAR, target_names
from loop.model.packed_attention import implementation
from loop.model.quantization import (
    about_zero3,
    check_quantization,
    compute_in_fp32,
    four_bit,
    kept_in_fp32,
    returned_memory,
)
from loop.utils import gathered

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(base_model: BaseModel, config: Config, accelerator: Accelerator) -> PeftModel:
    """Return the base model in the run's precision with a LoRA adapter to train.

    Raises UserError for targets that the model does not have.
    """
    # Under ZeRO-3 loading is made of collectives, which a rank that fails alone must not add to.
    sharded = zero_stage(accelerator) == 3
    with nullcontext() if sharded else raise_on_all_ranks():
        model = _load_base(base_model, config, accelerator)
    model.config.use_cache = False
    # torch.compile fuses by itself.
    on_gpu = accelerator.device.type == "cuda" and not config.torch_compile
    if on_gpu and (told := use_kernels(model)):
        print_rank0(f"kernels: {told}")
    if config.gradient_checkpointing:
        # Before DeepSpeed's pull request 8148, which 0.19.8 has, recomputed layers found their
        # parameters shared out again; only the reentrant kind gets by (transformers#47254). It
        # needs inputs with a gradient.
        model.gradient_checkpointing_enable({"use_reentrant": sharded})
        if sharded:
            model.enable_input_require_grads()
    tokens, values = base_model.new_tokens, None
    if tokens:
        new_tokens.grow(model, len(base_model.tokenizer))
        values = new_tokens.first_values(model, tokens)
    torch.manual_seed(config.seed)  # lora_A's initial values
    # DeepSpeed casts all parameters to one precision and keeps an fp32 master of the trained
    # ones; elsewhere what is trained is fp32 itself and runs under autocast.
    autocast = accelerator.state.deepspeed_plugin is None
    with raise_on_all_ranks(), new_tokens.without_collectives():
        with_adapter = _add_adapter(model, base_model, config, autocast)
    values = None if config.lora_weight_path else values
    new_tokens.set_up(with_adapter, values, config.train_new_tokens, sharded)
    if autocast:
        # peft casts its own parameters only, not the base's biases.
        for parameter in with_adapter.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        leave_inputs(with_adapter)
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        keep_memory()
    if config.torch_compile:
        _compile_layers(with_adapter)  # which draws by itself
    elif on_cpu:
        replace_dropout(with_adapter)
    return with_adapter


def leave_inputs(with_adapter: Any) -> None:
    """Have autocast alone cast what the adapter reads: peft's copy in fp32 would change nothing."""
    for module in with_adapter.modules():
        if isinstance(module, BaseTunerLayer):  # peft 0.21, tuners/tuners_utils.py
            module.cast_input_dtype_enabled = False


def _compile_layers(model: Any) -> None:
    """Have each layer compiled when it is first run, once for all lengths of rows."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # each layer of transformers' models
            layer.compile(dynamic=True)


def _add_adapter(model: Any, base_model: BaseModel, config: Config, autocast: bool) -> PeftModel:
    if config.lora_weight_path:
        saved = PeftConfig.from_pretrained(config.lora_weight_path)
        saved.lora_dropout = config.lora_dropout
        with as_user_error(f"--lora_weight_path {config.lora_weight_path}"):
            # peft only warns, and would train on from random values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = PeftModel.from_pretrained(
                model,
                config.lora_weight_path,
                config=saved,
                is_trainable=True,
                autocast_adapter_dtype=autocast,
            )
        new_tokens.check_rows(loaded, base_model.new_tokens, config.lora_weight_path)
        return loaded
    pairs, tokens = model.config.is_encoder_decoder, base_model.new_tokens
    targets = target_names(model, config.lora_target_modules)
    rows = new_tokens.places(model, tokens) if tokens else None
    new_tokens.check_targets(rows or {}, targets)
    adapter = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if pairs else TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ALL_LINEAR else list(targets),
        bias=config.lora_bias,
        trainable_token_indices=rows,
        base_model_name_or_path=base_model.name,
    )
    return get_peft_model(model, adapter, autocast_adapter_dtype=autocast)


def _load_base(base_model: BaseModel, config: Config, accelerator: Accelerator) -> Any:
    base, base_config = base_model.name, base_model.config
    zero3 = zero_stage(accelerator) == 3
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"] if plugin else {}
    check_quantization(base, base_config, config, zero)
    check_ties(base, base_config, zero3)
    if zero3 and config.q_lora:
        print_rank0(f"note: {about_zero3(config)}")
    options: dict[str, Any] = {}
    if config.q_lora:
        settings = four_bit(DTYPES[config.precision])  # makes bitsandbytes ready, too
        # A 4-bit model brings its own, which are checked above and would win with a warning.
        if not getattr(base_config, "quantization_config", None):
            options["quantization_config"] = settings
    if not zero3 and (config.q_lora or accelerator.device.type == "cuda"):
        # Straight from the mapped file to this rank's device; ZeRO-3 has its own way to load.
        options["device_map"] = {"": accelerator.device}
    loader = AutoModelForSeq2SeqLM if base_config.is_encoder_decoder else AutoModelForCausalLM
    with (
        as_user_error(base),
        returned_memory() if config.q_lora else nullcontext(),
        kept_in_fp32() if config.q_lora else nullcontext(),
        _compared_whole() if zero3 else nullcontext(),
    ):
        model, loaded = loader.from_pretrained(
            base,
            config=base_config,
            dtype=DTYPES[config.precision],
            attn_implementation=implementation(
                base_model.packed, config.flash_attn, config.torch_compile
            ),
            output_loading_info=True,
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    if loaded["missing_keys"]:
        names = ", ".join(sorted(loaded["missing_keys"])[:5])
        raise UserError(f"{base}: the weights lack {names}, which would be random. Mend the model.")
    if config.q_lora and config.precision != "no":
        compute_in_fp32(model, deepspeed=plugin is not None)
    return model


@contextmanager
def _compared_whole() -> Iterator[None]:
    """Have transformers compare whole matrices before it ties them.

    Under ZeRO-3 it compares what a rank holds, nothing with nothing (5.23, modeling_utils.py), and
    would put Flan-T5's embedding in the place of its LM head.
    """
    if not compares_ties():
        yield
        return
    are_equal = modeling_utils._tied_params_are_equal

    def whole_are_equal(one: Any, other: Any) -> bool:
        with gathered(one), gathered(other):
            return bool(are_equal(one, other))

    modeling_utils._tied_params_are_equal = whole_are_equal
    try:
        yield
    finally:
        modeling_utils._tied_params_are_equal = are_equal
