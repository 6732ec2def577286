"""Reads the inputs of the estimate: a model's shape from config.json, and accelerate configs."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, get_args

import yaml

from data.errors import UserError
from loop.config.flags import ROOT, Config
from loop.config.model_flags import Precision
from loop.model.base import meta_model, read_base_config
from loop.model.lora_targets import find_targets

# Model types with T5's blocks (transformers 5.23, models/mt5/modeling_mt5.py). Flan-T5 and ByT5
# have the type t5. UMT5 and LongT5 have another attention. Switch has experts.
T5_TYPES = ("t5", "mt5")
# T5 targets of one block that read the same tensor, a norm's output.
T5_SAME_INPUT = {"q": "norm", "k": "norm", "v": "norm", "wi_0": "norm", "wi_1": "norm"}
CROSS_ATTENTION = "EncDecAttention"
ENCODER_OUTPUT = "the encoder's output"  # read by all decoder layers


@dataclass(frozen=True)
class Reads:
    """The input widths of LoRA targets that read one side, source or target.

    targets: one width per LoRA target. inputs: one width per tensor that they read, without
    attention outputs. outputs: the widths of attention outputs, which `o` reads.
    """

    targets: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class T5:
    """The two stacks of a T5, and the LoRA targets by the side that they read.

    activation: transformers' name. dropout: whether the base model has dropout.
    """

    encoder: int  # layers
    decoder: int
    gated: bool
    activation: str
    dropout: bool
    own: Reads  # the encoder's targets
    crosswise: Reads  # keys and values of cross-attention, which read the source
    target: Reads  # the decoder's other targets


def t5_of(base_config: Any, targets: dict[str, Any]) -> T5 | None:
    """Return the stacks of a T5 and its LoRA targets, modules by name; None for a decoder."""
    if base_config.model_type not in T5_TYPES:
        return None
    by_side: dict[str, dict[str, Any]] = {"own": {}, "crosswise": {}, "target": {}}
    for name, module in targets.items():
        by_side[_side(name)][name] = module
    return T5(
        encoder=base_config.num_layers,
        decoder=base_config.num_decoder_layers,
        gated=base_config.is_gated_act,
        activation=base_config.dense_act_fn,
        dropout=base_config.dropout_rate > 0,
        **{side: _reads(modules) for side, modules in by_side.items()},
    )


def _side(name: str) -> str:
    """Return the field of T5 that a module belongs to."""
    if CROSS_ATTENTION in name and name.endswith((".k", ".v")):
        return "crosswise"
    return "own" if name.startswith("encoder.") else "target"


def _reads(targets: dict[str, Any]) -> Reads:
    inputs: dict[tuple[str, str], int] = {}
    outputs = []
    for name, module in targets.items():
        parent, _, own = name.rpartition(".")
        width = module.weight.shape[1]
        if own == "o":
            outputs.append(width)
        elif _side(name) == "crosswise":
            inputs[ENCODER_OUTPUT, ""] = width
        else:
            inputs[parent, T5_SAME_INPUT.get(own, own)] = width
    widths = tuple(module.weight.shape[1] for module in targets.values())
    return Reads(widths, tuple(inputs.values()), tuple(outputs))


CONFIGS = ROOT / "accelerate_configs"
# Values of distributed_type for one process. YAML reads a bare NO as false, in mixed_precision too.
SINGLE_PROCESS = ("NO", False)
# LLaMA's names in config.json. Config classes of other families map their names to these.
REQUIRED_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Targets of one block that read the same tensor.
SAME_INPUT = {"q_proj": "x", "k_proj": "x", "v_proj": "x", "gate_proj": "x", "up_proj": "x"}
INPUT_KEPT_BY_ATTENTION = "o_proj"  # its input is attention's output, which attention keeps


@dataclass(frozen=True)
class Weights:
    """The frozen parameters of a model or of one layer, in elements."""

    linears: tuple[int, ...]  # in 4 bits under QLoRA: every Linear but the LM head and `held`
    held: tuple[int, ...]  # in fp32 under QLoRA: T5's `wo`
    others: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA-like model or a T5, and of its adapter, for the formulas."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    query: int  # width of all query heads together
    key: int  # width of all key heads together, and of all value heads
    vocabulary: int
    plain_logits: bool  # the model does not alter its logits, so the loss can run in chunks
    head_trained: bool
    model: Weights
    layer: Weights
    trained: tuple[int, ...]  # elements of each lora_A, lora_B and trained bias
    targets: tuple[int, ...]  # the width of each LoRA target's input
    inputs: tuple[int, ...]  # one width per tensor that the targets read, without o_proj's
    t5: T5 | None


@dataclass(frozen=True)
class Backend:
    """The settings of an accelerate config that the estimate uses."""

    name: str
    stage: int  # ZeRO stage; 0 without DeepSpeed
    offload_optimizer: bool
    offload_param: bool
    multi_rank: bool  # allows several ranks
    precision: Precision


def read_shape(base: str, config: Config) -> Shape:
    """Return the shape of a model, in a folder or on the hub, and of the adapter.

    Raises UserError for a model that is neither LLaMA-like nor a T5, and for LoRA targets that the
    model does not have.
    """
    base_config = read_base_config(base, config)
    check_shape(base, base_config)
    return shape_of(bare_model(base, base_config, config), base_config, config)


def check_shape(base: str, base_config: Any) -> None:
    """Raise UserError for a model that the estimate does not cover."""
    if base_config.model_type in T5_TYPES:
        return
    missing = [name for name in REQUIRED_KEYS if getattr(base_config, name, None) is None]
    if missing or base_config.is_encoder_decoder:
        raise UserError(
            f"{base}: found a {base_config.model_type} model, "
            f"{'without ' + ', '.join(missing) if missing else 'an encoder-decoder'}; the estimate "
            f"expects a LLaMA-like model, or one of the types {', '.join(T5_TYPES)}."
        )


def shape_of(model: Any, base_config: Any, config: Config) -> Shape:
    """Return the shape of a model on the meta device, and of the adapter."""
    # Not at the top: errors of an accelerate config are reported without importing torch.
    from loop.training.loss import changes_logits

    heads = base_config.num_attention_heads
    head = getattr(base_config, "head_dim", None) or base_config.hidden_size // heads
    groups = getattr(base_config, "num_key_value_heads", None) or heads
    targets = lora_targets(model, config)
    t5 = t5_of(base_config, targets)
    return Shape(
        hidden=base_config.hidden_size,
        intermediate=base_config.d_ff if t5 else base_config.intermediate_size,
        layers=t5.encoder + t5.decoder if t5 else base_config.num_hidden_layers,
        heads=heads,
        query=heads * head,
        key=groups * head,
        vocabulary=base_config.vocab_size,
        plain_logits=not changes_logits(base_config),
        **_weights(model, base_config.num_hidden_layers, targets, config),
        t5=t5,
    )


def bare_model(base: str, base_config: Any, config: Config) -> Any:
    """Return the model on PyTorch's meta device, without weights or memory."""
    return meta_model(base, base_config, config.trust_remote_code)


