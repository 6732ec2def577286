"""Shows that two models are one: the same logits on the same texts, computed in fp32."""

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

LENGTH = 128  # tokens of a text that are compared
READ = 2048  # tokens of a text that are read, as in training: an answer may come late
FP32, SIXTEEN_BIT = 1e-4, 2e-2  # differences of logits


def examples_of(adapter: Adapter, changes: dict[str, Change], count: int) -> list[Example]:
    """Return the first texts of the run's own data, or of the bundled where they are gone.

    One more holds all tokens that the tokenizer was given.
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
    """Return `count` texts of the run's own data, which come after the known ones.

    Where the run has too few, the known are among them, and bundled ones fill up.
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
        limits = PairLimits(READ, READ, keep_header=False)
        pairs = encode_pairs(dialogues, adapter.tokenizer, limits, fastchat, Tally())
        return [*islice(pairs, count)]
    tally = Tally()
    return [*encode_dialogues(dialogues, adapter.template, adapter.tokenizer, READ, tally)]


def logits_of(model: Any, examples: list[Example]) -> list[Tensor]:
    """Return each text's logits, [T, vocabulary] float32, its first `LENGTH` tokens'."""
    with torch.inference_mode(), in_fp32(model):
        return [run(model, example) for example in examples]


def run(model: Any, example: Example) -> Tensor:
    """Return a text's logits, of a model that computes in fp32."""
    inputs = {"input_ids": torch.tensor([example.input_ids[:LENGTH]])}
    if example.is_pair:
        begun = [model.config.decoder_start_token_id, *example.labels][:LENGTH]
        inputs["decoder_input_ids"] = torch.tensor([begun])
    logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    return logits


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of two models' logits, of the tokens that both have."""
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
    """Return the difference that weights of this precision may make.

    In 16 bits the rounding of the changed weights grows with the logits: 2e-2 of the largest, as
    long as that is less than half of what the adapter does, or it may as well be missing.
    """
    if dtype == torch.float32:
        return FP32
    largest = max(float(tensor.abs().max()) for tensor in logits)
    return max(SIXTEEN_BIT, min(SIXTEEN_BIT * largest, effect / 2))


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Have the model compute in fp32, with one layer's weights upcast at a time.

    In bf16 the rounding of activations would hide what the weights differ by. A layer is upcast
    whole, since T5's casts its activations to the dtype that `wo` has (transformers 5.23); the next
    one takes its memory over, which would else be cut up by what is allocated meanwhile.
    """
    kept: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    free: dict[torch.Size, list[Tensor]] = defaultdict(list)
    layers = {layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m}

    def upcast(module: nn.Module, _: Any) -> None:
        kept[module] = []
        for owner in module.modules() if module in layers else [module]:
            for name, parameter in owner._parameters.items():
                if parameter is not None and _is_sixteen_bit(parameter):
                    kept[module].append((owner, name, parameter))
                    same = free[parameter.shape]
                    whole = same.pop().copy_(parameter) if same else parameter.float()
                    owner._parameters[name] = nn.Parameter(whole, requires_grad=False)

    def restore(module: nn.Module, *_: Any) -> None:
        for owner, name, parameter in kept.pop(module, []):
            whole = owner._parameters[name]
            if module in layers and whole is not None:
                free[parameter.shape].append(whole.data)
            owner._parameters[name] = parameter

    handles = []
    four_bit: list[Any] = []
    for module in model.modules():
        if hasattr(module._parameters.get("weight"), "quant_state"):
            four_bit.append(module)
            module.forward = partial(_dequantised, module)
        handles.append(module.register_forward_pre_hook(upcast))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in four_bit:
            del module.forward


def _dequantised(module: Any, inputs: Tensor) -> Tensor:
    """Compute a layer of 4 bits with the weights that training computes with, those of its dtype.

    Given fp32, bitsandbytes 0.50 makes fp32 weights of the codes (MatMul4Bit's gemm_4bit), which
    those of training in bf16 are rounded from.
    """
    weight = dequantize_bnb_weight(module.weight)
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return nn.functional.linear(inputs, weight.to(inputs.dtype), bias)


def _is_sixteen_bit(parameter: nn.Parameter) -> bool:
    """Whether it is to be upcast; 4-bit codes lie in tensors of such a dtype, too."""
    halves = (torch.bfloat16, torch.float16)
    return parameter.dtype in halves and not hasattr(parameter, "quant_state")
