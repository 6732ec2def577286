"""`python -m data split`: cuts dialogues between rounds into pieces that fit the model."""

import argparse
import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from data.dialogues.conversation import Dialogue, Role, share_of
from data.dialogues.formats import ROLES, as_sharegpt, turn_roles
from data.dialogues.sharegpt import Tally, arguments_of, parse_turn, with_tool_names
from data.encoding.encoder import Encoder
from data.encoding.seq2seq import NO_LIMIT, encode_pairs
from data.encoding.templates import DEFAULT, RenderSettings, TemplateName, render, render_text
from data.encoding.tokenizer import add_flags, load_tokenizer, rendering_of, template_of
from data.errors import BadRecord, UserError
from data.preparation.job import Job, Result, parser, run, summary

NO_FIT = "round longer than --model_max_length"


@dataclass(frozen=True)
class Settings:
    """The settings on which the pieces depend; held_out: share of dialogues to hold out."""

    tokenizer: str
    template: TemplateName
    max_length: int
    long_round: Literal["truncate", "drop"]
    held_out: float
    chat_template: str | None = None
    rendering: RenderSettings = DEFAULT
    tools: str = "[]"  # of the dialogue, as JSON text
    own_arguments: str = "{}"  # of the dialogue for the chat template, as JSON text

    @property
    def kind(self) -> tuple[str, TemplateName, str | None]:
        """The arguments for load_tokenizer."""
        return self.tokenizer, self.template, self.chat_template


# If a text has more characters per allowed token, only its prefix is encoded, to bound memory.
CHARACTERS_PER_TOKEN = 64
# A user turn with all turns before the next user turn: the index of the user turn, and the turns.
Turns = list[dict[str, Any]]
Round = tuple[int, Turns]


def flags() -> argparse.ArgumentParser:
    """Return the command's parser."""
    command = parser("split", "Cut dialogues between rounds into pieces that fit the model.")
    own = command.add_argument_group("split")
    own.add_argument(
        "--model_name_or_path", required=True, metavar="FOLDER",
        help="model whose tokenizer and template are used",
    )  # fmt: skip
    add_flags(own)
    own.add_argument(
        "--model_max_length", type=int, default=2048, metavar="TOKENS",
        help="maximum tokens of a piece",
    )  # fmt: skip
    own.add_argument(
        "--long_round", choices=("drop", "truncate"), default="drop",
        help="if a single round does not fit, drop it or truncate its last answer. The default "
        "is drop, because a truncated answer trains the model to stop in mid-sentence",
    )  # fmt: skip
    text = "share of dialogues to hold out, such as 0.02"
    own.add_argument("--eval", type=float, metavar="SHARE", help=text)
    text = "file for held-out dialogues; default: --out with .eval before its suffix"
    own.add_argument("--eval_out", type=Path, metavar="FILE", help=text)
    return command


def main(argv: list[str]) -> None:
    """Split the files; raises UserError."""
    given = flags().parse_args(argv)
    _check(given)
    (template, chat), name = template_of(given), given.model_name_or_path
    limit, share = given.model_max_length, given.eval or 0.0
    rendering = rendering_of(given, template)
    settings = Settings(name, template, limit, given.long_round, share, chat, rendering)
    held_out = given.eval_out or given.out.with_suffix(f".eval{given.out.suffix}")
    job = Job(
        name="split",
        inputs=given.inputs,
        out=given.out,
        report=given.report,
        settings={**asdict(settings), "fingerprint": _fingerprint(load_tokenizer(*settings.kind))},
        transform=partial(split, settings),
        skip_bad=given.on_bad_record == "skip",
        processes=given.processes,
        held_out=held_out if given.eval is not None else None,
    )
    print(summary(run(job)), file=sys.stderr)


def _check(given: argparse.Namespace) -> None:
    if given.model_max_length < 1:
        raise UserError(f"--model_max_length {given.model_max_length}: expected at least 1 token.")
    if given.eval is not None and not 0.0 < given.eval < 1.0:
        raise UserError(f"--eval {given.eval:g}: expected a share between 0 and 1, such as 0.02.")
    if given.eval_out and given.eval is None:
        raise UserError("--eval_out: nothing is held out. Give --eval, such as --eval 0.02.")


