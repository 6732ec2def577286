"""One run as the estimate sees it: shape, flags, backend, ranks, and its largest micro-batch."""

from dataclasses import dataclass
from math import ceil

from loop.config.flags import Config
from loop.distributed.layout import global_batch_size
from loop.doctor.memory.shape import Backend, Shape, Weights

# DeepSpeed's own value, in elements (deepspeed 0.19, runtime/zero/config.py): a parameter this
# small is whole on every rank.
PERSISTENT = 100_000


@dataclass(frozen=True)
class Size:
    """A micro-batch: its rows, and the tokens of each, padding counted; of pairs both sides'."""

    rows: int
    source: int
    target: int = 0

    @property
    def tokens(self) -> int:
        """The tokens that are run."""
        return self.rows * (self.source + self.target)

    def __str__(self) -> str:
        sides = f"{self.rows} x ({self.source:,} + {self.target:,}) tokens"
        return sides if self.target else f"{self.tokens:,} tokens"


@dataclass(frozen=True)
class Run:
    """One run: a model's shape, the flags, an accelerate config, and how many ranks."""

    shape: Shape
    config: Config
    backend: Backend
    ranks: int
    share: float = 1.0  # of the tokens, supervised; of pairs, of the targets'
    most: Size | None = None  # the largest micro-batch; none: all that the flags allow
    gpu: bool = True  # what a T5's attention keeps depends on the device

    @property
    def world(self) -> int:
        return self.ranks if self.backend.several else 1

    @property
    def width(self) -> int:
        """The bytes of a number in the run's precision."""
        return 4 if self.config.precision == "no" else 2

    @property
    def accumulated(self) -> int:
        """The bytes of a gradient that is summed over micro-batches (deepspeed_config.py)."""
        return 4 if self.config.precision == "bf16" else self.width

    @property
    def autocast(self) -> bool:
        return self.backend.stage == 0 and self.width == 2

    @property
    def adapter(self) -> int:
        return sum(self.shape.trained)

    @property
    def size(self) -> Size:
        """The largest micro-batch."""
        config = self.config
        longest = config.max_target_length or config.model_max_length
        target = longest if self.shape.t5 else 0
        full = Size(config.per_device_train_batch_size, config.model_max_length, target)
        return self.most or full

    @property
    def tokens(self) -> int:
        """The tokens of the largest micro-batch."""
        return self.size.tokens

    @property
    def supervised(self) -> int:
        learnt = self.size.rows * self.size.target if self.shape.t5 else self.tokens
        return ceil(self.share * learnt)

    @property
    def chunked(self) -> bool:
        """Whether the loss is made of so many tokens at a time (loop/training/loss.py)."""
        trained = self.shape.head_trained and self.backend.stage == 3
        plain = self.shape.plain_logits and self.config.loss_chunk_tokens > 0
        return plain and self.config.precision != "fp16" and not trained

    @property
    def micro_batches(self) -> int:
        """Micro-batches a rank runs each step."""
        batch = global_batch_size(self.config, self.world)
        return ceil(batch / (self.world * self.config.per_device_train_batch_size))

    def stored(self, weights: Weights) -> list[int]:
        """Return the elements of each frozen tensor as stored: codes lie two in a byte."""
        packed = 2 * self.width if self.config.q_lora else 1
        # Beside 4-bit weights in fp32 (fp32.py), which is two elements of a narrower kind.
        wide = 4 // self.width if self.config.q_lora else 1
        codes = [ceil(n / packed) for n in weights.linears]
        return [*codes, *(wide * n for n in weights.held), *weights.others]

    @property
    def base(self) -> int:
        return sum(self.stored(self.shape.model))

    @property
    def whole(self) -> int:
        """The elements that ZeRO-3 leaves whole on every rank."""
        return sum(n for n in (*self.stored(self.shape.model), *self.shape.trained) if small(n))

    @property
    def gathers(self) -> bool:
        """Whether weights are brought together for each use."""
        return self.backend.stage == 3 and (self.world > 1 or self.backend.offload_param)


def small(elements: int) -> bool:
    """Whether ZeRO-3 keeps a parameter whole."""
    return elements <= PERSISTENT
