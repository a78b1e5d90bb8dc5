"""The static layout of a log, for whoever verifies it: C2SP tlog-tiles. FORMAT.md §12. Blocking."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .. import forking
from ..core import checkpoint
from ..core.checkpoint import Checkpoint
from ..core.errors import AnotherLog, LogDamaged
from ..core.merkle import Unverified, leaf_hashes, subtree_root
from ..core.minimum import Minimum
from ..core.ports import Chunk
from ..core.tiles import (
    ENTRIES,
    WIDTH,
    Edge,
    Tile,
    decode_bundle,
    encode_bundle,
    level_size,
    split_hashes,
)
from .durable import SHARED_FILE, Durable

DIRECTORY = 0o750
_DRAFT = ".draft"

# Told how much is done, and of how much.
Tell = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Source:
    """A log: its newest checkpoint, all lines from one seq to another without gaps, and of what was
    archived the tiles that are still there, unverified.
    """

    note: bytes
    lines: Callable[[int, int], Iterator[Chunk]]
    tile: Callable[[Tile], bytes | None]
    minimum: Minimum


class Exported(NamedTuple):
    """An export had `old` lines before, and has `size` now; those from `minimum` on have their
    bundles if all others were made from this log as it is now.
    """

    old: int
    size: int
    minimum: int


class _Work:
    """How far it is: each line is worked on twice."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._done = 0

    def pieces(self, source: Source, start: int, stop: int) -> Iterator[list[bytes]]:
        """The lines, some hundreds or thousands at a time."""
        for chunk in source.lines(start, stop):
            lines = chunk.data.split(b"\n")[:-1]
            yield lines
            self._done += len(lines)
            self._tell(self._done, 2 * (stop - start))


class _Growing(NamedTuple):
    """What goes on: the tree, and the lines of the bundle that is not full yet; `skip` of the next
    lines are in none.
    """

    edge: Edge
    lines: list[bytes]
    skip: int = 0


