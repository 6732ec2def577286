"""`python -m data stats`: what data holds, how long it is, and what training on it will take."""

import argparse
import json
import math
import sqlite3
import statistics
import sys
from collections import Counter
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.encoding.tokenizer import add_flags, template_of
from data.errors import UserError
from data.files.atomic_write import check_output, place_of, written_whole
from data.files.read import find_files
from data.preparation.duplicates import Seen
from data.preparation.histogram import as_text, doublings, quantile, write_picture
from data.preparation.job import parser
from data.preparation.measure import NAMED, Counts, Settings, measure
from data.preparation.parallel import chunks, in_order

LIMITS = (512, 1024, 2048, 4096, 8192)
NEAR = 0.9  # as `clean` takes it
LANGUAGES = 12  # that are shown; the report has all


def main(argv: list[str]) -> None:
    """Count, and print what was found; the account goes to stderr. Raises UserError."""
    given = flags().parse_args(argv)
    files = find_files(given.inputs)
    taken = {place_of(file): "one of --in" for file in files}
    for flag, file in (("--out", given.out), ("--report", given.report)):
        if file:
            check_output(flag, file, taken)
            taken[place_of(file)] = flag
    rate, source = _rate(given)
    settings = _settings(given)
    with ExitStack() as stack:  # what cannot be written is told before the work
        picture = stack.enter_context(written_whole(given.out, "--out")) if given.out else None
        report = (
            stack.enter_context(written_whole(given.report, "--report")) if given.report else None
        )
        counts, doubles = _counted(files, settings, given.processes)
        names = ", ".join(map(str, given.inputs))
        if not counts.examples:
            raise UserError(f"{names}: found no dialogue to train on ({counts.tally}).")
        facts = _facts(counts, doubles, settings, given, rate)
        if picture:
            limits = [*settings.limits]
            write_picture(counts.lengths, facts["unit"], names[-80:], limits, picture)
        if report:
            text = json.dumps(facts, indent=1, ensure_ascii=False)
            report.write_text(text + "\n", encoding="utf-8")
    print("\n".join(_told(facts, counts, settings, source)))
    print(counts.tally, file=sys.stderr)


def flags() -> argparse.ArgumentParser:
    """Return the command's parser."""
    made = parser("stats", "What data holds, and what training on it will take.", out=False)
    own = made.add_argument_group("stats")
    own.add_argument("--out", "--png", type=Path, metavar="PNG", help="a picture of the lengths")
    own.add_argument(
        "--model_name_or_path", metavar="FOLDER",
        help="whose tokenizer and template count the tokens; by default characters are counted",
    )  # fmt: skip
    add_flags(own)
    text = "tokens of a dialogue at most, as in training"
    own.add_argument("--model_max_length", type=int, default=2048, metavar="TOKENS", help=text)
    text = "examples a step"
    own.add_argument("--global_batch_size", type=int, default=8, metavar="EXAMPLES", help=text)
    text = "passes over the data"
    own.add_argument("--num_train_epochs", type=float, default=3.0, metavar="EPOCHS", help=text)
    text = "of training, to estimate its time"
    own.add_argument("--tokens_per_second", type=float, metavar="TOKENS", help=text)
    text = "a run whose rate is taken, such as runs/main_job"
    own.add_argument("--like", type=Path, metavar="RUN", help=text)
    return made


