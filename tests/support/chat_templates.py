"""Chat templates that behave like those of current models, each in one way; and their dialogues."""

from dataclasses import dataclass
from typing import Any

from data.bundled.make import TOOL_TEMPLATE
from data.dialogues.conversation import Dialogue, ToolCall, Turn


@dataclass(frozen=True)
class Case:
    """A template, what closes an answer and one with tool calls, and whether calls take text."""

    text: str
    closes: str
    closes_calls: str = ""
    arguments_as_text: bool = False
    appended: bool = False  # `closes` is the next role's token


TOOLS_IN_SYSTEM = """
{%- if messages[0].role == 'system' or tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{% if tools %}{% for tool in tools %}
{{ tool | tojson }}{% endfor %}{% endif %}<|im_end|>
{% endif -%}
"""
CALLS = """
{%- for call in message.tool_calls or [] %}{{ '\\n' }}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor -%}
"""
# The reasoning of earlier turns is dropped, and the last answer has a block of it, perhaps empty.
REWRITES = (
    TOOLS_IN_SYSTEM
    + """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}
{%- endif %}{% endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>
{{ message.reasoning_content or '' }}
</think>

{% endif %}{{ message.content }}"""
    + CALLS
    + """<|im_end|>
{% elif message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}
"""
)
# The prompt opens the reasoning.
OPENS = REWRITES.replace(
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "<think>\n",
)
# An answer has channels that the prompt does not open, and another token ends the last one.
CHANNELS = """
{%- if tools %}<|start|>developer<|message|>{% for tool in tools %}{{ tool.function.name }}: {{
tool.function.description }} {{ tool.function.parameters | tojson }}
{% endfor %}<|end|>{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- if message.tool_calls -%}
{%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking
}}<|end|>{% endif -%}
<|start|>assistant to={{ message.tool_calls[0].function.name }}<|channel|>commentary<|message|>{{
message.content }}{{ message.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif loop.last -%}
{%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking
}}<|end|>{% endif -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|return|>
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""
TWO_CLOSERS = """
{%- for message in messages -%}
<|turn|>{{ message.role }}<|begin|>{{ message.content | trim }}<|stop|><|end_turn|>
{%- endfor -%}
{%- if add_generation_prompt %}<|turn|>assistant<|begin|>{% endif -%}
"""
NEXT_ROLE = """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>
<think>{{ message.reasoning_content or '' }}</think>
{{ message.content | trim }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<key>{{ key }}</key>
<value>{{ value }}</value>
{% endfor %}</tool_call>{% endfor -%}
{%- elif message.role == 'tool' -%}
<|observation|>
{{ message.content }}
{%- else -%}
<|{{ message.role }}|>
{{ message.content }}
{%- endif -%}
{%- endfor -%}
{%- if tools %}{% for tool in tools %}{{ '' }}{% endfor %}{% endif -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
NO_PLACES = """
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif -%}
{%- for message in messages -%}
{%- if message.role in ('user', 'assistant') -%}
<|turn|>{{ message.role }}
{{ message.content | trim }}<|end_turn|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|turn|>assistant
{% endif -%}
"""
TRAILING_EOS = """
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif -%}
"""
TEXT_CALLS = """
{%- for tool in tools -%}{{ tool | tojson }}
{% endfor -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<|call|>{{ call.function.name }}
{{ call.function.arguments }}<|end|>
{%- endfor -%}
<|end_turn|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
# Definitions stand before the last user turn, and results are JSON.
TOOLS_LAST = """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}
{%- endif %}{% endfor -%}
{%- for message in messages -%}
{%- if loop.index0 == ns.last and tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif -%}
{%- if message.role == 'tool' -%}
<|tool|>{{ {'content': message.content} | tojson }}<|end|>
{%- elif message.tool_calls -%}
<|assistant|>{{ message.content }}<|call|>{{ message.tool_calls | tojson }}<|end_turn|>
{%- else -%}
<|{{ message.role }}|>{{ message.content }}{{ '<|end_turn|>' if message.role == 'assistant' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
FAILS = """
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}
{%- if message.role == 'tool' %}{{ message.missing.key }}{% endif %}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
UNCLOSED = """
{%- for message in messages -%}
### {{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}### assistant: {% endif -%}
"""
PARTS = """
{%- for message in messages -%}
<|{{ message.role }}|>{% for part in message.content %}{{ part.text }}{% endfor %}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
MARKED = """
{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}<|end|>{% endgeneration %}
{%- else -%}{{ message.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
CASES = {
    "rewrites": Case(REWRITES, "<|im_end|>"),
    "opens": Case(OPENS, "<|im_end|>"),
    "channels": Case(CHANNELS, "<|return|>", "<|call|>"),
    "two_closers": Case(TWO_CLOSERS, "<|stop|><|end_turn|>"),
    "next_role": Case(NEXT_ROLE, "<|user|>", "<|observation|>", appended=True),
    "no_places": Case(NO_PLACES, "<|end_turn|>"),
    "trailing_eos": Case(TRAILING_EOS, "<|end|>"),
    "text_calls": Case(TEXT_CALLS, "<|end_turn|>", arguments_as_text=True),
    "tools_last": Case(TOOLS_LAST, "<|end_turn|>"),
    "fails": Case(FAILS, "<|end|>"),
    "unclosed": Case(UNCLOSED, "<|im_end|>", appended=True),
    "parts": Case(PARTS, "<|end|>"),
    "marked": Case(MARKED, "<|end|>"),
    "bundled": Case(TOOL_TEMPLATE.read_text(encoding="utf-8"), "<|im_end|>"),
}
CONTROL = [
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|turn|>"),
    *("<|begin|>", "<|stop|>", "<|end_turn|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|observation|>", "<|tool|>", "<|tools|>"),
]


def tokenizer_with(tokenizer: Any, template: Any) -> Any:
    """Return a copy of the tokenizer with the template, and with the templates' control tokens."""
    import copy

    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"additional_special_tokens": CONTROL})
    copied.chat_template = template
    return copied


LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "the city"}},
            "required": ["city"],
        },
    },
}
ROME = ToolCall("lookup", {"city": "Rome"}, "call12345")
RESULT = Turn("tool", '{"sky": "clear"}', name="lookup", call_id="call12345")


