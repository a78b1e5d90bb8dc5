"""Reads that were served while the server was away: durable first, delivered later.

Blocking, and used in one worker thread.
"""

import fcntl
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from ...api.deliveries import OfflineReadIn
from ...core.errors import ConfigurationError, LogDamaged, LogUnavailable
from ...storage.durable import PRIVATE_FILE, StateDirectory

# In bytes: of a segment, of all of them, and what is read at once.
_SEGMENT = 1 << 20
LIMIT = 64 << 20
_PIECE = 32 << 10
_SUFFIX = ".ndjson"


class Head(msgspec.Struct, frozen=True):
    """The first line of a segment: what the server knows it by."""

    ticket: str


class Batch(NamedTuple):
    """Reads of one segment that are to be delivered next; `size` in bytes."""

    ticket: str
    reads: list[OfflineReadIn]
    size: int


class OfflineQueue:
    """Lines in segments, each of which is a queue of its own to the server: its lines are numbered
    from 1. So a copy of the directory can't give the same number to something else. How far a
    segment was delivered, the server knows; it is removed when all of it was.

    Raises:
        ConfigurationError: another agent has it.
        OSError: the directory can't be used.
    """

    def __init__(self, directory: Path, new_id: Callable[[], str], limit: int = LIMIT) -> None:
        self._durable = StateDirectory()
        self._directory = directory
        self._new_id = new_id
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
        # Oldest first; the last one may be open.
        self._segments = sorted(directory.glob(f"*{_SUFFIX}"))
        self._descriptor: int | None = None
        self._written = 0
        self._number = 0
        # Up to where the oldest one was delivered, and its ticket.
        self._place = 0
        self._ticket = ""

    def append(self, reads: list[OfflineReadIn]) -> None:
        """Give the reads their numbers; return when they are on stable storage.

        Raises:
            LogUnavailable: they are not, so nothing may be revealed.
        """
        try:
            head = b""
            if self._descriptor is None or self._written > _SEGMENT:
                head = self._begin()
            lines = [
                _line(msgspec.structs.replace(read, number=number))
                for number, read in enumerate(reads, self._number + 1)
            ]
            data = head + b"".join(lines)
            assert self._descriptor is not None  # noqa: S101 - just begun
            self._durable.write(self._descriptor, data)
            self._durable.sync(self._descriptor)
            if head:
                self._durable.sync_path(self._directory)
        except OSError as error:
            # Nothing follows what may be half there, or there and not durable.
            self._end()
            raise LogUnavailable.of(error) from error
        self._written += len(data)
        self._number += len(reads)

    def take(self, most: int) -> Batch | None:
        """The next reads to deliver, at most so many; None if all were delivered.

        Raises:
            OSError: they can't be read, or what was delivered can't be removed.
        """
        while self._segments:
            oldest = self._segments[0]
            if not self._place:
                self._enter(oldest)
            found = _decode(_read(oldest, self._place), most) if self._place else []
            if found:
                return Batch(self._ticket, found, sum(len(_line(read)) for read in found))
            if len(self._segments) == 1:
                self._end()
            self._durable.unlink(oldest)
            self._segments.pop(0)
            self._place = 0
        return None

    def deliver(self, batch: Batch, delivered: int) -> None:
        """The server has this batch, and all of its segment up to the number `delivered`.

        Raises:
            LogDamaged: it has not.
        """
        last = batch.reads[-1].number
        if delivered < last:
            raise LogDamaged(f"The server has reads up to {delivered}, and was given {last}.")
        self._place += batch.size

    def close(self) -> None:
        """Let another agent have it."""
        self._end()
        os.close(self._lock)

    def remove(self) -> None:
        """Remove the directory too, after all was delivered. Nobody may open it meanwhile.

        Raises:
            OSError: something is left in it.
        """
        self.close()
        self._durable.unlink(self._directory / "lock")
        self._durable.remove_directory(self._directory)

    def _begin(self) -> bytes:
        """Open the next segment; returns its first line."""
        self._end()
        if (len(self._segments) + 1) * _SEGMENT > self._limit:
            raise LogUnavailable("the queue of offline reads is full")
        path = self._directory / f"{self._new_id()}{_SUFFIX}"
        self._descriptor = self._durable.open_append(path, PRIVATE_FILE)
        self._segments.append(path)
        self._written = self._number = 0
        return _line(Head(secrets.token_hex(32)))

    def _end(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _enter(self, segment: Path) -> None:
        """Read the first line; without it there is nothing in the segment."""
        line, end, _ = _read(segment, 0).partition(b"\n")
        try:
            if end:
                self._ticket = msgspec.json.decode(line, type=Head).ticket
                self._place = len(line) + 1
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass


def _line(document: msgspec.Struct) -> bytes:
    return msgspec.json.encode(document) + b"\n"


def _read(segment: Path, place: int) -> bytes:
    with segment.open("rb") as file:
        file.seek(place)
        return file.read(_PIECE)


def _decode(data: bytes, most: int) -> list[OfflineReadIn]:
    """The whole lines at the beginning of some bytes, at most so many."""
    found: list[OfflineReadIn] = []
    for line in data.splitlines(keepends=True)[:most]:
        try:
            if not line.endswith(b"\n"):
                break
            found.append(msgspec.json.decode(line, type=OfflineReadIn))
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
    return found
