"""The modules and expert parameters that LoRA adapts, found by rules over the model's modules."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data.errors import UserError

# LLaMA's and T5's default targets, which the estimate prints.
USUAL = (("q_proj", "v_proj"), ("q", "v"))
ALL_LINEAR, ALL_BUT_EXPERTS = ("all-linear",), ("all-linear-but-experts",)

# Names of projections, in lower case: of the query; of the value; of both in one matrix.
# q_a/q_b and kv_a/kv_b are the two factors of multi-head latent attention's projections.
QUERY = re.compile(
    r"q|q_proj|q_lin|to_q|wq|project_q|query|query_proj|query_key|receptance|q_[ab]_proj"
)
VALUE = re.compile(
    r"v|v_proj\w*|v_lin|to_v|wv|project_v|value|value_proj|kv_proj|to_kv|kv_[ab]_proj(_with_mqa)?"
)
FUSED = re.compile(r"qkv|qkv_proj|wqkv|query_key_value|c_attn|in_proj(_qkvz?)?")
# Not attention: feed-forward layers with a "value", and indexers, whose choice has no gradient.
OTHER_PARENTS = re.compile(r"mlp|ffn|feed_forward|indexer|compressor")
# A choice among experts, not a linear map of the hidden state.
ROUTER = re.compile(r"\w*router\w*|gate|shared_expert_gate|wg")
# Selects keys or tokens by top-k, which has no gradient.
NO_GRADIENT = re.compile(r"\w*indexer\w*|patcher")
# Towers of other modalities within a text model (GIT, Phi-4 multimodal).
OTHER_MODALITY = re.compile(r"(^|\.)\w*(vision|visual|image|img|audio)\w*\.")
# Fused state-space kernels read these weights instead of calling the modules (transformers 5.23,
# models/mamba/modeling_mamba.py and models/mamba2/modeling_mamba2.py).
READ_RAW = ("out_proj", "x_proj", "dt_proj")


@dataclass(frozen=True)
class Targets:
    """What LoRA adapts, by complete name.

    modules: linear layers or embeddings. parameters: weights that peft adapts as parameters
    (`target_parameters`): experts [experts, out, in], and the matrices that peft would take for
    experts by their name.
    """

    modules: dict[str, Any]
    parameters: dict[str, Any]

    def for_peft(self, model: Any) -> tuple[list[str], list[str]]:
        """Return `target_modules` and `target_parameters` for peft, as short as they can be."""
        modules = [name for name, _ in model.named_modules()]
        parameters = [name for name, _ in model.named_parameters()]
        return _shortest([*self.modules], modules), _shortest([*self.parameters], parameters)


def find_targets(model: Any, asked: tuple[str, ...] | None) -> Targets:
    """Return what LoRA adapts: --lora_target_modules, or attention's query and value.

    In a vision-language model, only the text part is searched. Raises UserError for a name that
    matches nothing, and for a model without a default.
    """
    linear, experts = _linear(model), experts_of(model)
    if asked in (ALL_LINEAR, ALL_BUT_EXPERTS):
        chosen = {name: m for name, m in linear.items() if not _left_out(model, name, m)}
        return _split(model, chosen, experts if asked == ALL_LINEAR else {})
    if asked is None:
        return _split(model, _query_and_value(model, linear), {})
    embeddings = _embeddings(model)
    for target in asked:
        if not _has([*linear, *embeddings, *experts], target):
            known = {name.rpartition(".")[2] for name in [*linear, *embeddings, *experts]}
            raise UserError(
                f"--lora_target_modules: found {target}, which names no module of the model; "
                f"expected some of: {', '.join(sorted(known))}. Give one of these, or all-linear."
            )
    return _split(
        model,
        {n: m for n, m in (linear | embeddings).items() if any(_has([n], t) for t in asked)},
        {n: p for n, p in experts.items() if any(_has([n], t) for t in asked)},
    )


def target_names(model: Any, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the targets, each without its path; raises UserError."""
    targets = find_targets(model, asked)
    if asked is not None:
        return asked
    owners = [name.removesuffix(".weight") for name in targets.parameters]
    return tuple(dict.fromkeys(n.rpartition(".")[2] for n in [*targets.modules, *owners]))


def kind_of(name: str) -> str:
    """Return the kind of an adapted module or parameter, by its complete name."""
    path = name.lower()
    if "expert" in path and not re.search(r"shared_?expert", path):
        return "expert"
    if re.search(r"embed|lm_head|\bwte\b", path):
        return "vocabulary"
    if re.search(r"shared_?expert|mlp|ffn|feed_?forward|dense(relu|_h|_4h)|\bfc\d|\bff\b", path):
        return "mlp"
    return "attention" if re.search(r"att|mixer|mamba", path) else "other"