@lru_cache(maxsize=1)
def load_encoder(*kind: Any) -> Encoder:
    """Return the encoder that training uses; the arguments are those of load_tokenizer."""
    return Encoder(load_tokenizer(*kind))


def _fingerprint(tokenizer: Any) -> str:
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
    text = "".join(map(str, (*parts, tokenizer.special_tokens_map)))
    return hashlib.sha256(text.encode()).hexdigest()


def split(settings: Settings, record: Any, place: str) -> Result:
    """Return the pieces of a dialogue; raises BadRecord."""
    record = as_sharegpt(record)
    roles, number = turn_roles(record), place.rpartition(" ")[2]
    name = str(number if record.get("id") is None else record["id"])
    system, rounds, left_out = _rounds(record["conversations"], roles)
    noted = ["dialogues", *["turn before the first question left out"] * left_out]
    pieces, dropped = [], 0
    # Rounds with the definitions of the tools, which go with every piece.
    settings = replace(
        settings,
        tools=json.dumps(record.get("tools") or []),
        own_arguments=json.dumps(arguments_of(record)),
    )
    for first, end in _pieces(settings, system, [turns for _, turns in rounds]):
        start, turns = rounds[first][0], [turn for _, some in rounds[first:end] for turn in some]
        if first == end and settings.long_round == "truncate":
            turns = _truncated(settings, system, rounds[first][1])
            noted += ["answer cut to fit"] * bool(turns)
        if turns:
            changed = {"id": f"{name}_{start}", "conversations": [*system, *turns]}
            pieces.append({"id": ""} | record | changed)
        else:
            dropped += 1
    noted += ["dialogues cut"] * (len(pieces) + dropped > 1)
    held_out = _share(record["conversations"], roles) < settings.held_out
    drops = (NO_FIT,) * dropped
    return Result(name, tuple(pieces), drops, tuple(noted), held_out=held_out)


def _rounds(turns: Turns, roles: list[Role]) -> tuple[Turns, list[Round], int]:
    """Return the leading system turns, the rounds, and the number of turns between them."""
    starts = [number for number, role in enumerate(roles) if role == "user"]
    if not starts:
        raise BadRecord("no human turn", "found no human turn; expected one")
    opening = next(number for number, role in enumerate(roles) if role != "system")
    ends = [*starts[1:], len(turns)]
    rounds = [(start, turns[start:end]) for start, end in zip(starts, ends, strict=True)]
    return turns[:opening], rounds, starts[0] - opening


def _share(turns: Turns, roles: list[Role]) -> float:
    """Return a number in [0, 1) that depends only on the dialogue's content."""
    parsed = [
        parse_turn(turn, role, n, True)
        for n, (turn, role) in enumerate(zip(turns, roles, strict=True))
    ]
    return share_of([turn.content for turn in parsed])


