"""The key that signs the log, and the signed checkpoints on disk. FORMAT.md §9. Blocking."""

import contextlib
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import orjson

from .. import forking
from ..core import checkpoint
from ..core.checkpoint import Checkpoint
from ..core.errors import ConfigurationError, LogDamaged
from ..core.merkle import Unverified
from ..core.note import Signer, Verifier
from .durable import PRIVATE_FILE, SHARED_FILE, Durable
from .published import Layout

# Longer than any name of a host; a checkpoint has to fit into a line of the log.
MAX_ORIGIN = 320

# In bytes: the end of the history in which its newest checkpoint is looked for.
_TAIL = 1 << 16


class Signed(NamedTuple):
    """A checkpoint whose signature is verified, and the note that it is in."""

    statement: Checkpoint
    note: bytes


class SigningKey:
    """The file with the key that signs the log."""

    def __init__(self, path: Path, durable: Durable) -> None:
        self.path = path
        self._durable = durable

    def load(self) -> Signer | None:
        """The key; None if there is no file.

        Raises:
            ConfigurationError: it can't be read, is open to others, or holds no key.
        """
        try:
            with self.path.open(encoding="ascii") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                signer = Signer.decode(file.read().strip())
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"The signing key {self.path} can't be read: {error}"
            ) from None
        except Unverified as error:
            raise ConfigurationError(f"The signing key {self.path} is not one: {error}.") from None
        if mode & 0o077:
            raise ConfigurationError(
                f"The signing key {self.path} is open to others (mode {mode:04o}). "
                f"Run: chmod 600 {self.path}"
            )
        if len(signer.name.encode()) > MAX_ORIGIN:
            raise ConfigurationError(f"The name of the signing key {self.path} is too long.")
        return signer

    def make(self) -> Signer:
        """The key; if there is none, a new one, durable.

        Raises:
            ConfigurationError: it can't be written.
        """
        try:
            with self._alone():
                signer = self.load()
                if signer is None:
                    signer = Signer(_origin(), secrets.token_bytes(32))
                    draft = self.path.with_name(f"{self.path.name}.{uuid4().hex}.tmp")
                    data = f"{signer.encode()}\n".encode()
                    self._durable.create(draft, data, PRIVATE_FILE, sync=True)
                    self._durable.rename(draft, self.path)
                    self._durable.sync_path(self.path.parent)
                return signer
        except OSError as error:
            raise ConfigurationError(
                f"The key that signs the log can't be written to {self.path}: {error.strerror}. "
                "Name a file for it with FLOWMASON_SECRETS_SIGNING_KEY_FILE."
            ) from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others from making one meanwhile."""
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        forking.close_in_children(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            forking.close(descriptor)


def _origin() -> str:
    """A name for a log that no other log has: C2SP tlog-checkpoint."""
    host = "".join(one if one.isalnum() or one in "-._" else "-" for one in socket.gethostname())
    return f"flowmason-secrets/{host[:255] or 'host'}/{secrets.token_hex(4)}"


class Checkpoints:
    """The newest checkpoint, and the history of all of them. # format §9.3"""

    def __init__(self, layout: Layout, durable: Durable) -> None:
        self._layout = layout
        self._durable = durable

    def newest(self) -> bytes | None:
        """The newest checkpoint, unverified."""
        with contextlib.suppress(FileNotFoundError):
            return self._layout.checkpoint.read_bytes()
        return None

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
        root, draft = self._layout.root, self._layout.checkpoint.with_name("checkpoint.tmp")
        # Of one who died; nobody else signs now.
        self._durable.unlink(draft)
        self._durable.create(draft, note, SHARED_FILE, sync=True)
        self._durable.rename(draft, self._layout.checkpoint)
        self._durable.sync_path(root)

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
