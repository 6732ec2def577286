"""A record of an unknown form is refused before torch and transformers are imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.sharegpt import Tally, read_dialogues
from data.errors import UserError
from tests.support.helpers import ROOT

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def refused(module: str, file: Path, *flags: str) -> str:
    """Run the command of a module in another process, and return its error and heavy imports."""
    code = (
        "import sys\n"
        f"from {module} import main\n"
        "from data.errors import UserError\n"
        "try: main(sys.argv[1:])\n"
        "except UserError as error: print(error, {'torch', 'transformers'} & {*sys.modules})\n"
    )
    words = ["--data_path", str(file), *flags]
    command = [sys.executable, "-c", code, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def saved(tmp_path: Path, *records: Any) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("module", ["loop.doctor.show", "loop.doctor.check"])
def test_an_unknown_form_is_refused_without_heavy_imports(module: str, tmp_path: Path) -> None:
    file = saved(tmp_path, CHAT, {"a": "Hi", "b": "Yo"})
    with pytest.raises(UserError) as training:
        [*read_dialogues([file], Tally())]
    assert refused(module, file) == f"{training.value} set()\n"


def test_what_training_skips_is_not_refused_at_first(tmp_path: Path) -> None:
    file = saved(tmp_path, CHAT, {"a": "Hi", "b": "Yo"})
    assert refused("loop.doctor.check", file, "--on_bad_record", "skip") == ""
