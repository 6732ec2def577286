"""Tools and arguments under a chat template: strict templates, and what the account counts."""

import json
from dataclasses import replace
from typing import Any

import pytest

from data.encoding.chat_template import ChatTemplate
from data.encoding.templates import RenderSettings, prompt
from data.errors import UserError
from tests.data.test_chat_templates import encoded, trained
from tests.support.chat_templates import CASES, DIALOGUES, LOOKUP, tokenizer_with


@pytest.fixture(scope="module")
def tokenizers(chat_tokenizer: Any) -> dict[str, Any]:
    return {name: tokenizer_with(chat_tokenizer, case.text) for name, case in CASES.items()}


def test_tool_descriptions_that_a_template_leaves_out_are_counted(
    chat_tokenizer: Any, tokenizers: dict[str, Any]
) -> None:
    note = "dialogues of which the template leaves out tool descriptions"
    names = CASES["rewrites"].text.replace("{{ tool | tojson }}", "{{ tool.function.name }}")
    assert names != CASES["rewrites"].text
    only_names = tokenizer_with(chat_tokenizer, names)
    lines = 'Look up "the" weather.\n    Of a city: Zürich.'
    function = {**LOOKUP["function"], "description": lines}
    second = {**LOOKUP, "function": {**function, "name": "search", "description": "Search."}}
    for description, tools, left_out in (
        ("one line", (LOOKUP,), 1),
        ("lines, and another tool", ({**LOOKUP, "function": function}, second), 1),
        ("none", ({**LOOKUP, "function": {"name": "lookup"}},), 0),
        ("no tools", (), 0),
    ):
        dialogue = replace(DIALOGUES["three"], tools=tools)
        for name in ("rewrites", "tools_last"):
            _, tally = encoded(dialogue, tokenizers[name])
            assert tally.noted[note] == 0, (name, description)
        for multi_turn in ("whole", "each"):
            settings = RenderSettings(multi_turn=multi_turn)
            _, tally = encoded(dialogue, only_names, settings)
            assert tally.noted[note] == left_out, description


CHECKS_NAMES = """
{%- set ns = namespace(names=[]) -%}
{%- for tool in tools or [] %}{% set ns.names = ns.names + [tool.function.name] %}{% endfor -%}
{%- for message in messages %}
{%- for call in message.tool_calls or [] %}{% if call.function.name not in ns.names -%}
{{ raise_exception('unknown tool ' + call.function.name) }}{% endif %}{% endfor -%}
{%- if message.role == 'tool' and message.name not in ns.names -%}
{{ raise_exception('unknown tool ' + message.name) }}{% endif -%}
{%- endfor -%}
"""


@pytest.mark.parametrize("name", ["rewrites", "channels", "text_calls", "tools_last"])
def test_a_template_that_refuses_calls_of_unknown_tools_is_known_as_one_that_does_not(
    name: str, chat_tokenizer: Any, tokenizers: dict[str, Any]
) -> None:
    checks = tokenizer_with(chat_tokenizer, CHECKS_NAMES + CASES[name].text)
    shows_reasoning = name in ("rewrites", "channels")
    for kind in ("call", "call_with_text", *["call_with_reasoning"] * shows_reasoning):
        examples, tally = encoded(DIALOGUES[kind], checks)
        plain, plain_tally = encoded(DIALOGUES[kind], tokenizers[name])
        assert [one.input_ids for one in examples] == [one.input_ids for one in plain]
        assert [one.labels for one in examples] == [one.labels for one in plain]
        assert vars(tally) == vars(plain_tally)
    own, without = (ChatTemplate(one) for one in (checks, tokenizers[name]))
    assert own.takes_objects() == without.takes_objects()
    for calls in (True, False):
        assert own.shows_reasoning(calls) == without.shows_reasoning(calls)
    unknown = replace(DIALOGUES["call"], tools=({**LOOKUP, "function": {"name": "search"}},))
    with pytest.raises(UserError, match="unknown tool lookup"):
        encoded(unknown, checks)


def test_a_records_own_template_arguments_replace_the_flags_and_are_counted(
    tokenizers: dict[str, Any],
) -> None:
    note = "dialogues whose chat_template_kwargs replace the flag's"
    tokenizer, thought = tokenizers["rewrites"], "<think>\n\n</think>\n\n"
    for flag, own, is_off, count in (
        (True, False, True, 1),
        (False, True, False, 1),
        (False, False, True, 0),
        (False, None, True, 0),
    ):
        settings = RenderSettings(json.dumps({"enable_thinking": flag, "other": 1}))
        arguments = {} if own is None else {"enable_thinking": own}
        dialogue = replace(DIALOGUES["plain"], template_arguments=arguments)
        examples, tally = encoded(dialogue, tokenizer, settings)
        ((start, _),) = trained(examples, tokenizer)
        assert start.endswith(thought) == is_off
        assert prompt(replace(dialogue, turns=dialogue.turns[:1]), "chat", tokenizer,
                      settings).text == start  # fmt: skip
        assert tally.noted[note] == count
    off = replace(DIALOGUES["reasoning"], template_arguments={"enable_thinking": False})
    with pytest.raises(UserError, match="opens the answer of turn 1") as refused:
        encoded(off, tokenizer, RenderSettings('{"enable_thinking": true}'))
    assert """Give the record "chat_template_kwargs" '{"enable_thinking": true}'""" in str(
        refused.value
    )
