"""Records a Trainer's steps, inside the processes of the peers; of this project nothing is used.

Times are the ends of steps, by one clock, so that between two of them lies all that a step costs:
data, forward, backward, optimizer, and what the trainer does around them.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Steps(TrainerCallback):  # type: ignore[misc]
    """Collects, of each step, its end, its loss, and the tokens of its micro-batches."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[Any] = []
        self.counts: list[list[int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step's counts."""
        self.counts.append([0, 0, 0])
        self.losses.append(torch.zeros(()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note when the step ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def count(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Add a micro-batch: supervised tokens, real ones, and all with padding."""
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
        real = ids.numel() if mask is None else int(mask.sum())
        every = ids.numel()
        if labels.shape != ids.shape:  # pairs: of the targets, too
            real += int((labels != -100).sum())
            every += labels.numel()
        for place, number in enumerate((int((labels != -100).sum()), real, every)):
            self.counts[-1][place] += number
        self.losses[-1] = self.losses[-1] + loss.detach()

    def write(self, file: str) -> None:
        """Write all of it as JSON."""
        names = ("supervised", "tokens", "padded")
        facts = {
            "ends": self.ends,
            "losses": [float(loss) for loss in self.losses],
            **{name: [one[n] for one in self.counts] for n, name in enumerate(names)},
        }
        Path(file).write_text(json.dumps(facts))


def timed(trainer: type[Any], steps: Steps) -> type[Any]:
    """Return the trainer, telling its steps, and taking the data in the order it lies in."""

    class Timed(trainer):  # type: ignore[misc]
        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **named)
            self.add_callback(steps)

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *words: Any, **named: Any) -> Any:
            counted = dict(inputs)
            loss = super().training_step(model, inputs, *words, **named)
            steps.count(counted, loss)
            return loss

    return Timed
