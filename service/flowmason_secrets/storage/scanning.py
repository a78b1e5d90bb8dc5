"""Reading a whole log to verify it: segments, packed or not, in blocks that any process can check.
FORMAT.md §5. Blocking, and reads only.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import msgspec
import zstandard

from ..core.events import BETWEEN_LINES, MAX_LINE, Detail
from ..core.merkle import leaf_hashes
from . import wire
from .chunks import ChunkReader
from .eventlog import HEADER_BYTES

# In bytes. What is made of a block fits into a processor's cache: that takes the least time.
BLOCK = 1 << 17
# How many blocks one process gets at a time.
TOGETHER = 16

# What packed segments that are damaged raise.
_UNREADABLE = (EOFError, OSError, zlib.error, zstandard.ZstdError)

_SOURCE = re.compile(r"audit-([0-9]{12})\.ndjson(|\.gz|\.zst)")
# How a time looks, with 0 for each digit.
_TIME = b"0000-00-00T00:00:00.000000Z"
_DIGITS = bytes.maketrans(b"123456789", b"000000000")


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


class _Event(msgspec.Struct, gc=False):
    """A line as the format has it. # format §5.1"""

    v: Literal[1]
    id: str
    seq: int
    time: str
    action: str
    outcome: Literal["success", "denied", "not_found", "expired", "failed"]
    org_id: str | None
    resource_type: str
    resource_id: str | None
    name: str | None
    version: int | None
    actor: str | None
    actor_type: str
    client_ip: str | None
    user_agent: str | None
    request_id: str | None
    status: int | None
    details: dict[str, Detail]


_decoder = msgspec.json.Decoder(_Event)
_decode = _decoder.decode
_seq, _time = attrgetter("seq"), attrgetter("time")


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
            event = _decode(file.read(MAX_LINE).partition(b"\n")[0])
    except (*_UNREADABLE, msgspec.DecodeError, UnicodeDecodeError):
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
    place = (block.source.first, start)
    lines = data.split(b"\n")
    bad = "not a whole line" if lines.pop() else block.problem
    try:
        events: list[_Event] = _decoder.decode_lines(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _scan_slowly(place, lines, bad)
    first = events[0].seq if events else -1
    times = list(map(_time, events))
    if (
        not len(events) == len(lines) == data.count(BETWEEN_LINES) + 1
        or list(map(_seq, events)) != list(range(first, first + len(events)))
        or times != sorted(times)
        or "".join(times).encode().translate(_DIGITS) != _TIME * len(times)
        or max(map(len, lines)) >= MAX_LINE
    ):
        return _scan_slowly(place, lines, bad)
    return _scanned(place, lines, events, [], bad)


def _scan_slowly(place: tuple[int, int], lines: list[bytes], bad: str | None) -> Scanned:
    """Like `scan`, of lines with which something is wrong: it says what."""
    events: list[_Event] = []
    faults: list[Fault] = []
    for line in lines:
        expected = events[-1].seq + 1 if events else None
        try:
            # As whoever writes decides where a segment ends. # format §5.2
            seq = wire.decode_line(line)["seq"]
        except wire.Malformed as error:
            bad = str(error)
            break
        if expected not in (None, seq):
            bad = f"has seq {seq} in place of {expected}"
            break
        event, problem = _checked(line, seq, events[-1].time if events else "")
        events.append(event)
        if problem is not None:
            faults.append(Fault(seq, problem))
    return _scanned(place, lines[: len(events)], events, faults, bad)


def _checked(line: bytes, seq: int, before: str) -> tuple[_Event, str | None]:
    try:
        event = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _unknown(seq, before), f"not an event: {error}"
    if len(line) >= MAX_LINE:
        return event, f"longer than {MAX_LINE} bytes"
    if event.time.encode().translate(_DIGITS) != _TIME:
        event.time = before
        return event, "its time is not one"
    if event.time < before:
        problem = f"its time {event.time} is before that of the line before it, {before}"
        event.time = before
        return event, problem
    return event, None


def _unknown(seq: int, time: str) -> _Event:
    nothing = (None, None, None, None)
    return _Event(1, "", seq, time, "", "failed", None, "", *nothing, "", *nothing, {})


def _scanned(
    place: tuple[int, int],
    lines: list[bytes],
    events: list[_Event],
    faults: list[Fault],
    bad: str | None,
) -> Scanned:
    segment, start = place
    end = start + sum(map(len, lines)) + len(lines)
    if not events:
        return Scanned(segment, end, -1, b"", ("", ""), faults, [], bad)
    if start == 0 and (len(lines[0]) + 1 < HEADER_BYTES or events[0].action != "log.segment"):
        faults.append(Fault(events[0].seq, "not the first line of a segment"))
    quotes = [
        Quote(event.seq, note)
        for event in events
        if event.action == "log.checkpoint"
        and isinstance(note := event.details.get("checkpoint"), str)
    ]
    times = (events[0].time, events[-1].time)
    leaves = b"".join(leaf_hashes(lines))
    return Scanned(segment, end, events[0].seq, leaves, times, faults, quotes, bad)


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
