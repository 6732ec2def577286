"""What the data is: the hash of its files, and its name for a person."""

import hashlib
from pathlib import Path

from data.dialogues.sources import files_of
from data.files.hashes import file_sha256
from loop.config.flags import DUMMY_DATA, Config, shown


def data_sha256(config: Config) -> str:
    """Return the SHA-256 of the data's file, or of the hashes of several and of their weights.

    Beside --preprocessed_path they are remembered. Raises UserError where a file cannot be read.
    """
    hashes, memory = [], None
    if config.preprocessed_path:
        kept = Path(config.preprocessed_path).expanduser()
        memory = kept.with_name(f".{kept.name}.hashes")
    for source in config.sources:
        hashes += [file_sha256(file, memory) for file in files_of(source, config.cache_dir)]
        hashes += [f"x {source.weight}"] if source.weight != 1.0 else []
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(str(hashes).encode()).hexdigest()


def data_shown(config: Config) -> str:
    """Return the names of the data as a person reads them."""
    return ", ".join(map(shown, config.data_path or [DUMMY_DATA]))
