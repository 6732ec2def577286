"""Encodes dialogues as (source, target) pairs for encoder-decoder models, one pair per answer."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import OnBadRecord, Tally, bad_record_error
from data.encoding.encode import Example, batches, check_fast
from data.encoding.templates import (
    DEFAULT,
    T5_SYSTEM,
    Rendered,
    RenderSettings,
    plain_text,
    render,
)
from data.errors import BadRecord

DROPPED_IDS = 5  # like FastChat, a pair is dropped if a side has so few ids or fewer
SHORT = f"pairs of {DROPPED_IDS} ids or fewer on a side, dropped"
NONE_LEFT = "no pair left"
UNKNOWN = "targets with an unknown token"


@dataclass(frozen=True)
class PairLimits:
    """Maximum ids of each side, with EOS.

    A source is truncated on the left, a target on the right.
    """

    source: int
    target: int
    keep_header: bool  # keep the header when truncating a source


LONGEST = 1 << 40
NO_LIMIT = PairLimits(LONGEST, LONGEST, keep_header=False)


def encode_pairs(
    dialogues: Iterable[Dialogue],
    tokenizer: Any,
    limits: PairLimits,
    fastchat: bool,
    tally: Tally,
    settings: RenderSettings = DEFAULT,
    on_bad_record: OnBadRecord = "fail",
) -> Iterator[Example]:
    """Yield a pair for each supervised answer: `input_ids` is the source, `labels` the target.

    Raises UserError for a tokenizer without character offsets, and for a dialogue that the template
    cannot show unless `on_bad_record` is "skip".
    """
    check_fast(tokenizer)
    encode = _fastchat_pairs if fastchat else _pairs
    shown = _shown(dialogues, settings, on_bad_record, tally)
    for record, dialogue, pairs in encode(shown, tokenizer, limits, tally):
        kept = [pair for pair in pairs if min(map(len, pair)) > DROPPED_IDS]
        tally.noted.update([SHORT] * (len(pairs) - len(kept)))
        tally.noted.update([UNKNOWN for _, target in kept if tokenizer.unk_token_id in target])
        tally.answers += len(kept)
        tally.ended += sum(target[-1] == tokenizer.eos_token_id for _, target in kept)
        if kept:
            tally.kept += 1
        else:
            tally.drop(NONE_LEFT, dialogue.id)
        share = dialogue.share if kept else 0.0
        for source, target in kept:
            yield Example(dialogue.id, source, target, len(target), record, True, share)


Pairs = list[tuple[list[int], list[int]]]


def _shown(
    dialogues: Iterable[Dialogue],
    settings: RenderSettings,
    on_bad_record: OnBadRecord,
    tally: Tally,
) -> Iterator[tuple[int, Dialogue, Rendered]]:
    """Yield each dialogue that the template can show, with its index and its text."""
    for record, dialogue in enumerate(dialogues):
        try:
            yield record, dialogue, render(dialogue, "t5", None, settings)
        except BadRecord as bad:
            if on_bad_record == "fail":
                raise bad_record_error(dialogue.place, dialogue.id, bad) from None
            tally.drop(bad.cause, dialogue.id)


def _pairs(
    shown: Iterable[tuple[int, Dialogue, Rendered]],
    tokenizer: Any,
    limits: PairLimits,
    tally: Tally,
) -> Iterator[tuple[int, Dialogue, Pairs]]:
    """Yield each dialogue with its pairs; the dialogue is encoded once, each answer once more."""
    before, after = _special_ids(tokenizer)
    for _, batch in batches(shown):
        rendered = [item for _, _, item in batch]
        answers = [item.text[start:end] for item in rendered for start, end in item.spans]
        targets = iter(_ids(tokenizer, answers) if answers else [])
        encoded = tokenizer(
            [item.text for item in rendered],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        columns = zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for (record, dialogue, item), ids, offsets in columns:
            ends, pairs = [end for _, end in offsets], []
            for span in item.spans:
                source = _before(item, span[0], ids, ends, tokenizer)
                header = bisect_right(ends, item.header) if limits.keep_header else 0
                room = limits.source - len(before) - len(after)
                source = _cut_source(source, header, room, tally)
                target = _cut_target(next(targets), before, after, limits.target, tally)
                pairs.append(([*before, *source, *after], target))
            yield record, dialogue, pairs


def _before(
    item: Rendered, start: int, ids: list[int], ends: list[int], tokenizer: Any
) -> list[int]:
    """Return the ids of the text before an answer, equal to those of that text alone.

    A token that reaches into the answer, such as one with the space before it, is encoded again.
    """
    count = bisect_right(ends, start)  # tokens that end before the answer
    while count and ends[count - 1] > start:
        count -= 1
    rest = item.text[ends[count - 1] if count else 0 : start]
    return ids[:count] + (_ids(tokenizer, [rest])[0] if rest else [])


def _cut_source(ids: list[int], header: int, room: int, tally: Tally) -> list[int]:
    if len(ids) <= room:
        return ids
    tally.noted["sources cut on the left"] += 1
    kept = room - header
    return ids[:header] + ids[-kept:] if kept > 0 else ids[-room:]


def _cut_target(
    ids: list[int], before: list[int], after: list[int], most: int, tally: Tally
) -> list[int]:
    if len(before) + len(ids) + len(after) <= most:
        return [*before, *ids, *after]
    tally.noted["targets cut on the right, without EOS"] += 1
    return [*before, *ids][:most]


def _ids(tokenizer: Any, texts: list[str], control_tokens: bool = False) -> list[list[int]]:
    """Return the ids of texts; "</s>" in a text becomes EOS only if `control_tokens` is true."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not control_tokens,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    outer = tokenizer("a", add_special_tokens=True)["input_ids"]
    place = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
    return outer[:place], outer[place + len(inner) :]


def _fastchat_pairs(
    shown: Iterable[tuple[int, Dialogue, Rendered]],
    tokenizer: Any,
    limits: PairLimits,
    tally: Tally,
) -> Iterator[tuple[int, Dialogue, Pairs]]:
    """Yield the pairs of FastChat 0.2.36 (train_flant5.py), including its misplaced cuts.

    Each piece is also tokenized alone, and its length locates its turn. A length counts as at most
    the source limit minus one. So all places after a longer turn are wrong. An answer ends with a
    newline.
    """
    end, most = [tokenizer.eos_token_id], limits.source
    for record, dialogue, _ in shown:
        pieces = [(dialogue.system or T5_SYSTEM) + "\n\n"]
        for number, turn in enumerate(dialogue.turns):
            last = number == len(dialogue.turns) - 1
            if turn.role == "user":
                question = f"### Human: {turn.text}\n### Assistant: "
                pieces.append(turn.text if last else question)
            else:
                pieces.append(f"{plain_text(turn)[0]}\n")
        ids = _ids(tokenizer, ["".join(pieces)], control_tokens=True)[0]
        encoded = _ids(tokenizer, pieces, control_tokens=True)
        lengths = [min(len(piece), most - 1) for piece in encoded]
        start, pairs = lengths[0], []
        for turn, length in zip(dialogue.turns, lengths[1:], strict=True):
            if turn.role == "assistant" and turn.supervised:
                source = ids[:start][-most:]
                pairs.append((source + end, ids[start : start + length][:most] + end))
            start += length
        yield record, dialogue, pairs
