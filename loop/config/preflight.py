"""What can be known of a run in milliseconds: versions, packages, room, flags and ZeRO's stage."""

import importlib.metadata
import os
import platform
import shutil
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from loop.config.flags import ROOT, Config

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


# What an adapter's folder holds at least (bytes); the Saver reckons with all, before step 1.
LEAST = 64 << 10
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def together(found: list[str]) -> str:
    """Return problems as one message; several: numbered, a line each.

    >>> together(["first.", "second."])
    '2 problems\\n  1. first.\\n  2. second.'
    """
    if len(found) == 1:
        return found[0]
    lines = [f"{number}. {problem}" for number, problem in enumerate(found, 1)]
    return "\n  ".join([f"{len(found)} problems", *lines])


def problems(config: Config, stage: int | None = None) -> Iterator[str]:
    """Yield what is wrong; stage: of ZeRO, 0 without DeepSpeed, None where it is not known."""
    yield from outdated(CORE)
    yield from missing(config, stage)
    yield from backend_conflicts(config, stage)
    # The first rank alone reads prompts, and writes.
    if os.environ.get("RANK", "0") == "0":
        yield from lost_prompts(config)
        output = Path(config.output_dir).expanduser()
        if output.exists() and not output.is_dir():
            yield f"--output_dir {output}: it is a file; expected a folder. Give another."
        yield from no_room(config, LEAST + base_copy(config))


def missing(config: Config, stage: int | None) -> Iterator[str]:
    """Yield the packages that are not there and that flags or launch ask for."""
    asked: dict[str, str] = {name: f"--report_to {name}" for name in config.report_to}
    asked["bitsandbytes"] = "--q_lora True" if config.q_lora else ""
    asked["flash_attn"] = "--flash_attn" if config.flash_attn else ""
    asked["deepspeed"] = f"an accelerate config with ZeRO-{stage}" if stage else ""
    instead = {
        "flash_attn": ", or leave the flag out: PyTorch's SDPA is used",
        "deepspeed": ", or launch with accelerate_configs/ddp.yaml or single_gpu.yaml",
    }
    for name, package in OPTIONAL.items():
        if asked.get(name) and version(package) is None:
            yield (
                f"{asked[name]}: the package {name} is not installed. Install it: pip install "
                f"{package}{instead.get(name, '')}."
            )


def backend_conflicts(config: Config, stage: int | None) -> Iterator[str]:
    """Yield the flags that cannot work under this backend."""
    if config.torch_compile and stage == 3:
        yield (
            "--torch_compile: found ZeRO-3, whose hooks stand between all parts of a layer; "
            "expected another backend. Leave it out, or launch accelerate_configs/zero2.yaml."
        )
    if config.lora_bias == "none":
        return
    if config.q_lora and stage == 0 and config.precision != "no":
        # bitsandbytes 0.50 casts a linear's bias in place (nn/modules.py, Linear4bit).
        yield (
            f"found --q_lora True with --lora_bias {config.lora_bias} in {config.precision}, "
            "where the biases would be trained without an fp32 master. Launch with "
            "accelerate_configs/zero2.yaml, which has one, or give --mixed_precision no."
        )
    if config.lora_weight_path and stage == 3 and not config.q_lora:
        yield (
            f"--lora_weight_path {config.lora_weight_path}: its biases cannot be put into a "
            "base model that ZeRO-3 has shared out. Launch with accelerate_configs/zero2.yaml."
        )


def lost_prompts(config: Config) -> Iterator[str]:
    """Yield the prompts that are meant as files, and are none."""
    for word in config.sample_prompts or ():
        named = word.endswith((".txt", ".json", ".jsonl"))
        named = named or word.startswith(("/", "./", "../", "~"))
        if named and len(word.split()) == 1 and not is_file(word):
            yield (
                f"--sample_prompts {word}: no such file; expected one with a prompt a line, or a "
                "question in words. Give a path that there is."
            )


def is_file(word: str) -> bool:
    """Whether a prompt is the path of a file."""
    try:
        return Path(word).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # A question may be too long for a name.
        return False


def base_copy(config: Config) -> int:
    """Return the bytes of the base model that the run saves, if it is asked to; else 0."""
    folder = Path(config.model_name_or_path or "").expanduser()
    if config.save_non_lora_state != "all" or not config.model_name_or_path:
        return 0
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def no_room(config: Config, needed: int) -> Iterator[str]:
    """Yield what is wrong where the output's disk has less than `needed` bytes free."""
    free = free_room(config)
    if free < needed:
        yield (
            f"--output_dir {config.output_dir}: found {free / 1e6:,.1f} MB free; expected at "
            f"least {needed / 1e6:,.1f} MB. Free some, or give another folder."
        )


def free_room(config: Config) -> int:
    """Return the free bytes where the output folder is, or will be."""
    place = Path(config.output_dir).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
