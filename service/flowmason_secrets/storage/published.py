"""The files under their final names: secrets and API keys. FORMAT.md §1, §2, §4. Blocking."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from ..core.names import org_hash, secret_hash
from ..core.records import (
    ApiKey,
    DropSecret,
    Inventory,
    Metadata,
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
        self.signing_lock = root / "signing.lock"

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

    def publish_again(self, change: Single) -> list[str]:
        """Like `publish`, but writes nothing where all of it is there: a disk may be full."""
        match change:
            case PutSecret(org_id, metadata, token):
                found = self.secret(org_id, metadata.name, 0)
                if found is not None and (found.metadata, found.token) == (metadata, token):
                    return [*self._paths(org_id, metadata.name), self._layout.root_path]
            case PutApiKey(key):
                if self.api_key(key.digest) == key:
                    return [self._layout.api_key(key.digest)]
        return self.publish(change)

    def publish(self, change: Single) -> list[str]:
        """Make a committed change visible; returns the paths it touched, not yet synced."""
        match change:
            case PutSecret(org_id, metadata, token):
                secret, meta = self._paths(org_id, metadata.name)
                # The metadata name the token's hash: a reader in between sees a mismatch, and the
                # gate tells him to read again.
                self._durable.place(secret, token, PRIVATE_FILE)
                data = wire.encode_metadata(metadata, token)
                self._durable.place(meta, data, PRIVATE_FILE)
                return [secret, meta, self._layout.root_path]
            case DropSecret(org_id, name):
                secret, meta = self._paths(org_id, name)
                # The token goes first: what is left of a torn deletion holds nothing.
                self._durable.unlink(secret)
                self._durable.unlink(meta)
                return [secret, meta]
            case PutApiKey(key):
                path = self._layout.api_key(key.digest)
                # Key files are read without the gate, and by listing them: never half of one.
                draft = self._layout.staged / f"{uuid4().hex}.tmp"
                self._durable.create(draft, wire.encode_api_key(key), PRIVATE_FILE, sync=False)
                self._durable.rename(draft, Path(path))
                return [path]

    def secret(self, org_id: str, name: str, as_of: int) -> SecretRecord | None:
        """The secret as its files are now. `as_of` is the size of the log before this call."""
        secret, meta = self._paths(org_id, name)
        try:
            raw_meta, token = _read(meta), _read(secret)
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
        return SecretRecord(metadata, token, as_of)

    def metadata(self, org: str, stem: str) -> Metadata | None:
        """The metadata of one file; None if it is gone, or can't be read, which is logged."""
        found = self._of_metadata(org, stem, wire.decode_metadata)
        return None if found is None else found[0]

    def _of_metadata(self, org: str, stem: str, decode: Callable[[bytes, str], T]) -> T | None:
        path = self._layout.secret(org, stem)[1]
        problem = None
        # It may be read while it is being written, which takes microseconds.
        for _ in range(_READS):
            raw = _read(path)
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
        files = set(os.listdir(f"{self._layout.root_path}/{org}"))
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
        raw = _read(self._layout.api_key(digest))
        try:
            return None if raw is None else wire.decode_api_key(raw)
        except wire.Malformed as error:
            _log.error("keys/%s.json is damaged and opens nothing: %s", digest, error)
            return None

    def api_keys(self, org_id: str) -> list[ApiKey]:
        """All API keys of the organisation, oldest first."""
        digests = [name[:-5] for name in os.listdir(self._layout.keys) if name.endswith(".json")]
        keys = [key for key in map(self.api_key, digests) if key and key.org_id == org_id]
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    def _paths(self, org_id: str, name: str) -> tuple[str, str]:
        return self._layout.secret(org_hash(org_id), secret_hash(name))


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().rstrip(b"\n")
    except FileNotFoundError:
        return None
