"""The tokenizer and the template that training will take, from a model's folder and flags."""

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.encoding.encode import check_fast
from data.encoding.templates import TemplateName, default_template
from data.encoding.tokens import with_missing_characters
from data.errors import UserError


def add_flags(flags: argparse._ArgumentGroup) -> None:
    """Add the flags that name a template."""
    flags.add_argument("--template", choices=("vicuna", "chat", "t5"), help="default: as training")
    flags.add_argument(
        "--chat_template", type=Path, metavar="FILE", help="in place of the model's own"
    )


@lru_cache(maxsize=1)  # one a process: transforms run in others
def load_tokenizer(
    name: str, template: TemplateName = "chat", chat_template: str | None = None
) -> Any:
    """Return the tokenizer of a model's folder, for a template; raises UserError.

    chat_template: Jinja in place of the tokenizer's own.
    """
    if not Path(name).is_dir():
        raise UserError(f"--model_name_or_path {name}: no such folder.")
    from transformers import AutoTokenizer  # here, since a mistake in flags need not wait for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{name}: its tokenizer cannot be loaded: {reason}.") from None
    check_fast(tokenizer)
    if template == "t5":
        tokenizer, _ = with_missing_characters(tokenizer)
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


def template_of(given: argparse.Namespace) -> tuple[TemplateName, str | None]:
    """Return the template's name and the text of --chat_template; raises UserError."""
    text = None
    if given.chat_template:
        try:
            text = given.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = f"cannot be read: {error}"
            raise UserError(f"--chat_template {given.chat_template}: {why}.") from None
    template = given.template or ("chat" if text else _default(given.model_name_or_path))
    if text and template != "chat":
        raise UserError(f"--chat_template: --template {template} does not use it. Leave one out.")
    return template, text


def _default(name: str) -> TemplateName:
    """Return training's default: the folder's config.json knows an encoder-decoder."""
    tokenizer = load_tokenizer(name)
    try:
        known = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        pairs = known.get("is_encoder_decoder", "t5" in known.get("model_type", ""))
    except (OSError, ValueError, AttributeError, TypeError):
        pairs = False
    return "t5" if pairs else default_template(tokenizer)
