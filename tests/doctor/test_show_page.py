"""The HTML page shows every token once, marks supervised ones, and escapes all text."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.encoding.encode import IGNORE_INDEX, Example
from loop.doctor.show import as_page, page_end, pieces
from tests.support.helpers import command, write_dialogues

TRICKY = "<script>alert('x')</script> &amp; \"q\" </pre> naïve 日本 😀👩‍👩‍👧 \tif x:\n\n    y\0z"


class Read(HTMLParser):
    """A parsed page: the tokens of each block as (ids, supervised, text), and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.blocks: list[list[tuple[list[int], bool, str]]] = []
        self.tags: set[str] = set()
        self.text, self.inside = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = tag in ("b", "i") and "title" in dict(attributes)
        if tag == "pre":
            self.blocks.append([])
        if self.inside:
            ids = [int(number) for number in (dict(attributes)["title"] or "").split()]
            self.blocks[-1].append((ids, tag == "b", ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            ids, supervised, text = self.blocks[-1][-1]
            self.blocks[-1][-1] = (ids, supervised, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def parsed(page: Path) -> Read:
    return Read(page.read_text(encoding="utf-8"))


def check(read: Read, row: dict[str, Any], tokenizer: Any) -> None:
    """Compare the page's only block with its example: ids, marks and text."""
    (block, *others) = read.blocks
    assert not others
    assert [number for ids, _, _ in block for number in ids] == row["input_ids"]
    marked = [supervised for ids, supervised, _ in block for _ in ids]
    assert marked == [label != IGNORE_INDEX for label in row["labels"]]
    text = tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)
    assert "".join(text for _, _, text in block) == text.replace("\0", "\u2400")


def test_the_page_shows_every_token_and_marks_supervised_ones(
    chat_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "d.json", [TRICKY, f"{TRICKY}!"])
    show = ["python", "-m", "loop", "show", "--data_path", data, "--model_name_or_path", chat_model]
    page = tmp_path / "new" / "page.html"
    done = command(*show, "--html", page)
    assert done.returncode == 0, done.stderr
    row = json.loads(command(*show, "--jsonl").stdout)
    read = parsed(page)
    check(read, row, chat_tokenizer)
    account = done.stderr.strip().splitlines()[-1]
    assert account in read.text
    assert "tokens supervised" in account
    assert not read.tags & {"script", "link", "img", "a", "iframe"}
    source = page.read_text(encoding="utf-8")
    assert "http:" not in source
    assert "https:" not in source
    assert "prefers-color-scheme:dark" in source
    twice = command(*show, "--html", page, "--jsonl")
    assert (twice.returncode, "found both" in twice.stderr) == (2, True)
    over = command(*show, "--html", data)
    assert (over.returncode, "the path is the data" in over.stderr) == (2, True)
    assert json.loads(data.read_text(encoding="utf-8"))


def test_a_pair_has_an_unmarked_source_and_a_marked_target(tiny_t5: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.json", ["Why is it so, then?", "Because it is just so."])
    show = ["python", "-m", "loop", "show", "--data_path", data, "--model_name_or_path", tiny_t5]
    page = tmp_path / "page.html"
    assert command(*show, "--html", page).returncode == 0
    (pair,) = json.loads(command(*show, "--jsonl").stdout)["pairs"]
    source, target = parsed(page).blocks
    assert [n for ids, supervised, _ in source for n in ids if not supervised] == pair["input_ids"]
    assert [n for ids, supervised, _ in target for n in ids if supervised] == pair["labels"]


def test_names_are_escaped_and_half_a_surrogate_pair_is_written(chat_tokenizer: Any) -> None:
    example = Example("<img src=x onerror=y>\ud83d", [1, 2], [-100, 2], 1)
    page = "".join(as_page([example], chat_tokenizer, "<b>")) + page_end("</footer><script>")
    assert page.encode()
    assert not Read(page).tags & {"img", "script"}


@pytest.mark.parametrize("name", ["mistral_v1", "t5", "chat"])
def test_the_pieces_are_the_text(name: str, shared: Path, chat_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = chat_tokenizer
    if name != "chat":
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    records = json.loads((shared / "data/oasst_en.json").read_text(encoding="utf-8"))[:60]
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    for text in [*texts, TRICKY]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        found = [*pieces(ids, tokenizer)]
        assert "".join(piece for _, _, piece in found) == whole
        assert [n for begin, end, _ in found for n in range(begin, end)] == [*range(len(ids))]
