"""Moving old segments out of the log. FORMAT.md §11. Blocking."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .. import forking
from ..core import times
from ..core.errors import AnotherLog, LogDamaged, LogUnavailable
from ..core.merkle import leaf_hashes
from ..core.minimum import Minimum
from ..core.ports import Clock
from ..core.tiles import WIDTH, Edge
from . import wire
from .chunks import ChunkReader, segment_name, segments
from .commitlock import CommitLock
from .compression import BROKEN, SUFFIXES, Form, compressed, decompressed
from .durable import SHARED_FILE, Durable
from .minimum import MinimumFile
from .published import Layout
from .signedtree import FilesTree
from .staging import Leftovers
from .staticlayout import Tell

_PIECE = 1 << 20

# Seconds for which nobody has written to a segment that goes.
_QUIET = 1.0

_MICROSECOND = 1e-6


class Sealed(NamedTuple):
    """A segment that may go: its lines have seqs from `first` up to and without `stop`."""

    first: int
    stop: int


class Target(NamedTuple):
    """Where segments go, and how they are compressed."""

    directory: Path
    form: Form


class FilesArchive:
    """The old segments of a data directory."""

    def __init__(self, layout: Layout, durable: Durable, tree: FilesTree, clock: Clock) -> None:
        self._layout = layout
        self._durable = durable
        self._tree = tree
        self._clock = clock
        self._file = MinimumFile(layout.minimum)

    def choose(self, before: float, position: int) -> list[Sealed]:
        """The oldest segments that may go if all their events are older than that, of a log with so
        many events. # format §11.2

        Raises:
            LogDamaged: the log is not what was signed.
        """
        if self._tree.newest() is None:
            return []
        self._tree.begin()
        self._tree.check(position)
        firsts = [one for one in segments(self._layout.events) if one >= self._minimum]
        found: list[Sealed] = []
        for one in map(Sealed, firsts, firsts[1:]):
            if not self._may_go(one, before):
                break
            found.append(one)
        return found

    @property
    def _minimum(self) -> int:
        return self._file.read().minimum

    def _may_go(self, one: Sealed, before: float) -> bool:
        path = self._layout.events / segment_name(one.first)
        whole_bundle = -(-one.stop // WIDTH) * WIDTH
        return (
            one.stop < self._tree.size
            and whole_bundle <= self._tree.size
            and not self._staged(one.stop)
            and os.stat(path).st_mtime <= self._clock() - _QUIET
            and times.parse_stored(self._time(one.stop - 1)) < before
        )

    def _staged(self, stop: int) -> bool:
        """Whether a staged change may have its event before `stop`."""
        leftovers = Leftovers(self._layout.staged, self._durable)
        return bool(leftovers) and leftovers.position < stop

    def _time(self, seq: int) -> str:
        for chunk in ChunkReader(self._layout.events).read(seq, seq + 1):
            return wire.decode_line(chunk.data.rstrip(b"\n"))["time"]
        raise LogDamaged(f"Event {seq} of the log is not there.")

    # --- copying ----------------------------------------------------------------------------

    def copy(self, chosen: Sequence[Sealed], to: Target, tell: Tell) -> Minimum:
        """Return when all of them are on stable storage there too, and what was written is known to
        be what was signed; what the minimum will be then. # format §11.3

        Raises:
            AnotherLog: there are other files of those names. Nothing was removed.
            LogDamaged: the segments are not what was signed.
        """
        self._durable.make_directory(to.directory)
        self._durable.sync_path(to.directory.parent)
        with _alone(to.directory):
            copying = _Copying(self._layout.events, self._file.read(), to, self._durable)
            total = 2 * len(chosen)
            for done, one in enumerate(chosen):
                copying.write(one)
                tell(done + 1, total)
            self._durable.sync_path(to.directory)
            for done, one in enumerate(chosen):
                copying.verify(one)
                tell(len(chosen) + done + 1, total)
        self._tree.vouch(copying.edge)
        return Minimum(
            copying.edge.size,
            self._complete_since(copying.last_time, copying.edge.size),
            tuple(sorted(copying.organisations)),
            copying.edge.rows,
        )

    def _complete_since(self, archived: str, minimum: int) -> str:
        """The time of the first event that is left, if what was archived is older."""
        first = self._time(minimum)
        if first > archived:
            return first
        return times.render(times.parse_stored(archived) + _MICROSECOND)

    # --- removing ---------------------------------------------------------------------------

    def remove(self, minimum: Minimum | None) -> int:
        """Raise the minimum index, and remove the segments below it; how many that were.

        None: only what an interrupted archiving left.
        """
        # Nobody commits meanwhile: whoever follows the log expects the next segment where the last
        # one ended.
        lock = CommitLock(self._layout, self._durable)
        try:
            with lock.held():
                return self._remove(minimum)
        finally:
            lock.close()

    def _remove(self, minimum: Minimum | None) -> int:
        if minimum is not None and self._staged(minimum.minimum):
            raise LogUnavailable("changes are staged that wait for room")
        if minimum is not None and self._minimum < minimum.minimum:
            self._file.write(minimum, self._durable)
        gone = [one for one in segments(self._layout.events) if one < self._minimum]
        for first in gone:
            self._durable.unlink(self._layout.events / segment_name(first))
        if gone:
            self._durable.sync_path(self._layout.events)
        return len(gone)


class _Copying:
    """Segments on their way, and what is learnt from their copies."""

    def __init__(self, events: Path, known: Minimum, to: Target, durable: Durable) -> None:
        self._events = events
        self._to = to
        self._durable = durable
        self.edge = Edge(known.minimum, lambda tile: known.edge[tile.level])
        self.organisations = set(known.organisations)
        self.last_time = ""

    def write(self, one: Sealed) -> None:
        """Write the copy, unless it is there; its name is not durable yet."""
        path = self._path(one)
        if path.exists():
            return
        draft = path.with_name(f"{path.name}.part")
        # Of one who died; nobody else archives to this place now.
        self._durable.unlink(draft)
        self._durable.create(draft, b"", SHARED_FILE, sync=False)
        descriptor = self._durable.open_existing(draft)
        try:
            with (self._events / segment_name(one.first)).open("rb") as source:
                pieces = iter(lambda: source.read(_PIECE), b"")
                for data in compressed(self._to.form, pieces):
                    self._durable.write(descriptor, data)
            self._durable.sync(descriptor)
        finally:
            os.close(descriptor)
        self._durable.rename(draft, path)

    def verify(self, one: Sealed) -> None:
        """Read the copy beside the segment, and count its lines in."""
        path, rest, left = self._path(one), b"", one.stop - one.first
        # It may have been there before.
        self._durable.sync_path(path)
        for piece in self._same(one, path):
            *lines, rest = (rest + piece).split(b"\n")
            # What follows the last line is a torn tail.
            lines = lines[:left]
            left -= len(lines)
            self._take(lines)
        if left:
            raise LogDamaged(f"{segment_name(one.first)} ends before event {one.stop - left}.")

    def _take(self, lines: Sequence[bytes]) -> None:
        self.edge.extend(leaf_hashes(lines))
        for raw in lines:
            line = wire.decode_line(raw)
            if line["org_id"] is not None:
                self.organisations.add(line["org_id"])
            self.last_time = line["time"]

    def _same(self, one: Sealed, path: Path) -> Iterator[bytes]:
        """The copy, piece by piece, as long as it is that of the segment."""
        with (
            decompressed(path) as copy,
            (self._events / segment_name(one.first)).open("rb") as source,
        ):
            while piece := self._read(copy, path):
                if source.read(len(piece)) != piece:
                    raise self._other(path)
                yield piece
            if source.read(1):
                raise self._other(path)

    def _read(self, copy: BinaryIO, path: Path) -> bytes:
        try:
            return copy.read(_PIECE)
        except BROKEN as error:
            raise self._other(path) from error

    def _other(self, path: Path) -> AnotherLog:
        return AnotherLog(
            f"{path} does not hold the segment of that name: it is of another log, or damaged. "
            "Move it away, or name another directory. Nothing was removed from the log."
        )

    def _path(self, one: Sealed) -> Path:
        return self._to.directory / f"{segment_name(one.first)}{SUFFIXES[self._to.form]}"


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    forking.close_in_children(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnotherLog(f"Somebody else is archiving to {directory}.") from None
        yield
    finally:
        forking.close(descriptor)
