"""What use cases take and give back."""

from dataclasses import dataclass
from typing import NamedTuple

from . import errors, names, times
from .access import FULL, Peer
from .events import Detail, Receipt
from .keyring import Plaintext
from .records import ApiKey, Metadata, SecretRecord


class Revealed(NamedTuple):
    """A value with its metadata, and the receipt of this read."""

    metadata: Metadata
    value: Plaintext
    receipt: Receipt


class Usage(NamedTuple):
    """What values are for: the names of a pipeline and of a stage of it, if they are known."""

    pipeline: str | None = None
    stage: str | None = None

    def check(self) -> dict[str, Detail]:
        """Returns what events of it have in their details.

        Raises:
            InvalidInput: empty, over 128 characters or with control characters.
        """
        given = self._asdict().items()
        return {field: names.check_label(name, field) for field, name in given if name is not None}


class OfflineRead(NamedTuple):
    """A read that an agent served from its cache: the `number` that it has in the agent's queue,
    from 1, an id, when it was, of what, and for whom.
    """

    number: int
    id: str
    time: str
    name: str
    version: int
    peer: Peer


class Delivery(NamedTuple):
    """Reads from the queue of an agent, by ascending numbers. Only the agent knows the `ticket`."""

    ticket: Plaintext
    reads: tuple[OfflineRead, ...]


class Resolved(NamedTuple):
    """A document, as JSON, with values in the place of references; and the receipt of the read of
    each secret, by its name.
    """

    document: Plaintext
    receipts: dict[str, Receipt]


class Written(NamedTuple):
    """The metadata after a create (`created`) or an update, and the receipt of it."""

    metadata: Metadata
    created: bool
    receipt: Receipt


class IssuedKey(NamedTuple):
    """A new API key. `raw` is told this once and kept nowhere."""

    key: ApiKey
    raw: Plaintext
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Draft:
    """What a secret is to become. `expires_at` is RFC 3339 with a zone; with `nested`, the name may
    have `/` in it.
    """

    name: str
    value: Plaintext
    description: str = ""
    category: str = "other"
    expires_at: str | None = None
    nested: bool = False

    def check(self) -> float | None:
        """Returns the expiry in seconds since the epoch.

        Raises:
            InvalidInput: names the field.
        """
        if self.nested:
            names.check_new_path(self.name)
        else:
            names.check_new_name(self.name)
        size = len(names.check_text("value", self.value.reveal()).encode())
        names.check_text("description", self.description)
        if size > names.MAX_VALUE_BYTES:
            raise errors.InvalidInput("value", f"has {size} bytes, at most 65536 are allowed")
        if len(self.description) > names.MAX_DESCRIPTION:
            raise errors.InvalidInput("description", "must have at most 1024 characters")
        if self.category not in names.CATEGORIES:
            raise errors.InvalidInput("category", f"must be one of {', '.join(names.CATEGORIES)}")
        return None if self.expires_at is None else times.parse(self.expires_at, "expires_at")


@dataclass(frozen=True, slots=True)
class Precondition:
    """What a conditional write asks for: absence, a version, or one of some etags (`*`: any)."""

    absent: bool = False
    etags: tuple[str, ...] = ()
    version: int | None = None

    def check(self, name: str, current: SecretRecord | None) -> None:
        """Raises:
        PreconditionFailed: the secret is not as asked for.
        """
        etag = None if current is None else current.metadata.etag
        if self.absent or current is None:
            met = self.absent and current is None
        elif self.version is not None:
            met = current.metadata.version == self.version
        else:
            met = "*" in self.etags or etag in self.etags
        if not met:
            raise errors.PreconditionFailed(name, etag)


@dataclass(frozen=True, slots=True)
class KeyDraft:
    """What an API key is to be. `expires_at` is RFC 3339 with a zone."""

    name: str
    scopes: tuple[str, ...] = (FULL,)
    allow: tuple[str, ...] = ()
    expires_at: str | None = None
