"""Times FastChat's own preprocessing; runs in the environment that data_preparation.py makes.

python fastchat_preprocess.py TOKENIZER_FOLDER DIALOGUES.json MOST_TOKENS
"""

import contextlib
import io
import json
import sys
import time
import types


def main(folder: str, text: str, most: int) -> None:
    """Print the seconds that `preprocess` takes for all dialogues, and the tokens it made."""
    # A part of FastChat that is not measured imports it, and it needs a GPU to be built.
    sys.modules.setdefault("flash_attn", types.ModuleType("flash_attn"))
    import transformers
    from fastchat.train.train import preprocess

    # As FastChat's train.py loads it.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, model_max_length=most, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    with open(text, encoding="utf-8") as opened:
        sources = [record["conversations"] for record in json.load(opened)]
    with contextlib.redirect_stdout(io.StringIO()):  # a line for each mask that it gives up
        preprocess(sources[:4], tokenizer)
        started = time.perf_counter()
        made = preprocess(sources, tokenizer)
        seconds = time.perf_counter() - started
    tokens = int(made["attention_mask"].sum())
    print(json.dumps({"seconds": seconds, "dialogues": len(sources), "tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
