"""Checks that take milliseconds: versions, packages, free disk, and flags against the backend."""

import importlib.metadata
import os
import platform
import shutil
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from data.errors import UserError
from loop.config.flags import ROOT, Config

# Packages whose versions are checked and reported, from the bottom of the stack up.
CORE = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers")
# Modules that a flag needs or that speed up a GPU, with their packages' names.
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
    """Return the installed version of a package without importing it; None: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(packages: Container[str] | None = None) -> list[Requirement]:
    """Return the requirements in pyproject.toml: all, or only those for `packages`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = [Requirement(line) for line in project["dependencies"]]
    return [needed for needed in known if packages is None or needed.name in packages]


def outdated(packages: Container[str] | None = None) -> Iterator[str]:
    """Yield an error for each installed package outside the range in pyproject.toml."""
    for needed in requirements(packages):
        found = version(needed.name)
        if found and not needed.specifier.contains(found, prereleases=True):
            yield (
                f"found {needed.name} {found}; expected {needed.specifier} (pyproject.toml). To "
                "install the tested version: pip install -r requirements.txt"
            )


def conflicts(packages: Container[str] | None = None) -> Iterator[str]:
    """Yield an error for each installed package that another package's requirements exclude.

    This is `pip check` for the packages in pyproject.toml, or only for `packages`.
    """
    for package in (needed.name for needed in requirements(packages)):
        if version(package) is None:
            continue
        for line in importlib.metadata.requires(package) or []:
            if "extra ==" in line:
                continue
            try:
                wanted = Requirement(line)
            except InvalidRequirement:  # Old packages use other syntaxes.
                continue
            if wanted.marker and not wanted.marker.evaluate():
                continue
            found = version(wanted.name)
            if found and not wanted.specifier.contains(found, prereleases=True):
                yield (
                    f"found {wanted.name} {found}; {package} {version(package)} expects "
                    f"{wanted.specifier}. To install the tested versions: pip install -r "
                    "requirements.txt"
                )


def version_rows() -> list[tuple[str, str]]:
    """Return the doctor's rows on versions: installed, different from tested, not installed."""
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
        ("tested", f"other versions: {', '.join(others)}" if others else "the same versions"),
    ]
    return rows + ([("not installed", ", ".join(absent))] if absent else [])


# Bytes of the smallest adapter folder. The Saver checks the complete requirement before step 1.
MIN_ADAPTER_BYTES = 64 << 10
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def together(problems: list[str]) -> str:
    """Return one message for all problems; several are numbered, one per line.

    >>> together(["first.", "second."])
    '2 problems\\n  1. first.\\n  2. second.'
    """
    if len(problems) == 1:
        return problems[0]
    lines = [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n  ".join([f"{len(problems)} problems", *lines])


def problems(config: Config, stage: int | None = None) -> Iterator[str]:
    """Yield every error. stage: the ZeRO stage; 0 without DeepSpeed; None before the launch."""
    yield from outdated(CORE)
    yield from missing(config, stage)
    yield from invalid_template_arguments(config)
    yield from backend_conflicts(config, stage)
    # Only rank 0 reads prompts and writes.
    if os.environ.get("RANK", "0") == "0":
        yield from missing_prompt_files(config)
        output = Path(config.output_dir).expanduser()
        if output.exists() and not output.is_dir():
            yield f"--output_dir {output}: found a file; expected a folder. Give another path."
        yield from no_room(config, MIN_ADAPTER_BYTES + base_copy(config))


def missing(config: Config, stage: int | None) -> Iterator[str]:
    """Yield an error for each missing package that a flag or the launch needs."""
    needed_by: dict[str, str] = {name: f"--report_to {name}" for name in config.report_to}
    needed_by["bitsandbytes"] = "--q_lora True" if config.q_lora else ""
    needed_by["flash_attn"] = "--flash_attn" if config.flash_attn else ""
    needed_by["deepspeed"] = f"an accelerate config with ZeRO-{stage}" if stage else ""
    alternatives = {
        "flash_attn": ", or leave the flag out: PyTorch's SDPA is used",
        "deepspeed": ", or launch with accelerate_configs/ddp.yaml or single_gpu.yaml",
    }
    for name, package in OPTIONAL.items():
        if needed_by.get(name) and version(package) is None:
            yield (
                f"{needed_by[name]}: the package {name} is not installed. Install it: pip install "
                f"{package}{alternatives.get(name, '')}."
            )


def invalid_template_arguments(config: Config) -> Iterator[str]:
    """Yield the error of --chat_template_kwargs that are no object or have a reserved name."""
    try:
        _ = config.rendering
    except UserError as error:
        yield str(error)


def backend_conflicts(config: Config, stage: int | None) -> Iterator[str]:
    """Yield an error for each flag that this backend does not support."""
    if config.torch_compile and stage == 3:
        yield (
            "--torch_compile: found ZeRO-3, whose hooks break up every layer's graph; expected "
            "another backend. Leave the flag out, or launch with accelerate_configs/zero2.yaml."
        )
    if config.lora_bias == "none":
        return
    if config.q_lora and stage == 0 and config.precision != "no":
        # bitsandbytes 0.50 casts the bias of a linear layer in place (nn/modules.py, Linear4bit).
        yield (
            f"found --q_lora True with --lora_bias {config.lora_bias} in {config.precision}, "
            "where the biases would be trained without an fp32 master copy. Launch with "
            "accelerate_configs/zero2.yaml, which keeps one, or give --mixed_precision no."
        )
    if config.lora_weight_path and stage == 3 and not config.q_lora:
        yield (
            f"--lora_weight_path {config.lora_weight_path}: found ZeRO-3, which partitions the "
            "base model, so an adapter's biases cannot be loaded into it. Launch with "
            "accelerate_configs/zero2.yaml."
        )


def missing_prompt_files(config: Config) -> Iterator[str]:
    """Yield an error for each prompt that looks like a path, but is not a file."""
    for word in config.sample_prompts or ():
        path_like = word.endswith((".txt", ".json", ".jsonl"))
        path_like = path_like or word.startswith(("/", "./", "../", "~"))
        if path_like and len(word.split()) == 1 and not is_file(word):
            yield (
                f"--sample_prompts {word}: no such file; expected a file with one prompt per line, "
                "or a question. Give an existing file."
            )


def is_file(word: str) -> bool:
    """Return whether a prompt is the path of a file."""
    try:
        return Path(word).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # A question can be too long for a file name.
        return False


def base_copy(config: Config) -> int:
    """Return the bytes of the base model if the run saves a copy of it, else 0."""
    folder = Path(config.model_name_or_path or "").expanduser()
    if config.save_non_lora_state != "all" or not config.model_name_or_path:
        return 0
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def no_room(config: Config, needed: int) -> Iterator[str]:
    """Yield an error if the disk of the output folder has less than `needed` bytes free."""
    free = free_room(config)
    if free < needed:
        yield (
            f"--output_dir {config.output_dir}: found {free / 1e6:,.1f} MB free; expected at "
            f"least {needed / 1e6:,.1f} MB. Free disk space, or give another folder."
        )


def free_room(config: Config) -> int:
    """Return the free bytes on the disk of the output folder, which need not exist yet."""
    folder = Path(config.output_dir).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
