"""Generates greedy answers to fixed prompts during training, on all ranks in lockstep."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

from data.dialogues.conversation import Dialogue, Turn
from data.encoding.encode import IGNORE_INDEX, Example
from data.encoding.encoder import prompt_ids
from data.encoding.generated import answer_marks, printed, without_closers
from data.encoding.templates import prompt
from data.errors import UserError
from loop.config.flags import Config
from loop.config.preflight import is_file
from loop.distributed.accelerator import raise_on_all_ranks
from loop.inputs.training_data import TrainingData
from loop.training.loss import token_losses

FILE = "samples.jsonl"
Row = dict[str, Any]  # step, prompt, answer with reasoning and calls on lines of their own


def read_prompts(config: Config, accelerator: Accelerator) -> list[str]:
    """Return the prompts, given as text or as files with one prompt per line.

    Every rank must call this; rank 0 reads the files. Raises UserError for a file that cannot be
    read or is empty.
    """
    prompts: list[str] = []
    with raise_on_all_ranks():
        for word in config.sample_prompts or () if accelerator.is_main_process else ():
            prompts += _lines(Path(word).expanduser()) if is_file(word) else [word]
    (prompts,) = broadcast_object_list([prompts])
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--sample_prompts {file}: cannot be read: {error}. Give a UTF-8 text file."
        ) from None
    if not any(lines):
        raise UserError(
            f"--sample_prompts {file}: found no text; expected one prompt per line. Give another "
            "file, or the prompt itself."
        )
    return [line for line in lines if line]


@dataclass(frozen=True)
class Sampler:
    """Answers prompts with the model's training forward pass, `size` prompts at a time.

    There is no KV cache: each new token runs the full sequence again. All backends support this,
    since attention and layout are those of training.
    """

    data: TrainingData
    config: Config
    accelerator: Accelerator
    prompts: Sequence[str]
    size: int
    chunk_tokens: int

    def rows(self, model: Any, step: int, stop_asked: Callable[[], bool]) -> list[Row] | None:
        """Return an answer to each prompt; None after a stop request. Every rank must call this."""
        tokenizer, rows = self.data.base.tokenizer, list[Row]()
        marks = answer_marks(self.data.base.template, tokenizer, self.config.rendering)
        for begin in range(0, len(self.prompts), self.size):
            prompts = self.prompts[begin : begin + self.size]
            answers = self._answers(model, [*map(self._ids, prompts)], stop_asked)
            if answers is None:
                return None
            texts = [without_closers(tokenizer.decode(ids), tokenizer) for ids in answers]
            rows += [
                {"step": step, "prompt": question, "answer": printed(marks.split(text))}
                for question, text in zip(prompts, texts, strict=True)
            ]
        return rows

    def _ids(self, text: str) -> list[int]:
        template = self.data.base.template
        dialogue = Dialogue("", (Turn("user", text),))
        rendered = prompt(dialogue, template, self.data.base.tokenizer, self.config.rendering)
        return prompt_ids(rendered, template, self.data.base.tokenizer)

    def _answers(
        self, model: Any, prompts: list[list[int]], stop_asked: Callable[[], bool]
    ) -> list[list[int]] | None:
        """Return the ids of each answer; None after a stop request."""
        end_ids = self._end_ids(model)
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = [*range(len(prompts))]
        for _ in range(self.config.sample_tokens):
            if stop_asked():
                return None
            examples = [self._example(prompts[i], answers[i]) for i in unfinished]
            tokens = self._next_tokens(model, examples)
            for i, token in zip(unfinished, tokens, strict=True):
                answers[i].append(token)
            unfinished = [i for i in unfinished if answers[i][-1] not in end_ids]
            if not unfinished:
                break
        return answers

    def _example(self, prompt_ids: list[int], answer: list[int]) -> Example:
        """Return an example that ends with a supervised placeholder for the next token."""
        if self.data.base.config.is_encoder_decoder:
            return Example("", prompt_ids, [*answer, 0], len(answer) + 1, is_pair=True)
        ids = [*prompt_ids, *answer]
        return Example("", [*ids, 0], [*[IGNORE_INDEX] * len(ids), 0], 1)

    def _next_tokens(self, model: Any, examples: list[Example]) -> list[int]:
        """Return the likeliest next token of each example, as computed on rank 0."""
        batch = self.data.collator(examples, 0).to(self.accelerator.device)
        _, predicted = token_losses(model, batch, self.chunk_tokens)
        counts = torch.tensor([example.supervised_tokens for example in examples])
        last = (counts.cumsum(0) - 1).to(predicted.device)
        tokens: Tensor = broadcast(predicted[last].contiguous())
        return [int(token) for token in tokens.tolist()]

    def _end_ids(self, model: Any) -> set[int]:
        """Return the ids that end an answer: the model's, and what training closed with."""
        generation = getattr(self.accelerator.unwrap_model(model), "generation_config", None)
        ends = getattr(generation, "eos_token_id", None) or []
        return {*(ends if isinstance(ends, list) else [ends]), *self.data.end_ids}


def write_samples(folder: Path, rows: list[Row], replace: bool = False) -> None:
    """Append the rows to samples.jsonl, or replace its content with them."""
    with open(folder / FILE, "w" if replace else "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
