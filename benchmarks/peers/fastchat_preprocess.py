"""Times FastChat's own preprocessing, in the environment that data_preparation.py creates.

python benchmarks/peers/fastchat_preprocess.py TOKENIZER_FOLDER DIALOGUES.json MAX_TOKENS
"""

import contextlib
import io
import json
import sys
import time


def main(folder: str, text: str, max_tokens: int) -> None:
    """Print the seconds that `preprocess` takes for all dialogues, and the tokens it returns."""
    import transformers
    from fastchat.train.train import preprocess

    # Like FastChat's train.py.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, model_max_length=max_tokens, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    with open(text, encoding="utf-8") as opened:
        sources = [record["conversations"] for record in json.load(opened)]
    # `preprocess` prints a line for each mismatched mask.
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess(sources[:4], tokenizer)
        begun = time.perf_counter(), time.process_time()
        encoded = preprocess(sources, tokenizer)
        seconds, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    tokens = int(encoded["attention_mask"].sum())

    facts = {"seconds": seconds, "cpu": cpu, "dialogues": len(sources), "tokens": tokens}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
