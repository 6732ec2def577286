"""Loads the base model in the run's precision or in 4 bits, and injects the LoRA adapter."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    load_peft_weights,
)
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.accelerator import raise_on_all_ranks, zero_stage
from loop.distributed.rank_zero import print_rank0
from loop.model import new_tokens
from loop.model.base import (
    BaseModel,
    as_user_error,
    check_experts,
    check_ties,
    compares_ties,
    model_class,
)
from loop.model.dtypes import torch_dtype
from loop.model.kernels import keep_memory, replace_dropout, use_kernels
from loop.model.lora_targets import find_targets
from loop.model.packed_attention import implementation
from loop.model.quantization import (
    about_zero3,
    check_quantization,
    compute_in_fp32,
    four_bit,
    kept_in_fp32,
    returned_memory,
)
from loop.model.saving_check import check_saving
from loop.utils import file_name, gathered


def load_model(base_model: BaseModel, config: Config, accelerator: Accelerator) -> PeftModel:
    """Return the base model in the run's precision, with a LoRA adapter to train.

    Raises UserError for targets that the model does not have.
    """
    # ZeRO-3 loads with collectives, which `raise_on_all_ranks` does not allow in its block.
    sharded = zero_stage(accelerator) == 3
    with nullcontext() if sharded else raise_on_all_ranks():
        model = _load_base_for_training(base_model, config, accelerator)
    model.config.use_cache = False
    # torch.compile fuses operations itself.
    on_gpu = accelerator.device.type == "cuda" and not config.torch_compile
    if on_gpu and (summary := use_kernels(model)):
        print_rank0(f"kernels: {summary}")
    if config.gradient_checkpointing:
        # Under ZeRO-3, checkpointing is reentrant: before DeepSpeed 0.19.8 (pull request 8148), the
        # other kind recomputed with partitioned parameters (transformers#47254). Reentrant
        # checkpointing needs inputs that require a gradient.
        model.gradient_checkpointing_enable({"use_reentrant": sharded})
        if sharded:
            model.enable_input_require_grads()
    tokens, values = base_model.new_tokens, None
    if tokens:
        new_tokens.grow(model, len(base_model.tokenizer))
        values = new_tokens.first_values(model, tokens)
    torch.manual_seed(config.seed)  # lora_A's initial values
    # Without DeepSpeed, trainable parameters are fp32 and run under autocast. DeepSpeed casts all
    # parameters to one dtype, and keeps an fp32 master of the trainable ones.
    autocast = accelerator.state.deepspeed_plugin is None
    with raise_on_all_ranks(), new_tokens.without_collectives():
        with_adapter = _add_adapter(model, base_model, config, autocast)
    values = None if config.lora_weight_path else values
    new_tokens.set_up(with_adapter, values, config.train_new_tokens, sharded)
    if autocast:
        # peft casts its own parameters only. Trained biases belong to the base model.
        for parameter in with_adapter.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        leave_inputs(with_adapter)
    if config.lora_weight_path:
        _restore_values(with_adapter, config.lora_weight_path)
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        keep_memory()
    if config.torch_compile:
        _compile_layers(with_adapter)  # A compiled layer has its own dropout.
    elif on_cpu:
        replace_dropout(with_adapter)
    check_saving(with_adapter, base_model, config.trust_remote_code)
    return with_adapter


def load_pretrained(
    source: str,
    base_config: Any,
    dtype: torch.dtype | str,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """Return the base model from the folder or hub name `source`, and the missing weights' names.

    base_config: determines the class, and whether the stored weights are already quantised.
    compute_dtype: of QLoRA's 4-bit linear layers; None: weights are not quantised here.
    Raises UserError for files that cannot be loaded.
    """
    if compute_dtype:
        settings = four_bit(compute_dtype)  # This also makes bitsandbytes importable.
        # A stored 4-bit model's own settings would override these, with a warning.
        if not getattr(base_config, "quantization_config", None):
            options["quantization_config"] = settings
    with (
        as_user_error(source),
        returned_memory() if compute_dtype else nullcontext(),
        kept_in_fp32() if compute_dtype else nullcontext(),
    ):
        model, report = model_class(base_config).from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options
        )
    return model, sorted(report["missing_keys"])


def _load_base_for_training(base_model: BaseModel, config: Config, accelerator: Accelerator) -> Any:
    base, base_config = base_model.name, base_model.config
    zero3 = zero_stage(accelerator) == 3
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"] if plugin else {}
    check_quantization(base, base_config, config, zero)
    check_experts(base, base_config, config)
    check_ties(base, base_config, zero3)
    if zero3 and config.q_lora:
        print_rank0(f"note: {about_zero3(config)}")
    options: dict[str, Any] = {}
    if not zero3 and (config.q_lora or accelerator.device.type == "cuda"):
        # Copies weights from the mapped file directly to this rank's device. ZeRO-3 cannot.
        options["device_map"] = {"": accelerator.device}
    dtype = torch_dtype(config.precision)
    with _ties_of_gathered_weights() if zero3 else nullcontext():
        model, missing = load_pretrained(
            base,
            base_config,
            dtype,
            dtype if config.q_lora else None,
            config=base_config,
            attn_implementation=implementation(
                base_model.packed, config.flash_attn, config.torch_compile
            ),
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    if missing:
        raise UserError(
            f"{base}: the weights lack {', '.join(missing[:5])}; expected all of the model's "
            "weights. Repair the model's files, or give another model."
        )
    if config.q_lora and config.precision != "no":
        compute_in_fp32(model, deepspeed=plugin is not None)
    return model


@contextmanager
def _ties_of_gathered_weights() -> Iterator[None]:
    """Gather weights before transformers compares them and ties equal ones.

    Under ZeRO-3, transformers 5.23 compares empty partitions, which are equal
    (modeling_utils.py). It then replaces Flan-T5's LM head by the embedding.
    """
    if not compares_ties():
        yield
        return
    are_equal = modeling_utils._tied_params_are_equal

    def gathered_are_equal(one: Any, other: Any) -> bool:
        with gathered(one), gathered(other):
            return bool(are_equal(one, other))

    modeling_utils._tied_params_are_equal = gathered_are_equal
    try:
        yield
    finally:
        modeling_utils._tied_params_are_equal = are_equal


def _add_adapter(model: Any, base_model: BaseModel, config: Config, autocast: bool) -> PeftModel:
    if config.lora_weight_path:
        saved = PeftConfig.from_pretrained(config.lora_weight_path)
        # peft refuses dropout with parameters; see `_set_dropout`.
        saved.lora_dropout = 0.0 if saved.target_parameters else config.lora_dropout
        _check_trains_whole(model, saved.modules_to_save or (), config.lora_weight_path)
        with as_user_error(f"--lora_weight_path {config.lora_weight_path}"):
            # peft only warns of missing weights. Training would start from random values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = PeftModel.from_pretrained(
                model,
                config.lora_weight_path,
                config=saved,
                is_trainable=True,
                autocast_adapter_dtype=autocast,
            )
        new_tokens.check_rows(loaded, base_model.new_tokens, config.lora_weight_path)
        if saved.target_parameters:
            _set_dropout(loaded, config.lora_dropout)
        return loaded
    pairs, tokens = model.config.is_encoder_decoder, base_model.new_tokens
    modules, parameters = find_targets(model, config.lora_target_modules).for_peft(model)
    rows = new_tokens.places(model, tokens) if tokens else None
    new_tokens.check_targets(rows or {}, (*modules, *parameters))
    adapter = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if pairs else TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if parameters else config.lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        bias=config.lora_bias,
        trainable_token_indices=rows,
        base_model_name_or_path=base_model.name,
    )
    with as_user_error(f"{base_model.name}: LoRA"):
        with_adapter = get_peft_model(model, adapter, autocast_adapter_dtype=autocast)
    if parameters:
        _set_dropout(with_adapter, config.lora_dropout)
    return with_adapter


def _check_trains_whole(model: Any, modules: Iterable[str], folder: str) -> None:
    """Raise UserError for a module in 4 bits that the adapter's `modules_to_save` trains."""
    quantised = [
        name
        for name, module in model.named_modules()
        if any(f".{name}".endswith(f".{end}") for end in modules)
        and any(hasattr(parameter, "quant_state") for parameter in module.parameters())
    ]
    if quantised:
        raise UserError(
            f"--lora_weight_path {folder}: found modules_to_save {', '.join(modules)}, and "
            f"{quantised[0]} in 4 bits; expected modules that are not quantised. Give --q_lora "
            "False and a base model whose files are not quantised."
        )


