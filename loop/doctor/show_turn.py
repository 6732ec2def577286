"""Makes the example of one answer: its generation prompt, and what is supervised after it."""

from collections.abc import Iterator
from dataclasses import replace

from data.dialogues.sharegpt import Tally, bad_record_error
from data.encoding.encode import IGNORE_INDEX, Example, check_fast, label
from data.encoding.encoder import encoder_of
from data.encoding.templates import Rendered, render_examples
from data.errors import BadRecord, UserError
from loop.config.flags import Config
from loop.inputs.training_data import select_dialogues
from loop.model.base import BaseModel


def examples_of_turn(config: Config, base: BaseModel, turn: int) -> Iterator[Example]:
    """Yield the example of the answer at this index of the messages, as `--multi_turn each` does.

    Dialogues without such an answer are left out. Raises UserError if no dialogue has one, and for
    a template that does not locate its generation prompts.
    """
    if base.template != "chat":
        raise UserError(
            f"--turn {turn}: found template {base.template}; expected chat, which has a generation "
            "prompt for each answer. Leave --turn out, or use a model with a chat template."
        )
    check_fast(base.tokenizer)
    valid, found = set[int](), False
    settings = replace(config.rendering, multi_turn="each")
    for record, dialogue in enumerate(select_dialogues(config, False, Tally())):
        try:
            items = render_examples(dialogue, base.template, base.tokenizer, settings)
        except BadRecord as bad:
            if config.on_bad_record == "fail":
                raise bad_record_error(dialogue.place, dialogue.id, bad) from None
            continue
        of_turn = {answer.turn: item for item in items for answer in item.located}
        valid |= {*of_turn}
        if turn in of_turn:
            found = True
            yield _example(dialogue.id, record, turn, of_turn[turn], base, config.model_max_length)
    if not found:
        expected = ", ".join(map(str, sorted(valid))) or "a dialogue with a supervised answer"
        raise UserError(
            f"--turn {turn}: found no supervised answer at this index of the messages; expected "
            f"one of: {expected}. Give one of these."
        )


def _example(
    name: str, record: int, turn: int, item: Rendered, base: BaseModel, max_length: int
) -> Example:
    """Encode the text; raises UserError if truncation leaves no supervised token."""
    ((ids, spans, placed),) = encoder_of(base.tokenizer)([item])
    labels, _ = label(ids[:max_length], placed, spans)
    supervised = len(labels) - labels.count(IGNORE_INDEX)
    if not supervised:
        raise UserError(
            f"--turn {turn}: found no supervised token of {name} within {max_length} of "
            f"{len(ids)} tokens; expected some. Give a larger --model_max_length, or set "
            "--train_on_reasoning and --train_on_tool_calls to True."
        )
    return Example(name, ids[:max_length], labels, supervised, record, turn=turn)
