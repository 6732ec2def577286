"""Reads the fields of a config dataclass from the command line and a YAML file."""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from data.errors import UserError, collect_errors

TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")

# --help shows the annotation as the flag's value: the unit of a number, or the kind of a path.
File = Annotated[str, "FILE"]
Folder = Annotated[str, "FOLDER"]
Model = Annotated[str, "FOLDER|NAME"]
Tokens = Annotated[int, "TOKENS"]
Examples = Annotated[int, "EXAMPLES"]
Steps = Annotated[int, "STEPS"]
Epochs = Annotated[float, "EPOCHS"]
Minutes = Annotated[float, "MINUTES"]
Share = Annotated[float, "SHARE"]

# What a change of a setting affects:
# - encoding: token ids and labels. Part of the cache key of encoded data, and compared on resume.
# - result: the trained weights. Compared on resume.
# - layout: how the work is split or computed. Results change in their last digits only.
# - precision: `Config.precision`. It is compared instead of the flags that set it.
# - report only: logs, trackers, limits on errors. May differ between ranks.
Affects = Literal["encoding", "result", "layout", "precision", "report only"]
# How a new run compares a setting with that of a finished run in its folder: by value, as a
# resolved path, or not at all.
FinishedCheck = Literal["value", "path", "no"]


def flag(
    default: Any,
    help: str,
    group: str,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    *,
    flag_only: bool = False,
    affects: Affects | None = None,
    is_path: bool = False,
    finished_check: FinishedCheck = "value",
    in_trial: Any = ...,
) -> Any:
    """Declare one field of a config dataclass as a flag.

    flag_only: a boolean that a `--config` file cannot switch on.
    affects: see `Affects`.
    is_path: the value is a path or may be one, so it may differ between machines.
    finished_check: see `FinishedCheck`.
    in_trial: the value in `doctor --trial`; `...`: unchanged.
    """
    bounds = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {
        "help": help,
        "group": group,
        "bounds": bounds,
        "flag_only": flag_only,
        "affects": affects,
        "is_path": is_path,
        "finished_check": finished_check,
        "in_trial": in_trial,
    }
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    config_type: type[Any],
    argv: Sequence[str],
    description: str,
    ignored: Container[str] = (),
    aliases: Mapping[str, str] | None = None,
    errors: list[str] | None = None,
) -> dict[str, Any]:
    """Return the values given by flags or by the `--config` file, converted and range-checked.

    Flags override the file. The file's keys in `ignored` are skipped, those in `aliases` renamed.
    Raises UserError for an unknown name or an invalid value; with a list `errors`, appends the
    error to it instead and leaves the value out.
    """
    parser = parser_of(config_type, description)
    known, unknown = parser.parse_known_args([_underscores(argument) for argument in argv])
    flags = [option for action in parser._actions for option in action.option_strings]
    for place, word in enumerate(unknown):
        if word.startswith("--") or place == 0:  # The words after an unknown flag are its values.
            name = word.partition("=")[0]
            with collect_errors(errors):
                raise UserError(f"{name}: unknown flag.{nearest(name, flags)} See --help.")
    raw, values = vars(known), dict[str, Any]()
    if "config" in raw:
        values["config"] = file = raw.pop("config")[-1]
        with collect_errors(errors):
            values |= _read_yaml(config_type, Path(file), ignored, aliases or {}, errors)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    for name, field in fields.items():
        if field.metadata["flag_only"] and values.get(name) and name not in raw:
            with collect_errors(errors):
                raise UserError(
                    f"--config {values['config']}: found {name}: True; expected it only on "
                    f"the command line. To allow it, give --{name} True next to --config."
                )
            del values[name]
    hints = get_type_hints(config_type)
    for name, words in raw.items():
        with collect_errors(errors):
            values[name] = convert(fields[name], hints[name], words, f"--{name}")
    return values


def convert(field: dataclasses.Field[Any], hint: Any, words: list[str], where: str) -> Any:
    """Convert a flag's words to its field's type, and check the range."""
    optional = type(None) in get_args(hint)
    kind = next(arg for arg in get_args(hint) if arg is not type(None)) if optional else hint
    if optional and len(words) == 1 and words[0].lower() in ("none", "null", ""):
        return None
    if get_origin(kind) is tuple:
        if not words:
            raise UserError(f"{where}: found no value; expected one or more words.")
        choices = get_args(get_args(kind)[0])
        return tuple(_one(_choices(choices), word, where) if choices else word for word in words)
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise UserError(f"{where}: found {len(words)} values; expected one.")
    expected = _choices(get_args(kind)) if get_origin(kind) is Literal else kind
    value = _one(expected, words[0], where)
    _check_bounds(value, field.metadata["bounds"], where)
    return value


