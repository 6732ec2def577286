"""Opens data files by their first bytes: compressed files, zip archives and what lies in them."""

import bz2
import codecs
import gzip
import io
import lzma
import shlex
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from data.errors import UserError
from data.files.json_stream import CHUNK, guess_encoding
from data.files.names import without_metadata
from data.files.refusals import HEAD, check_head
from data.files.splits import listed, select_split

GZIP, ZSTD, XZ, BZIP2 = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh"
ZIP, EMPTY_ZIP = b"PK\x03\x04", b"PK\x05\x06"
PARQUET, ARROW, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
SUFFIXES = {"gzip": (".gz",), "zstd": (".zst", ".zstd"), "xz": (".xz",), "bzip2": (".bz2",)}
XZ_MEMORY = 256 << 20  # bytes; `xz -9` needs 65 MiB
MAX_LAYERS = 3  # of archives and compression within each other
# An unpacked table is written to disk, because its reader goes to its end first. Tables are
# compressed themselves, so that a higher ratio is no table.
MAX_RATIO = 100
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, lzma.LZMAError)


def unpacked(
    stream: IO[bytes], path: Path, notes: Counter[str], name: str = "", layers: int = 0
) -> Iterator[tuple[str, Any, bytes]]:
    """Yield (name, stream, first bytes) of the file, or of each member of an archive.

    The streams are read in pieces of bounded size. Raises UserError for files that hold no data.
    """
    name = name or str(path)
    head = _peek(stream, name)
    if message := check_head(head, name, str(path)):
        raise UserError(message)
    kind = _compression(head)
    is_zip = head.startswith((ZIP, EMPTY_ZIP))
    if (kind or is_zip) and layers == MAX_LAYERS:
        raise UserError(
            f"{name}: found more than {MAX_LAYERS} archives within each other. Unpack the file."
        )
    if kind:
        if not name.lower().endswith(SUFFIXES[kind]):
            notes[f"files read as {kind}, by their bytes"] += 1
        yield from unpacked(_decompressed(kind, stream), path, notes, name, layers + 1)
    elif is_zip:
        with _on_disk(stream, path, name) if layers else stream as seekable:
            yield from _members(seekable, path, notes, name, layers)
    else:
        yield name, stream, head


def on_disk(stream: IO[bytes], path: Path, name: str) -> IO[bytes]:
    """Return a stream that can be read in any order: the stream itself if it is the file."""
    return stream if isinstance(getattr(stream, "raw", None), io.FileIO) else _on_disk(
        stream, path, name)  # fmt: skip


def recoded(stream: IO[bytes], encoding: str, name: str) -> IO[bytes]:
    """Return the stream in UTF-8; reading raises UserError for bytes of another encoding."""
    return io.BufferedReader(_Recoded(stream, encoding, name), CHUNK)


def check_encoding(encoding: str | None) -> None:
    """Raise UserError for an unknown name of an encoding."""
    try:
        known = encoding is None or codecs.lookup(encoding)._is_text_encoding
    except LookupError:
        known = False
    if not known:
        raise UserError(
            f"--encoding {encoding}: unknown; expected a name such as utf-16, cp1252, latin-1, "
            "cp1251, shift_jis or gb18030. Give one of them."
        )


def _peek(stream: IO[bytes], name: str) -> bytes:
    try:
        return bytes(cast(Any, stream).peek(HEAD)[:HEAD])
    except DAMAGED as error:
        raise UserError(
            f"{name}: its compression is damaged: {error}. Download or pack the file again."
        ) from None


def _compression(head: bytes) -> str | None:
    # Frames of zstd may begin with one that is skipped.
    skippable = head[1:4] == b"\x2a\x4d\x18" and head[:1] in map(bytes, zip(range(0x50, 0x60)))
    if head.startswith(ZSTD) or skippable:
        return "zstd"
    starts = {"gzip": GZIP, "xz": XZ, "bzip2": BZIP2}
    return next((kind for kind, start in starts.items() if head.startswith(start)), None)


def _decompressed(kind: str, stream: IO[bytes]) -> IO[bytes]:
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    raw = _Zstd(stream) if kind == "zstd" else _Limited(stream, kind)
    return io.BufferedReader(raw, CHUNK)


def _members(
    stream: IO[bytes], path: Path, notes: Counter[str], name: str, layers: int
) -> Iterator[tuple[str, Any, bytes]]:
    """Yield the streams of the data files of a zip archive."""
    unzip = f"unzip {shlex.quote(str(path))} -d data"
    try:
        with zipfile.ZipFile(stream) as archive:
            found = {one.filename: one for one in archive.infolist() if not one.is_dir()}
            if "[Content_Types].xml" in found:
                raise UserError(
                    f"{name}: found a document of Excel or Word; expected JSON, JSONL, CSV, "
                    'Parquet or Arrow. Save the sheet as "CSV UTF-8", and give that file.'
                )
            if any(one.endswith((".pkl", ".npy")) for one in found):
                raise UserError(
                    f"{name}: found an archive of PyTorch or NumPy ({listed(found)}); expected "
                    "JSON, JSONL, CSV, Parquet or Arrow. Give the file with the records."
                )
            names = without_metadata(sorted(found))
            names = names or [one for one in found if len(found) == 1]
            if not names:
                raise UserError(
                    f"{name}: found a zip archive with {listed(found) or 'no files'}; expected "
                    f"data files. Unpack it ({unzip}), and give its data files."
                )
            chosen, note = select_split(names, getattr(path, "part", None), name)
            notes[note] += 1
            for member in chosen:
                if found[member].flag_bits & 1:
                    raise UserError(
                        f"{name}/{member}: the archive is encrypted; expected one without a "
                        f"password. Unpack it with your password ({unzip}), and give data/{member}."
                    )
                with archive.open(member) as opened:
                    inner = f"{name}/{member}"
                    yield from unpacked(opened, path, notes, inner, layers + 1)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise UserError(
            f"{name}: not a complete zip archive: {error}. Download it again, or unpack it "
            f"({unzip}) and give its data files."
        ) from None


