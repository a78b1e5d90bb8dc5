"""A text with secrets in a file: for programs that read a file and not their environment."""

import hmac
import os
import secrets
import stat
from pathlib import Path

from aiofiles.os import wrap

from ..core.errors import ConfigurationError, InvalidInput
from ..core.keyring import Plaintext
from ..storage.durable import Durable

_OTHERS = 0o007
# Owner and group may have it, to read and to write.
_ALLOWED = 0o660


class Output:
    """A file that is there whole or not at all, and never with more than its `mode`."""

    def __init__(self, path: Path, mode: int) -> None:
        if mode & ~_ALLOWED or not mode & stat.S_IRUSR:
            raise InvalidInput(
                "mode", f"{mode:04o} is not one for secrets: like 0400, 0440, 0600, 0640 or 0660"
            )
        self._path = path
        self._mode = mode
        self._durable = Durable()
        self._key = secrets.token_bytes(32)
        self._digest = b""

    async def put(self, text: Plaintext) -> bool:
        """Make the file hold this, durably; returns whether it held something else before, as far
        as this process knows.

        Raises:
            ConfigurationError: others could read it there, or replace it.
            OSError: it can't be written; it is as it was.
        """
        data = text.reveal().encode()
        digest = hmac.digest(self._key, data, "sha256")
        if hmac.compare_digest(digest, self._digest):
            return False
        await wrap(self._write)(data)
        self._digest = digest
        return True

    def check(self) -> None:
        """Raises:
        ConfigurationError: others could read it there, or replace it.
        """
        directory = self._path.parent
        if stat.S_IMODE(os.stat(directory).st_mode) & 0o006:
            raise ConfigurationError(
                f"The directory {directory} is open to everybody: secrets are not put there. "
                f"Use another one, or: chmod o-rw {directory}"
            )
        try:
            there = os.lstat(self._path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(there.st_mode):
            raise ConfigurationError(f"{self._path} is not a file, and is not replaced.")
        if stat.S_IMODE(there.st_mode) & _OTHERS:
            raise ConfigurationError(
                f"{self._path} is open to everybody, and somebody may rely on that: remove it, "
                f"or: chmod o= {self._path}"
            )

    def _write(self, data: bytes) -> None:
        self.check()
        draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}.part")
        try:
            self._durable.create(draft, data, self._mode, sync=True)
            self._durable.rename(draft, self._path)
        except BaseException:
            self._durable.unlink(draft)
            raise
        self._durable.sync_path(self._path.parent)
