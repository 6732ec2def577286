"""The tokenizer and the template that training will take, from a model's folder and flags."""

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from data.encoding.encode import check_fast
from data.encoding.templates import TemplateName, default_template
from data.errors import UserError

# What SentencePiece's vocabulary of T5 has no piece for, or takes for a space.
CHARACTERS = "{}<\\^`~\n\t"
# A lone new token gets it: of two peft can be told that the LM head is not the embedding's matrix
# (loop/model/new_tokens.py, places). It is a private-use character, which no T5 knows either.
COMPANION = "\ue000"
# FastChat 0.2.36, train_flant5.py, in its order. Its space doubles the length of a text.
FASTCHAT_PAD, FASTCHAT_CHARACTERS = "[PAD]", "<{\n}` \\^\t"


def with_missing_characters(tokenizer: Any) -> tuple[Any, list[int]]:
    """Return a tokenizer that keeps every character of `CHARACTERS`, and the ids that are new.

    One that lacks none is returned as it is. In the other, white space is kept, too: T5's own
    splits at it, loses runs of it and any before a new token. What is white but no space, newline
    or tab becomes a space, and a carriage return before a newline goes. A text of words with one
    space between them has the ids that it had.
    """
    missing = [c for c in CHARACTERS if c not in _there_and_back(tokenizer, f"a{c}b")]
    if not missing:
        return tokenizer, []
    if len(missing) == 1:
        missing.append(COMPANION)
    known = len(tokenizer)
    tokenizer = _rebuilt(tokenizer)
    tokenizer.add_tokens([AddedToken(c, normalized=False, special=False) for c in missing])
    backend = tokenizer.backend_tokenizer
    given = _keeping_spaces(backend)
    backend.normalizer = normalizers.Sequence(
        # The new tokens are cut out before: a carriage return before a newline ends its piece.
        [*given, normalizers.Replace(Regex(r"\r\z"), ""), normalizers.Replace(Regex(r"\s"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    return tokenizer, [*range(known, len(tokenizer))]


def with_fastchat_tokens(tokenizer: Any) -> tuple[Any, list[int]]:
    """Return the tokenizer with FastChat's ten tokens for T5, and their ids."""
    known = len(tokenizer)
    tokenizer = _rebuilt(tokenizer)
    tokenizer.add_special_tokens({"pad_token": AddedToken(FASTCHAT_PAD, normalized=False)})
    tokenizer.add_tokens(
        [AddedToken(c, normalized=False, special=False) for c in FASTCHAT_CHARACTERS]
    )
    return tokenizer, [*range(known, len(tokenizer))]


def _keeping_spaces(backend: Any) -> list[Any]:
    """Return the normalizers but for those that make one space of several, or strip a text.

    Pegasus' and mBART-50's tokenizers have such a one (transformers 5.23).
    """
    if backend.normalizer is None:
        return []
    state = json.loads(backend.normalizer.__getstate__())
    steps = [_normalizer(step) for step in state.get("normalizers", [state])]
    spaces = " a  b "
    return [s for s in steps if len(s.normalize_str(spaces).replace("▁", " ")) == len(spaces)]


def _normalizer(state: dict[str, Any]) -> Any:
    made = normalizers.Sequence([])
    made.__setstate__(json.dumps({"type": "Sequence", "normalizers": [state]}).encode())
    return made


def _there_and_back(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # A `<` is not there because an `<unk>` is.
    decoded: str = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decoded


def _rebuilt(tokenizer: Any) -> Any:
    """Return a tokenizer of the generic class, which is saved and read as it is.

    T5's own class makes its splitting anew whenever it is read (transformers 5.23,
    models/t5/tokenization_t5.py), so a change of it would be lost.
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