def _settings(given: argparse.Namespace) -> Settings:
    """Return what is counted and how; raises UserError for flags that do not fit."""
    for name in ("model_max_length", "global_batch_size", "num_train_epochs", "tokens_per_second"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: expected more than 0.")
    name, bad = given.model_name_or_path, given.on_bad_record
    if name is None:
        unheeded = [f for f in ("template", "chat_template") if getattr(given, f)]
        if unheeded:
            raise UserError(f"--{unheeded[0]}: needs a tokenizer. Give --model_name_or_path.")
        return Settings(None, "vicuna", None, bad, ())
    template, text = template_of(given)
    limits = tuple(sorted({*LIMITS, given.model_max_length}))
    return Settings(name, template, text, bad, limits)


def _rate(given: argparse.Namespace) -> tuple[float | None, str]:
    """Return the tokens a second that training is to be estimated by, and whose they are."""
    if given.like is None:
        return given.tokens_per_second, "as given"
    if given.tokens_per_second:
        raise UserError("found both --tokens_per_second and --like; expected one of them.")
    file = given.like / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rates = [float(json.loads(line)["tokens_per_second"]) for line in lines]
    except OSError as error:
        raise UserError(f"--like {given.like}: {file.name}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--like {given.like}: {file.name} is not a run's log.") from None
    rates = rates[1:] or rates  # the first step is slower: it warms up
    if not rates or not 0 < statistics.median(rates) < math.inf:
        raise UserError(f"--like {given.like}: {file.name} tells no rate yet.")
    return statistics.median(rates), f"the median of {given.like}, for its model and machine"


def _counted(files: list[Path], settings: Settings, processes: int) -> tuple[Counts, Counter[str]]:
    """Return the counts of all files, and how many dialogues were there before, by cause."""
    total, doubles = Counts(), Counter[str]()
    # A base without a name lies on disk, and goes when it is closed.
    with (
        closing(sqlite3.connect("", isolation_level=None)) as base,
        tqdm(desc="stats", unit=" records", disable=None) as progress,
    ):
        seen = Seen(base, NEAR)
        base.execute("BEGIN")
        for part in in_order(partial(measure, settings), chunks(files), processes):
            total.add(part)
            for exact, near in part.seen:
                if cause := seen.cause(exact, near):
                    doubles[cause] += 1
            progress.update(part.tally.read)
    return total, doubles


def _facts(
    counts: Counts,
    doubles: Counter[str],
    settings: Settings,
    given: argparse.Namespace,
    rate: float | None,
) -> dict[str, Any]:
    """Return the report: the account first, as of every preparation."""
    tally, length = counts.tally, given.model_max_length
    # A chunk keeps the first ids of a cause: where there were more, the report has their count.
    dropped = {
        cause: tally.named[cause] if len(tally.named[cause]) == count <= NAMED else count
        for cause, count in sorted(tally.dropped.items())
    }
    cut = counts.cuts.get(length)
    learnt = counts.examples - (cut.nothing_left if cut else 0)
    batch = min(given.global_batch_size, max(learnt, 1))
    per_epoch = math.ceil(learnt / batch)
    tokens = counts.length - (cut.tokens if cut else 0)
    seconds = given.num_train_epochs * tokens / rate if rate and settings.tokenizer else None
    facts: dict[str, Any] = {"read": tally.read, "kept": tally.kept, "dropped": dropped}
    facts["noted"] = dict(sorted(tally.noted.items()))
    facts["unit"] = "tokens" if settings.tokenizer else "characters"
    facts["template"] = settings.template if settings.tokenizer else None
    facts |= {name: getattr(counts, name) for name in ("dialogues", "rounds", "answers")}
    facts |= {name: getattr(counts, name) for name in ("examples", "length", "supervised")}
    facts["quantiles"] = {f"{q:g}": quantile(counts.lengths, q) for q in (0.5, 0.9, 0.99, 1.0)}
    facts["histogram"] = doublings(counts.lengths)
    facts["languages"] = dict(counts.languages.most_common())
    facts["duplicates"] = dict(sorted(doubles.items()))
    facts["cut_at"] = {str(limit): vars(one) for limit, one in counts.cuts.items()}
    facts["estimate"] = {
        "model_max_length": length,
        "examples": learnt,
        "examples_per_step": batch,
        "epochs": given.num_train_epochs,
        "steps_per_epoch": per_epoch,
        "steps": math.ceil(given.num_train_epochs * per_epoch),
        "tokens_per_second": rate,
        "seconds": seconds,
    }
    return facts


def _told(facts: dict[str, Any], counts: Counts, settings: Settings, source: str) -> list[str]:
    """Return the report as a person reads it."""
    unit, quantiles = facts["unit"], facts["quantiles"]
    examples, length = facts["examples"], facts["length"]
    languages = [*facts["languages"].items()]
    shown = [f"{code} {_share(count, counts.dialogues)}" for code, count in languages[:LANGUAGES]]
    shown += [f"{len(languages) - LANGUAGES} more"] * (len(languages) > LANGUAGES)
    doubles = [f"{cause}: {count:,}" for cause, count in facts["duplicates"].items()]
    rows = {
        "dialogues": f"{facts['dialogues']:,}",
        "rounds": f"{facts['rounds']:,} ({facts['answers']:,} answers)",
        unit: f"{length:,}; of an example {length / examples:,.0f} on average, "
        f"{quantiles['0.5']:,} the median, {quantiles['0.9']:,} and {quantiles['0.99']:,} what "
        f"90 and 99 % reach at most, {quantiles['1']:,} the longest",
        "supervised": f"{facts['supervised']:,} {unit} ({_share(facts['supervised'], length)})",
        "languages": ", ".join(shown),
        "duplicates": ", ".join(doubles) or "none",
    }
    if settings.template == "t5":
        rows["pairs"] = f"{examples:,}; an example is a pair, its length that of its longer side"
    width = max(map(len, rows)) + 2
    lines = [f"{name:{width}}{text}" for name, text in rows.items()]
    lines += ["", f"lengths in {unit}", *as_text(facts["histogram"]), ""]
    if settings.tokenizer is None:
        lines.append("Without --model_name_or_path there are no tokens, cuts and time.")
    else:
        lines += ["cut at     examples  tokens lost  supervised lost  left with nothing to learn"]
    for limit, cut in counts.cuts.items():
        shares = [_share(cut.examples, examples), _share(cut.tokens, length)]
        shares += [_share(cut.supervised, facts["supervised"]), f"{cut.nothing_left:,}"]
        wide = zip(shares, (10, 13, 17, 28), strict=True)
        lines.append(f"{limit:>6,}  " + "".join(f"{share:>{n}}" for share, n in wide))
    return [*lines, "", *_estimated(facts["estimate"], source)]


def _estimated(estimate: dict[str, Any], source: str) -> list[str]:
    steps, rate, seconds = (estimate[name] for name in ("steps", "tokens_per_second", "seconds"))
    lines = [
        f"{steps:,} steps: {estimate['steps_per_epoch']:,} an epoch of "
        f"{estimate['examples']:,} examples, {estimate['examples_per_step']:,} a step, "
        f"{estimate['epochs']:g} epochs"
    ]
    if seconds is None:
        return [
            *lines,
            "no estimate of the time: it needs tokens, and --tokens_per_second or --like",
        ]
    minutes = math.ceil(seconds / 60)
    time = f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
    return [*lines, f"about {time} at {rate:,.0f} tokens/s ({source})"]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