def _on_disk(stream: IO[bytes], path: Path, name: str) -> IO[bytes]:
    """Return a temporary file with the stream's bytes, at most MAX_RATIO times the file's."""
    made = cast(IO[bytes], tempfile.TemporaryFile(prefix="unpacked-"))  # noqa: SIM115
    most = path.stat().st_size * MAX_RATIO + CHUNK
    try:
        while piece := stream.read(CHUNK):
            made.write(piece)
            if made.tell() > most:
                raise UserError(
                    f"{name}: unpacks to more than {MAX_RATIO} times its size. Unpack it yourself "
                    "if you trust it, and give the files."
                )
    except DAMAGED as error:
        raise UserError(f"{name}: its compression is damaged: {error}. Pack it again.") from None
    made.seek(0)
    return made


class _Zstd(io.RawIOBase):
    """Decompresses consecutive zstd frames; raises EOFError for a damaged or truncated frame.

    The reader of zstandard 0.25 takes a truncated frame for a complete one.
    """

    def __init__(self, packed: IO[bytes]) -> None:
        import zstandard

        self.packed, self.error = packed, zstandard.ZstdError
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame, self.raw, self.within = self.new_frame(), b"", False
        self.waiting = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into the buffer; return their number, 0 only at the file's end."""
        while not (size := self.waiting.readinto(buffer)):
            # Only few bytes are read, because 4 bytes may decompress to 128 KiB.
            self.raw = self.raw or self.packed.read(256)
            if not self.raw:
                if self.within:
                    raise EOFError("its last frame is truncated")
                return 0
            try:
                self.waiting, self.within = io.BytesIO(self.frame.decompress(self.raw)), True
            except self.error as error:
                raise EOFError(str(error)) from None
            self.raw = b""
            if self.frame.eof:
                self.raw, self.within = self.frame.unused_data, False
                self.frame = self.new_frame()
        return size


class _Limited(io.RawIOBase):
    """Decompresses consecutive xz or bzip2 streams, at most CHUNK bytes at a time.

    Reading raises EOFError for a damaged or truncated stream, and for one whose dictionary needs
    more than XZ_MEMORY.
    """

    def __init__(self, packed: IO[bytes], kind: str) -> None:
        self.packed, self.kind = packed, kind
        self.frame, self.raw, self.within = self._new(), b"", False

    def _new(self) -> Any:
        if self.kind == "bzip2":
            return bz2.BZ2Decompressor()
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into the buffer; return their number, 0 only at the file's end."""
        while True:
            if self.frame.eof:
                # Streams of xz may have zeros between them.
                self.raw, self.within = self.frame.unused_data.lstrip(b"\0"), False
                self.frame = self._new()
            if not self.raw and self.frame.needs_input:
                self.raw = self.packed.read(CHUNK >> 4)
                self.raw = self.raw if self.within else self.raw.lstrip(b"\0")
                if not self.raw:
                    if self.within:
                        raise EOFError("its last stream is truncated")
                    return 0
            self.within = True
            try:
                found = self.frame.decompress(self.raw, len(buffer))
            except (lzma.LZMAError, OSError, MemoryError) as error:
                raise EOFError(str(error) or "it needs too much memory") from None
            self.raw = b""
            if found:
                buffer[: len(found)] = found
                return len(found)


class _Recoded(io.RawIOBase):
    """Decodes a text and encodes it in UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str, name: str) -> None:
        self.stream, self.encoding, self.name = stream, encoding, name
        self.decoder = codecs.getincrementaldecoder(encoding)("strict")
        self.waiting, self.before, self.ended = io.BytesIO(), 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into the buffer; return their number, 0 only at the file's end."""
        while not (size := self.waiting.readinto(buffer)):
            if self.ended:
                return 0
            raw = cast(Any, self.stream).read1(CHUNK)
            self.ended = not raw
            try:
                text = self.decoder.decode(raw, final=self.ended)
            except UnicodeDecodeError as error:
                guess = guess_encoding(raw[:CHUNK])
                raise UserError(
                    f"{self.name}: byte {self.before + error.start:,} is not {self.encoding}; give "
                    f"another --encoding, such as {guess or 'cp1252'}."
                ) from None
            self.before += len(raw)
            text = text if self.waiting.tell() else text.removeprefix("\ufeff")
            self.waiting = io.BytesIO(text.encode("utf-8", "surrogatepass"))
        return size
