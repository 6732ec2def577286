"""`python -m data clean`: what it changes, what it drops, and that it counts both."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import clean
from data.clean import RULES, STEPS, Settings
from data.errors import BadRecord, UserError
from tests.helpers import ROOT, write_dialogues

ALL = Settings(tuple(RULES), ("as an ai language model, i", "network error"))
QUESTION = "How do I sort a list in Python?"
ANSWER = "Call sorted() with the list; it returns a new one."
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


def dialogue(*texts: str, roles: str = "human gpt", **more: Any) -> dict[str, Any]:
    names = roles.split()
    turns = [{"from": names[n % len(names)], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **more}


def without(*rules: str, **more: Any) -> Settings:
    return Settings(tuple(rule for rule in RULES if rule not in rules), ALL.blocked_words, **more)


def cleaned(*texts: str, rules: Settings = ALL) -> list[str]:
    """Return the messages that are left of a dialogue; its first is a question of the test's."""
    result = clean.clean(rules, dialogue(*texts), "x.json: record 0")
    return [turn["value"] for record in result.records for turn in record["conversations"]]


def answer(text: str, rules: Settings = ALL) -> str:
    return cleaned(QUESTION, text, rules=rules)[1]


def dropped(record: dict[str, Any], rules: Settings = ALL) -> tuple[str, ...]:
    return clean.clean(rules, record, "x.json: record 0").dropped


def run(*records: Any, folder: Path, flags: str = "") -> tuple[list[dict[str, Any]], Any]:
    """Clean the records by the command and return what is kept, and the report."""
    file, out, report = folder / "in.json", folder / "out.json", folder / "report.json"
    file.write_text(json.dumps(records))
    words = f"--in {file} --out {out} --report {report} --processes 1 {flags}"
    clean.main(words.split())
    return json.loads(out.read_text()), json.loads(report.read_text())


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
def test_what_only_looks_like_markup_or_residue_stays(text: str) -> None:
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


def test_invisible_characters_go_but_not_those_that_scripts_and_emoji_are_made_with() -> None:
    assert answer("a\u200bb\ufeffc\xadd\xa0e\r\nf\x00g\ud800h\u2028i") == "abcd e\nfgh\ni"
    for text in ("👨\u200d👩\u200d👧", "❤️\u200d🔥", "می\u200cخواهم", "क्\u200dष", "ភាសា\u200bខ្មែរ"):
        assert answer(text) == text
    assert answer("a\u200db") == "ab"


def test_a_dialogue_goes_from_the_first_question_to_the_last_answer() -> None:
    turns = dialogue(
        "Be brief.", "left over", QUESTION, ANSWER, "Thanks", roles="system gpt human gpt human"
    )
    result = clean.clean(ALL, turns, "x.json: record 0")
    kept = result.records[0]["conversations"]
    assert [turn["value"] for turn in kept] == ["Be brief.", QUESTION, ANSWER]
    assert result.noted == ("trim",)
    assert cleaned(QUESTION, ANSWER, "And?", " \u200b", "Hello?", ANSWER) == [QUESTION, ANSWER]


def test_roles_alternate_but_answers_and_tools_may_follow_one_another() -> None:
    assert dropped(dialogue(QUESTION, "Again?", ANSWER, roles="human human gpt"))
    late = dialogue(QUESTION, ANSWER, "Be brief.", ANSWER, roles="human gpt system gpt")
    assert dropped(late) == ("wrong alternation",)
    tools = "user function_call observation tool assistant gpt"
    assert not dropped(dialogue(QUESTION, "f()", "1", "2", ANSWER, ANSWER, roles=tools))


def test_refusals_plugins_and_short_dialogues_are_dropped() -> None:
    refusal = "Well. As an AI language model, I cannot."
    assert dropped(dialogue(QUESTION, refusal)) == ("blocked words",)
    assert not dropped(dialogue(refusal, ANSWER))
    assert dropped(dialogue(QUESTION, ANSWER, plugins=["web"])) == ("plug-ins",)
    assert not dropped(dialogue(QUESTION, ANSWER, plugins=[]))
    assert dropped(dialogue("Hi", "Hello")) == ("too short",)
    assert dropped(dialogue(QUESTION, "\x00")) == ("no question and answer",)


