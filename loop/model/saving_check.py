"""Checks before step 1 that the adapter can be saved and that peft loads it again."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from data.errors import UserError
from loop.distributed.accelerator import raise_on_all_ranks
from loop.distributed.rank_zero import print_rank0
from loop.model import new_tokens
from loop.model.base import LIBRARY_ERRORS, BaseModel, meta_model
from loop.utils import Tensors, adapter_settings, adapter_weights, file_name, shapes

SHOWN_NAMES = 3


def check_saving(model: PeftModel, base_model: BaseModel, trust_remote_code: bool) -> None:
    """Load the adapter's keys and shapes into the base model's structure, as peft does it.

    No tensor has values: both are on PyTorch's meta device. Every rank must call this. Raises
    UserError on all ranks if the saved adapter would lack a trained tensor or not load.
    """
    with raise_on_all_ranks():
        try:
            wrong = _wrong_names(model, base_model, trust_remote_code)
        except LIBRARY_ERRORS as error:
            raise _refusal(model, f"{type(error).__name__}: {error}") from error
        if wrong:
            more = ", ..." if len(wrong) > SHOWN_NAMES else ""
            raise _refusal(model, f"{', '.join(wrong[:SHOWN_NAMES])}{more} not saved or not loaded")


def saved_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the adapter's file, by their names in it."""
    return {**shapes(model), **new_tokens.row_shapes(model)}


def _wrong_names(model: PeftModel, base_model: BaseModel, trust_remote_code: bool) -> list[str]:
    """Return the tensors that are not saved, or that the loaded adapter has otherwise."""
    expected = saved_shapes(model)
    saved = adapter_weights(model, _trained_on_meta(model, expected))
    wrong = _different(expected, saved)
    if wrong:
        return wrong
    try:
        base = meta_model(base_model.name, base_model.config, trust_remote_code)
    except UserError:  # Some models with their own code cannot be built without values.
        print_rank0("note: the adapter cannot be loaded before step 1; only its names are checked")
        return []
    with torch.device("meta"):
        if base_model.new_tokens:
            new_tokens.grow(base, len(base_model.tokenizer))
        settings: dict[str, Any] = adapter_settings(model)
        adapter = PeftConfig.from_peft_type(**{**settings, "init_lora_weights": False})
        with new_tokens.without_collectives():  # values do not matter, and peft's gather needs CUDA
            loaded = get_peft_model(base, adapter, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(loaded, saved, low_cpu_mem_usage=True)
    own = adapter_weights(loaded, loaded.state_dict())
    return sorted({*result.unexpected_keys, *_different(expected, own)})


def _trained_on_meta(model: PeftModel, expected: dict[str, tuple[int, ...]]) -> Tensors:
    """Return what the run gathers before it saves, on the meta device."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # peft's name of rows in the model ends with the adapter's name; frozen rows are saved, too.
    rows = [f"{name}.default" for name in new_tokens.row_shapes(model)]
    return {
        name: torch.empty(expected[file_name(name)], device="meta")
        for name in dict.fromkeys([*trained, *rows])
    }


def _different(expected: dict[str, tuple[int, ...]], found: Tensors) -> list[str]:
    """Return the names that only one side has, or whose shapes differ."""
    other = {name: tuple(tensor.shape) for name, tensor in found.items()}
    return sorted(name for name in {**expected, **other} if expected.get(name) != other.get(name))


def _refusal(model: PeftModel, found: str) -> UserError:
    config = model.peft_config["default"]
    return UserError(
        f"the trained adapter could not be saved and loaded again: found {found}; expected every "
        f"trained tensor in the file and in the loaded adapter (target_modules "
        f"{config.target_modules}, modules_to_save {config.modules_to_save}). Give other "
        "--lora_target_modules. With --lora_weight_path, merge that adapter first (python -m loop "
        "merge), and train a new one on the merged model."
    )
