"""Detects the language of a dialogue; the detector is loaded on first use."""

import difflib
import functools
from collections.abc import Iterable
from typing import Any

from data.errors import UserError
from data.preparation.html import split_fences

MAX_CHARACTERS = 2000  # longer texts make the detection slower, but not better
UNKNOWN = ("und", "zxx")  # undetermined; no linguistic content (ISO 639-2)


def language_of(texts: Iterable[str]) -> str:
    """Return the ISO 639-1 code of the texts' main language, outside of code fences."""
    text = ""
    for part in texts:
        text += " ".join(split_fences(part[:MAX_CHARACTERS])[::2]) + "\n"
        if len(text) > MAX_CHARACTERS:
            break
    return str(_detector().classify(text[:MAX_CHARACTERS])[0])


def check_languages(codes: Iterable[str]) -> None:
    """Raise UserError for a code that the detector does not support."""
    codes = list(codes)
    if not codes:
        return
    known = sorted(_detector().labels)
    for code in codes:
        if code not in known:
            near = (difflib.get_close_matches(code, known, 1, 0) or known)[0]
            raise UserError(
                f"found the language {code!r}; expected an ISO 639-1 code, such as {near}. "
                f"Known: {' '.join(known)}."
            )


@functools.cache
def _detector() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("language detection needs py3langid: pip install py3langid.") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE)
