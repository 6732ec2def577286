"""The run that is estimated: model shape, flags, backend, ranks, and largest micro-batch."""

from dataclasses import dataclass
from math import ceil

from loop.config.flags import Config
from loop.distributed.layout import global_batch_size
from loop.doctor.memory.shape import Backend, Shape, Weights
from loop.model.dtypes import BYTES

# ZeRO-3 does not partition smaller parameters (deepspeed 0.19, runtime/zero/config.py:
# stage3_param_persistence_threshold).
PERSISTENT_ELEMENTS = 100_000


@dataclass(frozen=True)
class Size:
    """The size of a micro-batch: rows and padded tokens per row; only pairs have a target."""

    rows: int
    source: int
    target: int = 0

    @property
    def tokens(self) -> int:
        """The tokens of all rows."""
        return self.rows * (self.source + self.target)

    def __str__(self) -> str:
        sides = f"{self.rows} x ({self.source:,} + {self.target:,}) tokens"
        return sides if self.target else f"{self.tokens:,} tokens"


@dataclass(frozen=True)
class Run:
    """One run: a model's shape, the flags, an accelerate config, and the number of ranks."""

    shape: Shape
    config: Config
    backend: Backend
    ranks: int
    share: float = 1.0  # supervised share of all tokens; for pairs, of the target tokens
    largest: Size | None = None  # micro-batch; None: the largest that the flags allow
    gpu: bool = True  # on a CPU, a T5's attention saves other tensors

    @property
    def world(self) -> int:
        """The world size."""
        return self.ranks if self.backend.multi_rank else 1

    @property
    def width(self) -> int:
        """The bytes of a number in the run's precision."""
        return BYTES[self.config.precision]

    @property
    def accumulated(self) -> int:
        """The bytes of one element of the accumulated gradient (deepspeed_config.py)."""
        return 4 if self.config.precision == "bf16" else self.width

    @property
    def autocast(self) -> bool:
        """Whether the run computes under autocast."""
        return self.backend.stage == 0 and self.width == 2

    @property
    def adapter(self) -> int:
        """The elements of the adapter."""
        return sum(self.shape.trained)

    @property
    def size(self) -> Size:
        """The largest micro-batch."""
        config = self.config
        longest = config.max_target_length or config.model_max_length
        target = longest if self.shape.t5 else 0
        full = Size(config.per_device_train_batch_size, config.model_max_length, target)
        return self.largest or full

    @property
    def tokens(self) -> int:
        """The tokens of the largest micro-batch."""
        return self.size.tokens

    @property
    def supervised(self) -> int:
        """The supervised tokens of the largest micro-batch."""
        candidates = self.size.rows * self.size.target if self.shape.t5 else self.tokens
        return ceil(self.share * candidates)

    @property
    def chunked(self) -> bool:
        """Whether the loss is computed in chunks of tokens (loop/training/loss.py)."""
        trained = self.shape.head_trained and self.backend.stage == 3
        plain = self.shape.plain_logits and self.config.loss_chunk_tokens > 0
        return plain and self.config.precision != "fp16" and not trained

    @property
    def micro_batches(self) -> int:
        """The micro-batches of a rank in each step."""
        batch = global_batch_size(self.config, self.world)
        return ceil(batch / (self.world * self.config.per_device_train_batch_size))

    def stored(self, weights: Weights) -> list[int]:
        """Return the elements of each frozen tensor as stored; a byte holds two 4-bit codes."""
        packed = 2 * self.width if self.config.q_lora else 1
        # Weights in fp32 (loop/model/quantization.py) count as two elements of 16 bits.
        wide = 4 // self.width if self.config.q_lora else 1
        codes = [ceil(n / packed) for n in weights.linears]
        return [*codes, *(wide * n for n in weights.held), *weights.others]

    @property
    def base(self) -> int:
        """The elements of the base model as stored."""
        return sum(self.stored(self.shape.model))

    @property
    def persistent(self) -> int:
        """The elements that ZeRO-3 does not partition."""
        return sum(n for n in (*self.stored(self.shape.model), *self.shape.trained) if small(n))

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered for each use."""
        return self.backend.stage == 3 and (self.world > 1 or self.backend.offload_param)


def small(elements: int) -> bool:
    """Whether ZeRO-3 keeps a complete copy of a parameter on each rank."""
    return elements <= PERSISTENT_ELEMENTS
