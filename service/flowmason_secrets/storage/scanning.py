"""Reading a whole log to verify it: segments, packed or not, in blocks that any process can check.
FORMAT.md §5. Blocking, and reads only.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import zstandard

from ..core.events import MAX_LINE
from ..core.merkle import HASH_BYTES, leaf_hash
from . import wire
from .chunks import ChunkReader
from .eventlog import HEADER_BYTES
from .strict import StrictLine, are_times, decode

try:
    from ..core._speedups import take_lines
except ImportError:
    from .strict import take_lines

# In bytes. What is made of a block fits into a processor's cache: that takes the least time.
BLOCK = 1 << 17
# How many blocks one process gets at a time.
TOGETHER = 16

# What packed segments that are damaged raise.
_UNREADABLE = (EOFError, OSError, zlib.error, zstandard.ZstdError)

_SOURCE = re.compile(r"audit-([0-9]{12})\.ndjson(|\.gz|\.zst)")


class Source(NamedTuple):
    """A segment: the seq in its name, its file, that file's size, and how it is packed."""

    first: int
    path: str
    size: int
    packing: str

    @property
    def name(self) -> str:
        """The name of its file."""
        return os.path.basename(self.path)


class Block(NamedTuple):
    """A part of a segment: the lines that begin at `start` <= place < `stop`.

    `data` is None for a file that is not packed: whoever checks the block reads it. `problem` says
    why nothing follows it.
    """

    source: Source
    start: int
    stop: int
    data: bytes | None = None
    problem: str | None = None


class Fault(NamedTuple):
    """What is wrong with a line."""

    seq: int
    problem: str


class Quote(NamedTuple):
    """A checkpoint in a line of the log."""

    seq: int
    note: str


class Scanned(NamedTuple):
    """What is in a block of `segment`: the valid lines at its beginning. They end at place `end` of
    the segment, and the first of them has seq `first`; that is -1 if there are none.

    `leaves` are their hashes, one after the other. `bad` says what is wrong with what follows them,
    None if nothing does.
    """

    segment: int
    end: int
    first: int
    leaves: bytes
    times: tuple[str, str]
    faults: list[Fault]
    quotes: list[Quote]
    bad: str | None


def sources(events: Path, archives: Sequence[Path]) -> list[Source]:
    """All segments in order; one that is in several places is taken from the first of them.

    Raises:
        OSError: a directory can't be read.
    """
    found: dict[int, Source] = {}
    for directory in (events, *archives):
        for name in sorted(os.listdir(directory)):
            match = _SOURCE.fullmatch(name)
            if match is None or (directory == events and match[2]):
                continue
            path = os.fspath(directory / name)
            first = int(match[1])
            found.setdefault(first, Source(first, path, os.stat(path).st_size, match[2]))
    return [found[first] for first in sorted(found)]


def previous_checkpoint(source: Source) -> str | None:
    """What the first line of a segment quotes; None if it is nothing. # format §5.3"""
    try:
        with _opened(source) as file:
            event = decode(file.read(MAX_LINE).partition(b"\n")[0])
    except (*_UNREADABLE, ValueError):
        # Whoever reads all of it finds out.
        return None
    note = event.details.get("previous_checkpoint")
    return note if isinstance(note, str) else None


def line_of(events: Path, seq: int) -> bytes | None:
    """The line of an event, without its newline; None if it is not there."""
    for chunk in ChunkReader(events).read(seq, seq + 1):
        if chunk.first == seq:
            return chunk.data.removesuffix(b"\n")
    return None


def blocks(source: Source) -> Iterator[Block]:
    """A segment in blocks: at least one, and one that ends early if it can't be unpacked."""
    if source.packing:
        yield from _unpacked(source)
        return
    for start in range(0, max(source.size, 1), BLOCK):
        yield Block(source, start, min(start + BLOCK, source.size))


def scan(block: Block) -> Scanned:
    """Check the lines of a block, one after the other.

    Raises:
        OSError: the segment can't be read.
    """
    start, data = (block.start, block.data) if block.data is not None else _read(block)
    lines, bad = _Lines(data, start), block.problem
    try:
        while lines.place < len(data):
            lines.take_one()
            lines.take_more()
    except wire.Malformed as error:
        bad = str(error)
    return lines.scanned(block.source.first, bad)


