"""What the estimate knows of a T5 beside a decoder's shape: two stacks, and what LoRA reads."""

from dataclasses import dataclass
from typing import Any

# Those whose blocks are T5's (transformers 5.23, models/mt5/modeling_mt5.py); Flan-T5 and ByT5 call
# themselves t5. UMT5's and LongT5's attention and Switch's experts are others.
KINDS = ("t5", "mt5")
# Targets that read one tensor: a norm's output; the encoder's, which all decoder layers read.
ONE_INPUT = {"q": "norm", "k": "norm", "v": "norm", "wi_0": "norm", "wi_1": "norm"}
CROSS, ENCODED = "EncDecAttention", "the encoder's output"


@dataclass(frozen=True)
class Reads:
    """LoRA targets that read tokens of one side, each by the width of its input.

    inputs: once for targets that read one tensor; outputs: attention's, which `o` reads.
    """

    targets: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class T5:
    """The two stacks of a T5, and what is trained on which side.

    activation: transformers' name. dropout: whether the base has any.
    """

    encoder: int  # layers
    decoder: int
    gated: bool
    activation: str
    dropout: bool
    own: Reads  # the encoder's
    crosswise: Reads  # the decoder's keys and values of the source
    target: Reads


def t5_of(base_config: Any, targets: dict[str, Any]) -> T5 | None:
    """Return what is known of a T5 and its LoRA targets, modules by name; None for a decoder."""
    if base_config.model_type not in KINDS:
        return None
    sorted_out: dict[str, dict[str, Any]] = {"own": {}, "crosswise": {}, "target": {}}
    for name, module in targets.items():
        sorted_out[_reader(name)][name] = module
    return T5(
        encoder=base_config.num_layers,
        decoder=base_config.num_decoder_layers,
        gated=base_config.is_gated_act,
        activation=base_config.dense_act_fn,
        dropout=base_config.dropout_rate > 0,
        **{reader: _reads(modules) for reader, modules in sorted_out.items()},
    )


def _reader(name: str) -> str:
    """Return the field of T5 that a module belongs to."""
    if CROSS in name and name.endswith((".k", ".v")):
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
        elif _reader(name) == "crosswise":
            inputs[ENCODED, ""] = width
        else:
            inputs[parent, ONE_INPUT.get(own, own)] = width
    widths = tuple(module.weight.shape[1] for module in targets.values())
    return Reads(widths, tuple(inputs.values()), tuple(outputs))
