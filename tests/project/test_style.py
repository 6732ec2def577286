"""The budgets and import directions that keep the project readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted([*ROOT.glob("loop/*.py"), *ROOT.glob("data/*.py")])
FILES = sorted([*CODE, *ROOT.glob("tests/*.py")])

# Who may import whom inside loop/: each module only from rows above its own.
LAYERS = [
    [
        *("flags", "compat", "leave", "state", "checkpoint", "launch", "targets", "fp32"),
        *("curves", "shards", "quiet", "sections", "questions"),
    ],
    ["clock", "dealing", "attention", "cpu", "page"],
    ["config", "new_tokens", "zero_file", "picture", "guard"],
    [
        *("embedded", "windows", "utils", "non_lora", "settings", "deltas", "data_files"),
        *("metrics", "versions", "doctor_flags"),
    ],
    ["summary", "preflight"],
    ["zero", "base", "objective", "optim", "shape_t5"],
    ["backend", "prepare", "shape"],
    ["quantize", "kernels", "run", "output", "fingerprints"],
    ["model", "resume", "fit", "samples", "estimate_t5"],
    ["trackers", "adapter", "estimate"],
    ["tracking", "base_tensors", "proof"],
    ["saver", "to_gguf", "rounding"],
    ["evaluation", "traffic", "show"],
    ["overview"],
    ["launches"],
    ["trial", "machine", "findings"],
    ["outlook"],
    ["examination"],
    ["train", "chat", "merge", "check", "doctor", "plot", "dashboard"],
    ["__main__", "__init__"],
]
ONLY_IN = {
    "deepspeed": {"loop/state.py", "loop/zero_file.py", "loop/fp32.py"},
    "matplotlib": {"loop/picture.py", "data/histogram.py"},
    "trackio": {"loop/trackers.py"},
    "wandb": {"loop/trackers.py"},
    "wandb_workspaces": {"loop/dashboard.py"},
}


def imports(path: Path) -> list[str]:
    """Return the modules a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function of a file, methods and nested ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_functions_and_lines_keep_their_budgets(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 100
    long = [f.name for f in functions(path) if (f.end_lineno or 0) - f.lineno + 1 > 50]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_says_first_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith('"""')


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_the_loop_fits_on_one_screen() -> None:
    train = next(f for f in functions(ROOT / "loop/train.py") if f.name == "train")
    blocks = [node for node in train.body if isinstance(node, ast.With)]
    loop = next(node for node in blocks if isinstance(node.body[-1], ast.For))
    assert (loop.end_lineno or 0) - loop.lineno + 1 <= 45
    assert (train.end_lineno or 0) - train.lineno + 1 <= 50
    assert not [node for node in ast.walk(loop) if isinstance(node, ast.If)]


def test_data_imports_nothing_of_loop_and_no_accelerate() -> None:
    for path in ROOT.glob("data/*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"loop", "accelerate", "deepspeed", "peft"}, path


def test_imports_in_loop_run_one_way() -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    modules = {path.stem for path in ROOT.glob("loop/*.py")}
    assert modules == {*level}, "name every module in LAYERS"
    for path in ROOT.glob("loop/*.py"):
        for name in imports(path):
            if name.startswith("loop."):
                target = name.removeprefix("loop.")
                assert level[target] < level[path.stem], f"{path.name} imports {target}"


@pytest.mark.parametrize("package", ["bitsandbytes", "trl", *ONLY_IN])
def test_heavy_packages_are_imported_where_they_belong_only(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in CODE
        if package in {name.partition(".")[0] for name in imports(path)}
    }
    assert users <= ONLY_IN.get(package, set())


def test_no_module_is_named_like_a_dependency() -> None:
    taken = {"datasets", "evaluate", "tokenizers", "tokenize", "types", "logging", "torch"}
    assert not {path.stem for path in CODE} & taken


def test_the_trainer_of_transformers_is_used_nowhere() -> None:
    names = {
        alias.name
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not [name for name in names if name.endswith(("Trainer", "TrainingArguments"))]
    assert "transformers.Trainer" not in "".join(path.read_text() for path in CODE)
