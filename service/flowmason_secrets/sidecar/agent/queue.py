"""Reads that were served while the server was away: durable first, delivered later.

Blocking, and used in one worker thread, except for what says otherwise.
"""

import fcntl
import os
import secrets
from pathlib import Path

import msgspec

from ...api.deliveries import OfflineReadIn
from ...core.errors import ConfigurationError, LogDamaged, LogUnavailable
from ...storage.durable import PRIVATE_FILE, Durable

# In bytes: of a segment, of all of them, and what is read at once.
_SEGMENT = 1 << 20
LIMIT = 64 << 20
_PIECE = 32 << 10
_SUFFIX = ".ndjson"


class OfflineQueue:
    """Lines in segments that are named by the number of their first line. Numbers ascend for ever;
    how far they were delivered, the server knows: segments are removed when all of them were.

    Raises:
        ConfigurationError: another agent has it.
        OSError: the directory can't be used.
    """

    def __init__(self, directory: Path, limit: int = LIMIT) -> None:
        self._durable = Durable()
        self._directory = directory
        self._limit = limit
        self._durable.make_directory(directory)
        self._durable.restrict(directory)
        self._lock = self._durable.open_slot(directory / "lock")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigurationError(
                f"Another agent works in {directory.parent}: give each its own --state-dir."
            ) from None
        self._descriptor: int | None = None
        self._written = 0
        self.ticket = self._own_ticket()
        self._segments = self._found()
        # The number of the next line, in memory and in the name of the newest segment.
        self._next = self._recover()
        self._delivered = self._segments[0] - 1 if self._segments else self._next - 1
        # Where the next line to deliver is: segment and offset.
        self._place = (self._segments[0] if self._segments else self._next, 0)

    @property
    def waiting(self) -> int:
        """How many reads were not delivered, at most. In any thread."""
        return self._next - 1 - self._delivered

    def append(self, reads: list[OfflineReadIn]) -> None:
        """Give the reads their numbers; return when they are on stable storage.

        Raises:
            LogUnavailable: they are not, so nothing may be revealed.
        """
        first = self._next
        lines = [
            msgspec.json.encode(msgspec.structs.replace(read, number=first + place)) + b"\n"
            for place, read in enumerate(reads)
        ]
        data = b"".join(lines)
        if (len(self._segments) + 1) * _SEGMENT > self._limit:
            raise LogUnavailable("the queue of offline reads is full")
        # Also if it fails: numbers that may be on the disk are not given again.
        self._next += len(reads)
        try:
            if self._descriptor is None or self._written > _SEGMENT:
                self._begin(first)
            assert self._descriptor is not None  # noqa: S101 - just begun
            self._durable.write(self._descriptor, data)
            self._durable.sync(self._descriptor)
            self._written += len(data)
        except OSError as error:
            # Never again on the same descriptor.
            self._end()
            raise LogUnavailable.of(error) from error

    def take(self, most: int) -> list[OfflineReadIn]:
        """The next reads to deliver, at most so many; none if all were delivered."""
        while True:
            segment, offset = self._place
            found = self._lines(segment, offset, most)
            if found:
                return found
            later = [first for first in self._segments if first > segment]
            if not later:
                return []
            self._place = (later[0], 0)

    def deliver(self, reads: list[OfflineReadIn], delivered: int) -> None:
        """The server has all up to the number `delivered`, these above all.

        Raises:
            LogDamaged: it has not.
            OSError: the directory can't be written.
        """
        last = reads[-1].number
        if delivered < last:
            raise LogDamaged(f"The server has reads up to {delivered}, and was given {last}.")
        segment, offset = self._place
        size = sum(len(msgspec.json.encode(read)) + 1 for read in reads)
        self._place = (segment, offset + size)
        self._delivered = last
        if self.waiting == 0 and self._segments:
            # The next number lives on in the name of an empty segment.
            self._end()
            self._begin(self._next)
        # Whole segments before the place are delivered.
        for first in [first for first in self._segments if first < self._place[0]]:
            self._durable.unlink(self._path(first))
            self._segments.remove(first)

    def close(self) -> None:
        """Let another agent have it."""
        self._end()
        os.close(self._lock)

    def _lines(self, segment: int, offset: int, most: int) -> list[OfflineReadIn]:
        try:
            with self._path(segment).open("rb") as file:
                file.seek(offset)
                data = file.read(_PIECE)
        except FileNotFoundError:
            return []
        return _decode(data, most)

    def _begin(self, first: int) -> None:
        self._end()
        path = self._path(first)
        if first not in self._segments:
            # A crash may have left a part of a line there that nobody was told of.
            self._durable.unlink(path)
        self._descriptor = self._durable.open_append(path, PRIVATE_FILE)
        self._durable.sync_path(self._directory)
        self._written = 0
        if first not in self._segments:
            self._segments.append(first)
        if self._delivered == first - 1:
            self._place = (first, 0)

    def _end(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _found(self) -> list[int]:
        stems = (path.stem for path in self._directory.glob(f"*{_SUFFIX}"))
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())

    def _recover(self) -> int:
        """The next number: behind the last whole line."""
        if not self._segments:
            return 1
        last = self._segments[-1]
        found = _decode(self._path(last).read_bytes(), None)
        if found:
            return found[-1].number + 1
        # Nothing whole in it: it begins anew.
        self._segments.pop()
        return last

    def _own_ticket(self) -> str:
        path = self._directory / "ticket"
        if not path.exists():
            draft = self._directory / "ticket.tmp"
            self._durable.unlink(draft)
            self._durable.create(draft, secrets.token_hex(32).encode(), PRIVATE_FILE, sync=True)
            self._durable.rename(draft, path)
            self._durable.sync_path(self._directory)
        return path.read_text()

    def _path(self, first: int) -> Path:
        return self._directory / f"{first:016d}{_SUFFIX}"


def _decode(data: bytes, most: int | None) -> list[OfflineReadIn]:
    """The whole lines at the beginning of some bytes."""
    found: list[OfflineReadIn] = []
    for line in data.splitlines(keepends=True)[:most]:
        try:
            if not line.endswith(b"\n"):
                break
            found.append(msgspec.json.decode(line, type=OfflineReadIn))
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
    return found