def _query_and_value(model: Any, linear: dict[str, Any]) -> dict[str, Any]:
    """Return the projections of attention's query and value, fused or not.

    A module counts as attention if it has a value and a query among its children, or both in one.
    """
    children: dict[str, dict[str, Any]] = {}
    for name, module in linear.items():
        parent, _, own = name.rpartition(".")
        children.setdefault(parent, {})[own] = module
    chosen: dict[str, Any] = {}
    for parent, found in children.items():
        if OTHER_PARENTS.search(parent.rpartition(".")[2].lower()):
            continue
        fused = [own for own in found if FUSED.fullmatch(own.lower())]
        queries = [own for own in found if QUERY.fullmatch(own.lower())]
        values = [own for own in found if VALUE.fullmatch(own.lower())]
        # Without a query: mixtures of attention (JetMoE), whose queries are experts.
        both = queries + values if values and (queries or "kv_proj" in values) else []
        for own in fused or both:
            chosen[f"{parent}.{own}" if parent else own] = found[own]
    chosen = {name: m for name, m in chosen.items() if not NO_GRADIENT.search(name)}
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise UserError(
            f"--lora_target_modules: found no query and value projections in "
            f"{type(model).__name__}; expected names. Give all-linear, or some of: {known}."
        )
    return chosen


def _left_out(model: Any, name: str, module: Any) -> bool:
    """Return whether all-linear leaves a linear layer out."""
    parts = name.lower().split(".")
    head = model.get_output_embeddings()
    tied = head is not None and (module is head or module.weight is head.weight)
    # "gate" is a router; a gated MLP has a "gate_proj".
    routes = any(ROUTER.fullmatch(part) for part in parts)
    return tied or routes or any(NO_GRADIENT.fullmatch(part) for part in parts)


def _linear(model: Any) -> dict[str, Any]:
    """Return the text part's linear layers, but those whose weights a kernel reads."""
    from torch import nn  # Imported here, since it is slow and not all importers call this.
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    inside = _text_part(model)
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and inside(name)
        and not _read_raw(model, name, modules)
    }


def _read_raw(model: Any, name: str, modules: dict[str, Any]) -> bool:
    parent, _, own = name.rpartition(".")
    if own not in READ_RAW:
        return False
    # peft (0.21, tuners_utils.py) refuses this name in all modules of these models.
    mamba_types = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
    if own == "out_proj" and getattr(model.config, "model_type", None) in mamba_types:
        return True
    siblings = modules.get(parent)
    return hasattr(siblings, "conv1d") and hasattr(siblings, "in_proj")


def _embeddings(model: Any) -> dict[str, Any]:
    from torch import nn

    inside = _text_part(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and inside(n)}


def experts_of(model: Any) -> dict[str, Any]:
    """Return the text part's experts that are one parameter per layer, [experts, out, in]."""
    inside = _text_part(model)
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__ and inside(name)
        for own, parameter in module.named_parameters(recurse=False)
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 3
    }


def _text_part(model: Any) -> Callable[[str], bool]:
    """Return a test of whether a module, by its complete name, belongs to the text part."""
    config = model.config
    text = config if config.is_encoder_decoder else config.get_text_config()
    decoder = None if text is config else model.get_decoder()
    head = model.get_output_embeddings()
    roots = (
        [name for name, module in model.named_modules() if module is decoder or module is head]
        if decoder is not None and decoder is not model
        else [""]
    )

    def inside(name: str) -> bool:
        in_root = any(not root or f"{name}.".startswith(f"{root}.") for root in roots)
        return in_root and not OTHER_MODALITY.search(f"{name}.")

    return inside


def _split(model: Any, modules: dict[str, Any], experts: dict[str, Any]) -> Targets:
    """Adapt as parameters what peft would take for experts by the name.

    For mixtures of experts, peft (0.21, `_convert_peft_config_moe`) reads some names as those of
    transformers 4's experts, so that a dense layer's `gate_proj` would adapt the experts.
    """
    renamed = _renamed_by_peft(model)
    plain = {n: m for n, m in modules.items() if n.rpartition(".")[2] not in renamed}
    as_parameters = {f"{n}.weight": m.weight for n, m in modules.items() if n not in plain}
    return Targets(plain, as_parameters | experts)


def _renamed_by_peft(model: Any) -> set[str]:
    from peft.utils import transformers_weight_conversion as conversion

    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", None))
    return {*conversion._MOE_TARGET_MODULE_MAPPING.get(kind, {})}


def _shortest(chosen: list[str], names: list[str]) -> list[str]:
    """Return the shortest endings of the chosen names that match no other name."""
    own_names = {name.rpartition(".")[2] for name in chosen}
    inside_layers = {re.split(r"\.\d+\.", name)[-1] for name in chosen}
    for endings in (own_names, inside_layers):
        if {n for n in names if any(_has([n], end) for end in endings)} == {*chosen}:
            return sorted(endings)
    return chosen


def _has(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
