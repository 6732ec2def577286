"""`python -m loop show|chat|merge|check|doctor|plot|dashboard …`: dispatch only."""

import importlib
import sys

from data.errors import UserError
from loop.config.parser import nearest
from loop.distributed.signals import run_and_exit

# peft 0.21 imports bitsandbytes wherever it is installed (helpers.py), which takes seconds and
# fails where it does not fit the GPU driver. Blocked until --q_lora needs it (quantization.py).
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]

# Command -> its module in loop/, and its line of --help.
COMMANDS = {
    "plot": ("monitor.plots", "a run's curves, or several runs' in one picture: PNG and HTML"),
    "dashboard": ("monitor.wandb_workspace", "a workspace at wandb for what this loop logs"),
    "show": ("doctor.show", "how dialogues are tokenised and which tokens are supervised"),
    "check": ("doctor.check", "whether a launch's flags are right, within a second"),
    "doctor": ("doctor.command", "all that can be known of a run before it costs anything"),
    "chat": ("adapters.chat", "talk to an adapter, or compare it with its base"),
    "merge": ("adapters.merge", "write base model and adapter as one model, and prove it"),
}


def main() -> None:
    """Run the command named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  python -m loop {command:10} {text}" for command, (_, text) in COMMANDS.items()]
        print("\n".join([*lines, "Each has --help. Training: ./launch.sh --help"]))
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: unknown command.{nearest(name, [*COMMANDS])} See --help.")
    importlib.import_module(f"loop.{COMMANDS[name][0]}").main(sys.argv[2:])


run_and_exit(main)
