"""Recognises files that hold no records by their first bytes, with the command that helps."""

import re
import shlex

# What begins a file, its name, and the command that makes records of it; FILE is the file.
BINARIES: tuple[tuple[bytes, str, str], ...] = (
    (b"SQLite format 3\0", "an SQLite database",
     'sqlite3 -json FILE "select * from TABLE" > data.json'),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"\x89HDF\r\n", "an HDF5 file", ""),
    (b"%PDF", "a PDF document", ""),
    (b"\x89PNG", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"GGUF", "a GGUF model", ""),
    (b"\x7fELF", "a program", ""),
    (b"Obj\x01", "an Avro file", ""),
    (b"ORC", "an ORC file",
     "python -c \"from pyarrow import orc, parquet; "
     "parquet.write_table(orc.read_table('FILE'), 'data.parquet')\""),
    (b"FEA1", "a Feather file of version 1", ""),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x -oDATA FILE"),
    (b"Rar!", "a RAR archive", "unrar x FILE DATA/"),
    (b"\x04\x22\x4d\x18", "lz4 data", "lz4 -d FILE data.jsonl"),
)  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|\?xml)", re.I | re.S)
FAILED = re.compile(
    rb"\s*(404: Not Found|Entry not found|Not Found|Access denied|Access Denied|Invalid username"
    rb"|Repository not found|Unauthorized|Forbidden)[^{\[]{0,80}\s*\Z"
)
PICKLE = re.compile(rb"\x80[\x02-\x05]([\x95}\]cX(\x8c]|\x4b)")
SAFETENSORS = re.compile(rb"\A.{4}\0{4}\{\"", re.S)
HEAD = 1024  # bytes that are looked at


def check_head(head: bytes, name: str, path: str) -> str | None:
    """Return the message for a file without records, by its first HEAD bytes; None for others.

    name: of the file and its member. path: of the file.
    """
    file, folder = shlex.quote(path), shlex.quote(path.rpartition("/")[0] or ".")
    if head.startswith(LFS):
        base = shlex.quote(path.rpartition("/")[2])
        return (
            f"{name}: found a Git LFS pointer in place of the data; expected the file itself. "
            f'Fetch it: git -C {folder} lfs pull --include "{base}"'
        )
    if b"/annex/objects/" in head[:300] and head.startswith((b"/annex", b"../", b".git")):
        found = "found a git-annex pointer in place of the data"
        return f"{name}: {found}; expected the file itself. Fetch it: git annex get {file}"
    page = PAGE.match(head.removeprefix(b"\xef\xbb\xbf"))
    if page:
        kind = "XML" if page[1].startswith(b"?") else "an HTML page"
        return (
            f"{name}: found {kind} in place of the data, such as a login or an error page; "
            "expected JSON, JSONL, CSV, Parquet or Arrow. Download the file itself: a file of the "
            "Hugging Face hub has /resolve/ in its address, not /blob/, and GitHub's has /raw/. "
            "Or give the data set of the hub: --data_path owner/name"
        )
    if FAILED.match(head):
        text = " ".join(head[:60].decode("utf-8", "replace").split())
        return (
            f"{name}: found the answer {text!r} of a failed download; expected data. Download the "
            "file again, or give the data set of the hub: --data_path owner/name"
        )
    return _binary(head, name, file)


def _binary(head: bytes, name: str, file: str) -> str | None:
    kind, command = next(
        ((kind, command) for start, kind, command in BINARIES if head.startswith(start)), ("", "")
    )
    if head[257:262] == b"ustar":
        kind, command = "a tar archive", "mkdir DATA && tar -xf FILE -C DATA"
    elif PICKLE.match(head):
        kind = "a Python pickle, which may run any program when it is read"
        command = (
            "python -c \"import pandas; pandas.read_pickle('FILE').to_json('data.jsonl', "
            "orient='records', lines=True)\""
        )
    elif SAFETENSORS.match(head):
        kind = "weights in safetensors"
    if not kind:
        return None
    how = f" If you trust it, write its records as JSONL: {command}" if command else ""
    if command and not kind.startswith("a Python"):
        how = f" Read it so: {command.replace('DATA', 'data')}"
    how = how.replace("FILE", file if "'FILE'" not in how else file.strip("'"))
    expected = "expected JSON, JSONL, CSV, Parquet or Arrow"
    return f"{name}: found {kind}; {expected}.{how or ' Give the file with the records.'}"
