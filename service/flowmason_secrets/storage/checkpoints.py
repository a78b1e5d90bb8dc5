"""The signed checkpoints on disk: the newest one and all of them. FORMAT.md §9. Blocking."""

import contextlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

import orjson

from ..core import checkpoint
from ..core.checkpoint import Checkpoint
from ..core.errors import LogDamaged
from ..core.merkle import Unverified
from ..core.note import Verifier
from .durable import SHARED_FILE, Durable
from .published import Layout

_log = logging.getLogger(__name__)

# In bytes: the end of the history in which its newest checkpoint is looked for.
_TAIL = 1 << 16

# A note of more bytes, with cosignatures, is not ours, and would not fit into a line of the log.
_QUOTABLE = 4096


class Signed(NamedTuple):
    """A checkpoint whose signature is verified, and the note that it is in."""

    statement: Checkpoint
    note: bytes


class Checkpoints:
    """The newest checkpoint, and the history of all of them. # format §9.3"""

    def __init__(self, layout: Layout, durable: Durable) -> None:
        self._layout = layout
        self._durable = durable

    def newest(self) -> bytes | None:
        """The newest checkpoint, unverified."""
        return _contents(self._layout.checkpoint)

    def cosigned(self) -> bytes | None:
        """The newest cosigned checkpoint, unverified."""
        return _contents(self._layout.cosigned)

    def quotable(self) -> str | None:
        """The newest checkpoint as the log quotes it, unverified."""
        note = self.newest()
        try:
            if note is None:
                return None
            if len(note) > _QUOTABLE:
                raise Unverified("too long")
            checkpoint.read(note)
        except Unverified as error:
            _log.error("%s is not a checkpoint: %s", self._layout.checkpoint, error)
            return None
        return note.decode()

    def exist(self) -> bool:
        """Whether anything was ever signed here."""
        return self._layout.checkpoint.exists() or self._layout.checkpoints.exists()

    @property
    def anew(self) -> str:
        """What to do to begin anew with another key."""
        return (
            f"To begin anew with another key, move {self._layout.checkpoint} and "
            f"{self._layout.checkpoints} away and keep them with the old verifier key."
        )

    def signed(self, verifier: Verifier) -> list[Signed]:
        """The newest checkpoint and the newest one of the history, the larger one first. They
        differ only after a crash between writing the one and the other, or if somebody put back
        an older one.

        Raises:
            LogDamaged: one of them is not signed by this key, or they contradict each other.
        """
        found = [
            self._verified(path, data, verifier)
            for path, data in (
                (self._layout.checkpoint, self.newest()),
                (self._layout.checkpoints, self._last()),
            )
            if data is not None
        ]
        found.sort(key=lambda one: one.statement.size, reverse=True)
        if len({one.statement for one in found}) > len({one.statement.size for one in found}):
            raise LogDamaged(
                f"{self._layout.checkpoint} and the end of {self._layout.checkpoints} are two "
                "different statements about one size of the log. Compare both with your copies."
            )
        return found

    def publish(self, note: bytes, time: str) -> None:
        """Make a checkpoint the newest one; durable when this returns."""
        self._append(orjson.dumps({"time": time, "checkpoint": note.decode()}) + b"\n")
        self._replace(self._layout.checkpoint, note)
        self._durable.sync_path(self._layout.root)

    def cosign(self, note: bytes, *, newest: bool) -> None:
        """Make a cosigned checkpoint the newest one of its kind; if it is also the `newest` of all,
        it takes the place of what was published without its cosignatures. Durable when this
        returns.
        """
        self._replace(self._layout.cosigned, note)
        if newest:
            self._replace(self._layout.checkpoint, note)
        self._durable.sync_path(self._layout.root)

    def _replace(self, path: Path, note: bytes) -> None:
        draft = self._layout.signing_draft
        # Of one who died; nobody else signs now.
        self._durable.unlink(draft)
        self._durable.create(draft, note, SHARED_FILE, sync=True)
        self._durable.rename(draft, path)

    def _append(self, line: bytes) -> None:
        path = self._layout.checkpoints
        descriptor = self._durable.open_append(path, SHARED_FILE)
        try:
            # A torn line is closed, and counts for nothing.
            torn = not self._end(1).endswith(b"\n") and os.fstat(descriptor).st_size > 0
            self._durable.write(descriptor, b"\n" * torn + line)
            self._durable.sync(descriptor)
        finally:
            os.close(descriptor)

    def _end(self, size: int) -> bytes:
        with self._layout.checkpoints.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read()

    def _last(self) -> bytes | None:
        try:
            lines = self._end(_TAIL).split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
                note: bytes = orjson.loads(line)["checkpoint"].encode()
                return note
        return None

    def _verified(self, path: Path, data: bytes, verifier: Verifier) -> Signed:
        try:
            return Signed(checkpoint.verify(data, [verifier]), data)
        except Unverified as error:
            raise LogDamaged(
                f"The checkpoint in {path} can't be verified with the key {verifier.encode()}: "
                f"{error}. If the log was signed with another key, put that one back. {self.anew}"
            ) from None


def _contents(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None
