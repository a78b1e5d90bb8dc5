"""The event log: append-only segments of lines. FORMAT.md §5.

Blocking, and used under the commit lock, but for `approach`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import times
from ..core.errors import LogDamaged
from ..core.events import Event
from ..core.ports import Sources
from . import wire
from .checkpoints import Checkpoints
from .chunks import ChunkReader, line_place, segment_name, segments
from .durable import SHARED_FILE, Durable
from .minimum import MinimumFile
from .published import Layout
from .wire import Followed

HEADER_BYTES = 1024
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SegmentLimits:
    """When a segment is sealed: at a size in bytes, or an age in seconds."""

    size: int = 64 << 20
    age: float = 86400.0


class Archived(Exception):
    """The segment that was written to last was sealed and archived by others."""


@dataclass(slots=True)
class _Segment:
    """The segment that is written to; `end` is where its whole lines end."""

    first: int
    path: Path
    descriptor: int
    end: int = 0
    born: float = 0.0


class EventLog:
    """Appends lines and follows what other processes append; `position` is the next seq.

    After an OSError the object is worth nothing any more: open another one, which re-reads.
    """

    def __init__(
        self,
        layout: Layout,
        durable: Durable,
        sources: Sources,
        limits: SegmentLimits,
    ) -> None:
        self._directory = layout.events
        self._path = os.fspath(layout.events)
        self._scratch = layout.staged
        self._checkpoints = Checkpoints(layout, durable)
        self._durable = durable
        self._clock, self._new_id = sources
        self._limits = limits
        self._segment: _Segment | None = None
        self._torn = False
        # Whether another process gave the segment its name, which it may not have synced.
        self._foreign_name = False
        self._last_time = 0.0
        self.position = 0

    def approach(self) -> Iterator[Followed]:
        """The lines that are there by now, like `catch_up`, but without the commit lock: `open` and
        `catch_up` have little left to read then. Before `open` it begins with the last segment.

        Raises:
            LogDamaged: as `open` or `catch_up`.
        """
        if self._segment is None:
            self._enter_last()
        long = True
        try:
            while long:
                long = False
                for number, lines in enumerate(self._chunks()):
                    yield from lines
                    # Much may have been appended meanwhile.
                    long = number > 0
        finally:
            # What looks torn may just be being written. Under the lock one knows.
            self._torn = False

    def open(self) -> None:
        """Find the end of the log. Only the last segment is read.

        Raises:
            LogDamaged: the last segment does not begin with the seq in its name, or is missing.
        """
        approached = self._segment is not None
        if approached:
            try:
                self.changed()
            except Archived:
                approached = False
        if not approached:
            self._enter_last()
        for _ in self._chunks():
            pass

    def close(self) -> None:
        """Release the descriptor."""
        if self._segment is not None:
            os.close(self._segment.descriptor)
            self._segment = None

    def catch_up(self) -> Iterator[Followed]:
        """The lines that were appended since, by whomever; following into new segments.

        Raises:
            LogDamaged: a segment does not begin with the seq in its name.
        """
        for lines in self._chunks():
            yield from lines

    def append(self, events: Sequence[Event]) -> str:
        """Number the events and write them as lines; `sync` makes them durable.

        Returns the time they were given. The caller has caught up.

        Raises:
            Unwritable: some of the events can't be lines; nothing was written.
        """
        now = max(self._clock(), self._last_time)
        segment = self._segment
        if segment is None or self._torn or self._sealed(segment, now):
            segment = self._roll(now)
        time = times.render(now)
        data = wire.encode_lines(events, self.position, time)
        self._durable.write(segment.descriptor, data)
        segment.end += len(data)
        self.position += len(events)
        self._last_time = now
        return time

    def sync(self) -> None:
        """Make the segment durable, also what others appended: they may have died before they
        could.
        """
        if self._segment is not None:
            self._durable.sync(self._segment.descriptor)
            if self._foreign_name:
                self._durable.sync_path(self._directory)
                self._foreign_name = False

    @property
    def minimum(self) -> int:
        """The seq of the first event that was not archived."""
        return MinimumFile.beside(self._directory).read().minimum

    def changed(self) -> bool:
        """Whether `catch_up` has something to do. Cheap: asked once per batch.

        Raises:
            Archived: so much happened since that the segment was archived; open another log.
            LogDamaged: the segment is gone, or shorter than it was.
        """
        segment = self._segment
        if segment is None or self._torn:
            if self.position < self.minimum:
                # Somebody began the next segment, and it was archived.
                raise Archived
            return self._exists(self.position)
        status = os.fstat(segment.descriptor)
        if status.st_size < segment.end or not status.st_nlink:
            if segment.first < self.minimum:
                raise Archived
            raise LogDamaged(
                f"{segment.path.name} was removed or cut off while it was in use. "
                "Put back what is missing, and start again."
            )
        return status.st_size != segment.end or self._exists(self.position)

    def lines(self, start: int) -> Iterator[Followed]:
        """All lines from seq `start` on.

        Raises:
            LogDamaged: some are missing, or were archived.
        """
        if start < min(self.minimum, self.position):
            raise LogDamaged(
                f"Changes are staged whose events may be in the segments from event {start} on, "
                "which were archived. Decompress them into events/ and remove the file minimum."
            )
        for chunk in ChunkReader(self._directory).read(start, self.position):
            lines = wire.decode_lines(chunk.data)
            if len(lines) < chunk.data.count(b"\n"):
                raise LogDamaged(
                    f"Event {chunk.first + len(lines)} of the log can't be read. "
                    "Compare its segment with your shipped copy."
                )
            yield from lines

    def _sealed(self, segment: _Segment, now: float) -> bool:
        return segment.end >= self._limits.size or now - segment.born >= self._limits.age

    def _exists(self, first: int) -> bool:
        # Asked for each batch; `os.path.exists` takes five times as long where nothing is.
        return os.access(f"{self._path}/{segment_name(first)}", os.F_OK)

    def _enter_last(self) -> None:
        firsts, minimum = segments(self._directory), self.minimum
        if minimum > max(firsts, default=0):
            raise LogDamaged(
                f"The segment with event {minimum} of the log is missing, and was not archived. "
                "Put back what is missing in events/, and start again."
            )
        if firsts:
            self.position = firsts[-1]
            self._enter(firsts[-1])

    def _enter(self, first: int) -> None:
        path = self._directory / segment_name(first)
        descriptor = self._durable.open_existing(path)
        self.close()
        self._segment = _Segment(first, path, descriptor)
        self._torn = False
        self._foreign_name = True

    def _chunks(self) -> Iterator[list[Followed]]:
        """Whole valid lines behind the known end, a mebibyte at a time, segment after segment."""
        while True:
            if self._segment is not None:
                yield from self._rest(self._segment)
            # Its name is the next seq, so nobody needs to tell which segment is the newest one.
            if not self._exists(self.position):
                return
            self._enter(self.position)

    def _rest(self, segment: _Segment) -> Iterator[list[Followed]]:
        # Nobody else appends meanwhile.
        stop = os.fstat(segment.descriptor).st_size
        while segment.end < stop and (data := _behind(segment, stop)):
            lines, size = self._valid(data)
            if lines:
                self._advance(segment, lines, size)
                yield lines
            if size < len(data):
                # Left where it is (shippers have read it); the next event opens a new segment.
                self._torn = True
                break
        if segment.end == 0:
            raise LogDamaged(
                f"{segment.path.name} does not begin with event {segment.first}. "
                "Compare it with your shipped copy before you go on."
            )

    def _valid(self, data: bytes) -> tuple[list[Followed], int]:
        """The lines at the start of `data` that continue the log, and their size in bytes; what
        follows them is torn.
        """
        lines = wire.decode_lines(data[: data.rfind(b"\n") + 1])
        for seq, line in enumerate(lines, self.position):
            if line.seq != seq:
                del lines[seq - self.position :]
                break
        return lines, line_place(data, len(lines), data.count(b"\n"))

    def _advance(self, segment: _Segment, lines: list[Followed], size: int) -> None:
        if segment.end == 0:
            segment.born = _time(lines[0])
        segment.end += size
        self.position += len(lines)
        self._last_time = max(self._last_time, _time(lines[-1]))

    def _roll(self, now: float) -> _Segment:
        """Begin a new segment. It appears with its header line whole and durable, or not at all."""
        self.sync()
        first = self.position
        header = Event(
            id=self._new_id(),
            action="log.segment",
            outcome="success",
            org_id=None,
            resource_type="log",
            resource_id=segment_name(first),
            details={"previous_checkpoint": self._checkpoints.quotable()},
        )
        data = wire.encode_header(header, first, times.render(now), HEADER_BYTES)
        draft = self._scratch / f"{header.id}.tmp"
        self._durable.create(draft, data, SHARED_FILE, sync=True)
        self._durable.rename(draft, self._directory / segment_name(first))
        self._durable.sync_path(self._directory)
        self._enter(first)
        segment = self._segment
        assert segment is not None  # noqa: S101 - _enter has just set it
        segment.end, segment.born = len(data), now
        self._foreign_name = False
        self.position = first + 1
        self._last_time = now
        return segment


def _behind(segment: _Segment, stop: int) -> bytes:
    """What follows the known end: a mebibyte at most, and then up to the end of a line."""
    missing = stop - segment.end
    data = os.pread(segment.descriptor, min(missing, _CHUNK), segment.end)
    return data if len(data) == missing else data[: data.rfind(b"\n") + 1] or data


def _time(line: Followed) -> float:
    return times.parse_stored(line.time)
