"""Limits of length, import directions, and words that the project does not use."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted([*ROOT.glob("loop/**/*.py"), *ROOT.glob("data/**/*.py")])
FILES = sorted([*CODE, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])

# Each package imports only from the packages before it.
PACKAGES = [
    *("data.errors", "data.files", "data.dialogues", "data.encoding", "data.batching"),
    *("data.preparation", "data.bundled", "data.__main__"),
    *("loop.utils", "loop.config", "loop.distributed", "loop.model", "loop.inputs", "loop.monitor"),
    *("loop.checkpoint", "loop.training", "loop.doctor", "loop.adapters"),
    *("loop.train", "loop.__main__"),
]
INDEPENDENT = {("loop.adapters", "loop.doctor")}  # Neither imports the other.
ONLY_IN = {
    "deepspeed": {
        "loop/distributed/optimizer_state.py",
        "loop/distributed/deepspeed_config.py",
        "loop/model/quantization.py",
        "loop/utils.py",
    },
    "matplotlib": {"loop/monitor/plots.py", "data/preparation/histogram.py"},
    "trackio": {"loop/monitor/trackers.py"},
    "wandb": {"loop/monitor/trackers.py"},
    "wandb_workspaces": {"loop/monitor/wandb_workspace.py"},
}
# Former identifiers, each replaced by a field term.
FORMER_NAMES = (
    *("told_to_all", "first_rank_says", "from_first_rank", "join_ranks", "_meet_again", "Damaged"),
    *("Dealt", "begun_alike", "side_by_side", "unlearnt", "until_enough", "find_start", "AFRESH"),
    *("crossed", "put_master", "put_trained", "_is_shared_out", "keep_buckets"),
    *("NOT_COMPARED", "GROUPS_THAT_TRAIN", "WITHOUT_MEANING", "NOTHING_HELD_OUT", "lost_prompts"),
)
# Former phrases, each with its plain replacement.
FORMER_PHRASES = {
    "no token is run behind": "each sequence stops at its last supervised token",
    "beside a tracker": "and a tracker",
    "since the first decides the second": "the first sets the second",
    "a prompt a line": "one prompt per line",
    "these very versions": "the same versions",
    "docs/scaling.md": "docs/memory.md",
}


def imports(path: Path) -> list[str]:
    """Return the modules that a file imports, at its top or inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if is_module(name)]
            names += modules or [node.module]
    return names


def is_module(name: str) -> bool:
    """Return whether a name is a module of the project, not a name inside a module."""
    return ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function of a file, including methods and nested functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_lines_keep_their_budgets(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 450
    assert max(map(len, lines)) <= 100
    long = [f.name for f in functions(path) if (f.end_lineno or 0) - f.lineno + 1 > 50]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_starts_with_its_docstring(path: Path) -> None:
    assert path.read_text().startswith('"""')


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
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


def test_data_imports_neither_loop_nor_accelerate() -> None:
    for path in ROOT.glob("data/**/*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"loop", "accelerate", "deepspeed", "peft"}, path


def package_of(module: str) -> str:
    """Return the first two names: `loop.model` of `loop.model.load`."""
    return ".".join(module.split(".")[:2])


def test_imports_between_packages_run_one_way() -> None:
    for path in CODE:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = package_of(module)
        if own in ("loop.__init__", "data.__init__"):
            continue
        for name in imports(path):
            other = package_of(name)
            if other.startswith(("loop.", "data.")) and other != own:
                assert PACKAGES.index(other) < PACKAGES.index(own), f"{module} imports {name}"
                assert (own, other) not in INDEPENDENT, f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {}
    for path in CODE:
        parts = path.relative_to(ROOT).with_suffix("").parts
        arrows[".".join(parts)] = set(imports(path))
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"an import circle: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for other in sorted(arrows.get(module, ())):
            visit(other, (*trail, module))
        done.add(module)

    for module in arrows:
        visit(module, ())


@pytest.mark.parametrize("folder", ["loop", "data"])
def test_a_top_folder_has_at_most_12_entries(folder: str) -> None:
    entries = {
        path.name
        for path in (ROOT / folder).iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__")
    }
    assert len(entries) <= 12, entries


def test_init_files_hold_one_docstring_and_no_code() -> None:
    for path in [path for path in FILES if path.name == "__init__.py"]:
        (only,) = ast.parse(path.read_text()).body
        assert isinstance(only, ast.Expr), path
        assert isinstance(only.value, ast.Constant), path


@pytest.mark.parametrize("package", ["bitsandbytes", "trl", *ONLY_IN])
def test_heavy_packages_are_imported_only_in_their_modules(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in CODE
        if package in {name.partition(".")[0] for name in imports(path)}
    }
    assert users <= ONLY_IN.get(package, set())


def test_no_module_is_named_like_a_dependency() -> None:
    taken = {"datasets", "evaluate", "tokenizers", "tokenize", "types", "logging", "torch"}
    assert not {path.stem for path in CODE} & taken


def test_the_trainer_of_transformers_is_not_used() -> None:
    names = {
        alias.name
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not [name for name in names if name.endswith(("Trainer", "TrainingArguments"))]
    assert "transformers.Trainer" not in "".join(path.read_text() for path in CODE)


def test_no_former_name_or_phrase_is_left() -> None:
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    texts = [*FILES, *pages, ROOT / "launch.sh", *ROOT.glob("accelerate_configs/*.yaml")]
    names = re.compile(
        rf"\b({'|'.join(FORMER_NAMES)})\b|{'|'.join(map(re.escape, FORMER_PHRASES))}"
    )
    found = {
        str(path.relative_to(ROOT)): names.findall(path.read_text())
        for path in texts
        if path != Path(__file__).resolve() and names.search(path.read_text())
    }
    assert not found
