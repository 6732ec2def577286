"""Finds and masks what looks like personal data: addresses, phone numbers, keys, cards."""

import re
from functools import partial

EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
KEY = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{22,}|glpat-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{0,8000}?-----END [A-Z ]*PRIVATE KEY-----"
)
CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{2,6}){2,4}(?![\w-]|\.\d)")
# International; (555) 123-4567 and 555-123-4567; with the zero that dials out of a town.
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
    r"|(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}"
    r"|0[1-9]\d{1,4}[ /-]\d{3,8}(?:[ -]\d{2,6}){0,3})(?![\w-]|\.\d)"
)


def masked(text: str) -> tuple[str, set[str]]:
    """Return the text with [EMAIL], [KEY], [CARD] and [PHONE] in it, and which of them it has."""
    found: set[str] = set()

    def mask(kind: str, match: re.Match[str]) -> str:
        if not _plausible(kind, match[0]):
            return match[0]
        found.add(kind)
        return f"[{kind}]"

    if "@" in text:
        text = EMAIL.sub(partial(mask, "EMAIL"), text)
    for kind, pattern in (("KEY", KEY), ("CARD", CARD), ("PHONE", PHONE)):
        text = pattern.sub(partial(mask, kind), text)
    return text, found


def _plausible(kind: str, text: str) -> bool:
    digits = [int(character) for character in text if character.isdecimal()]
    if kind == "PHONE":
        return 8 <= len(digits) <= 15
    return kind != "CARD" or (13 <= len(digits) <= 19 and _luhn(digits))


def _luhn(digits: list[int]) -> bool:
    """Say whether the check digit is right (ISO/IEC 7812-1, annex B)."""
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0