def test_the_list_of_blocked_words_can_be_replaced(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\ufeffSorted()\n\nit’s\n", encoding="utf-8")
    refusal = dialogue(QUESTION, "As an AI language model, I do.")
    records = [refusal, dialogue(QUESTION, ANSWER), dialogue(QUESTION, "It's good as it is.")]
    kept, report = run(*records, folder=tmp_path, flags=f"--blocked_words {words}")
    assert kept == [refusal]
    assert report["dropped"] == {"blocked words": ["1", "2"]}


WORDS = [f"word{number} " for number in range(400)]


def near_pair(change: int) -> list[dict[str, Any]]:
    """Return two dialogues that differ in one of so many words."""
    other = [f"other{n} " if n % change == 5 else word for n, word in enumerate(WORDS)]
    return [dialogue(QUESTION, "".join(words)) for words in (WORDS, other)]


def test_duplicates_are_dropped_by_id_by_content_and_when_nearly_the_same(tmp_path: Path) -> None:
    alike = near_pair(400)
    records = [
        dialogue(QUESTION, ANSWER, id="a"),
        dialogue(QUESTION, "Another answer.", id="a"),
        dialogue(QUESTION, ANSWER, id="b"),
        *alike,
        near_pair(20)[1],
    ]
    kept, report = run(*records, folder=tmp_path)
    assert kept == [records[0], records[3], records[5]]
    duplicates = {"duplicate id": ["a"], "duplicate content": ["b"], "near duplicate": ["4"]}
    assert report == {"read": 6, "kept": 3, "dropped": duplicates, "noted": {}}
    assert run(*alike, folder=tmp_path, flags="--near_threshold 1")[1]["kept"] == 2
    short = [dialogue(QUESTION, f"{ANSWER} {n}") for n in range(2)]
    assert run(*short, folder=tmp_path)[1]["kept"] == 2


def test_personal_data_is_reported_or_masked() -> None:
    text = (
        "Write to ann.b@mail.example.org or +49 30 1234567 or (555) 123-4567, "
        "card 4111 1111 1111 1111, key sk-abcdefghijklmnopqrstuvwx."
    )
    rules = without(personal="mask")
    masked = "Write to [EMAIL] or [PHONE] or [PHONE], card [CARD], key [KEY]."
    assert answer(text, rules) == masked
    assert answer(masked, rules) == masked
    reported = clean.clean(without(personal="report"), dialogue(QUESTION, text), "x: record 0")
    assert reported.noted == ("has CARD", "has EMAIL", "has KEY", "has PHONE")
    assert answer(text) == text
    plain = "On 2023-01-15 10:20:30, 4111 1111 1111 1112, 3.14159265358, sk-learn, a@b, 1234567890."
    assert answer(plain, rules) == plain


def test_languages_are_kept_or_skipped(tmp_path: Path) -> None:
    german = dialogue("Wie sortiere ich eine Liste?", "Mit sorted() bekommst du eine neue Liste.")
    english = dialogue(QUESTION, ANSWER)
    kept, report = run(german, english, folder=tmp_path, flags="--keep_languages en")
    assert kept == [english]
    assert report["dropped"] == {"language de": ["0"]}
    assert run(german, english, folder=tmp_path, flags="--skip_languages en")[0] == [german]
    with pytest.raises(UserError, match="'englisch'; expected an ISO 639-1 code, such as en"):
        run(english, folder=tmp_path, flags="--skip_languages englisch")


# For each rule a dialogue, or several, on which it alone has an effect.
EFFECTS: dict[str, list[dict[str, Any]]] = {
    "invisible": [dialogue(QUESTION, "so\u200b it is")],
    "html": [dialogue(QUESTION, "<b>so</b> it is")],
    "residue": [dialogue(QUESTION, "1 / 2\n\nso it is")],
    "fences": [dialogue(QUESTION, "so\n```\n```\nit is")],
    "newlines": [dialogue(QUESTION, "so\n\n\nit is")],
    "empty": [dialogue(QUESTION, ANSWER, "", ANSWER)],
    "trim": [dialogue(QUESTION, ANSWER, QUESTION)],
    "plugins": [dialogue(QUESTION, ANSWER, plugins=[1])],
    "alternation": [dialogue(QUESTION, QUESTION, ANSWER, roles="human human gpt")],
    "short": [dialogue("Hi", "Hello")],
    "blocked": [dialogue(QUESTION, "I'm sorry, but I can't do that.")],
    "ids": [dialogue(QUESTION, ANSWER, id=1), dialogue("And so?", ANSWER, id=1)],
    "content": [dialogue(QUESTION, ANSWER), dialogue(QUESTION, ANSWER)],
    "near": near_pair(400),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_can_be_switched_off(rule: str, tmp_path: Path) -> None:
    records = EFFECTS[rule]
    assert run(*records, folder=tmp_path)[0] != records
    assert run(*records, folder=tmp_path, flags=f"--skip {rule}")[0] == records


def test_an_unknown_rule_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such rule; did you mean newlines"):
        run(dialogue(QUESTION, ANSWER), folder=tmp_path, flags="--skip html newline")


def test_other_keys_of_records_and_turns_stay_as_they_are() -> None:
    record = dialogue("\n" + QUESTION, ANSWER, id="x", model="m", more={"deep": [1, None]})
    record["conversations"][1]["weight"] = 0
    kept = clean.clean(ALL, record, "x.json: record 3").records[0]
    record["conversations"][0]["value"] = QUESTION
    assert kept == record


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (7, "record is not an object"),
        ({"id": 1}, "no conversations"),
        ({"conversations": [None]}, "turn is not an object"),
        ({"conversations": [{"from": "parrot", "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": 7}]}, "value is not text"),
    ],
)
def test_what_is_no_dialogue_is_told_or_counted(record: Any, cause: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecord) as bad:
        clean.clean(ALL, record, "x.json: record 0")
    assert bad.value.cause == cause
    _, report = run(record, folder=tmp_path, flags="--on_bad_record skip")
    assert report == {"read": 1, "kept": 0, "dropped": {cause: ["0"]}, "noted": {}}


