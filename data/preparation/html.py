"""Converts the HTML in a message to Markdown, but not source code in HTML."""

import re
from typing import Any, cast

from bs4 import BeautifulSoup
from markdownify import MarkdownConverter

BLOCK = "p div pre ul ol li dl dt dd h1 h2 h3 h4 h5 h6 blockquote table thead tbody tfoot tr td th"
INLINE = "a b strong i em u s del code kbd samp sub sup span q mark small cite"
MATH = """math semantics annotation mrow mi mo mn ms mtext mspace msup msub msubsup mfrac msqrt
mroot mover munder munderover mtable mtr mtd mstyle mpadded mphantom menclose"""
LOOK_BACK_CHARACTERS = 200
MAX_NESTING = 100  # levels, more than in any page; bounds the recursion of the parsers
VOID = {"br", "hr", "img"}
# Tags of pages and pictures. A message with one of them contains HTML as source code.
PAGE = """html head body script style form input select option textarea label button meta link
title nav header footer main section article aside canvas svg iframe template video audio"""
SOURCE = {*PAGE.split()}
BLOCKS = {*BLOCK.split()}
TEXT = BLOCKS | VOID | {*INLINE.split(), *MATH.split()}
# On an indented line, these tags are source code too. Exported HTML is not indented.
LAID_OUT = {"div", "span", "p", "a", "img", "table", "h1", "h2", "h3", "h4", "h5", "h6"}
IN_STRING = re.compile(r"(?:[=:(,+?\[]|return)\s*[\"'`][^\"'`]*\Z")
IN_SOURCE = re.compile(r"className|[{}]|\b(?:on[a-z]+|v-[a-z]+|ng-[a-z]+)\s*=")
SPACE = re.compile(r"\s*")
FENCE = re.compile(r"\n[ \t]*(`{3,}|~{3,})([^\n]*)")
TOKEN = re.compile(
    r"(?P<code>(?<!`)(`+)[^`\n]+\2)"
    r"|(?<!\\)<(?P<end>/?)(?P<name>[A-Za-z][A-Za-z0-9]*)(?P<rest>\s[^<>]*)?/?>"
)
NO_TAG = re.compile(rf"<(?!/?(?:{'|'.join(sorted(TEXT | SOURCE))})[\s/>]|!--)", re.IGNORECASE)
# The picture on the button "Copy code".
ICON = re.compile(r"<svg\b(?:(?!</svg>)[\s\S]){0,4000}</svg>\s*(?=Copy code)")
LANGUAGE = re.compile(r"language-([\w+#.-]+)")
LABEL = re.compile(r"\A\s*([\w+#.-]{1,20}?)\s*(?:Copy code|\Z)")


def split_fences(text: str) -> list[str]:
    """Return the text in pieces that alternate: outside of code fences, inside, outside, ..."""
    if "```" not in text and "~~~" not in text:
        return [text]
    pieces, at, opened = [], 0, None
    # With a leading line break, FENCE also matches the first line. A match's start is then the
    # line's start in the text.
    for mark in FENCE.finditer("\n" + text):
        ticks, info = mark.groups()
        if opened is None:
            if ticks[0] == "`" and "`" in info:  # code within a line
                continue
            opened = ticks
            pieces.append(text[at : mark.start()])
            at = mark.start()
        elif ticks.startswith(opened) and not info.strip():
            opened = None
            pieces.append(text[at : mark.end() - 1])
            at = mark.end() - 1
    return [*pieces, text[at:]]


def html_to_markdown(text: str) -> str:
    """Convert each HTML element outside of code; an unclosed tag stays."""
    if "</" not in text:
        return text
    pieces = split_fences(text)
    pieces[::2] = [_converted(piece) if "</" in piece else piece for piece in pieces[::2]]
    return "".join(pieces)


def _converted(text: str) -> str:
    parts, at = [""], 0
    for start, end, block in _elements(text):
        before, element = text[at:start], _markdown(text[start:end])
        # `&lt;b&gt;` has become `<b>`, which a second pass would convert. So it is escaped.
        if _elements(element):
            element = TOKEN.sub(lambda m: m[0] if m["code"] else "\\" + m[0], element)
        at = end
        if block and element.strip():
            before = before.rstrip()
            apart = "".join(parts[-2:]) + before
            between = "" if not apart or apart.endswith("\n\n") else "\n\n"
            parts += [before, between, element.strip(), "\n\n"]
            at = cast(re.Match[str], SPACE.match(text, end)).end()
        else:
            parts += [before, element]
    if at == len(text) and parts[-1] == "\n\n":
        parts.pop()
    return "".join(parts) + text[at:]


def _elements(text: str) -> list[tuple[int, int, bool]]:
    """Return (start, end, is block) of each outermost element; empty for source code."""
    found: list[tuple[int, int, bool]] = []
    stack: list[str] = []
    start = at = 0
    while token := TOKEN.search(text, at):
        at = token.end()
        if token["code"]:
            if stack and "</" in token["code"]:
                at = token.start() + 1  # the backticks are in different elements, so no pair
            continue
        name, end = token["name"].lower(), bool(token["end"])
        if "pre" in stack and not (end and name == "pre"):
            continue
        line = text[max(0, token.start() - LOOK_BACK_CHARACTERS) : token.start()].rpartition("\n")[
            2
        ]
        laid_out = bool(line) and line.isspace() and name in LAID_OUT
        laid_out = laid_out or (not stack and IN_STRING.search(line) is not None)
        if name in SOURCE or laid_out or IN_SOURCE.search(token["rest"] or ""):
            return []
        if name not in TEXT or name in VOID:
            continue
        if not end:
            start = start if stack else token.start()
            stack.append(name)
            if len(stack) > MAX_NESTING:
                return []
        elif name in stack:
            first = stack[0]
            while stack.pop() != name:
                pass
            if not stack:
                found.append((start, token.end(), first in BLOCKS))
    return found


def _markdown(html: str) -> str:
    soup = BeautifulSoup(NO_TAG.sub("&lt;", ICON.sub("", html)), "lxml")
    for formula in soup.select("span.katex"):
        source = formula.find("annotation")
        formula.replace_with(f"${source.get_text()}$" if source else formula.get_text())
    return str(CONVERTER.convert_soup(soup)).strip("\n")


class _Converter(MarkdownConverter):
    """Writes code fences with the page's name of the language, longer than fences in the code."""

    def convert_pre(self, element: Any, text: str, parent_tags: set[str]) -> str:
        code = element.find("code")
        if code is None:
            label, body = None, text
        else:
            body = code.get_text()
            shown = element.get_text()
            label = LABEL.match(shown[: shown.find(body)]) if body else None
        classes = " ".join(code.get("class", [])) if code is not None else ""
        named = LANGUAGE.search(classes)
        language = named[1] if named else label[1] if label else ""
        ticks = "`" * max(3, *(len(run) + 1 for run in ["", *re.findall("`{3,}", body)]))
        return "\n\n{0}{1}\n{2}\n{0}\n\n".format(ticks, language, body.strip("\n"))

    def convert_br(self, element: Any, text: str, parent_tags: set[str]) -> str:
        return " " if "_inline" in parent_tags else "\n"


CONVERTER = _Converter(
    heading_style="ATX",
    bullets="-",
    escape_asterisks=False,
    escape_underscores=False,
    table_infer_header=True,
)
