"""The files under their final names: secrets and API keys. FORMAT.md §1, §2, §4. Blocking."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from ..core.names import org_hash, secret_hash
from ..core.records import (
    ApiKey,
    DropSecret,
    Inventory,
    Metadata,
    Proof,
    PutApiKey,
    PutSecret,
    SecretRecord,
    Single,
)
from . import wire
from .durable import PRIVATE_FILE, Durable

T = TypeVar("T")

_log = logging.getLogger(__name__)

_READS = 3
_PIECE = 1 << 14

_Files = list[tuple[str, bytes | None]]


class Layout:
    """Where everything is in a data directory. # format §1"""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root_path = os.fspath(root)
        self.events = root / "events"
        self.staged = root / "staged"
        self.keys = root / "keys"
        self.lock = root / "commit.lock"
        self.index = root / "index.sqlite3"
        self.tree = root / "tree"
        self.checkpoint = root / "checkpoint"
        self.checkpoints = root / "checkpoints.ndjson"
        self.cosigned = root / "checkpoint.cosigned"
        self.witnesses = root / "witnesses.json"
        self.reserve = root / "reserve"
        self.reserve_in_use = root / "reserve.in-use"
        # Of whatever the process that signs replaces: its next checkpoint clears it away.
        self.signing_draft = root / "checkpoint.tmp"
        self.signing_lock = root / "signing.lock"
        self.minimum = root / "minimum"

    def organisations(self) -> list[str]:
        """The directories of organisations: 16 hex digits. # format §2.1"""
        names = (path.name for path in self.root.glob("[0-9a-f]" * 16) if path.is_dir())
        return sorted(names)

    # Plain strings: these are made for every change, and pathlib is slow.

    def secret(self, org: str, stem: str) -> tuple[str, str]:
        """The token's and the metadata's file."""
        path = f"{self.root_path}/{org}/{stem}"
        return f"{path}.secret", f"{path}.meta"

    def api_key(self, digest: str) -> str:
        """The file of the API key with this SHA-256."""
        return f"{self.root_path}/keys/{digest}.json"


