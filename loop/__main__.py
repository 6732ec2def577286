"""`python -m loop show|chat|merge|check|doctor|plot|dashboard …`: dispatch only."""

import importlib
import sys

from data.errors import UserError
from loop.flags import nearest
from loop.leave import run_and_exit

COMMANDS = {
    "plot": "a run's curves, or several runs' in one picture: PNG and HTML",
    "dashboard": "a workspace at wandb for what this loop logs",
    "show": "how dialogues are tokenised and which tokens are supervised",
    "check": "whether a launch's flags are right, within a second",
    "doctor": "all that can be known of a run before it costs anything",
    "chat": "talk to an adapter, or compare it with its base",
    "merge": "write base model and adapter as one model, and prove it",
}


def main() -> None:
    """Run the command named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  python -m loop {command:10} {text}" for command, text in COMMANDS.items()]
        print("\n".join([*lines, "Each has --help. Training: ./launch.sh --help"]))
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: unknown command.{nearest(name, [*COMMANDS])} See --help.")
    importlib.import_module(f"loop.{name}").main(sys.argv[2:])


run_and_exit(main)
