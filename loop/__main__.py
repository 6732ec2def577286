"""`python -m loop COMMAND`: imports the command's module and calls its main()."""

import importlib
import sys

from data.errors import UserError
from loop.config.parser import nearest
from loop.distributed.signals import run_and_exit

# Block bitsandbytes: peft 0.21 imports it if it is installed (helpers.py). The import takes seconds
# and can fail (wrong GPU driver). --q_lora unblocks it (model/quantization.py).
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]

# Command -> module in loop/ and --help line.
COMMANDS = {
    "plot": ("monitor.plots", "plot the curves of one or several runs: PNG and HTML"),
    "dashboard": ("monitor.wandb_workspace", "create a wandb workspace for the metrics"),
    "show": ("doctor.show", "show how dialogues are tokenized and which tokens are supervised"),
    "check": ("doctor.check", "check the flags of a launch, within a second"),
    "doctor": ("doctor.command", "check a run and estimate its memory and time, before the launch"),
    "chat": ("adapters.chat", "chat with an adapter, or compare it with its base model"),
    "merge": ("adapters.merge", "merge base model and adapter into one model, and verify it"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  python -m loop {command:10} {text}" for command, (_, text) in COMMANDS.items()]
        print("\n".join([*lines, "Each command has --help. Training: ./launch.sh --help"]))
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: unknown command.{nearest(name, [*COMMANDS])} See --help.")
    importlib.import_module(f"loop.{COMMANDS[name][0]}").main(sys.argv[2:])


run_and_exit(main)
