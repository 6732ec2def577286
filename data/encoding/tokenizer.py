"""Loads the tokenizer and the template that training uses, from a model's folder and flags."""

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from data.encoding.encode import check_fast
from data.encoding.templates import (
    RenderSettings,
    TemplateName,
    default_template,
    template_arguments,
)
from data.errors import UserError

# Characters that T5's SentencePiece vocabulary lacks, or turns into a space.
CHARACTERS = "{}<\\^`~\n\t"
# Added if only one character is missing: with two new tokens, peft separates the LM head from the
# embedding (loop/model/new_tokens.py, places). No T5 vocabulary has this private-use character.
COMPANION = "\ue000"
# The tokens of FastChat 0.2.36, train_flant5.py, in its order. The space token doubles the number
# of ids of a text.
FASTCHAT_PAD, FASTCHAT_CHARACTERS = "[PAD]", "<{\n}` \\^\t"


def with_missing_characters(tokenizer: Any) -> tuple[Any, list[int]]:
    """Return a tokenizer that keeps all characters of `CHARACTERS`, and the ids of its new tokens.

    A tokenizer that already keeps them is returned unchanged. The new tokenizer also keeps runs of
    spaces, and spaces before a new token; T5's tokenizer does not. White space other than space,
    newline and tab becomes a space. A carriage return before a newline is removed. The ids of a
    text of words with single spaces do not change.
    """
    missing = [c for c in CHARACTERS if c not in _round_trip(tokenizer, f"a{c}b")]
    if not missing:
        return tokenizer, []
    if len(missing) == 1:
        missing.append(COMPANION)
    known = len(tokenizer)
    tokenizer = _rebuilt(tokenizer)
    tokenizer.add_tokens([AddedToken(c, normalized=False, special=False) for c in missing])
    backend = tokenizer.backend_tokenizer
    kept = _normalizers_keeping_spaces(backend)
    backend.normalizer = normalizers.Sequence(
        # New tokens, such as a newline, are split off before this runs. So a carriage return before
        # a newline is the end of the normalized piece.
        [*kept, normalizers.Replace(Regex(r"\r\z"), ""), normalizers.Replace(Regex(r"\s"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    return tokenizer, [*range(known, len(tokenizer))]


def with_fastchat_tokens(tokenizer: Any) -> tuple[Any, list[int]]:
    """Return a tokenizer with FastChat's ten new tokens for T5, and the ids of these tokens."""
    known = len(tokenizer)
    tokenizer = _rebuilt(tokenizer)
    tokenizer.add_special_tokens({"pad_token": AddedToken(FASTCHAT_PAD, normalized=False)})
    tokenizer.add_tokens(
        [AddedToken(c, normalized=False, special=False) for c in FASTCHAT_CHARACTERS]
    )
    return tokenizer, [*range(known, len(tokenizer))]


def _normalizers_keeping_spaces(backend: Any) -> list[Any]:
    """Return the tokenizer's normalizers, except those that merge spaces or strip a text.

    Pegasus' and mBART-50's tokenizers have such normalizers (transformers 5.23).
    """
    if backend.normalizer is None:
        return []
    state = json.loads(backend.normalizer.__getstate__())
    steps = [_normalizer(step) for step in state.get("normalizers", [state])]
    spaces = " a  b "
    return [s for s in steps if len(s.normalize_str(spaces).replace("▁", " ")) == len(spaces)]


def _normalizer(state: dict[str, Any]) -> Any:
    normalizer = normalizers.Sequence([])
    normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": [state]}).encode())
    return normalizer


def _round_trip(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Special tokens are skipped: the `<` of `<unk>` is not a `<` of the text.
    decoded: str = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decoded


def _rebuilt(tokenizer: Any) -> Any:
    """Return the tokenizer as one of the generic class, which saves and loads without a change.

    T5's own class rebuilds its pre-tokenizer at each load (transformers 5.23,
    models/t5/tokenization_t5.py). This would undo the new pre-tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        **{name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name, None)},
    )


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def add_flags(flags: argparse._ArgumentGroup) -> None:
    """Add --template and the flags of the chat template."""
    flags.add_argument(
        "--template", choices=("vicuna", "chat", "t5"), help="default: as in training"
    )
    flags.add_argument(
        "--chat_template",
        type=Path,
        metavar="FILE",
        help="a Jinja file that replaces the model's chat template",
    )
    flags.add_argument(
        "--chat_template_name",
        metavar="NAME",
        help="which of a tokenizer's chat templates, as in training",
    )
    flags.add_argument(
        "--chat_template_kwargs",
        metavar="OBJECT",
        help="arguments of the chat template, as in training",
    )


@lru_cache(maxsize=1)  # each worker process calls this for each block, and loads it once
def load_tokenizer(
    name: str, template: TemplateName = "chat", chat_template: str | None = None
) -> Any:
    """Return the tokenizer of a model's folder, with the new tokens of the template.

    chat_template: Jinja text that replaces the tokenizer's chat template.

    Raises UserError.
    """
    if not Path(name).is_dir():
        raise UserError(f"--model_name_or_path {name}: no such folder.")
    from transformers import AutoTokenizer  # a slow import; errors in flags are found before it

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
    """Return the name of the template, and the text of --chat_template; raises UserError."""
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


def rendering_of(given: argparse.Namespace, template: TemplateName) -> RenderSettings:
    """Return the arguments and the name of the chat template; raises UserError."""
    for flag in ("chat_template_kwargs", "chat_template_name"):
        if getattr(given, flag) and template != "chat":
            raise UserError(f"--{flag}: --template {template} does not use it. Leave one out.")
    arguments = template_arguments(given.chat_template_kwargs)
    return RenderSettings(arguments, given.chat_template_name)


def _default(name: str) -> TemplateName:
    """Return the template that training uses by default: "t5" for an encoder-decoder."""
    tokenizer = load_tokenizer(name)
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        encoder_decoder = config.get("is_encoder_decoder", "t5" in config.get("model_type", ""))
    except (OSError, ValueError, AttributeError, TypeError):
        encoder_decoder = False
    return "t5" if encoder_decoder else default_template(tokenizer)
