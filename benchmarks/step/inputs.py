"""Writes the inputs of run.py: a model folder, the same model for FastChat, long dialogues.

python benchmarks/step/inputs.py model KIND FOLDER TOKENIZER|- [tiny]
python benchmarks/step/inputs.py fastchat MODEL_FOLDER FOLDER
python benchmarks/step/inputs.py long FILE [MAX_TOKENS]
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from loop.config.flags import DUMMY_DATA

# Random LLaMA-like models: hidden, intermediate, layers, heads, key and value heads.
LLAMAS = {
    "tiny": (64, 128, 2, 4, 2),
    "narrow": (64, 128, 30, 4, 2),
    "llama-1b": (2048, 5632, 22, 32, 4),
    "llama-7b": (4096, 11008, 32, 32, 32),
}
# Random T5s: d_model, d_kv, d_ff, layers, heads. "t5" has the shape of Flan-T5-small.
T5S = {"tiny": (64, 16, 128, 2, 4), "t5": (512, 64, 1024, 8, 6)}
VOCABULARY = 49152  # the rows of SmolLM2's embedding; Mistral has fewer
LONG_CHARACTERS = 3900, 4500  # characters of a long dialogue, fewer than half as many tokens
LONG_DIALOGUES = 200


def main(what: str, *words: str) -> None:
    """Write the model folder, FastChat's form of it, or the long dialogues."""
    writers: dict[str, Callable[..., None]] = {
        "model": write_model,
        "fastchat": write_fastchat_form,
        "long": write_long,
    }
    writers[what](*words)


def write_model(kind: str, folder: str, tokenizer: str, tiny: str = "") -> None:
    """Write the model folder: the bundled weights, or random weights of a given shape.

    A given tokenizer replaces the model's tokenizer. Its ids must be within the embedding's rows.
    """
    from loop.model.bundled_model import embedded_model

    to = Path(folder)
    given = None if tokenizer == "-" else Path(tokenizer)
    if kind == "t5":
        _write_t5(to, given, "tiny" if tiny else "t5")
        return
    embedded = embedded_model()
    if kind == "decoder" and not tiny:
        to.mkdir()
        for name in ("config.json", "model.safetensors", "generation_config.json"):
            (to / name).symlink_to(embedded / name)
    else:
        rows = 1024 if tiny and not given else VOCABULARY
        _write_llama(to, LLAMAS["tiny" if tiny else kind], rows)
    read = _read_tokenizer(given or embedded)
    (_small(read) if tiny and not given else read).save_pretrained(to)


def write_fastchat_form(model: str, folder: str) -> None:
    """Write the same model so that transformers 4.41 can load it.

    4.41 does not support some keys that transformers 5 writes to config.json and
    tokenizer_config.json. The tokenizer only provides the padding id, because the plan has the ids
    of all examples.
    """
    source, to = Path(model).resolve(), Path(folder)
    to.mkdir()
    for weights in source.glob("*.safetensors*"):
        (to / weights.name).symlink_to(weights.resolve())
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {}
    config |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    config["torch_dtype"] = config.pop("dtype", "float32")
    if "scale_decoder_outputs" in config:  # 4.41 calls this key of T5 tie_word_embeddings
        config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
    (to / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "t5":
        pieces = source / "spiece.model"
        if not pieces.is_file():
            sys.exit("FastChat's T5: found no spiece.model. Give a folder with one as --tokenizer.")
        (to / pieces.name).write_bytes(pieces.read_bytes())
        settings = {"tokenizer_class": "T5Tokenizer"}
    else:
        (to / "vocab.json").write_text('{"<unk>": 0, "a": 1}')
        (to / "merges.txt").write_text("#version: 0.2\n")
        names = dict.fromkeys(("unk_token", "eos_token", "bos_token", "pad_token"), "<unk>")
        settings = {"tokenizer_class": "GPT2Tokenizer", **names}
    (to / "tokenizer_config.json").write_text(json.dumps(settings))


def write_long(file: str, max_tokens: str = "2048") -> None:
    """Write dialogues of 0.7 to 1 times `max_tokens` SmolLM2 tokens, chained from bundled ones."""
    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    draw, dialogues = random.Random(0), []
    for number in range(LONG_DIALOGUES):
        turns: list[dict[str, str]] = []
        characters = draw.randint(*LONG_CHARACTERS) * int(max_tokens) // 2048
        while sum(len(turn["value"]) for turn in turns) < characters:
            turns += draw.choice(records)["conversations"]
        dialogues.append({"id": f"long_{number}", "conversations": turns})
    Path(file).write_text(json.dumps(dialogues), encoding="utf-8")


def _write_llama(folder: Path, sizes: tuple[int, ...], rows: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, key_heads = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        dtype="bfloat16" if hidden > 1000 else "float32",
    )
    held = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(held)


def _write_t5(folder: Path, tokenizer: Path | None, size: str) -> None:
    """Write a random T5 with an untied LM head, like Flan-T5, and a tokenizer (default: small)."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from tests.support.small_t5 import t5_tokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else t5_tokenizer()
    width, head, inner, layers, heads = T5S[size]
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=-(-len(loaded) // 128) * 128,
        d_model=width,
        d_kv=head,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5.23 ties embedding and head, regardless of the config (as in small_t5.py).
    model.lm_head.weight = torch.nn.Parameter(width**-0.5 * torch.randn_like(model.shared.weight))
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)
    if tokenizer and (tokenizer / "spiece.model").is_file():
        (folder / "spiece.model").write_bytes((tokenizer / "spiece.model").read_bytes())


def _small(tokenizer: Any) -> Any:
    """Return a tokenizer of the same kind with 1,000 tokens."""
    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    return tokenizer.train_new_from_iterator([texts], 1000)


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
