"""Records the steps of a transformers Trainer, in the environment of a peer.

Nothing of this project is imported. A step's end is its time on one clock. The difference of two
ends is the complete time of a step: data, forward, backward, optimizer and the trainer's own work.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Steps(TrainerCallback):  # type: ignore[misc]
    """Collects the end, the loss and the token counts of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[Any] = []
        self.counts: list[list[int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Reset the counts of a step to zero."""
        self.counts.append([0, 0, 0])
        self.losses.append(torch.zeros(()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the end of the step, in seconds."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def count(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Add a micro-batch's supervised tokens, real tokens, and tokens with padding."""
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
        real = ids.numel() if mask is None else int(mask.sum())
        padded = ids.numel()
        if labels.shape != ids.shape:  # for pairs, the targets count, too
            real += int((labels != -100).sum())
            padded += labels.numel()
        for place, number in enumerate((int((labels != -100).sum()), real, padded)):
            self.counts[-1][place] += number
        self.losses[-1] = self.losses[-1] + loss.detach()

    def write(self, file: str) -> None:
        """Write the records as JSON."""
        names = ("supervised", "tokens", "padded")
        facts = {
            "ends": self.ends,
            "losses": [float(loss) for loss in self.losses],
            **{name: [one[n] for one in self.counts] for n, name in enumerate(names)},
        }
        Path(file).write_text(json.dumps(facts))


def timed(trainer: type[Any], steps: Steps) -> type[Any]:
    """Return a subclass of the trainer that records its steps and keeps the order of the data."""

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
