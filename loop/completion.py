"""`python -m loop completion bash|zsh`: prints what lets a shell complete commands and flags.

Write it to a file once and have the shell read that: bash from .bashrc, zsh from .zshrc.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from data import clean, convert, split, stats
from data.errors import UserError
from loop.chat import ChatConfig
from loop.config import Config
from loop.dashboard import DashboardConfig
from loop.doctor_flags import DoctorConfig
from loop.flags import parser_of
from loop.merge import MergeConfig
from loop.plot import PlotConfig
from loop.show import ShowConfig

SHELLS = ("bash", "zsh")
LOOP: dict[str, Any] = {
    "show": ShowConfig,
    "chat": ChatConfig,
    "merge": MergeConfig,
    "check": Config,
    "doctor": DoctorConfig,
    "plot": PlotConfig,
    "dashboard": DashboardConfig,
}
DATA = {"clean": clean, "convert": convert, "split": split, "stats": stats}
# bash completes files itself where nothing is found; zsh wants to be told.
PLACES = {
    "FILE": {"bash": "", "zsh": "_files"},
    "FOLDER": {"bash": "", "zsh": "_files -/"},
}
# `python -m loop ...` is completed as a command named loop, all else as before.
PYTHON = {
    "bash": """
# What bash-completion has for it would be loaded at the first TAB only.
{ _comp_load python || _completion_loader python; } &>/dev/null || true
if [[ $(complete -p python 2>/dev/null) != *_lora_loop_python* ]]; then
  _lora_loop_before=$(complete -p python 2>/dev/null | sed -n 's/.*-F \\([^ ]*\\) .*/\\1/p')
fi
_lora_loop_python() {
  if [[ ${COMP_WORDS[1]} == -m && $COMP_CWORD -gt 2 && ${COMP_WORDS[2]} =~ ^(loop|data)$ ]]; then
    local words=("${COMP_WORDS[@]:2}") number=$((COMP_CWORD - 2))
    local COMP_WORDS=("${words[@]}") COMP_CWORD=$number
    "_shtab_${words[0]}"
  elif [[ -n $_lora_loop_before ]]; then
    "$_lora_loop_before" "$@"
  elif [[ ${COMP_WORDS[1]} == -m && $COMP_CWORD == 2 ]]; then
    COMPREPLY=($(compgen -W "loop data" -- "${COMP_WORDS[2]}"))
  fi
}
complete -o bashdefault -o default -F _lora_loop_python python python3
complete -r loop data
complete -o bashdefault -o default -F _shtab_launch_sh launch.sh
""",
    "zsh": """
_lora_loop_python() {
  if [[ $words[2] == -m && $CURRENT -gt 3 && $words[3] == (loop|data) ]]; then
    words=("${(@)words[3,-1]}")
    (( CURRENT -= 2 ))
    _shtab_$words[1]
  else
    _python "$@"
  fi
}
compdef _lora_loop_python python python3
compdef _shtab_launch_sh launch.sh
""",
}


def main(argv: Sequence[str]) -> None:
    """Print the script; raises UserError for another shell, or without shtab."""
    if [*argv] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) != 1 or argv[0] not in SHELLS:
        found = " ".join(argv) or "nothing"
        raise UserError(f"found {found}; expected a shell: {' or '.join(SHELLS)}.")
    try:
        import shtab
    except ImportError:
        raise UserError(
            "the package shtab is not installed. Install it: pip install shtab"
        ) from None
    (shell,) = argv
    # zsh: without its end, which registers loop and data as commands, if the file is not sourced.
    parts = [
        shtab.complete(parser, shell).partition("\nif [[ $zsh_eval_context")[0]
        for parser in parsers()
    ]
    print("\n".join([*parts, PYTHON[shell]]))


def parsers() -> list[argparse.ArgumentParser]:
    """Return what shtab reads: launch.sh, and `loop` and `data` as commands with commands."""
    launch = parser_of(Config, "")
    launch.prog = "launch.sh"
    words: Any = launch.add_argument("command", nargs="?", help="a config, or setup, or test")
    words.complete = {
        "bash": "_lora_loop_words",
        "zsh": "_files -g '*.yaml'",
        "preamble": {
            "bash": '_lora_loop_words() { compgen -W "setup test" -- "$1"; compgen -f -- "$1"; }'
        },
    }
    launch.add_argument("--max_restarts", metavar="N", help="start the ranks again so often")
    launch.add_argument("--until-done", action="store_true", help="go on after a crash or a stop")
    loop = {name: parser_of(kind, "") for name, kind in LOOP.items()}
    loop["completion"] = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    loop["completion"].add_argument("shell", choices=SHELLS)
    data = {name: module.flags() for name, module in DATA.items()}
    for parser in (launch, *loop.values(), *data.values()):
        _tell_values(parser)
    return [launch, _with_commands("loop", loop), _with_commands("data", data)]


def _tell_values(parser: argparse.ArgumentParser) -> None:
    """Give each flag its values or places, which --help tells, in the form that shtab reads."""
    for action in parser._actions:
        takes: Any = action.metavar or ""
        words = takes.removesuffix(" ...").split("|")
        if words[0] in PLACES:
            action.complete = PLACES[words[0]]  # type: ignore[attr-defined]
        elif len(words) > 1:
            action.choices = words
        if action.nargs == "*" and not takes.endswith(" ..."):
            action.nargs = None  # Behind its one value other flags follow.


def _with_commands(name: str, commands: dict[str, argparse.ArgumentParser]) -> Any:
    made = argparse.ArgumentParser(name, allow_abbrev=False)
    under = made.add_subparsers()
    for command, parser in commands.items():
        under.add_parser(command, parents=[parser], add_help=False, help=parser.description)
    return made
