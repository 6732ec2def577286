"""`python -m data COMMAND`: prepares dialogues. Each command is a module of data/preparation."""

import sys

from data.errors import UserError, printable

COMMANDS = {
    "look": "show what a file of dialogues holds, in ten lines",
    "convert": "convert dialogues of a known format to ShareGPT",
    "clean": "clean raw dialogues and remove duplicates",
    "split": "cut dialogues into pieces that fit the model",
    "stats": "count dialogues and tokens, and estimate the training time",
}


def main() -> None:
    """Run the command; a UserError is printed in one line, and sets the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        lines = [f"  python -m data {command:8} {text}" for command, text in COMMANDS.items()]
        print("\n".join([*lines, "Each command has --help."]))
        return
    if name not in COMMANDS:
        found = f"unknown command {name!r}" if name else __doc__
        print(f"{found}\nusage: python -m data {{{','.join(COMMANDS)}}} --help", file=sys.stderr)
        sys.exit(2)
    from importlib import import_module

    try:
        import_module(f"data.preparation.{name}").main(sys.argv[2:])
    except UserError as error:
        message = "\n".join(map(printable, str(error).split("\n")))
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
