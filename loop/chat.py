"""`python -m loop chat`: talks to an adapter, or sets its answers beside its base's."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    TextStreamer,
)

from data.errors import UserError
from data.sharegpt import Turn
from data.templates import TemplateName, default_template, prompt
from loop.base import mistakes
from loop.flags import flag, parse
from loop.model import DTYPES, quiet
from loop.new_tokens import grow, set_up
from loop.output import SETTINGS


@dataclass(frozen=True)
class ChatConfig:
    """What to talk to, and how."""

    adapter: str = flag("runs/main_job", "the output folder of a run", "chat")
    base: str | None = flag(None, "base model; none: the one in adapter_config.json", "chat")
    prompt: tuple[str, ...] = flag((), "questions to answer and leave; none: a dialogue", "chat")
    compare: bool = flag(False, "answer each prompt from the base too, side by side", "chat")
    max_new_tokens: int = flag(128, "tokens an answer at most", "chat", at_least=1)
    temperature: float = flag(0.0, "0: greedy, always the same answer", "chat", at_least=0)


@dataclass(frozen=True)
class Speaker:
    """A loaded model with its tokenizer and the template it was trained with."""

    model: PeftModel
    tokenizer: Any
    template: TemplateName
    config: ChatConfig

    def answer(self, turns: tuple[Turn, ...], streamer: TextStreamer | None = None) -> str:
        """Return the assistant's next answer, printed as it comes where a streamer is given."""
        asked = prompt(turns, self.template, self.tokenizer)
        inputs = self.tokenizer(
            asked.text,
            add_special_tokens=asked.add_special_tokens,
            split_special_tokens=self.template == "t5",  # as in training, which adds its own
            return_tensors="pt",
        ).to(self.model.device)
        ends = self.model.generation_config.eos_token_id or []
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        sampling = {"do_sample": True, "temperature": self.config.temperature}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=self.config.max_new_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                **(sampling if self.config.temperature else {"do_sample": False}),
            )
        # An encoder-decoder returns its answer alone, behind the token that starts it.
        pairs = self.model.config.is_encoder_decoder
        new = ids[0, 1 if pairs else inputs["input_ids"].shape[1] :]
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return text.strip()


def main(argv: Sequence[str]) -> None:
    """Answer the prompts given, or hold a dialogue."""
    values = parse(ChatConfig, argv, __doc__ or "")
    values.pop("config", None)
    config = ChatConfig(**values)
    if config.compare and not config.prompt:
        raise UserError('--compare: found no --prompt; expected at least one, as in --prompt "Hi".')
    speaker = load_speaker(config)
    streamer = TextStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for text in config.prompt:
        turns = (Turn("user", text),)
        if config.compare:
            print(side_by_side(text, base_answer(speaker, turns), speaker.answer(turns)))
        else:
            print(f"> {text}")
            speaker.answer(turns, streamer)
    if not config.prompt:
        _converse(speaker, streamer)


def load_speaker(config: ChatConfig) -> Speaker:
    """Load the adapter on its base, in the precision it was trained in.

    Raises UserError where the folder holds no adapter.
    """
    folder = Path(config.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {folder}: no adapter_config.json there. Train first: ./launch.sh"
        )
    file = folder / SETTINGS  # An adapter made elsewhere has none.
    trained = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    hub = {key: trained[key] for key in ("cache_dir", "trust_remote_code") if key in trained}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[trained["mixed_precision"]] if trained else "auto"
    quiet()
    with mistakes(f"--adapter {folder}"):
        base = config.base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else base, **hub)
        pairs = AutoConfig.from_pretrained(base, **hub).is_encoder_decoder
        loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
        model = loader.from_pretrained(base, dtype=dtype, **hub).to(device)
        if pairs:
            grow(model, len(tokenizer))
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        set_up(model, None, train=False)
    template = trained.get("template") or ("t5" if pairs else default_template(tokenizer))
    return Speaker(model, tokenizer, template, config)


def base_answer(speaker: Speaker, turns: tuple[Turn, ...]) -> str:
    """Return the answer with the adapter switched off."""
    with speaker.model.disable_adapter():
        return speaker.answer(turns)


def side_by_side(question: str, base: str, adapter: str) -> str:
    """Return a table of two columns: the base's answer and the adapter's."""
    width = (shutil.get_terminal_size((100, 24)).columns - 3) // 2
    columns = [
        [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        for text in (base, adapter)
    ]
    rows = [("BASE", "BASE + ADAPTER"), *zip_longest(*columns, fillvalue="")]
    lines = [f"{left:{width}} | {right}".rstrip() for left, right in rows]
    return "\n".join([f"\n> {question}", *lines])


def _converse(speaker: Speaker, streamer: TextStreamer) -> None:
    turns: tuple[Turn, ...] = ()
    print("Type a message; Ctrl-D ends.")
    while True:
        try:
            text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            turns += (Turn("user", text),)
            sys.stdout.write("assistant: ")
            turns += (Turn("assistant", speaker.answer(turns, streamer)),)