class StaticLayout:
    """A directory in the static layout. It is only added to."""

    def __init__(self, directory: Path, durable: Durable) -> None:
        self._directory = directory
        self._durable = durable
        self._checkpoint = directory / "checkpoint"
        # Directories that have new names in them.
        self._touched: set[Path] = set()

    def add(self, source: Source, tell: Tell) -> Exported:
        """Bring it up to the checkpoint.

        Raises:
            AnotherLog: what is there is not an earlier state of this log.
            LogDamaged: the log is not what was signed. Nothing was added in either case.
        """
        signed, work = checkpoint.read(source.note)[0], _Work(tell)
        self._make(self._directory)
        with self._alone():
            old = self._published(signed, source.minimum)
            # Nothing is added that is not known to be what was signed.
            edge = self._begin(old, source.minimum).edge
            for lines in work.pieces(source, edge.size, signed.size):
                edge.extend(leaf_hashes(lines))
            if edge.root() != signed.root:
                raise self._contradiction(signed, old)
            self._extend(old, source, signed.size, work)
            self._publish(source.note)
        minimum = -(-source.minimum.minimum // WIDTH) * WIDTH
        return Exported(0 if old is None else old.size, signed.size, minimum)

    # --- what is there ----------------------------------------------------------------------

    def _published(self, signed: Checkpoint, minimum: Minimum) -> Checkpoint | None:
        try:
            found = checkpoint.read(self._checkpoint.read_bytes())[0]
        except FileNotFoundError:
            if set(os.listdir(self._directory)) <= {"tile", _DRAFT}:
                return None
            raise self._refusal("it is not empty, and has no checkpoint") from None
        except Unverified as error:
            raise self._refusal(f"its checkpoint is none: {error}") from None
        if found.origin != signed.origin:
            raise self._refusal(f"it is of the log {found.origin}, not of {signed.origin}")
        if found.size > signed.size:
            raise self._refusal(
                f"it is ahead: it has {found.size} events, and {signed.size} are signed here"
            )
        if found.size < minimum.minimum:
            raise self._refusal(
                f"it has {found.size} events, and those up to {minimum.minimum - 1} were archived "
                "since; export into a new directory"
            )
        return found

    def _begin(self, old: Checkpoint | None, minimum: Minimum) -> _Growing:
        if old is None:
            edge = Edge(minimum.minimum, lambda tile: minimum.edge[tile.level])
            return _Growing(edge, [], -minimum.minimum % WIDTH)
        try:
            edge = Edge(old.size, self._read)
            if edge.root() != old.root:
                raise Unverified("its tiles do not give the root of its checkpoint")
            number, width = divmod(old.size, WIDTH)
            lines = decode_bundle(self._read(Tile(ENTRIES, number, width))) if width else []
            row = self._read(Tile(0, number, width)) if width else b""
            if b"".join(leaf_hashes(lines)) != row:
                raise Unverified("its last bundle has other lines than its tiles")
        except (FileNotFoundError, Unverified) as error:
            raise self._refusal(f"it is damaged: {error}") from None
        return _Growing(edge, lines)

    def _read(self, tile: Tile) -> bytes:
        return (self._directory / tile.path).read_bytes()

    def _refusal(self, reason: str) -> AnotherLog:
        return AnotherLog(f"Nothing was exported to {self._directory}: {reason}.")

    def _contradiction(self, signed: Checkpoint, old: Checkpoint | None) -> LogDamaged | AnotherLog:
        if old is None:
            return LogDamaged(
                f"Nothing was exported: the lines of the log do not give the root that was signed "
                f"over its {signed.size} events. Compare it with your shipped copy."
            )
        return self._refusal(
            f"its {old.size} events and those that follow here do not give the root that was "
            f"signed over {signed.size}, so it is of another log, or this log is damaged"
        )

    # --- adding -----------------------------------------------------------------------------

    def _extend(self, old: Checkpoint | None, source: Source, size: int, work: _Work) -> None:
        edge, waiting, skip = self._begin(old, source.minimum)
        if old is None:
            self._add_archived(source)
        for lines in work.pieces(source, edge.size, size):
            for tile, data in edge.extend(leaf_hashes(lines)):
                self._add(tile, data)
            waiting += lines[skip:]
            skip = max(0, skip - len(lines))
            end = edge.size - len(waiting)
            while len(waiting) >= WIDTH:
                self._add(Tile(ENTRIES, end // WIDTH), encode_bundle(waiting[:WIDTH]))
                waiting, end = waiting[WIDTH:], end + WIDTH
        for tile, data in edge.partial():
            self._add(tile, data)
        if waiting:
            self._add(Tile(ENTRIES, size // WIDTH, len(waiting)), encode_bundle(waiting))

    def _add_archived(self, source: Source) -> None:
        """The tiles of what was archived, as far as they are there and right."""
        minimum = source.minimum
        for level, row in enumerate(minimum.edge[1:]):
            first = level_size(minimum.minimum, level + 1) // WIDTH * WIDTH
            self._add_below(source, Tile(level, first), split_hashes(row, len(row) // 32))

    def _add_below(self, source: Source, first: Tile, roots: Sequence[bytes]) -> None:
        """Neighbouring full tiles of which the roots are known, and what is below them."""
        for number, root in enumerate(roots, first.number):
            data = source.tile(Tile(first.level, number))
            if data is None or subtree_root(hashes := split_hashes(data, WIDTH)) != root:
                continue
            self._add(Tile(first.level, number), data)
            if first.level:
                self._add_below(source, Tile(first.level - 1, number * WIDTH), hashes)

    def _add(self, tile: Tile, data: bytes) -> None:
        """A file that is there already has to be the same: files appear whole."""
        path = self._directory / tile.path
        self._make(path.parent)
        if not path.exists():
            self._place(path, data)
        elif path.read_bytes() != data:
            raise self._refusal(f"its {tile.path} is another one")
        # Also if it is there: who made it may have died before he synced its name.
        parents = path.parents[: len(path.parents) - len(self._directory.parents)]
        self._touched.update(parents)

    def _place(self, path: Path, data: bytes) -> None:
        draft = self._directory / _DRAFT
        # Of one who died; nobody else exports now.
        self._durable.unlink(draft)
        self._durable.create(draft, data, SHARED_FILE, sync=True)
        self._durable.rename(draft, path)

    def _make(self, directory: Path) -> None:
        if directory.is_dir():
            return
        # One by one, so that each has its mode.
        self._make(directory.parent)
        self._durable.make_directory(directory, DIRECTORY)
        self._touched.add(directory.parent)

    def _publish(self, note: bytes) -> None:
        for directory in self._touched:
            self._durable.sync_path(directory)
        self._touched.clear()
        if not self._checkpoint.exists() or self._checkpoint.read_bytes() != note:
            self._place(self._checkpoint, note)
            self._durable.sync_path(self._directory)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        forking.close_in_children(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._refusal("somebody else is exporting to it") from None
            yield
        finally:
            forking.close(descriptor)
