"""What the model answers to fixed prompts while it is trained: greedy, on all ranks in step."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

from data.dialogues.sharegpt import Turn
from data.encoding.encode import IGNORE_INDEX, Example
from data.encoding.templates import prompt
from data.errors import UserError
from loop.config.flags import Config
from loop.config.preflight import is_file
from loop.distributed.accelerator import raise_on_all_ranks
from loop.inputs.training_data import TrainingData
from loop.training.loss import token_losses

FILE = "samples.jsonl"
Row = dict[str, Any]  # step, prompt, answer


def read_prompts(config: Config, accelerator: Accelerator) -> list[str]:
    """Return the prompts: words, or the lines of files; every rank must call this.

    The first rank reads them for all. Raises UserError for a file that cannot be read or is empty.
    """
    found: list[str] = []
    with raise_on_all_ranks():
        for word in config.sample_prompts or () if accelerator.is_main_process else ():
            found += _lines(Path(word).expanduser()) if is_file(word) else [word]
    (found,) = broadcast_object_list([found])
    return found


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {file}: cannot be read as UTF-8: {error}.") from None
    if not any(lines):
        raise UserError(f"--sample_prompts {file}: found no line; expected one prompt a line.")
    return [line for line in lines if line]


@dataclass(frozen=True)
class Sampler:
    """Answers prompts with the model as it is run in training; `size` of them at a time.

    There is no cache of keys and values: each token runs the whole prompt again, through the
    very attention and layout of training, which is what all backends have.
    """

    data: TrainingData
    config: Config
    accelerator: Accelerator
    prompts: Sequence[str]
    size: int

    def rows(self, model: Any, step: int, asked: Callable[[], bool]) -> list[Row] | None:
        """Return an answer to each prompt; None where a stop was asked for. Every rank calls it."""
        tokenizer, rows = self.data.base.tokenizer, list[Row]()
        for begin in range(0, len(self.prompts), self.size):
            prompts = self.prompts[begin : begin + self.size]
            answers = self._answers(model, [*map(self._ids, prompts)], asked)
            if answers is None:
                return None
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
            rows += [
                {"step": step, "prompt": asked_for, "answer": text}
                for asked_for, text in zip(prompts, texts, strict=True)
            ]
        return rows

    def _ids(self, text: str) -> list[int]:
        template = self.data.base.template
        rendered = prompt((Turn("user", text),), template, self.data.base.tokenizer)
        ids: list[int] = self.data.base.tokenizer(
            rendered.text,
            add_special_tokens=rendered.add_special_tokens,
            split_special_tokens=template == "t5",  # as in training, which adds its own
        )["input_ids"]
        return ids

    def _answers(
        self, model: Any, prompts: list[list[int]], asked: Callable[[], bool]
    ) -> list[list[int]] | None:
        ends = self._ends(model)
        answers: list[list[int]] = [[] for _ in prompts]
        going = [*range(len(prompts))]
        for _ in range(self.config.sample_tokens):
            if asked():
                return None
            examples = [self._example(prompts[i], answers[i]) for i in going]
            chosen = self._next(model, examples)
            for i, token in zip(going, chosen, strict=True):
                answers[i].append(token)
            going = [i for i in going if answers[i][-1] not in ends]
            if not going:
                break
        return answers

    def _example(self, asked: list[int], answer: list[int]) -> Example:
        """Return an example whose last supervised token, whatever it is, is the one to be found."""
        if self.data.base.config.is_encoder_decoder:
            return Example("", asked, [*answer, 0], len(answer) + 1, is_pair=True)
        ids = [*asked, *answer]
        return Example("", [*ids, 0], [*[IGNORE_INDEX] * len(ids), 0], 1)

    def _next(self, model: Any, examples: list[Example]) -> list[int]:
        """Return each one's likeliest next token: the first rank's, so that all ranks go on."""
        batch = self.data.collator(examples, 0).to(self.accelerator.device)
        _, predicted = token_losses(model, batch, self.config.loss_chunk_tokens)
        counts = torch.tensor([example.supervised_tokens for example in examples])
        last = (counts.cumsum(0) - 1).to(predicted.device)
        chosen: Tensor = broadcast(predicted[last].contiguous())
        return [int(token) for token in chosen.tolist()]

    def _ends(self, model: Any) -> set[int]:
        generation = getattr(self.accelerator.unwrap_model(model), "generation_config", None)
        ends = getattr(generation, "eos_token_id", None) or []
        return {
            *(ends if isinstance(ends, list) else [ends]),
            self.data.base.tokenizer.eos_token_id,
        }


def write_samples(folder: Path, rows: list[Row], afresh: bool = False) -> None:
    """Add the rows to samples.jsonl, or make it anew of them."""
    with open(folder / FILE, "w" if afresh else "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
