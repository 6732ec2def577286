"""Names of data files: the suffixes of formats and compressions, and files that hold no records."""

from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".zip")
COMPRESSIONS = (".gz", ".zst", ".zstd", ".xz", ".bz2")
# Files without records that `datasets` writes next to the Arrow files of a folder.
ARROW_METADATA = ("dataset_info.json", "state.json", "dataset_dict.json")


def kind_of(path: PurePath) -> str | None:
    """Return the suffix of the format, such as ".json"; a suffix of compression is ignored."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def without_metadata(names: Sequence[str]) -> list[str]:
    """Return the relative paths of data files: hidden files and metadata are left out."""
    found = []
    for name in names:
        path = PurePosixPath(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if kind_of(path) and not hidden:
            found.append(name)
    if any(kind_of(PurePosixPath(name)) == ".arrow" for name in found):
        found = [name for name in found if PurePosixPath(name).name not in ARROW_METADATA]
    return found