def _weights(model: Any, layers: int, targets: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return the fields of Shape with counts of elements; a tied weight counts once."""
    from torch import nn

    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    in_fp32 = {*(model._keep_in_fp32_modules or ())}
    held = {id(m.weight) for name, m in linears.items() if in_fp32 & {*name.split(".")}}
    four_bit = {id(m.weight) for m in linears.values()} - held
    biases = trained_biases(model, targets, config)

    def count(module: Any) -> Weights:
        frozen = [p for p in module.parameters() if id(p) not in biases]
        return Weights(
            tuple(p.numel() for p in frozen if id(p) in four_bit),
            tuple(p.numel() for p in frozen if id(p) in held),
            tuple(p.numel() for p in frozen if id(p) not in four_bit | held),
        )

    # The layers of a T5's decoder are larger than the encoder's.
    stack = model.get_decoder() if model.config.is_encoder_decoder else model
    layers = len(stack.block) if model.config.is_encoder_decoder else layers
    # The first list holds the layers. A list of experts of this length is inside a layer.
    stacks = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    inputs: dict[tuple[str, str], int] = {}
    trained = list(biases.values())
    for name, module in targets.items():
        parent, _, own = name.rpartition(".")
        if own != INPUT_KEPT_BY_ATTENTION:
            inputs[parent, SAME_INPUT.get(own, own)] = _weight(module).shape[-1]
        trained += pair_of(module, config)
    return {
        "head_trained": any(module is head for module in targets.values()),
        "model": count(model),
        "layer": count(stacks[0][0]),
        "trained": tuple(trained),
        "targets": tuple(_weight(module).shape[-1] for module in targets.values()),
        "inputs": tuple(inputs.values()),
    }


def pair_of(module: Any, config: Config) -> list[int]:
    """Return the elements of lora_A [r, in] and lora_B [out, r], of all experts of a parameter."""
    shape = _weight(module).shape
    return [config.lora_r * prod(shape[:-2]) * width for width in shape[-2:]]


def _weight(target: Any) -> Any:
    """Return an adapted module's weight; an adapted parameter is its own."""
    from torch import nn

    return target if isinstance(target, nn.Parameter) else target.weight


def lora_targets(model: Any, config: Config) -> dict[str, Any]:
    """Return the modules and parameters that get a LoRA pair, by name.

    Raises UserError for a target that the model does not have.
    """
    targets = find_targets(model, config.lora_target_modules)
    return targets.modules | targets.parameters


def trained_biases(model: Any, targets: dict[str, Any], config: Config) -> dict[int, int]:
    """Return the elements of each trained bias of the base model, by the id of the parameter."""
    if config.lora_bias == "none":
        return {}
    chosen = targets if config.lora_bias == "lora_only" else dict(model.named_modules())
    biases = [getattr(module, "bias", None) for module in chosen.values()]
    return {id(bias): bias.numel() for bias in biases if bias is not None}


def read_backend(path: Path) -> Backend:
    """Return the backend of an accelerate config.

    Raises UserError for a file that cannot be read, and for an unsupported backend.
    """
    where, values = f"--accelerate_config {path}", read_accelerate(path)
    kind = values["distributed_type"]
    zero = values.get("deepspeed_config") or {} if kind == "DEEPSPEED" else {"zero_stage": 0}
    if "deepspeed_config_file" in zero:
        raise UserError(
            f"{where}: found deepspeed_config_file; expected zero_stage and offload devices; the "
            "estimate reads no other key. Give one of accelerate_configs/."
        )
    stage = zero.get("zero_stage", 2)
    precision: Any = values.get("mixed_precision") or "no"
    if type(stage) is not int or stage not in range(4) or precision not in get_args(Precision):
        raise UserError(
            f"{where}: found zero_stage {stage} and mixed_precision {precision}; expected stage "
            "1, 2 or 3 and precision no, bf16 or fp16. Give one of accelerate_configs/."
        )
    return Backend(
        name=path.stem,
        stage=stage,
        offload_optimizer=zero.get("offload_optimizer_device", "none") != "none",
        offload_param=zero.get("offload_param_device", "none") != "none",
        multi_rank=kind not in SINGLE_PROCESS,
        precision=precision,
    )


def read_accelerate(path: Path) -> dict[str, Any]:
    """Return the keys of an accelerate config.

    Raises UserError for a file that cannot be read, and for an unsupported backend.
    """
    where = f"--accelerate_config {path}"
    try:
        values = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise UserError(
            f"{where}: cannot be read: {error.strerror}. Expected an accelerate config, such as "
            f"those in accelerate_configs/: {known}."
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}.") from None
    kind = values.get("distributed_type") if isinstance(values, dict) else None
    if kind not in (*SINGLE_PROCESS, "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
        similar = "zero3.yaml" if kind == "FSDP" else ""  # Both partition the base model.
        raise UserError(
            f"{where}: found distributed_type {kind}; expected NO, MULTI_GPU or DEEPSPEED. "
            f"Give {'' if similar else 'one of '}accelerate_configs/{similar}."
        )
    zero = values.get("deepspeed_config") or {}
    if kind == "DEEPSPEED" and not isinstance(zero, dict):
        raise UserError(
            f"{where}: deepspeed_config: found {zero}; expected keys such as zero_stage. Give one "
            "of accelerate_configs/."
        )
    return dict(values)


def backends() -> list[Backend]:
    """Return the backends of accelerate_configs/ for the GPUs of one machine, by stage.

    A file that the estimate cannot read is skipped with a note.
    """
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        try:
            backend = read_backend(path)
        except UserError as error:
            print(f"note: skipped: {str(error).removeprefix('--accelerate_config ')}")
            continue
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        # Without these keys, accelerate uses one machine with GPUs.
        if values.get("num_machines", 1) == 1 and not values.get("use_cpu"):
            found.append(backend)
    return sorted(found, key=lambda b: (b.stage, b.multi_rank, b.offload_optimizer))