def _one(kind: Any, word: str, where: str) -> Any:
    if isinstance(kind, tuple):
        if word not in kind:
            raise UserError(f'{where}: found "{word}"; expected one of {", ".join(kind)}.')
        return word
    if kind is bool:
        if word.lower() not in TRUE + FALSE:
            raise UserError(f'{where}: found "{word}"; expected True or False.')
        return word.lower() in TRUE
    names = {int: "a whole number", float: "a finite number", str: "a non-empty text"}
    try:
        value = kind(word)
        if value == "" or (kind is float and not math.isfinite(value)):
            raise ValueError
    except ValueError:
        raise UserError(f'{where}: found "{word}"; expected {names[kind]}.') from None
    return value


def _choices(values: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _check_bounds(value: Any, bounds: dict[str, float], where: str) -> None:
    holds = {
        "at least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "below": lambda bound: value < bound,
        "at most": lambda bound: value <= bound,
    }
    if not all(holds[name](bound) for name, bound in bounds.items()):
        expected = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items())
        raise UserError(f"{where}: found {value}; expected a value {expected}.")


def _read_yaml(
    config_type: type[Any],
    path: Path,
    ignored: Container[str],
    aliases: Mapping[str, str],
    errors: list[str] | None,
) -> dict[str, Any]:
    try:
        # BaseLoader leaves every value a string. YAML 1.1 types 1e-3 as text and `no` as a boolean.
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"--config {path}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: expected lines `key: value`.")
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    hints, values = get_type_hints(config_type), {}
    for key, value in loaded.items():
        if key in ignored:
            continue
        key = aliases.get(key, key)
        where = f"--config {path}: {key}"
        with collect_errors(errors):
            if key not in fields:
                raise UserError(f"{where}: unknown key.{nearest(str(key), list(fields))}")
            if isinstance(value, dict):
                raise UserError(f"{where}: found a mapping; expected a value.")
            words = [str(item) for item in (value if isinstance(value, list) else [value])]
            values[key] = convert(fields[key], hints[key], words, where)
    return values


def nearest(name: str, known: list[str]) -> str:
    """Return "Did you mean X?" for the most similar known name, else an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _underscores(argument: str) -> str:
    """Return --lora_r for --lora-r."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the type of a flag's value instead of argparse's `[VALUE ...]`."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar or default_metavar)


def parser_of(config_type: type[Any], description: str) -> argparse.ArgumentParser:
    """Return the argument parser. It keeps values as lists of words for `convert`."""
    # The docstring of a command starts with its call: "`python -m loop chat`: ...".
    command, described, text = description.removeprefix("`").partition("`: ")
    parser = _Parser(
        usage=f"{command} [--flag value ...]" if described else "[--flag value ...]",
        description=f"{text[:1].upper()}{text[1:]}" or description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Help,
    )
    # argparse's own pattern takes -1e-4 for a flag.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.add_argument(
        "--config", nargs=1, metavar="FILE", help="YAML file with these keys; flags override it"
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        name, default = field.metadata["group"], field.default
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        text = field.metadata["help"].replace("%", "%%")
        if default not in (None, ()):
            shown = " ".join(default) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        elif "none: " not in text:  # Otherwise the help describes the default itself.
            text += " (default: none)"
        # Both --prompt a b and --prompt a --prompt b work; for other flags the last one counts.
        action = "extend" if isinstance(default, tuple) else "store"
        group.add_argument(
            f"--{field.name}", nargs="*", action=action, help=text, metavar=_metavar(field.type)
        )
        if field.type is bool:
            off = f"--no_{field.name}"
            group.add_argument(
                off, dest=field.name, action="store_const", const=["false"], help=argparse.SUPPRESS
            )
    return parser


def _metavar(hint: Any) -> str:
    """Return what --help shows as the value of a flag of this type."""
    if get_origin(hint) is Annotated:
        return str(hint.__metadata__[0])
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if hint in (int, float, str, bool):
        return {int: "N", float: "X", str: "TEXT", bool: "True|False"}[hint]
    if get_origin(hint) is tuple:
        return f"{_metavar(get_args(hint)[0])} ..."
    return next(_metavar(part) for part in get_args(hint) if part is not type(None))
