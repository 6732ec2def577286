"""Rules of `python -m data clean` for messages: HTML, leftovers, characters, personal data."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.preparation import clean
from data.preparation.clean import RULES, STEPS, Settings

QUESTION = "How do I sort a list in Python?"
EXPORTED = (
    '1 / 2<div class="markdown prose"><p>Use <code>a_b</code>, as <strong>5 &lt; 6</strong>:</p>'
    '<pre><div class="bg-black rounded-md"><div class="flex"><span>python</span><button class="'
    'flex"><svg><path d="M0"></path></svg>Copy code</button></div><div class="p-4"><code class="'
    'hljs"><span class="hljs-keyword">def</span> f(a):\n    <span>return</span> a &lt; 1\n\n\n'
    "f(1)\n</code></div></div></pre><ol><li>one</li><li>two</li></ol>"
    "<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr>"
    "</tbody></table></div>"
)
MARKDOWN = """Use `a_b`, as **5 < 6**:

```python
def f(a):
    return a < 1


f(1)
```

1. one
2. two

| A | B |
| --- | --- |
| 1 | 2 |"""


def without(*rules: str, personal: str = "off") -> Settings:
    return Settings(tuple(rule for rule in RULES if rule not in rules), personal=personal)


def cleaned(text: str, rules: Settings) -> clean.Result:
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": text}]
    return clean.clean(rules, {"conversations": turns}, "x.json: record 0")


def answer(text: str, rules: Settings | None = None) -> str:
    """Return the cleaned answer."""
    (record,) = cleaned(text, rules or without()).records
    value: str = record["conversations"][1]["value"]
    return value


def test_an_exported_page_becomes_markdown_with_fences_and_their_languages() -> None:
    assert answer(EXPORTED) == MARKDOWN


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ('<pre><code class="language-c++">a &lt; b</code></pre>', "```c++\na < b\n```"),
        ("<pre>plain\n  text</pre>", "```\nplain\n  text\n```"),
        ("<pre><code>a ``` b</code></pre>", "````\na ``` b\n````"),
        ("see <em>this</em>\n\nand <a href='http://a.b/c_d'>that</a>", "see *this*\n\nand "
         "[that](http://a.b/c_d)"),
        ("<ul><li>a<ul><li>b</li></ul></li></ul>", "- a\n  - b"),
        ("before\n\n<ul>\n  <li>a</li>\n  <li>b</li>\n</ul>\nafter", "before\n\n- a\n- b\n\nafter"),
        ("<p>a<br>b</p><p>List<int></p>", "a\nb\n\nList<int>"),
        ("<p>write &lt;b&gt;x&lt;/b&gt;</p>", "write \\<b>x\\</b>"),
        ('<p>so <span class="katex"><math><mi>x</mi><annotation>x^2</annotation></math></span></p>',
         "so $x^2$"),
    ],
)  # fmt: skip
def test_html_becomes_markdown(html: str, markdown: str) -> None:
    assert answer(html) == markdown


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: List<int>, Map<String, List<T>> and </b>",
        "```html\n<div><p>hi</p>\n\n\n\n</div>\n```\nand `<b>x</b>`",
        "~~~\n<p>hi</p>\n",
        "Close it with <p>.",
        '<form action="/x"><p>Name</p></form>',
        "const a = '<a href=\"x\">text</a>';",
        "return (\n<div className={style}><p>x</p></div>)",
        "<html><body><p>x</p></body></html>",
        "| a | b |\n| - | - |\n| 1<br>2 | 3 |",
        "The button says Copy code, and 1 / 2 = 0.5; 12 chars / 2 words fit.",
        "1 / 2",
        "```\n# Copy code\nx\n```",
    ],
)
def test_text_that_only_looks_like_markup_or_residue_stays(text: str) -> None:
    assert answer(text, without("newlines")) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```\npythonCopy codedef f():\n    pass\n```", "```python\ndef f():\n    pass\n```"),
        ("```python\nCopy code\nx = 1\n```", "```python\nx = 1\n```"),
        ("yaml\nCopy code\na: 1", "yaml\na: 1"),
        ("2 / 3\n\nHello there", "Hello there"),
        ("Hello there\nCopy12 chars / 2 words", "Hello there"),
        ("Hello there\n12 chars / 2 words\nand more", "Hello there\n\nand more"),
        ("I have a sourceShare Prompt", "I have a source"),
        ("Before\n```python\nCopy code\n```\nafter", "Before\n\nafter"),
        ("a\n\n\n\nb\n\n\n```\nc\n\n\n\nd\n```", "a\n\nb\n\n```\nc\n\n\n\nd\n```"),
    ],
)
def test_leftovers_of_pages_are_removed(text: str, expected: str) -> None:
    assert answer(text) == expected


def test_invisible_characters_are_removed_but_not_those_of_scripts_and_emoji() -> None:
    assert answer("a\u200bb\ufeffc\xadd\xa0e\r\nf\x00g\ud800h\u2028i") == "abcd e\nfgh\ni"
    for text in ("👨\u200d👩\u200d👧", "❤️\u200d🔥", "می\u200cخواهم", "क्\u200dष", "ភាសា\u200bខ្មែរ"):
        assert answer(text) == text
    assert answer("a\u200db") == "ab"


def test_personal_data_is_reported_or_masked() -> None:
    text = (
        "Write to ann.b@mail.example.org or +49 30 1234567 or (555) 123-4567, "
        "card 4111 1111 1111 1111, key sk-abcdefghijklmnopqrstuvwx."
    )
    rules = without(personal="mask")
    masked = "Write to [EMAIL] or [PHONE] or [PHONE], card [CARD], key [KEY]."
    assert answer(text, rules) == masked
    assert answer(masked, rules) == masked
    reported = cleaned(text, without(personal="report"))
    assert reported.noted == ("has CARD", "has EMAIL", "has KEY", "has PHONE")
    assert answer(text) == text
    plain = "On 2023-01-15 10:20:30, 4111 1111 1111 1112, 3.14159265358, sk-learn, a@b, 1234567890."
    assert answer(plain, rules) == plain


PIECES = st.sampled_from(
    ["a", "B c", "\n", "\n\n\n", " ", "```", "```python\n", "\n```\n", "~~~\n", "`", "<p>", "</p>",
     "<b>", "</b>", "<pre>", "</pre>", "<code>", "</code>", "<li>", "</li>", "<ul>", "</ul>",
     "<br>", "<div", ">", "&lt;", "&amp;", "&nbsp;", "<td>", "</td>", "</table>", "<table>", "<tr>",
     "\\", "Copy code", "1 / 2", "1", " / ", "12 chars / 2 words", "Copy3 chars / 1 words",
     "\u200b", "Share Prompt", "\u200d", "\xa0", "\ud800", "\x00", "*", "_", "#", "- ", "1. ", "> ",
     "|", "é", "字", "👩", "a@b.org", "+49 30 1234567", "<!--", "-->", "<h1>", "</h1>", "</a>",
     "<a href='x'>", "<blockquote>", "</blockquote>", "<span>", "</span>", "<img src='a'>", "<hr>",
     "$"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join)
DIALOGUES = st.lists(
    st.tuples(st.sampled_from(["human", "gpt", "gpt", "human", "system", "tool"]), TEXTS),
    max_size=6,
).map(lambda turns: {"conversations": [{"from": role, "value": text} for role, text in turns]})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=DIALOGUES, skipped=st.sets(st.sampled_from([*STEPS, "trim", "empty", "short"])))
def test_cleaning_is_idempotent(record: Any, skipped: set[str]) -> None:
    rules = without(*skipped, "alternation", personal="mask")
    for kept in clean.clean(rules, record, "x.json: record 0").records:
        again = clean.clean(rules, kept, "x.json: record 0")
        assert again.records == (kept,)
        assert not again.noted
