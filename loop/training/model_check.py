"""Proves before step 1 that the run computes what the model computes for each example alone."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data.batching.collate import MicroBatch
from data.encoding.encode import IGNORE_INDEX, Example
from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.accelerator import broadcast_flag, raise_on_all_ranks
from loop.distributed.layout import Layout, batched
from loop.distributed.rank_zero import print_rank0
from loop.inputs.training_data import TrainingData
from loop.model.base import LIBRARY_ERRORS
from loop.model.packed_attention import plain_attention
from loop.training.evaluation import evaluating
from loop.training.loss import (
    ALL_LOGITS,
    hidden_states,
    logits_at_positions,
    supervised_loss_sum,
)

SAMPLED = 256  # the texts are cut from the shortest of so many examples
TEXT_TOKENS, PREFIX_TOKENS, COMPARED_TOKENS = 34, 18, 64
BEYOND_TOKENS = 65  # by so many tokens is a text longer than a limit; the last is only a target
CUT_TOKENS = 20
# Tolerance of a hidden state's distance, relative to its norm. fp32: of the largest distance, from
# rounding. 16 bits and TF32: of the median distance, because another attention kernel rounds
# differently, and a router may then choose other experts for a few tokens.
FP32, SIXTEEN_BIT = 1e-3, 1e-1
NO_FLAG = "No flag corrects this. Give another model."
LOSS = 1e-3  # tolerance of a mean loss from equal hidden states; relative above a loss of 1
# Names of lengths in configurations: sliding windows, chunks, original lengths, positions.
LENGTHS = re.compile("window|chunk|position|context|length|radius|block|max_seq|topk")
# From the fastest layout to the plainest: packed, sharing, alone.
LAYOUTS = {
    "rows with shared prefixes": (True, True, False),
    "rows": (True, False, False),
    "padded micro-batches": (False, False, False),
    "micro-batches of one example": (False, False, True),
}


def check_model(
    data: TrainingData, layout: Layout, config: Config, model: nn.Module, accelerator: Accelerator
) -> tuple[TrainingData, Layout]:
    """Compare the run's passes with plain ones; return the fastest layout that agrees.

    Every rank must call this after `prepare`. Short texts of the data run alone through the model's
    own forward pass. If the data has examples beyond a length in the configuration, such as a
    sliding window, so do two texts beyond it. Then the texts run as in training. The hidden states
    at the LM head and the losses must agree. Weights, modes and the random state do not change.
    Raises UserError on all ranks if nothing agrees.
    """
    if not config.check_model:
        print_rank0("check_model: left out; a wrong loss or layout would not be found")
        return data, layout
    with raise_on_all_ranks():
        longest = _longest(data)
        limit = _limit(data.base.config.to_dict(), longest)
        texts = _texts(data, limit)
    # Compiling takes half a minute, and the check does not concern compiled code.
    eager = torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()
    device = accelerator.device
    seeded = torch.random.fork_rng([device] if device.type == "cuda" else [])
    check = _Check(data, config, model, device)
    with eager, seeded, evaluating(model):
        with check.plain_attention():
            expected = check.plain_states(texts, limit, longest)
            chunk_tokens = check.chunk_tokens(texts[0], layout.chunk_tokens)
        layout = dataclasses.replace(layout, chunk_tokens=chunk_tokens)
        return check.agreeing(texts, expected, layout)


class _Check:
    """The passes of one check. All ranks run the same ones: under ZeRO-3 they are collectives."""

    def __init__(
        self, data: TrainingData, config: Config, model: nn.Module, device: torch.device
    ) -> None:
        self.data, self.model, self.device = data, model, device
        base = dataclasses.replace(data.base, packed=False, sharing=False)
        self.plain = dataclasses.replace(data, base=base)
        wrapped: Any = getattr(model, "module", model)  # DistributedDataParallel, DeepSpeedEngine
        self.base = wrapped.get_base_model()
        self.exact = config.precision == "no" and not config.tf32
        self.tolerance = FP32 if self.exact else SIXTEEN_BIT
        self.name, self.pairs = data.base.name, data.base.config.is_encoder_decoder
        self.states_of = hidden_states  # logits_at_positions, if the head cannot run on some only

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Run the block with transformers' own attention and masks."""
        asked = self.base.config._attn_implementation
        self._use_attention(plain_attention(self.base))
        try:
            yield
        finally:
            self._use_attention(asked)

    def plain_states(self, texts: list[Example], limit: int | None, longest: int) -> list[Tensor]:
        """Return the states of each text alone, [S, H] fp32.

        longest: the number of tokens of the longest example.
        Raises UserError if tokens attend to later ones, if states depend on earlier passes, and if
        the model cannot run a text or has too few positions.
        """
        states: list[Tensor] = []
        with _Positions(self.base, texts) as positions:
            for text in texts:
                # Checked before the texts beyond the limit: on a GPU, a position without a row
                # would end the process.
                if states and longest > positions.count:
                    raise _refusal(
                        f"{self.name}: found an example of {longest} tokens; expected at most "
                        f"{positions.count}, the model's number of learned positions. Give "
                        f"--model_max_length {positions.count}."
                    )
                found = _attempt(partial(self._states, [text], self.plain))
                if not states and isinstance(found, Exception):
                    self.states_of = logits_at_positions
                    found = _attempt(partial(self._states, [text], self.plain))
                if isinstance(found, Exception):
                    raise self._cannot_run(text, limit, found) from found
                states.append(found)
        self._check_history(texts, states, limit)
        return states

    def _check_history(self, texts: list[Example], states: list[Tensor], limit: int | None) -> None:
        """Raise UserError if states depend on later tokens, the length or earlier passes.

        Cut texts run after longer ones. Some models scale positions by the longest length so far,
        and some select as many keys as there are.
        """
        beyond = [(texts[-2], states[-2])] if limit else []
        for text, before in [(texts[0], states[0]), *beyond]:
            cut = self._states([_cut(text)], self.plain)
            distance = self._distance(cut, before[:-CUT_TOKENS])
            if not self._differs(distance):
                continue
            remedy = NO_FLAG if text is texts[0] else f"Give --model_max_length {limit}."
            changed = self._states([_changed(text)], self.plain)[:-CUT_TOKENS]
            if self._differs(self._distance(changed, before[:-CUT_TOKENS])):
                cause = "tokens that attend to later ones"
                remedy = "Set is_decoder in its config.json, or give another causal model."
            elif self._differs(self._distance(self._states([text], self.plain), before)):
                cause = "hidden states that depend on earlier passes"
            else:
                cause = "hidden states that depend on the number of tokens"
            raise _refusal(
                f"{self.name}: found {cause} (they differ by {distance:.2g} when a text is cut at "
                f"its end); expected the same ones as in a longer text. {remedy}"
            )

    def chunk_tokens(self, text: Example, asked: int) -> int:
        """Return `asked`, or what of 0 and ALL_LOGITS has the loss of the model's own logits."""
        batch = self._collate([text], self.plain)
        expected = self._plain_loss(batch)
        found = ""
        for size in dict.fromkeys((asked, 0, ALL_LOGITS)):
            loss = self._mean_loss(batch, size)
            if broadcast_flag(not abs(loss - expected) > LOSS * max(expected, 1.0)):
                break
            found = found or f"loss {loss:.6g}, but the model's own logits give {expected:.6g}"
        if found:
            where = "supervised" if size == 0 else "all"
            print_rank0(f"check_model: {found}; the model computes the logits of {where} positions")
        return size

    def agreeing(
        self, texts: list[Example], expected: list[Tensor], layout: Layout
    ) -> tuple[TrainingData, Layout]:
        """Return data and layout with the fastest layout whose states are the expected ones."""
        base, found = self.data.base, ""
        for name, (packed, sharing, alone) in LAYOUTS.items():
            if (packed, sharing) > (base.packed, base.sharing):
                continue
            form = dataclasses.replace(base, packed=packed, sharing=sharing, alone=alone)
            data = dataclasses.replace(self.data, base=form)
            if not packed and not base.flash:
                self._use_attention(plain_attention(self.base))
            distance = self._layout_distance(texts, expected, data)
            if not self._differs(distance):
                if found:
                    print_rank0(f"check_model: {found}; using {name}")
                    layout = batched(layout, packed, sharing, alone)
                return data, layout
            found = found or f"{name} change hidden states by {distance:.2g}"
        raise _refusal(
            f"{self.name}: found hidden states that differ by {distance:.2g} from a plain forward "
            f"pass in every layout; expected at most {self.tolerance:g}. {NO_FLAG}"
        )

    def _layout_distance(
        self, texts: list[Example], expected: list[Tensor], data: TrainingData
    ) -> float:
        """Return the largest distance between the texts' states in micro-batches and alone."""
        if data.base.alone:
            batches = [[place] for place in range(len(texts))]
        else:
            # Beyond a limit: the texts before and after it, and a short one.
            batches = [[0, 1, 2], *([[0, 4, 3]] if len(texts) > 3 else [])]
        worst = 0.0
        for places in batches:
            states = _attempt(partial(self._states, [texts[n] for n in places], data))
            if isinstance(states, Exception):
                return math.inf  # Such as a model that does not accept a row's inputs.
            for place in places:
                tokens = len(expected[place])
                worst = max(worst, self._distance(states[:tokens], expected[place]))
                states = states[tokens:]
        return worst

    def _collate(self, texts: list[Example], data: TrainingData) -> MicroBatch:
        return data.collator(texts, 0).to(self.device)

    def _states(self, texts: list[Example], data: TrainingData) -> Tensor:
        """Return the states of the texts in one micro-batch, one after another, [S, H] fp32."""
        return self.states_of(self.model, self._collate(texts, data)).float()

    def _distance(self, found: Tensor, expected: Tensor) -> float:
        if not expected.isfinite().all():
            return 0.0  # The run itself finds a loss that is not finite, and prints its examples.
        distances = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
        return float(distances.max() if self.exact else distances.median())

    def _differs(self, distance: float) -> bool:
        """Return rank 0's answer, since all ranks must go on with the same passes."""
        return broadcast_flag(not distance <= self.tolerance)

    def _plain_loss(self, batch: MicroBatch) -> float:
        """Return the mean loss at the supervised positions, from all of the model's logits."""
        logits = logits_at_positions(self.model, batch).float()
        return float(nn.functional.cross_entropy(logits, batch.targets))

    def _mean_loss(self, batch: MicroBatch, chunk_tokens: int) -> float:
        """Return the run's mean loss; infinite if the model changes its head's output otherwise."""
        loss = _attempt(partial(supervised_loss_sum, self.model, batch, chunk_tokens))
        if isinstance(loss, Exception) or loss.numel() != 1:
            return math.inf
        return float(loss) / len(batch.targets)

    def _use_attention(self, name: str | None) -> None:
        if name and name != self.base.config._attn_implementation:
            self.base.set_attn_implementation(name)

    def _cannot_run(self, text: Example, limit: int | None, error: Exception) -> UserError:
        tokens, reason = max(text.lengths), " ".join(f"{type(error).__name__}: {error}".split())
        short = limit is None or tokens <= limit
        remedy = NO_FLAG if short else f"Give --model_max_length {limit}."
        return _refusal(
            f"{self.name}: found a model that cannot run {tokens} tokens in its own forward pass "
            f"({reason[:200]}); expected hidden states. {remedy}"
        )


