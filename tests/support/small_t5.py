"""Creates small T5s with a tokenizer that lacks the same characters as T5's."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from data.encoding.templates import T5_SYSTEM
from data.encoding.tokenizer import CHARACTERS
from loop.config.flags import DUMMY_DATA

TOKENS = 1000
LONGEST = 10  # characters of a piece


def t5_tokenizer() -> Any:
    """Return a unigram tokenizer with pieces of the bundled dialogues, which splits like T5's.

    The pieces are counted here, because the trainer of tokenizers 0.23 returns other pieces in each
    process.
    """
    from transformers import T5Tokenizer

    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    without = {ord(character): " " for character in CHARACTERS}
    texts = [turn["value"].translate(without) for r in records for turn in r["conversations"]]
    texts += [T5_SYSTEM, "### Human: ### Assistant: "] * 50
    counts: Counter[str] = Counter()
    for word, count in Counter(f"\u2581{w}" for text in texts for w in text.split()).items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST, len(word)) + 1):
                counts[word[start:end]] += count
    special = ["<pad>", "</s>", "<unk>"]
    characters = [piece for piece in counts if len(piece) == 1]
    longer = sorted(counts.keys() - {*characters}, key=lambda p: (-counts[p] * len(p), p))
    pieces = characters + longer[: TOKENS - len(special) - len(characters)]
    total = sum(counts[piece] for piece in pieces)
    scored = [(piece, math.log(counts[piece] / total)) for piece in pieces]
    return T5Tokenizer(vocab=[(name, 0.0) for name in special] + scored, extra_ids=0)


def make_t5(folder: Path, tokenizer: Any, tied: bool = False, rows: int = TOKENS + 32) -> Path:
    """Write a random T5 of two layers; unless tied, with a separate LM head, like Flan-T5."""
    import torch

    from benchmarks.small_t5 import random_t5

    model = random_t5(rows, width=64, layers=2, tied=tied)
    if not tied:
        with torch.no_grad():
            model.lm_head.weight.mul_(0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def joined_shards(folder: Path, model: Path, alone: Path) -> Any:
    """Return the state that transformers reads from the shards of a saved base model.

    The shards are linked into the folder `alone`, because their own folder has an adapter, which
    transformers would load.
    """
    from transformers import AutoModelForSeq2SeqLM

    index = folder / "non_lora_state.safetensors.index.json"
    text = json.loads(index.read_text())
    files = {*text["weight_map"].values()}
    assert len(files) > 3
    assert {file.name for file in folder.glob("*non_lora_state*")} == {*files, index.name}
    assert sum((folder / file).stat().st_size for file in files) > text["metadata"]["total_size"]
    alone.mkdir()
    for file in files:
        (alone / file).hardlink_to(folder / file)
    (alone / "model.safetensors.index.json").hardlink_to(index)
    (alone / "config.json").hardlink_to(model / "config.json")
    read, found = AutoModelForSeq2SeqLM.from_pretrained(alone, output_loading_info=True)
    assert not any(found.values()), found
    return read.state_dict()