class Published:
    """Reads the published files, and publishes changes. Publishing again changes nothing."""

    def __init__(self, layout: Layout, durable: Durable, oldest_key: Callable[[], str]) -> None:
        self._layout = layout
        self._durable = durable
        self._oldest_key = oldest_key
        # What files would hold, if they could be written; None: they would be gone. Replaced as a
        # whole, because it is read in other threads.
        self._held: dict[str, bytes | None] = {}

    def hold(self, changes: Iterable[Single]) -> None:
        """From now on read these committed changes, and no others, as if they were published."""
        self._held = {path: data for change in changes for path, data in self._files(change)}

    def publish_again(self, change: Single) -> list[str]:
        """Like `publish`, but writes nothing where all of it is there: a disk may be full."""
        files = self._files(change)
        if any(_read(path) != data for path, data in files):
            return self.publish(change)
        return self._touched(change, files)

    def publish(self, change: Single) -> list[str]:
        """Make a committed change visible; returns the paths it touched, not yet synced."""
        # The token goes first. The metadata name its hash: a reader in between sees a mismatch, and
        # the gate tells him to read again. What is left of a torn deletion holds nothing.
        files = self._files(change)
        for path, data in files:
            if data is None:
                self._durable.unlink(path)
            elif isinstance(change, PutApiKey):
                # Key files are read without the gate, and by listing them: never half of one.
                draft = self._layout.staged / f"{uuid4().hex}.tmp"
                self._durable.create(draft, data, PRIVATE_FILE, sync=False)
                self._durable.rename(draft, Path(path))
            else:
                self._durable.place(path, data, PRIVATE_FILE)
        return self._touched(change, files)

    def _touched(self, change: Single, files: _Files) -> list[str]:
        """What has to be synced after a change."""
        paths = [path for path, _ in files]
        # The organisation's directory may be new.
        return [*paths, self._layout.root_path] if isinstance(change, PutSecret) else paths

    def _files(self, change: Single) -> _Files:
        """What a change makes of which files, in order."""
        match change:
            case PutSecret(org_id, metadata, token):
                secret, meta = self._paths(org_id, metadata.name)
                return [(secret, token), (meta, wire.encode_metadata(metadata, token))]
            case DropSecret(org_id, name):
                return [(path, None) for path in self._paths(org_id, name)]
            case PutApiKey(key):
                return [(self._layout.api_key(key.digest), wire.encode_api_key(key))]

    def secret(self, org_id: str, name: str, as_of: int) -> SecretRecord | None:
        """The secret as its files are now. `as_of` is the size of the log before this call."""
        secret, meta = self._paths(org_id, name)
        try:
            raw_meta, token = self._read(meta), self._read(secret)
            if raw_meta is None and token is None:
                return None
            metadata, token_sha256 = wire.decode_metadata(raw_meta or b"", self._oldest_key())
        except (wire.Malformed, OSError) as error:
            unreadable = wire.unreadable(org_id, name, self._oldest_key())
            return SecretRecord(unreadable, b"", as_of, str(error))
        if not token:
            return SecretRecord(metadata, b"", as_of, "the encrypted value is missing or empty")
        if token_sha256 not in (None, hashlib.sha256(token).hexdigest()):
            return SecretRecord(
                metadata, b"", as_of, "value and metadata are of different versions"
            )
        return SecretRecord(metadata, token, as_of, proof=Proof())

    def organisations(self) -> list[str]:
        """The directories of organisations, or what they would be called."""
        held = {os.path.basename(os.path.dirname(path)) for path in self._held}
        return sorted({*self._layout.organisations(), *held} - {self._layout.keys.name})

    def stems(self, org: str) -> list[str]:
        """The secret hashes of all metadata that an organisation has."""
        names = self._names(f"{self._layout.root_path}/{org}")
        return [name[:-5] for name in names if name.endswith(".meta")]

    def settled(self) -> bool:
        """Whether the files hold every change that this process knows of."""
        return not self._held

    def metadata(self, org: str, stem: str) -> Metadata | None:
        """The metadata of one file; None if it is gone, or can't be read, which is logged."""
        found = self._of_metadata(org, stem, wire.decode_metadata)
        return None if found is None else found[0]

    def _of_metadata(self, org: str, stem: str, decode: Callable[[bytes, str], T]) -> T | None:
        path = self._layout.secret(org, stem)[1]
        problem = None
        # It may be read while it is being written, which takes microseconds.
        for _ in range(_READS):
            raw = self._read(path)
            if raw is None:
                return None
            try:
                return decode(raw, self._oldest_key())
            except wire.Malformed as error:
                problem = error
        _log.warning("left out: %s: %s", path, problem)
        return None

    def secrets(self, org_id: str, names: Sequence[str], as_of: int) -> list[SecretRecord | None]:
        """Like `secret`, one for each name."""
        return [self.secret(org_id, name, as_of) for name in names]

    def inventory(self, org: str) -> Inventory:
        """See `Store.inventory`."""
        files = self._names(f"{self._layout.root_path}/{org}")
        stems = {name.rpartition(".")[0] for name in files if name.endswith((".secret", ".meta"))}
        found = Inventory({}, [])
        for stem in sorted(stems):
            entry = self._of_metadata(org, stem, wire.decode_key_id)
            whole = f"{stem}.secret" in files
            if entry is None or not whole or secret_hash(entry[0]) != stem:
                found.damaged.append(stem)
            else:
                found.names.setdefault(entry[1], []).append(entry[0])
        return found

    def api_key(self, digest: str) -> ApiKey | None:
        """The API key with this SHA-256; None without one, or for a damaged file (logged)."""
        raw = self._read(self._layout.api_key(digest))
        try:
            return None if raw is None else wire.decode_api_key(raw)
        except wire.Malformed as error:
            _log.error("keys/%s.json is damaged and opens nothing: %s", digest, error)
            return None

    def api_keys(self, org_id: str) -> list[ApiKey]:
        """All API keys of the organisation, oldest first."""
        names = self._names(f"{self._layout.root_path}/keys")
        digests = [name[:-5] for name in names if name.endswith(".json")]
        keys = [key for key in map(self.api_key, digests) if key and key.org_id == org_id]
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    def _read(self, path: str) -> bytes | None:
        held = self._held
        return held[path] if path in held else _read(path)

    def _names(self, directory: str) -> set[str]:
        """The names in a directory; none if it is not there."""
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            names.update(os.listdir(directory))
        for path, data in self._held.items():
            parent, name = os.path.split(path)
            if parent == directory:
                names.discard(name) if data is None else names.add(name)
        return names

    def _paths(self, org_id: str, name: str) -> tuple[str, str]:
        return self._layout.secret(org_hash(org_id), secret_hash(name))


def _read(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # `open` makes twice as many system calls, for files as small as these are.
        data = piece = os.read(descriptor, _PIECE)
        while len(piece) == _PIECE:
            piece = os.read(descriptor, _PIECE)
            data += piece
    finally:
        os.close(descriptor)
    return data.rstrip(b"\n")
