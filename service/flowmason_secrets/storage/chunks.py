"""The segments of the event log and their lines, for everybody who reads it. FORMAT.md §5.

Blocking.
"""

import errno
import itertools
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from ..core.errors import LogDamaged
from ..core.events import MAX_LINE
from ..core.ports import Chunk
from . import wire
from .minimum import MinimumFile

_CHUNK = 1 << 20
# About so many bytes has a line, as a rule.
_LINE = 512
# How many lines are read at once, each from a segment of its own perhaps.
_TOGETHER = 128
# How many bytes a disk reads in about the time that it takes for one.
_NEAR = 1 << 16
_SEGMENT = re.compile(r"audit-([0-9]{12})\.ndjson")


def segment_name(first: int) -> str:
    """The file of the segment whose first line has seq `first`. # format §5.2"""
    return f"audit-{first:012d}.ndjson"


def segments(directory: Path) -> list[int]:
    """The first seqs of all segments there, in order."""
    found = map(_SEGMENT.fullmatch, os.listdir(directory))
    return sorted(int(match[1]) for match in found if match is not None)


class ChunkReader:
    """Reads the log from any seq on. It remembers where it stopped, so that following is cheap.

    Which segments were archived says the file `minimum` beside their directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._archived = MinimumFile.beside(directory)
        # The seq, the segment and the offset at which the last reading ended.
        self._stopped = (-1, 0, 0)

    def read(self, start: int, stop: int) -> Iterator[Chunk]:
        """All lines with `start` <= seq < `stop` that were not archived, in order, in chunks of
        about a mebibyte. What is archived meanwhile may be left out.

        Raises:
            LogDamaged: a segment that was not archived is missing, or has fewer lines than the next
                one says.
        """
        seq, firsts = max(start, self._archived.read().minimum), segments(self._directory)
        while firsts and seq < stop:
            place = bisect_right(firsts, seq)
            end = min(firsts[place], stop) if place < len(firsts) else stop
            file = self._opened(firsts[place - 1]) if place else None
            if file is not None:
                with file:
                    yield from self._segment(file, firsts[place - 1], seq, end)
                seq = end
                continue
            minimum = self._archived.read().minimum
            if minimum <= seq:
                raise LogDamaged(
                    f"The segment with event {seq} of the log is missing, and was not archived. "
                    "Put it back into events/."
                )
            seq, firsts = minimum, segments(self._directory)

    def _opened(self, first: int) -> BinaryIO | None:
        try:
            return (self._directory / segment_name(first)).open("rb")
        except FileNotFoundError:
            return None

    def _segment(self, file: BinaryIO, first: int, start: int, stop: int) -> Iterator[Chunk]:
        seq, segment, offset = self._stopped
        if segment != first or not first <= seq <= start:
            seq, offset = first, 0
        seq, offset = _near(file, start, (seq, offset))
        file.seek(offset)
        while seq < stop:
            data = file.read(min(_CHUNK, (stop - seq) * _LINE)) + file.readline()
            lines = data.count(b"\n")
            if not lines:
                raise LogDamaged(f"{segment_name(first)} ends before event {seq}.")
            skip, end = min(max(start - seq, 0), lines), min(stop - seq, lines)
            low, high = line_place(data, skip, lines), line_place(data, end, lines)
            if low < high:
                yield Chunk(seq + skip, first, offset + low, data[low:high])
            seq, offset = seq + end, offset + high
            self._stopped = (seq, first, offset)


def _near(file: BinaryIO, start: int, known: tuple[int, int]) -> tuple[int, int]:
    """The seq and the offset of a line not far before line `start`, found by halving what lies
    behind a known line.
    """
    (seq, offset), end = known, os.fstat(file.fileno()).st_size
    while start > seq and end - offset > _CHUNK:
        middle = (offset + end) // 2
        file.seek(middle)
        file.readline()
        place = file.tell()
        try:
            found = wire.decode_line(file.readline())["seq"]
        except wire.Malformed:
            # A torn tail.
            found = start + 1
        if found > start:
            end = middle
        else:
            seq, offset = found, place
    return seq, offset


def line_place(data: bytes, line: int, lines: int) -> int:
    """Where a line begins, of so many whole ones, or where they end."""
    if line == lines:
        return data.rfind(b"\n") + 1
    place = 0
    for _ in range(line):
        place = data.index(b"\n", place) + 1
    return place


def read_lines(directory: Path, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """The lines at these places, each a segment and an offset, without their newlines.

    Raises:
        FileNotFoundError: a segment is not there.
        ValueError: no file has such a place.
    """
    found: list[bytes] = []
    for start in range(0, len(places), _TOGETHER):
        found += _read_together(directory, places[start : start + _TOGETHER])
    return found


def _read_together(directory: Path, places: Sequence[tuple[int, int]]) -> list[bytes]:
    descriptors: dict[int, int] = {}
    try:
        for segment, group in itertools.groupby(sorted(places), key=itemgetter(0)):
            path = f"{directory}/{segment_name(segment)}"
            descriptors[segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if sys.platform == "linux":
                for start, stop in _spans(offset for _, offset in group):
                    os.posix_fadvise(
                        descriptors[segment], start, stop - start, os.POSIX_FADV_WILLNEED
                    )
        return [_line_at(descriptors[segment], offset) for segment, offset in places]
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ValueError("no place in a file") from error
        raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _spans(offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
    """What to have the disk read, all at once: it takes less time for a few large pieces, with what
    is between the lines, than for many small ones.
    """
    start = stop = 0
    for offset in offsets:
        if offset > stop + _NEAR:
            if stop:
                yield start, stop
            start = offset
        stop = offset + _LINE
    yield start, stop


def _line_at(descriptor: int, offset: int) -> bytes:
    data = os.pread(descriptor, _LINE, offset)
    while (end := data.find(b"\n")) < 0 and len(data) < MAX_LINE:
        more = os.pread(descriptor, MAX_LINE, offset + len(data))
        if not more:
            break
        data += more
    return data if end < 0 else data[:end]
