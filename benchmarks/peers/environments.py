"""Creates the virtual environments of the trainers that the benchmarks compare with.

python benchmarks/peers/environments.py [trl] [fastchat]
"""

import importlib.metadata
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path.home() / ".cache/lora-loop"
PACKAGES = {
    # For libraries that both use, TRL gets this project's versions.
    "trl": ("trl==1.16.0", "=transformers", "=peft", "=accelerate", "=bitsandbytes", "=datasets"),
    # FastChat is older than transformers 5, so it gets versions of its time.
    "fastchat": (
        *("fschat==0.2.36", "transformers==4.41.2", "accelerate==0.30.1", "peft==0.11.1"),
        *("numpy<2", "sentencepiece", "protobuf", "psutil", "setuptools<81", "=bitsandbytes"),
    ),
}


def peer_python(name: str) -> Path:
    """Return the Python of a trainer's environment; create the environment if it is missing."""
    folder = CACHE / f"{name}-step-time"
    python, done = folder / "bin/python", folder / "made"
    packages = [_package(word) for word in PACKAGES[name]]
    wanted = " ".join([importlib.metadata.version("torch"), *packages])
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"creating {folder}: takes minutes", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    # The same build of torch as here; if pip does not have it, the same version.
    torch = importlib.metadata.version("torch")
    if subprocess.run([*install, f"torch=={torch}"], check=False).returncode:
        subprocess.run([*install, f"torch=={torch.partition('+')[0]}"], check=True)
    subprocess.run([*install, *packages], check=True)
    done.write_text(wanted)
    return python


def is_made(name: str) -> bool:
    """Return whether the environment of a trainer exists."""
    return (CACHE / f"{name}-step-time/made").exists()


def _package(word: str) -> str:
    """Return pip's argument for a package; `=name` is the version pinned in requirements.txt."""

    if not word.startswith("="):
        return word
    pins = (ROOT / "requirements.txt").read_text()
    found = re.search(rf"^{word[1:]}==\S+$", pins, re.MULTILINE)
    assert found, f"requirements.txt has no pin of {word[1:]}"
    return found[0]


if __name__ == "__main__":
    for trainer in sys.argv[1:] or PACKAGES:
        started = time.perf_counter()
        print(f"{peer_python(trainer)}: {time.perf_counter() - started:.0f} s")