class _Positions(TorchFunctionMode):
    """Finds tables of learned positions; `count` is the number of rows of the shortest one.

    Such a table is an embedding that is looked up with consecutive indices, one for each token.
    """

    def __init__(self, model: Any, texts: list[Example]) -> None:
        super().__init__()
        self.tokens, self.count = model.get_input_embeddings().weight, math.inf
        self.lengths = {length for text in texts for length in text.lengths if length > 1}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding and args[1] is not self.tokens:
            indices = args[0].flatten()
            if len(indices) in self.lengths and bool((indices.diff() == 1).all()):
                self.count = min(self.count, len(args[1]) - int(indices[0]))
        return func(*args, **(kwargs or {}))


def _attempt(run: Callable[[], Tensor]) -> Tensor | Exception:
    """Return the result, or the error of a model that cannot run so; raises if out of memory."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except (UserError, *LIBRARY_ERRORS) as error:
        return error


def _longest(data: TrainingData) -> int:
    """Return the number of tokens of the longest example, of one side for pairs."""
    both = (data.examples, data.held_out)
    return max(max(example.lengths) for part in both if part for example in part.longest(1))


def _limit(values: Any, longest: int) -> int | None:
    """Return the largest length in a configuration that examples exceed, such as a window."""
    found = [
        number
        for name, value in values.items()
        for number in (
            [_limit(value, longest)]
            if isinstance(value, dict)
            else value
            if isinstance(value, list | tuple)
            else [value]
        )
        if type(number) is int
        and 1 < number < longest
        and (isinstance(value, dict) or LENGTHS.search(str(name)))
    ]
    return max(found, default=None)


def _texts(data: TrainingData, limit: int | None) -> list[Example]:
    """Return a text, two with a common prefix, and two beyond the limit, the longer one last."""
    sampled = sorted(data.examples[:SAMPLED], key=lambda example: example.run_tokens)
    one, other = sampled[0], sampled[min(1, len(sampled) - 1)]
    begin = [*islice(cycle(other.input_ids), PREFIX_TOKENS)]
    texts = [_text(one, TEXT_TOKENS)]
    texts += [_text(one, TEXT_TOKENS - 17, begin), _text(other, TEXT_TOKENS - 7, begin)]
    if limit:
        beyond = limit + BEYOND_TOKENS
        texts += [_text(one, beyond), _text(other, beyond + BEYOND_TOKENS)]
    return texts


def _text(example: Example, tokens: int, begin: list[int] | None = None) -> Example:
    """Return an example of the text's first tokens, repeated as needed, after `begin`.

    The states of its last tokens are compared, but not those of `begin`.
    """
    if example.is_pair:
        source, target = (
            [*islice(cycle(ids), tokens)] for ids in (example.input_ids, example.labels)
        )
        return Example("", source, target, len(target), is_pair=True)
    ids = [*(begin or []), *islice(cycle(example.input_ids), tokens)]
    compared = min(COMPARED_TOKENS, tokens - 1)
    labels = [IGNORE_INDEX] * (len(ids) - compared) + ids[-compared:]
    return Example("", ids, labels, compared)


def _cut(text: Example) -> Example:
    """Return the text without its last tokens; in a pair, those of the target."""
    ids = text.input_ids if text.is_pair else text.input_ids[:-CUT_TOKENS]
    count = text.supervised_tokens - CUT_TOKENS
    return dataclasses.replace(
        text, input_ids=ids, labels=text.labels[:-CUT_TOKENS], supervised_tokens=count
    )


def _changed(text: Example) -> Example:
    """Return the text with other last tokens; in a pair, those of the target."""
    ids = [*(text.labels if text.is_pair else text.input_ids)]
    ids[-CUT_TOKENS:] = ids[CUT_TOKENS - 1 :: -1]
    if text.is_pair:
        return dataclasses.replace(text, labels=ids)
    return dataclasses.replace(text, input_ids=ids)


def _refusal(message: str) -> UserError:
    """Return an error that all ranks raise, since their passes were the same."""
    error = UserError(message)
    error.known_to_all = True
    return error
