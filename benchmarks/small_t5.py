"""Trains a small T5 from scratch, then trains a LoRA adapter for a second task with loop/train.py.

python benchmarks/small_t5.py --tokenizer DIR [--output_dir runs/small_t5] [--epochs 10]

DIR has T5's tokenizer. The second task is to answer the bundled dialogues in braces. T5's
vocabulary has no braces.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from data.dialogues.conversation import Turn
from loop.config.flags import DUMMY_DATA, ROOT, Config
from loop.inputs.training_data import TrainingData, read_training_data
from loop.training.loss import supervised_loss_sum

HELD_OUT_EVERY = 10  # one of so many dialogues is held out
ANSWER = '{{"answer": "{}"}}'


@dataclass(frozen=True)
class Taught:
    """The result of the second task."""

    loss_before: float  # per token of the held-out answers
    loss_after: float
    answered: list[str]  # greedy answers to held-out questions
    well_formed: int  # answers in the second task's form


def random_t5(rows: int, width: int, layers: int, tied: bool = False) -> Any:
    """Return a random model like Flan-T5, with a separate LM head unless `tied`."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=rows,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def make_base(folder: Path, tokenizer: Any, width: int, layers: int) -> int:
    """Write a random T5 that can be trained from scratch; return its number of parameters."""
    model = random_t5(-(-len(tokenizer) // 128) * 128, width, layers)
    with torch.no_grad():
        model.shared.weight.mul_(0.1)
        model.lm_head.weight.mul_(0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def train_all(folder: Path, data: Path, epochs: int, lr: float) -> list[float]:
    """Train all weights of the model in the folder; return the loss per token of each epoch."""
    from transformers import AutoModelForSeq2SeqLM

    prepared = read_training_data(Config(str(folder), data_path=(str(data),)))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    examples, losses = sorted(prepared.examples, key=lambda e: e.tokens), []
    batches = [examples[i : i + 8] for i in range(0, len(examples), 8)]
    for epoch in range(epochs):
        random.Random(epoch).shuffle(batches)
        total = 0.0
        for number, batch in enumerate(batches):
            done = (epoch * len(batches) + number) / (epochs * len(batches))
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 20 * done, 1.05 - done)
            loss = supervised_loss_sum(model, prepared.collator(batch, epoch))
            (loss / sum(example.supervised_tokens for example in batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        losses.append(total / sum(example.supervised_tokens for example in examples))
        print(f"epoch {epoch + 1}/{epochs}: loss {losses[-1]:.3f}", flush=True)
    model.save_pretrained(folder)
    return losses


def second_task(folder: Path) -> tuple[Path, Path]:
    """Write the second task's dialogues, one question each: a training and a held-out file."""
    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    parts: tuple[list[Any], list[Any]] = ([], [])
    for number, record in enumerate(records):
        turns = [turn for turn in record["conversations"] if turn["from"] != "system"]
        asked, answered = turns[:2]
        answer = {"from": "gpt", "value": ANSWER.format(answered["value"])}
        part = parts[number % HELD_OUT_EVERY == 0]
        part.append({"id": record["id"], "conversations": [asked, answer]})
    files = folder / "second.json", folder / "held_out.json"
    for file, part in zip(files, parts, strict=True):
        file.write_text(json.dumps(part), encoding="utf-8")
    return files


def teach(base: Path, folder: Path, epochs: int, flags: list[str], command: Any) -> Taught:
    """Train an adapter with loop/train.py; return loss and answers on held-out dialogues."""
    from loop.adapters.chat import ChatConfig, load_speaker

    train_on, held_out = second_task(folder)
    command(
        *("accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml"),
        *("loop/train.py", "--model_name_or_path", str(base), "--data_path", str(train_on)),
        *("--output_dir", str(folder / "adapter"), "--num_train_epochs", str(epochs), *flags),
    )
    prepared = read_training_data(Config(str(base), data_path=(str(held_out),)))
    speaker = load_speaker(ChatConfig(adapter=(str(folder / "adapter"),), max_new_tokens=60))
    with speaker.model.disable_adapter():
        before = loss_of(speaker.model, prepared)
    after = loss_of(speaker.model, prepared)
    records = json.loads(held_out.read_text(encoding="utf-8"))[:10]
    questions = [record["conversations"][0]["value"] for record in records]
    answered = [speaker.answer((Turn("user", question),)).text for question in questions]
    begin, end = ANSWER.format("|").split("|")
    well_formed = [text for text in answered if text.startswith(begin) and text.endswith(end)]
    return Taught(before, after, answered, len(well_formed))


def loss_of(model: Any, prepared: TrainingData) -> float:
    """Return the mean loss per token of the answers."""
    total = 0.0
    with torch.no_grad():
        for example in prepared.examples:
            total += supervised_loss_sum(model, prepared.collator([example], 0)).item()
    return total / sum(example.supervised_tokens for example in prepared.examples)


def main() -> None:
    """Train base and adapter, and print the results."""

    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/small_t5")
    parser.add_argument("--epochs", type=int, default=10)
    asked = parser.parse_args()
    base = asked.output_dir / "base"
    count = make_base(base, AutoTokenizer.from_pretrained(asked.tokenizer), width=96, layers=2)
    print(f"base: {count:,} parameters")
    started = time.monotonic()
    losses = train_all(base, DUMMY_DATA, asked.epochs, lr=3e-3)
    print(
        f"from scratch: loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"{time.monotonic() - started:.0f} s"
    )

    def run(*words: str) -> None:
        subprocess.run(words, cwd=ROOT, check=True)

    flags = ["--learning_rate", "1e-2", "--lora_r", "16", "--lora_target_modules", "all-linear"]
    taught = teach(base, asked.output_dir, 4, [*flags, "--mixed_precision", "no"], run)
    print(f"held-out loss: {taught.loss_before:.3f} -> {taught.loss_after:.3f}")
    print(f"{taught.well_formed} of {len(taught.answered)} greedy answers in braces:")
    print("\n".join(taught.answered))


if __name__ == "__main__":
    main()