def _restore_values(with_adapter: PeftModel, folder: str) -> None:
    """Copy an adapter's biases and modules that are trained whole from its file.

    Every rank must call this. peft (0.21) loads these in the base's dtype, which rounds them.
    """
    saved = load_peft_weights(folder, device="cpu")
    for name, parameter in with_adapter.named_parameters():
        value = saved.get(file_name(name))
        if parameter.requires_grad and "lora_" not in name and value is not None:
            with gathered(parameter), torch.no_grad():
                parameter.copy_(value)


def _set_dropout(with_adapter: Any, dropout: float) -> None:
    """Give all adapted modules, but no adapted parameters, their dropout.

    A parameter's LoRA is added to the weight, so that its input cannot be dropped. peft (0.21,
    `ParamWrapper`) therefore refuses a configuration with dropout, also when it loads one.
    """
    for module in with_adapter.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
    if dropout:
        print_rank0(f"note: experts get LoRA dropout 0; all other modules {dropout}")


def leave_inputs(with_adapter: Any) -> None:
    """Disable peft's cast of LoRA inputs to fp32, which autocast would undo."""
    for module in with_adapter.modules():
        if isinstance(module, BaseTunerLayer):  # peft 0.21, tuners/tuners_utils.py
            module.cast_input_dtype_enabled = False


def _compile_layers(model: Any) -> None:
    """Compile each layer on its first call, once for all row lengths."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # each layer of transformers' models
            layer.compile(dynamic=True)