def _pieces(settings: Settings, system: Turns, rounds: list[Turns]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the longest pieces that fit; (n, n) if round n alone does not fit.

    The search begins at the token positions of the rounds in the complete dialogue. The result is
    exact: each piece is encoded, and so is the piece with one more round, which must not fit.
    """

    @cache
    def encoded(first: int, end: int) -> _Encoded:
        turns = [turn for some in rounds[first:end] for turn in some]
        return _encoded(settings, system + turns)

    def fits(first: int, end: int) -> bool:
        return encoded(first, end).length <= settings.max_length

    complete = encoded(0, len(rounds))
    if complete.length <= settings.max_length:
        yield 0, len(rounds)
        return
    at = _positions(complete, rounds)
    first = 0
    while first < len(rounds):
        # The text before the first question is part of each piece.
        end = bisect_right(at, at[first] + settings.max_length - at[0]) - 1
        end = min(max(end, first + 1), len(rounds))
        while end > first and not fits(first, end):
            end -= 1
        while first < end < len(rounds) and fits(first, end + 1):
            end += 1
        yield first, end
        first = max(end, first + 1)


@lru_cache(maxsize=1)
def bytewise(*kind: Any) -> bool:
    """Return whether the tokenizer is byte-level BPE, so that each token is a byte or more."""
    state = json.loads(load_tokenizer(*kind).backend_tokenizer.to_str())
    steps = state["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    # A normalizer or a prefix space may add bytes to a text.
    plain = state["normalizer"] is None and not any(one.get("add_prefix_space") for one in steps)
    kinds = {one.get("type") for one in steps}
    return plain and state["model"]["type"] == "BPE" and kinds <= {"ByteLevel", "Split", "Digits"}


@dataclass(frozen=True)
class _Encoded:
    """A dialogue as text and tokens; if it is much too long, only a prefix is encoded.

    length: number of tokens; for a T5, of the longest side of its pairs. If only a prefix is
    encoded, this is the prefix's number, more than twice the limit. If the dialogue is so short
    that it is not encoded, this is an upper bound.
    """

    text: str
    encoded_characters: int
    tokens: Any
    length: int


def _encoded(settings: Settings, turns: Turns) -> _Encoded:
    """Encode a dialogue like training, as far as is needed to decide whether it fits."""
    tokenizer = load_tokenizer(*settings.kind)
    parsed = [parse_turn(turn, ROLES[turn["from"]], n, True) for n, turn in enumerate(turns)]
    system = parsed.pop(0).text if parsed[0].role == "system" else None
    tools = tuple(json.loads(settings.tools))
    own = json.loads(settings.own_arguments)
    dialogue = Dialogue("", with_tool_names(parsed), system, tools, own)
    rendered = render_text(dialogue, settings.template, tokenizer, settings.rendering)
    text, special = rendered.text, rendered.add_special_tokens
    if settings.template == "t5":
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)
        pairs = encode_pairs([dialogue], tokenizer, NO_LIMIT, False, Tally())
        longest = max((max(pair.sides) for pair in pairs), default=0)
        return _Encoded(text, len(text), tokens, longest)
    most = len(text.encode()) + special * tokenizer.num_special_tokens_to_add()
    if most <= settings.max_length and bytewise(*settings.kind):
        return _Encoded(text, len(text), None, most)
    many = CHARACTERS_PER_TOKEN * settings.max_length
    for encoded_characters in [many, len(text)] if len(text) > many else [len(text)]:
        tokens = tokenizer(text[:encoded_characters], add_special_tokens=special, verbose=False)
        length = len(tokens["input_ids"])
        # The rest of the text cannot halve the number of the prefix's tokens.
        if length > 2 * settings.max_length:
            break
    encoder = load_encoder(*settings.kind)
    if encoded_characters == len(text) and any(
        encoder.pattern.search(turn.text) for turn in parsed
    ):
        # Text that looks like a control token is several tokens (data/encoding/encoder.py).
        try:
            rendered = render(dialogue, settings.template, tokenizer, settings.rendering)
            length = len(encoder([rendered])[0][0])
        except UserError as error:
            raise BadRecord("refused by the template", str(error).rstrip(".")) from None
    return _Encoded(text, encoded_characters, tokens, length)


def _positions(dialogue: _Encoded, rounds: list[Turns]) -> list[int]:
    """Return the approximate token position of each round, and of the end of the last round."""
    at, found = 0, []
    for turns in rounds:
        at = max(dialogue.text.find(turns[0]["value"].strip(), at), at)
        token = dialogue.tokens.char_to_token(at) if at < dialogue.encoded_characters else None
        found.append(
            dialogue.length * at // dialogue.encoded_characters if token is None else token
        )
        at += len(turns[0]["value"].strip())
    return [*found, dialogue.length * len(dialogue.text) // dialogue.encoded_characters]


def _truncated(settings: Settings, system: Turns, turns: Turns) -> Turns:
    """Return the round with its last answer cut so that it fits; no turns if nothing is left."""
    answers = [n for n, turn in enumerate(turns) if ROLES[turn["from"]] == "assistant"]
    if not answers:
        return []
    number, limit = answers[-1], settings.max_length
    answer = turns[number]["value"][: CHARACTERS_PER_TOKEN * limit]
    tokens = load_tokenizer(*settings.kind)(answer, add_special_tokens=False, verbose=False)
    left = min(len(tokens["input_ids"]), limit)
    while left > 0:
        cut = answer[: tokens.token_to_chars(left - 1).end].rstrip()
        shorter = [*turns[:number], {**turns[number], "value": cut}, *turns[number + 1 :]]
        length = _encoded(settings, system + shorter).length
        if length <= limit:
            return shorter if cut else []
        left -= length - limit
    return []
