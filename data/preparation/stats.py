"""`python -m data stats`: counts dialogues and tokens, and estimates the training time."""

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

from data.encoding.tokenizer import add_flags, rendering_of, template_of
from data.errors import UserError
from data.files.atomic_write import check_output, place_of, written_whole
from data.files.read import find_files
from data.preparation.duplicates import Seen
from data.preparation.histogram import as_text, doublings, quantile, write_picture
from data.preparation.job import parser
from data.preparation.measure import IDS_PER_CAUSE, Counts, Settings, measure
from data.preparation.parallel import chunks, in_order

LIMITS = (512, 1024, 2048, 4096, 8192)
NEAR_THRESHOLD = 0.9  # the default of `clean`
PRINTED_LANGUAGES = 12  # --report has all


def main(argv: list[str]) -> None:
    """Print the counts and the estimate; the tally goes to stderr. Raises UserError."""
    given = flags().parse_args(argv)
    files = find_files(given.inputs)
    taken = {place_of(file): "one of --in" for file in files}
    for flag, file in (("--out", given.out), ("--report", given.report)):
        if file:
            check_output(flag, file, taken)
            taken[place_of(file)] = flag
    rate, source = _rate(given)
    settings = _settings(given)
    with ExitStack() as stack:  # a path that cannot be written fails before the work
        picture = stack.enter_context(written_whole(given.out, "--out")) if given.out else None
        report = (
            stack.enter_context(written_whole(given.report, "--report")) if given.report else None
        )
        counts, duplicates = _counted(files, settings, given.processes)
        names = ", ".join(map(str, given.inputs))
        if not counts.examples:
            raise UserError(f"{names}: found no dialogue to train on ({counts.tally}).")
        facts = _facts(counts, duplicates, settings, given, rate)
        if picture:
            limits = [*settings.limits]
            write_picture(counts.lengths, facts["unit"], names[-80:], limits, picture)
        if report:
            text = json.dumps(facts, indent=1, ensure_ascii=False)
            report.write_text(text + "\n", encoding="utf-8")
    print("\n".join(_lines(facts, counts, settings, source)))
    print(counts.tally, file=sys.stderr)


def flags() -> argparse.ArgumentParser:
    """Return the command's parser."""
    about = "Count dialogues and tokens, and estimate the training time."
    command = parser("stats", about, out=False)
    own = command.add_argument_group("stats")
    own.add_argument("--out", "--png", type=Path, metavar="PNG", help="a histogram of the lengths")
    own.add_argument(
        "--model_name_or_path", metavar="FOLDER",
        help="model whose tokenizer and template are used; the default is to count characters",
    )  # fmt: skip
    add_flags(own)
    text = "maximum tokens of a dialogue, as in training"
    own.add_argument("--model_max_length", type=int, default=2048, metavar="TOKENS", help=text)
    text = "examples per step"
    own.add_argument("--global_batch_size", type=int, default=8, metavar="EXAMPLES", help=text)
    text = "passes over the data"
    own.add_argument("--num_train_epochs", type=float, default=3.0, metavar="EPOCHS", help=text)
    text = "training speed, to estimate the training time"
    own.add_argument("--tokens_per_second", type=float, metavar="TOKENS", help=text)
    text = "take the training speed from a run, such as runs/main_job"
    own.add_argument("--like", type=Path, metavar="RUN", help=text)
    return command


