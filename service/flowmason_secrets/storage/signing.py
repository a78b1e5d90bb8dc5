"""The key that signs the log, in its file. FORMAT.md §9.2. Blocking."""

import contextlib
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from .. import forking
from ..core.errors import ConfigurationError
from ..core.merkle import Unverified
from ..core.note import Signer
from .durable import PRIVATE_FILE, Durable

# Longer than any name of a host; a checkpoint has to fit into a line of the log.
MAX_ORIGIN = 320


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