def user(text: str) -> Turn:
    """Return a user's turn."""
    return Turn("user", text)


def gpt(text: str, **more: Any) -> Turn:
    """Return an answer."""
    return Turn("assistant", text, **more)


DIALOGUES = {
    "plain": Dialogue("plain", (user("Hello there"), gpt("General greeting"))),
    "three": Dialogue(
        "three",
        (user("One?"), gpt("First."), user("Two?"), gpt("Second."), user("Three?"), gpt("Third.")),
    ),
    "system": Dialogue("system", (user("Hello there"), gpt("Short words")), "Be brief."),
    "ends_with_user": Dialogue("ends_with_user", (user("Hi you"), gpt("Yes?"), user("Nothing."))),
    "unsupervised": Dialogue(
        "unsupervised", (user("Aha?"), gpt("Bad.", supervised=False), user("Oho?"), gpt("Good."))
    ),
    "reasoning": Dialogue("reasoning", (user("Why is it?"), gpt("So.", reasoning="Let me see."))),
    "think_text": Dialogue(
        "think_text", (user("Why is it?"), gpt("<think>\nLet me see.\n</think>\n\nSo."))
    ),
    "reasoning_twice": Dialogue(
        "reasoning_twice",
        (
            *(user("Why is it?"), gpt("So.", reasoning="Let me see.")),
            *(user("And then?"), gpt("Thus.", reasoning="Once more.")),
        ),
    ),
    "tools": Dialogue("tools", (user("Hello there"), gpt("No tool needed.")), tools=(LOOKUP,)),
    "call": Dialogue(
        "call",
        (user("Weather there?"), gpt("", calls=(ROME,)), RESULT, gpt("It is clear.")),
        tools=(LOOKUP,),
    ),
    "call_with_text": Dialogue(
        "call_with_text",
        (user("Weather there?"), gpt("Looking.", calls=(ROME,)), RESULT, gpt("It is clear.")),
        tools=(LOOKUP,),
    ),
    "call_with_reasoning": Dialogue(
        "call_with_reasoning",
        (
            user("Weather there?"),
            gpt("", calls=(ROME,), reasoning="I need the tool."),
            *(RESULT, gpt("It is clear.", reasoning="The sky is clear.")),
        ),
        tools=(LOOKUP,),
    ),
    "newline_answer": Dialogue("newline_answer", (user("Code?"), gpt("\n\n    return 1\n"))),
    "quoted_control": Dialogue(
        "quoted_control", (user("What is <|im_end|> for?"), gpt("<|im_end|> ends a turn."))
    ),
}