PIECES = st.sampled_from(
    ["a", "B c", "\n", "\n\n\n", " ", "```", "```python\n", "\n```\n", "~~~\n", "`", "<p>", "</p>",
     "<b>", "</b>", "<pre>", "</pre>", "<code>", "</code>", "<li>", "</li>", "<ul>", "</ul>", "<br>",
     "<div", ">", "&lt;", "&amp;", "&nbsp;", "<td>", "</td>", "</table>", "<table>", "<tr>", "\\",
     "Copy code", "1 / 2", "1", " / ", "12 chars / 2 words", "Copy3 chars / 1 words", "\u200b",
     "Share Prompt", "\u200d", "\xa0", "\ud800", "\x00", "*", "_", "#", "- ", "1. ", "> ", "|", "é",
     "字", "👩", "a@b.org", "+49 30 1234567", "<!--", "-->", "<h1>", "</h1>", "<a href='x'>", "</a>",
     "<blockquote>", "</blockquote>", "<span>", "</span>", "<img src='a'>", "<hr>", "$"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join)
DIALOGUES = st.lists(
    st.tuples(st.sampled_from(["human", "gpt", "gpt", "human", "system", "tool"]), TEXTS),
    max_size=6,
).map(lambda turns: {"conversations": [{"from": role, "value": text} for role, text in turns]})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=DIALOGUES, skipped=st.sets(st.sampled_from([*STEPS, "trim", "empty", "short"])))
def test_cleaning_what_is_clean_changes_nothing(record: Any, skipped: set[str]) -> None:
    rules = without(*skipped, "alternation", personal="mask")
    for kept in clean.clean(rules, record, "x.json: record 0").records:
        again = clean.clean(rules, kept, "x.json: record 0")
        assert again.records == (kept,)
        assert not again.noted


def test_cleaning_a_file_again_changes_nothing_and_drops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record for records in EFFECTS.values() for record in records]
    kept, report = run(*records, folder=tmp_path)
    count = sum(map(len, report["dropped"].values()))
    assert report["read"] == len(records) == report["kept"] + count
    assert f"read {len(records)} = kept {len(kept)} + dropped {count}" in capsys.readouterr().err
    again, report = run(*kept, folder=tmp_path)
    assert again == kept
    assert report == {"read": len(kept), "kept": len(kept), "dropped": {}, "noted": {}}


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    texts = [[f"{QUESTION} {n}", f"{ANSWER}\n\n\n{n % 5000}"] for n in range(6000)]
    file = write_dialogues(tmp_path / "in.json", *texts)
    words = [sys.executable, "-m", "data", "clean", "--in", file, "--processes", "1", "--out"]
    out = tmp_path / "out.jsonl"
    run = subprocess.Popen([*words, out], cwd=ROOT)
    partial = tmp_path / ".out.jsonl.journal-wal"
    while run.poll() is None and not (partial.exists() and partial.stat().st_size > 100_000):
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not out.exists()
    went_on = subprocess.run([*words, out], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "going on behind record" in went_on.stderr
    assert "read 6,000 = kept 6,000" in went_on.stderr
    clean.main([str(word) for word in [*words[4:], tmp_path / "whole.jsonl"]])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