def _settings(given: argparse.Namespace) -> Settings:
    """Return the settings of the count; raises UserError for invalid flags."""
    for name in ("model_max_length", "global_batch_size", "num_train_epochs", "tokens_per_second"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: expected a number above 0.")
    name, bad = given.model_name_or_path, given.on_bad_record
    if name is None:
        names = ("template", "chat_template", "chat_template_name", "chat_template_kwargs")
        unused = [f for f in names if getattr(given, f)]
        if unused:
            raise UserError(f"--{unused[0]}: needs a tokenizer. Give --model_name_or_path.")
        return Settings(None, "vicuna", None, bad, ())
    template, text = template_of(given)
    limits = tuple(sorted({*LIMITS, given.model_max_length}))
    return Settings(name, template, text, bad, limits, rendering_of(given, template))


def _rate(given: argparse.Namespace) -> tuple[float | None, str]:
    """Return the tokens per second for the estimate, and their source in words."""
    if given.like is None:
        return given.tokens_per_second, "--tokens_per_second"
    if given.tokens_per_second:
        raise UserError("found both --tokens_per_second and --like; expected one of them.")
    file = given.like / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rates = [float(json.loads(line)["tokens_per_second"]) for line in lines]
    except OSError as error:
        raise UserError(f"--like {given.like}: {file.name}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--like {given.like}: {file.name} is not the log of a run.") from None
    rates = rates[1:] or rates  # the first step includes the warm-up
    if not rates or not 0 < statistics.median(rates) < math.inf:
        raise UserError(f"--like {given.like}: {file.name} has no tokens_per_second yet.")
    return statistics.median(rates), f"the median of {given.like}, for its model and machine"


def _counted(files: list[Path], settings: Settings, processes: int) -> tuple[Counts, Counter[str]]:
    """Return the counts of all files, and the number of duplicates by cause."""
    total, duplicates = Counts(), Counter[str]()
    # SQLite puts a database without a name into a temporary file.
    with (
        closing(sqlite3.connect("", isolation_level=None)) as base,
        tqdm(desc="stats", unit=" records", disable=None) as progress,
    ):
        seen = Seen(base, NEAR_THRESHOLD)
        base.execute("BEGIN")
        for part in in_order(partial(measure, settings), chunks(files), processes):
            total.add(part)
            for exact, near in part.seen:
                if cause := seen.cause(exact, near):
                    duplicates[cause] += 1
            progress.update(part.tally.read)
    return total, duplicates


def _facts(
    counts: Counts,
    duplicates: Counter[str],
    settings: Settings,
    given: argparse.Namespace,
    rate: float | None,
) -> dict[str, Any]:
    """Return the report; like all reports of preparations, it begins with read, kept, dropped."""
    tally, length = counts.tally, given.model_max_length
    # Only IDS_PER_CAUSE ids of a cause are kept. If there are more, the report has their number.
    dropped = {
        cause: tally.named[cause] if len(tally.named[cause]) == count <= IDS_PER_CAUSE else count
        for cause, count in sorted(tally.dropped.items())
    }
    cut = counts.cuts.get(length)
    trained = counts.examples - (cut.nothing_left if cut else 0)
    batch = min(given.global_batch_size, max(trained, 1))
    per_epoch = math.ceil(trained / batch)
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
    facts["duplicates"] = dict(sorted(duplicates.items()))
    facts["cut_at"] = {str(limit): vars(one) for limit, one in counts.cuts.items()}
    facts["estimate"] = {
        "model_max_length": length,
        "examples": trained,
        "examples_per_step": batch,
        "epochs": given.num_train_epochs,
        "steps_per_epoch": per_epoch,
        "steps": math.ceil(given.num_train_epochs * per_epoch),
        "tokens_per_second": rate,
        "seconds": seconds,
    }
    return facts


def _lines(facts: dict[str, Any], counts: Counts, settings: Settings, source: str) -> list[str]:
    """Return the printed report."""
    unit, quantiles = facts["unit"], facts["quantiles"]
    examples, length = facts["examples"], facts["length"]
    languages = [*facts["languages"].items()]
    shown = [
        f"{code} {_share(count, counts.dialogues)}" for code, count in languages[:PRINTED_LANGUAGES]
    ]
    shown += [f"{len(languages) - PRINTED_LANGUAGES} more"] * (len(languages) > PRINTED_LANGUAGES)
    duplicates = [f"{cause}: {count:,}" for cause, count in facts["duplicates"].items()]
    rows = {
        "dialogues": f"{facts['dialogues']:,}",
        "rounds": f"{facts['rounds']:,} ({facts['answers']:,} answers)",
        unit: f"{length:,}; per example: mean {length / examples:,.0f}, "
        f"median {quantiles['0.5']:,}, 90 % up to {quantiles['0.9']:,}, "
        f"99 % up to {quantiles['0.99']:,}, maximum {quantiles['1']:,}",
        "supervised": f"{facts['supervised']:,} {unit} ({_share(facts['supervised'], length)})",
        "languages": ", ".join(shown),
        "duplicates": ", ".join(duplicates) or "none",
    }
    if settings.template == "t5":
        rows["pairs"] = f"{examples:,}; an example is a pair, with the length of its longer side"
    width = max(map(len, rows)) + 2
    lines = [f"{name:{width}}{text}" for name, text in rows.items()]
    lines += ["", f"lengths in {unit}", *as_text(facts["histogram"]), ""]
    if settings.tokenizer is None:
        lines.append("Tokens, cuts and training time need --model_name_or_path.")
    else:
        lines += ["cut at     examples  tokens lost  supervised lost  without supervised tokens"]
    for limit, cut in counts.cuts.items():
        shares = [_share(cut.examples, examples), _share(cut.tokens, length)]
        shares += [_share(cut.supervised, facts["supervised"]), f"{cut.nothing_left:,}"]
        wide = zip(shares, (10, 13, 17, 28), strict=True)
        lines.append(f"{limit:>6,}  " + "".join(f"{share:>{n}}" for share, n in wide))
    return [*lines, "", *_estimated(facts["estimate"], source)]


def _estimated(estimate: dict[str, Any], source: str) -> list[str]:
    steps, rate, seconds = (estimate[name] for name in ("steps", "tokens_per_second", "seconds"))
    lines = [
        f"{steps:,} steps: {estimate['steps_per_epoch']:,} per epoch of "
        f"{estimate['examples']:,} examples, {estimate['examples_per_step']:,} per step, "
        f"{estimate['epochs']:g} epochs"
    ]
    if seconds is None:
        return [
            *lines,
            "no estimate of the training time: it needs --model_name_or_path, and "
            "--tokens_per_second or --like",
        ]
    minutes = math.ceil(seconds / 60)
    time = f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
    return [*lines, f"about {time} at {rate:,.0f} tokens/s ({source})"]


def _share(part: int, total: int) -> str:
    return f"{100 * part / max(total, 1):.1f} %"
