"""How many tensors are laid out in several files, with the index that transformers reads."""

import json
from collections.abc import Mapping


def cut(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Return the names in order, one list a file.

    `sizes`: bytes of each tensor. `most`: bytes of a file, but for a single larger tensor.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def name_of(stem: str, number: int, count: int) -> str:
    """Return the name of a file, of which there are so many; they are numbered from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def index(places: Mapping[str, str], size: int) -> str:
    """Return the index as JSON: the file of each tensor, and the bytes of all."""
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1) + "\n"
