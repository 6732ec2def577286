"""Identifies a run: hashes and settings that must be equal when a checkpoint is resumed."""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from data.files.hashes import HASH_VERSION, value_sha256
from loop.config.flags import Config, names_of
from loop.inputs.training_data import TrainingData, data_sha256
from loop.model.base import tokenizer_sha256

SAMPLE_BYTES = 1 << 16  # of a weights file, hashed at three places
MAX_HEADER_BYTES = 100 * 10**6  # safetensors' own limit
TENSOR_BYTES = 256  # of each tensor, hashed at its middle
VERSION_FACT = "version of the hashes"


def run_facts(config: Config, data: TrainingData, global_batch_size: int) -> dict[str, Any]:
    """Return the facts that determine the result; their names are shown in error messages."""
    return {
        VERSION_FACT: HASH_VERSION,
        **hash_facts(config, data, HASH_VERSION),
        "data sources": [*data.source_sizes],
        "examples": len(data.examples),
        "examples a step": global_batch_size,
        **{f"--{name}": value for name, value in _plain(_result_settings(config)).items()},
    }


def hash_facts(config: Config, data: TrainingData, hash_version: int) -> dict[str, Any]:
    """Return the facts that are hashes, computed as by this version of `value_sha256` or before.

    Version 1 joined texts and bytes without boundaries; checkpoints without a version have it.
    """
    base, adapter = data.base, config.lora_weight_path
    template = str(base.tokenizer.chat_template if base.template == "chat" else "")
    samples = [
        _weights(base.name, "config.json", config),
        adapter and _weights(adapter, "adapter_config.json", config),
        _tensors(base.name),
        [template.encode()],
    ]
    base_hash, adapter_hash, tensors_hash, template_hash = [
        _sha256(sample, hash_version) if isinstance(sample, list) else sample for sample in samples
    ]
    return {
        "data (SHA-256)": data.sha256 if hash_version != 1 else data_sha256(config, 1),
        "base model (sampled SHA-256)": base_hash,
        "base model (sample of each tensor)": tensors_hash,
        "--lora_weight_path (sampled SHA-256)": adapter_hash,
        "tokenizer (SHA-256)": tokenizer_sha256(base.tokenizer, hash_version),
        "template": f"{base.template} {str(template_hash)[:12]}",
    }


def _result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine the result. Those that only split the work are omitted."""
    names = {*names_of(affects="encoding"), *names_of(affects="result")}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k in names}
    return {"precision": config.precision, **settings}


def _weights(base: str, settings: str, config: Config) -> str | list[bytes]:
    """Return the settings file, and each weights file's size, start, middle and end.

    A hash of everything would take minutes for a large model, and another model of the same shape
    differs in every sample. For a model from the hub, return its name and commit instead.
    """
    folder, hub = Path(base), {"cache_dir": config.cache_dir}
    if not folder.is_dir():
        return f"{base} {Path(str(cached_file(base, settings, **hub))).parent.name}"
    found = [(folder / settings).read_bytes()]
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    weights = [file for pattern in patterns for file in folder.glob(pattern)]
    for file in sorted(weights):
        size = file.stat().st_size
        found.append(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                opened.seek(start)
                found.append(opened.read(SAMPLE_BYTES))
    return found


def _tensors(base: str) -> str | list[bytes]:
    """Return each tensor's name, type, shape and bytes at its middle; "" on the hub.

    Single tensors of a model may have been replaced, which the samples of its files can miss. A
    damaged file is skipped here: loading the model names it.
    """
    folder, found = Path(base), list[bytes]()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        found.append(file.name.encode())
        with suppress(ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
            found.extend(_parts(file) if file.suffix == ".bin" else _samples(file))
    return found if folder.is_dir() else ""


def _parts(file: Path) -> Iterator[bytes]:
    """Yield name, size and checksum of each tensor in a file of torch.save, which is a ZIP file."""
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            yield f"{part.filename} {part.file_size} {part.CRC}".encode()


def _samples(file: Path) -> Iterator[bytes]:
    """Yield name, type, shape and a sample of each tensor in a safetensors file."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MAX_HEADER_BYTES:
            return
        header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items()):
            begin, end = tensor["data_offsets"]
            yield f"{name} {tensor['dtype']} {tensor['shape']}".encode()
            opened.seek(8 + size + max(begin, (begin + end - TENSOR_BYTES) // 2))
            yield opened.read(min(TENSOR_BYTES, end - begin))


def _sha256(parts: list[bytes], hash_version: int) -> str:
    if hash_version == 1:
        return hashlib.sha256(b"".join(parts)).hexdigest()
    return value_sha256("samples", parts)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as they are after a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
