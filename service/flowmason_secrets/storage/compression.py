"""Archived segments: how they are compressed, and read again. FORMAT.md §11.3. Blocking."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast, get_args

import zstandard

Form = Literal["zstd", "gzip"]
FORMS: tuple[Form, ...] = get_args(Form)
SUFFIXES: dict[Form, str] = {"zstd": ".zst", "gzip": ".gz"}

# What reading a file raises that is not what it should be.
BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError)

# With gzip's header and trailer, but no time: the same bytes each time.
_GZIP = 16 + zlib.MAX_WBITS


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


def compressed(form: Form, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes of a compressed file that holds these pieces."""
    compressor: _Compressor
    if form == "gzip":
        compressor = zlib.compressobj(wbits=_GZIP)
    else:
        compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    for piece in pieces:
        if data := compressor.compress(piece):
            yield data
    yield compressor.flush()


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """What a compressed file holds, to be read; its name tells how it is compressed.

    Reading raises one of `BROKEN` if the file is cut off or damaged.
    """
    if path.suffix == SUFFIXES["gzip"]:
        with gzip.open(path, "rb") as plain:
            yield cast("BinaryIO", plain)
        return
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        yield cast("BinaryIO", reader)
