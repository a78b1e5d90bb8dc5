"""What the agent knew last of each secret: encrypted, in memory and on disk, bound to its API key.

Files are written and removed in one worker thread, in order; `load`, `store` and `purge` block.
Processes with the same API key may share a directory.
"""

import contextlib
import hmac
import os
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import msgspec
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ...core.keyring import Plaintext
from ...storage.durable import PRIVATE_FILE, StateDirectory

_SUFFIX = ".known"
# Of all tokens together, in bytes: what was confirmed longest ago goes first.
_ROOM = 8 << 20
# How many times within its maximum age the file of a value is written again, only because the
# server said again that it is current.
_CONFIRMATIONS = 20


class Known(msgspec.Struct, frozen=True):
    """A value as the server gave it: in the read with this `seq`, so that of two answers the newer
    one can be told. `confirmed` and `expiry` are in seconds since the epoch.
    """

    name: str
    value: str
    category: str
    version: int
    seq: int
    confirmed: float
    expiry: float | None = None

    def __repr__(self) -> str:
        return f"<Known {self.name!r}>"


@dataclass(slots=True)
class _Entry:
    token: bytes
    version: int
    seq: int
    expiry: float | None
    confirmed: float
    # When it was confirmed according to its file.
    written: float


class LastKnown:
    """The cache. Nothing in it is older than `max_age` seconds when it is handed out."""

    def __init__(
        self,
        directory: Path,
        api_key: Plaintext,
        clock: Callable[[], float],
        max_age: float,
    ) -> None:
        secret = api_key.reveal().encode()
        # An API key has 192 random bits: RFC 5869 is for such, no need to make guessing slow.
        self._fernet = Fernet(urlsafe_b64encode(_derive(secret, b"values")))
        self._name_key = _derive(secret, b"names")
        self._directory = directory
        self._durable = StateDirectory()
        self._clock = clock
        self._max_age = max_age
        self._entries: dict[str, _Entry] = {}
        self._size = 0
        # When secrets were dropped, in drops: an answer from before must not bring one back.
        self.drops = 0
        self._dropped: dict[str, int] = {}
        self._all_dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        """The secrets that are known."""
        return list(self._entries)

    def load(self) -> None:
        """Read the files; those of another API key, and those that are too old, are removed.

        Raises:
            OSError: the directory can't be used.
        """
        self._durable.make_directory(self._directory)
        self._durable.restrict(self._directory)
        with self._alone():
            self._load()

    def _load(self) -> None:
        for path in sorted(self._directory.iterdir()):
            try:
                token = path.read_bytes()
                known = msgspec.json.decode(self._fernet.decrypt(token), type=Known)
            except (InvalidToken, msgspec.DecodeError, UnicodeDecodeError):
                self._durable.unlink(path)
                continue
            entry = _Entry(
                token, known.version, known.seq, known.expiry, known.confirmed, known.confirmed
            )
            if path != self._path(known.name) or self._outdated(entry):
                self._durable.unlink(path)
            else:
                self._keep(known.name, entry)

    def get(self, name: str) -> tuple[Known, float] | None:
        """What is known of a secret and how many seconds ago it was confirmed, if it may still be
        handed out.
        """
        entry = self._entries.get(name)
        if entry is None or self._outdated(entry):
            return None
        known = msgspec.json.decode(self._fernet.decrypt(entry.token), type=Known)
        return known, max(0.0, self._clock() - entry.confirmed)

    def has(self, name: str, version: int) -> bool:
        """Whether this version is known."""
        entry = self._entries.get(name)
        return entry is not None and entry.version == version

    def seq(self, name: str) -> int:
        """The seq of the newest read of a known secret; -1 if it is not known."""
        entry = self._entries.get(name)
        return -1 if entry is None else entry.seq

    def confirm(self, name: str, seq: int) -> bool:
        """The server gave the same version again; whether it is worth to be stored anew."""
        entry = self._entries[name]
        entry.seq = max(entry.seq, seq)
        entry.confirmed = self._clock()
        return entry.confirmed - entry.written > self._max_age / _CONFIRMATIONS

    def put(self, known: Known, drops: int) -> bool:
        """Keep what the server gave; the request was sent after so many `drops`. False if something
        newer is known.
        """
        name = known.name
        if known.seq < self.seq(name):
            return False
        if drops < max(self._all_dropped, self._dropped.get(name, 0)):
            return False
        token = self._fernet.encrypt(msgspec.json.encode(known))
        entry = _Entry(token, known.version, known.seq, known.expiry, known.confirmed, 0.0)
        self._keep(name, entry)
        return True

    def drop(self, name: str) -> bool:
        """Forget a secret; whether it was known. `store` removes its file."""
        self.drops += 1
        if len(self._dropped) > 1000:
            self._dropped.clear()
            self._all_dropped = self.drops
        self._dropped[name] = self.drops
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._size -= len(entry.token)
        return entry is not None

    def clear(self) -> list[str]:
        """Forget all secrets; returns their names."""
        names = self.names
        self.drops += 1
        self._all_dropped = self.drops
        self._entries.clear()
        self._size = 0
        return names

    def store(self, name: str) -> None:
        """Make the file of a secret what is known of it now: it is there whole, or not at all.

        Raises:
            OSError: it can't be written.
        """
        with self._alone():
            self._store(name)

    def purge(self) -> None:
        """Remove all files, those that others wrote too.

        Raises:
            OSError: they can't be removed.
        """
        with self._alone():
            for path in self._directory.iterdir():
                self._durable.unlink(path)

    def _store(self, name: str) -> None:
        path = self._path(name)
        found = self.get(name)
        if found is None:
            self._durable.unlink(path)
            return
        known, _ = found
        if self._seq_on_disk(path) > known.seq:
            # Another process has read it since.
            return
        entry = self._entries.get(name)
        confirmed = known.confirmed if entry is None else entry.confirmed
        token = self._fernet.encrypt(
            msgspec.json.encode(msgspec.structs.replace(known, confirmed=confirmed))
        )
        draft = self._directory / f"{uuid4().hex}.tmp"
        try:
            self._durable.create(draft, token, PRIVATE_FILE, sync=True)
            self._durable.rename(draft, path)
        except OSError:
            with contextlib.suppress(OSError):
                self._durable.unlink(draft)
            raise
        if entry is not None:
            entry.written = confirmed

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes away from the files, for as long as a step takes."""
        return self._durable.locked(self._directory.with_name(f"{self._directory.name}.lock"))

    def _seq_on_disk(self, path: Path) -> int:
        try:
            token = path.read_bytes()
            return msgspec.json.decode(self._fernet.decrypt(token), type=Known).seq
        except (FileNotFoundError, InvalidToken, msgspec.DecodeError, UnicodeDecodeError):
            return -1

    def _keep(self, name: str, entry: _Entry) -> None:
        before = self._entries.pop(name, None)
        self._size += len(entry.token) - (0 if before is None else len(before.token))
        self._entries[name] = entry
        while self._size > _ROOM:
            oldest = min(self._entries, key=lambda one: self._entries[one].confirmed)
            self._size -= len(self._entries.pop(oldest).token)

    def _outdated(self, entry: _Entry) -> bool:
        now = self._clock()
        # A confirmation from the future: the clock was set back, nobody knows how old it is.
        fresh = -1.0 <= now - entry.confirmed <= self._max_age
        return not fresh or (entry.expiry is not None and entry.expiry <= now)

    def _path(self, name: str) -> Path:
        # Not even the names are told.
        return self._directory / (
            hmac.digest(self._name_key, os.fsencode(name), "sha256").hex()[:32] + _SUFFIX
        )


def place_of(api_key: Plaintext) -> str:
    """The name of a directory for this API key, which does not tell it."""
    return _derive(api_key.reveal().encode(), b"place").hex()[:32]


def _derive(secret: bytes, purpose: bytes) -> bytes:
    info = b"flowmason-secrets agent cache: " + purpose
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)
