"""Trains one window of a tiny model of each architecture, and compares it with plain passes."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.batching.balance import assign_micro_batches
from data.dialogues.sharegpt import Tally
from data.encoding.cache import in_memory
from data.encoding.encode import IGNORE_INDEX, Example
from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.layout import plan_layout
from loop.inputs.training_data import TrainingData
from loop.model.base import BaseModel, check_architecture, model_class
from loop.model.packed_attention import can_pack, implementation
from loop.training.loss import supervised_loss_sum
from loop.training.model_check import LAYOUTS, check_model
from tests.support.tiny_models import VOCABULARY, architectures, tiny_config

LENGTHS = (23, 41, 12, 97, 120, 35)  # some are longer than the windows of the tiny models
SCALE = 3.0  # of random weights, so that a token depends visibly on the others
REASONS = {
    "tokens attend to later ones": "attend to later ones",
    "hidden states depend on the number of tokens": "depend on the number of tokens",
    "not loaded as a text model": "does not load as",
    "its own forward pass fails": "cannot run",
}
# Models that cannot be built in a tiny shape here, with the reason.
UNBUILT = {
    "gemma3n": "needs timm",
    "gemma4_assistant": "an assistant of another model",
    "gemma4_unified_assistant": "an assistant of another model",
}
RANKS = SimpleNamespace(process_index=0, num_processes=1)


class Outcome(NamedTuple):
    """What training does with an architecture.

    result: right, refused, or wrong. layout: the one that was used. reason: of a refusal.
    distance: of loss and gradients from plain passes, relative.
    """

    result: str
    layout: str = ""
    reason: str = ""
    distance: float = 0.0
    chunks: bool = False


class WithAdapter(nn.Module):
    """A model with the two methods of peft's wrapper that the check calls."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.config = base, base.config
        self.generation_config = None

    def get_base_model(self) -> Any:
        return self.base

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        return self.base(**inputs)


def outcomes() -> dict[str, Outcome]:
    """Return the outcome of each entry of transformers' two mappings that can be built here."""
    found: dict[str, Outcome] = {}
    for model_type, tasks in architectures().items():
        for task in tasks:
            if model_type in UNBUILT:
                continue
            config = tiny_config(model_type)
            if task == "causal" and len(tasks) == 2:
                config.is_encoder_decoder, config.is_decoder = False, True
            name = f"{model_type} ({task})" if len(tasks) == 2 else model_type
            found[name] = outcome_of(config)
    return found


def reason_of(found: Outcome) -> str:
    """Return the kind of a refusal; its whole message, if no kind fits."""
    return next((kind for kind, text in REASONS.items() if text in found.reason), found.reason)


def outcome_of(
    config: Any,
    model_max_length: int | None = None,
    change: Callable[[Any], None] = lambda _model: None,
) -> Outcome:
    """Return what training does with a random model of this configuration, in fp32.

    model_max_length: examples are truncated to it. change: is applied to the model.
    """
    torch.manual_seed(0)
    pairs = config.is_encoder_decoder
    try:
        check_architecture("tiny", config)
    except UserError as error:
        return Outcome("refused", reason=str(error))
    packed = can_pack(config)
    attention = implementation(packed, False)
    options = {"attn_implementation": attention} if attention else {}
    base = model_class(config).from_config(config, **options)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALE)
    change(base)
    model = WithAdapter(base.float()).eval()
    examples = _examples(pairs, model_max_length)
    tokenizer = SimpleNamespace(pad_token_id=0)
    described = BaseModel("tiny", config, tokenizer, [], "chat", packed, False, packed)
    data = TrainingData(described, in_memory(examples, Tally()), "", "")
    run = Config(mixed_precision="no", per_device_train_batch_size=3, warmup_ratio=0)
    layout = plan_layout(run, len(examples), RANKS, packed)
    try:
        data, layout = check_model(data, layout, run, model, Accelerator(cpu=True))
    except UserError as error:
        return Outcome("refused", reason=str(error))
    form = data.base.packed, data.base.sharing, data.base.alone
    name = next(name for name, one in LAYOUTS.items() if one == form)
    distance = _distance_of_window(model, data, layout)
    found = "right" if distance < 1e-3 else "wrong"
    return Outcome(found, name, "", distance, layout.chunk_tokens > 0)


def _examples(pairs: bool, max_length: int | None) -> list[Example]:
    drawn = torch.Generator().manual_seed(1)
    examples = []
    for number, length in enumerate(min(n, max_length or n) for n in LENGTHS):
        ids = torch.randint(5, VOCABULARY - 60, (length,), generator=drawn).tolist()
        if number % 2:
            ids[:20] = examples[0].input_ids[:20]
        labels = [IGNORE_INDEX] * 20 + ids[20:] if length > 24 else ids
        if pairs:
            labels = torch.randint(5, VOCABULARY - 60, (length // 2,), generator=drawn).tolist()
        count = sum(label != IGNORE_INDEX for label in labels)
        examples.append(Example(str(number), ids, labels, count, number, pairs))
    return examples


def _distance_of_window(model: Any, data: TrainingData, layout: Any) -> float:
    """Return the larger distance, of loss or gradients, of the run's window from plain passes."""
    examples = [*data.examples]
    assignment = assign_micro_batches(examples, 1, layout.limits)
    total = torch.zeros(())
    for batch in assignment.ranks[0]:
        micro_batch = data.collator(batch.examples, 0, batch.shared)
        loss = supervised_loss_sum(model, micro_batch, layout.chunk_tokens)
        loss.backward()
        total = total + loss.detach()
    found = _gradients(model)
    plain = model.base.config._attn_implementation
    if data.base.packed:
        model.base.set_attn_implementation("sdpa" if model.base._supports_sdpa else "eager")
    expected = torch.zeros(())
    for example in examples:
        loss = _plain_loss(model.base, example, data)
        loss.backward()
        expected = expected + loss.detach()
    if data.base.packed:
        model.base.set_attn_implementation(plain)
    wanted = _gradients(model)
    distances = [(total - expected).abs().item() / expected.abs().item()]
    norm = math.sqrt(sum(gradient.norm().item() ** 2 for gradient in wanted.values()))
    off = math.sqrt(sum((found[n] - wanted[n]).norm().item() ** 2 for n in wanted))
    return max(*distances, off / norm) if math.isfinite(off) else math.inf


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients, with zeros where there is none, and forget them."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


def _plain_loss(base: Any, example: Example, data: TrainingData) -> Tensor:
    inputs = {"input_ids": torch.tensor([example.input_ids])}
    labels = [*example.labels[1:], IGNORE_INDEX]
    if example.is_pair:
        labels = example.labels
        start = data.collator.decoder_start_id or 0
        inputs["decoder_input_ids"] = torch.tensor([[start, *labels[:-1]]])
    logits = base(**inputs, use_cache=False).logits[0].float()
    return nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