class _Lines:
    """The lines at the beginning of a block's data that were found to be valid; `place` is behind
    them. The block begins at `start` of its segment.
    """

    def __init__(self, data: bytes, start: int) -> None:
        self.place = 0
        self._data = data
        self._start = start
        # The first seq and the next one, -1 before there is a line.
        self._first = self._next = -1
        # The time of the first line and of the last one; empty if there is none that is one.
        self._begin = self._time = ""
        self._leaves: list[bytes] = []
        self._faults: list[Fault] = []
        self._quotes: list[Quote] = []

    def take_one(self) -> None:
        """Take the next line, whatever there is to say of it.

        Raises:
            Malformed: it ends the valid ones.
        """
        end = self._data.find(b"\n", self.place)
        if end < 0:
            raise wire.Malformed("not a whole line")
        line = self._data[self.place : end]
        # As whoever writes decides where a segment ends. # format §5.2
        seq = wire.decode_line(line)["seq"]
        if self._next not in (-1, seq):
            raise wire.Malformed(f"has seq {seq} in place of {self._next}")
        event, problem = _checked(line, seq, self._time)
        if problem is not None:
            self._faults.append(Fault(seq, problem))
        if self._start == self.place == 0 and not _heads_segment(line, event):
            self._faults.append(Fault(seq, "not the first line of a segment"))
        note = event.details.get("checkpoint")
        if event.action == "log.checkpoint" and isinstance(note, str):
            self._quotes.append(Quote(seq, note))
        if self._first < 0:
            self._first, self._begin = seq, event.time
        self._leaves.append(leaf_hash(line))
        self.place, self._next, self._time = end + 1, seq + 1, event.time

    def take_more(self) -> None:
        """Take those of the following lines of which there is nothing to say."""
        if self._time:
            known = (self.place, self._next, self._time.encode())
            self.place, leaves, time = take_lines(self._data, *known)
            self._leaves.append(leaves)
            self._next += len(leaves) // HASH_BYTES
            self._time = time.decode()

    def scanned(self, segment: int, bad: str | None) -> Scanned:
        """What was found; `bad` says what is wrong with what follows."""
        return Scanned(
            segment,
            self._start + self.place,
            self._first,
            b"".join(self._leaves),
            (self._begin, self._time),
            self._faults,
            self._quotes,
            bad,
        )


def _heads_segment(line: bytes, event: StrictLine) -> bool:
    return len(line) + 1 >= HEADER_BYTES and event.action == "log.segment"


def _checked(line: bytes, seq: int, before: str) -> tuple[StrictLine, str | None]:
    try:
        event = decode(line)
    except ValueError as error:
        return _unknown(seq, before), f"not an event: {error}"
    if len(line) >= MAX_LINE:
        return event, f"longer than {MAX_LINE} bytes"
    if not are_times(event.time):
        event.time = before
        return event, "its time is not one"
    if event.time < before:
        problem = f"its time {event.time} is before that of the line before it, {before}"
        event.time = before
        return event, problem
    return event, None


def _unknown(seq: int, time: str) -> StrictLine:
    nothing = (None, None, None, None)
    return StrictLine(1, "", seq, time, "", "failed", None, "", *nothing, "", *nothing, {})


def _read(block: Block) -> tuple[int, bytes]:
    """Where the first line that begins in the block begins, and all that begin there, whole."""
    source, start, stop, *_ = block
    before = min(start, 1)
    with open(source.path, "rb", buffering=0) as file:
        file.seek(start - before)
        # What came after the size was taken is not looked at: it may be half written.
        data = _exactly(file, min(stop + MAX_LINE, source.size) - start + before)
    if before:
        # It begins with the end of a line, maybe only with its newline.
        skipped = data.find(b"\n") + 1
        if not 0 < skipped <= stop - start:
            return stop, b""
        start, data = start + skipped - 1, data[skipped:]
    end = data.find(b"\n", stop - start - 1) + 1 if stop > start else 0
    return start, data[:end] if end else data


def _exactly(file: BinaryIO, size: int) -> bytes:
    pieces: list[bytes] = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _opened(source: Source) -> BinaryIO:
    match source.packing:
        case ".gz":
            return cast(BinaryIO, gzip.open(source.path, "rb"))
        case ".zst":
            return cast(BinaryIO, zstandard.open(source.path, "rb"))
    return open(source.path, "rb")


def _unpacked(source: Source) -> Iterator[Block]:
    place, kept, problem = 0, b"", None
    try:
        with _opened(source) as file:
            while piece := file.read(BLOCK):
                kept += piece
                if len(kept) >= BLOCK:
                    end = kept.rfind(b"\n") + 1 or len(kept)
                    yield Block(source, place, place + end, kept[:end])
                    place, kept = place + end, kept[end:]
    except _UNREADABLE as error:
        problem = f"can't be unpacked: {error}"
    yield Block(source, place, place + len(kept), kept, problem)
