"""Which packages are installed, in which versions, and which of them do not go together."""

import importlib.metadata
import platform
import tomllib
from collections.abc import Container, Iterator

from packaging.requirements import InvalidRequirement, Requirement

from loop.config.flags import ROOT

# What a run is computed by, in the order of a stack.
CORE = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers")
# What some flags ask for, or a GPU runs quicker with, each by the name to install it by.
OPTIONAL = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "bitsandbytes": "bitsandbytes",
    "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel",
    "deepspeed": "deepspeed",
}


def version(package: str) -> str | None:
    """Return the installed version of a package, without importing it; None: not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(packages: Container[str] | None = None) -> list[Requirement]:
    """Return the packages and ranges of pyproject.toml; of all, or of these."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = [Requirement(line) for line in project["dependencies"]]
    return [needed for needed in known if packages is None or needed.name in packages]


def outdated(packages: Container[str] | None = None) -> Iterator[str]:
    """Yield the installed packages whose versions the code was not written for."""
    for needed in requirements(packages):
        found = version(needed.name)
        if found and not needed.specifier.contains(found, prereleases=True):
            yield (
                f"found {needed.name} {found}; expected {needed.specifier} (pyproject.toml). What "
                "is tested: pip install -r requirements.txt"
            )


def conflicts(packages: Container[str] | None = None) -> Iterator[str]:
    """Yield the installed packages that another one, which the loop needs, does not take.

    As `pip check`, for those of pyproject.toml, or for these.
    """
    for package in (needed.name for needed in requirements(packages)):
        if version(package) is None:
            continue
        for line in importlib.metadata.requires(package) or []:
            if "extra ==" in line:
                continue
            try:
                wanted = Requirement(line)
            except InvalidRequirement:  # some old package's own way to write one
                continue
            if wanted.marker and not wanted.marker.evaluate():
                continue
            found = version(wanted.name)
            if found and not wanted.specifier.contains(found, prereleases=True):
                yield (
                    f"found {wanted.name} {found}; {package} {version(package)} expects "
                    f"{wanted.specifier}. What is tested: pip install -r requirements.txt"
                )


def version_rows() -> list[tuple[str, str]]:
    """Return which versions are installed, and where they are not the tested ones."""
    installed = [f"{name} {version(name) or 'missing'}" for name in CORE]
    pinned = [
        Requirement(line)
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    others = [
        f"{pin.name} {version(pin.name) or 'missing'} ({str(pin.specifier).removeprefix('==')})"
        for pin in pinned
        if not pin.specifier.contains(version(pin.name) or "0")
    ]
    absent = [name for name, package in OPTIONAL.items() if version(package) is None]
    rows = [
        ("installed", f"Python {platform.python_version()}, {', '.join(installed)}"),
        ("tested", f"other than here: {', '.join(others)}" if others else "these very versions"),
    ]
    return rows + ([("not there", ", ".join(absent))] if absent else [])
