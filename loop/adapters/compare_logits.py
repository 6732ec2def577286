"""Compares the logits of two models on the same texts, computed in fp32."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from data.dialogues.sharegpt import Tally, read_dialogues
from data.dialogues.sources import files_of, parse_source
from data.encoding.encode import Example, encode_dialogues
from data.encoding.seq2seq import PairLimits, encode_pairs
from data.errors import UserError
from loop.adapters.adapter import Adapter
from loop.adapters.merge_rules import Change
from loop.config.flags import DUMMY_DATA

COMPARED_TOKENS = 128  # of each text
READ_TOKENS = 2048  # of each text; a dialogue whose answer starts later is skipped
MAX_DIFFERENCE_FP32, MAX_DIFFERENCE_16_BIT = 1e-4, 2e-2  # of logits


def examples_of(adapter: Adapter, changes: dict[str, Change], count: int) -> list[Example]:
    """Return the first texts of the run's data, or of the bundled data if the files are missing.

    If the adapter changes rows of new tokens, one more text holds all of these tokens.
    """
    words, pairs = adapter.trained.get("data_path") or [str(DUMMY_DATA)], adapter.pairs
    try:
        examples = _encoded(adapter, words, count)
    except UserError:
        examples = _encoded(adapter, [str(DUMMY_DATA)], count)
    new = sorted({token for change in changes.values() for token in change.tokens})
    if new:
        examples.append(Example("new tokens", new, new, len(new), is_pair=pairs))
    return examples


def examples_after(adapter: Adapter, known: list[Example], count: int) -> list[Example]:
    """Return `count` texts of the run's data that follow the `known` ones.

    If the run has too few texts, the known texts are added, then texts of the bundled data.
    """
    words = adapter.trained.get("data_path") or [str(DUMMY_DATA)]
    try:
        own = _encoded(adapter, words, len(known) + count)
    except UserError:  # as in examples_of
        own = _encoded(adapter, [str(DUMMY_DATA)], len(known) + count)
    own = own[len(known) :]
    if len(own) < count:
        own += known
    return [*own, *_encoded(adapter, [str(DUMMY_DATA)], max(count - len(own), 0))][:count]


def _encoded(adapter: Adapter, words: list[str], count: int) -> list[Example]:
    files = [file for word in words for file in files_of(parse_source(word))]
    dialogues = islice(read_dialogues(files, Tally(), "skip", adapter.pairs), count)
    if adapter.pairs:
        fastchat = bool(adapter.trained.get("t5_compat"))
        limits = PairLimits(READ_TOKENS, READ_TOKENS, keep_header=False)
        pairs = encode_pairs(dialogues, adapter.tokenizer, limits, fastchat, Tally())
        return [*islice(pairs, count)]
    how = READ_TOKENS, Tally(), adapter.rendering
    template, tokenizer = adapter.template, adapter.tokenizer
    return [*encode_dialogues(dialogues, template, tokenizer, *how, on_bad_record="skip")]


def logits_of(model: Any, examples: list[Example]) -> list[Tensor]:
    """Return the logits [T, vocabulary] float32 of each text's first `COMPARED_TOKENS` tokens."""
    with torch.inference_mode(), in_fp32(model):
        return [run(model, example) for example in examples]


def run(model: Any, example: Example) -> Tensor:
    """Return a text's logits [T, vocabulary] float32; the model computes in fp32."""
    inputs = {"input_ids": torch.tensor([example.input_ids[:COMPARED_TOKENS]])}
    if example.is_pair:
        target = [model.config.decoder_start_token_id, *example.labels][:COMPARED_TOKENS]
        inputs["decoder_input_ids"] = torch.tensor([target])
    logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    return logits


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of two models' logits over their common vocabulary."""
    return max(float(part.abs().max()) for part in _differences(one, other))


def root_mean_square(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the root of the mean squared difference of two models' logits."""
    parts = [*_differences(one, other)]
    squares = sum(float(part.square().sum()) for part in parts)
    return math.sqrt(squares / sum(part.numel() for part in parts))


def _differences(one: list[Tensor], other: list[Tensor]) -> Iterator[Tensor]:
    size = min(tensor.shape[-1] for tensor in (*one, *other))
    return (a[:, :size] - b[:, :size] for a, b in zip(one, other, strict=True))


def allowed(dtype: torch.dtype, logits: list[Tensor], effect: float) -> float:
    """Return the largest accepted difference of logits for weights of this dtype.

    The effect of 16-bit rounding grows with the logits, so the limit is 2 % of the largest logit.
    It is at most half of the adapter's `effect`, since otherwise a missing adapter would pass. It
    is at least 2e-2.
    """
    if dtype == torch.float32:
        return MAX_DIFFERENCE_FP32
    largest = max(float(tensor.abs().max()) for tensor in logits)
    return max(MAX_DIFFERENCE_16_BIT, min(MAX_DIFFERENCE_16_BIT * largest, effect / 2))


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Make the model compute in fp32; one layer's weights are upcast at a time.

    In bf16, rounded activations would hide differences between weights. All weights of a layer are
    upcast together, since T5 casts activations to the dtype of `wo` (transformers 5.23). The next
    layer reuses the fp32 memory, since freeing and allocating it again would fragment the heap.
    """
    originals: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    free: dict[torch.Size, list[Tensor]] = defaultdict(list)
    layers = {layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m}

    def to_fp32(module: nn.Module, _: Any) -> None:
        originals[module] = []
        for owner in module.modules() if module in layers else [module]:
            for name, parameter in owner._parameters.items():
                if parameter is not None and _is_sixteen_bit(parameter):
                    originals[module].append((owner, name, parameter))
                    reusable = free[parameter.shape]
                    upcast = reusable.pop().copy_(parameter) if reusable else parameter.float()
                    owner._parameters[name] = nn.Parameter(upcast, requires_grad=False)

    def restore(module: nn.Module, *_: Any) -> None:
        for owner, name, parameter in originals.pop(module, []):
            upcast = owner._parameters[name]
            if module in layers and upcast is not None:
                free[parameter.shape].append(upcast.data)
            owner._parameters[name] = parameter

    handles = []
    four_bit: list[Any] = []
    for module in model.modules():
        if hasattr(module._parameters.get("weight"), "quant_state"):
            four_bit.append(module)
            module.forward = partial(_dequantised, module)
        handles.append(module.register_forward_pre_hook(to_fp32))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in four_bit:
            del module.forward


def _dequantised(module: Any, inputs: Tensor) -> Tensor:
    """Compute a 4-bit layer with weights rounded to its compute dtype, as in training.

    For fp32 inputs, bitsandbytes 0.50 would dequantise the codes to fp32 (MatMul4Bit's gemm_4bit).
    """
    weight = dequantize_bnb_weight(module.weight)
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return nn.functional.linear(inputs, weight.to(inputs.dtype), bias)


def _is_sixteen_bit(parameter: nn.Parameter) -> bool:
    """Return whether to upcast a parameter; 4-bit codes may be stored in the same dtypes."""
    halves = (torch.bfloat16, torch.float16)
    return parameter.dtype in halves and not hasattr(parameter, "quant_state")
