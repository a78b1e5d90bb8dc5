"""What is stored: a secret with its metadata, and an API key with its grants. FORMAT.md §2, §4."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .access import Principal
from .names import secret_id

# Identifies what an event changes or depends on: the organisation and the resource's id.
Ref = tuple[str, str]


@dataclass(frozen=True, slots=True)
class SecretMetadata:
    """Everything about a secret but its value. Times are RFC 3339 in UTC."""

    id: str
    name: str
    description: str
    category: str
    created_at: str
    updated_at: str
    created_by: str | None
    expires_at: str | None
    is_expired: bool
    version: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """Everything about a secret but its value. Times are RFC 3339 in UTC.

    `revision` is the id of the event that wrote this version; it is empty for a secret that
    FlowMason 1.0 wrote. `key_id` names the master key of the token.
    """

    id: str
    name: str
    description: str
    category: str
    created_at: str
    updated_at: str
    created_by: str | None
    expires_at: str | None
    version: int
    revision: str
    key_id: str
    # Seconds since the epoch, next to the text of the same time: reads compare it.
    expiry: float | None = field(default=None, repr=False)

    @property
    def etag(self) -> str:
        """The entity tag (RFC 9110 §8.8.3), never the same for two contents of a secret."""
        # The tail of a UUIDv7 is its random part.
        return f'"{self.version}-{self.revision[-8:] or "0"}"'

    def shown(self, now: float) -> SecretMetadata:
        """What callers see of it at `now`, in seconds since the epoch."""
        return SecretMetadata(
            id=self.id,
            name=self.name,
            description=self.description,
            category=self.category,
            created_at=self.created_at,
            updated_at=self.updated_at,
            created_by=self.created_by,
            expires_at=self.expires_at,
            is_expired=self.is_expired(now),
            version=self.version,
        )

    def is_expired(self, now: float) -> bool:
        """Whether the value is no longer handed out at `now`, in seconds since the epoch."""
        return self.expiry is not None and self.expiry <= now


class Proof:
    """With which key a token was decrypted: it can be decrypted with that one again."""

    __slots__ = ("key",)

    def __init__(self) -> None:
        self.key: object = None


class SecretRecord(NamedTuple):
    """One secret as it is stored, read when the log stood at `as_of` events.

    `damage` says what is wrong with its files; then `token` is empty. A record that is kept in
    memory has a `proof`.
    """

    metadata: Metadata
    token: bytes
    as_of: int
    damage: str | None = None
    proof: Proof | None = None


class Inventory(NamedTuple):
    """An organisation's secrets: names by the id of the master key they are under.

    `damaged` has the file stems of what is not a whole secret.
    """

    names: dict[str, list[str]]
    damaged: list[str]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key, of which only the SHA-256 is kept. Times are RFC 3339 in UTC.

    `expiry` is `expires_at` in seconds since the epoch.
    """

    id: str
    org_id: str
    name: str
    digest: str = field(repr=False)
    scopes: tuple[str, ...]
    allow: tuple[str, ...]
    created_at: str
    created_by: str | None
    expires_at: str | None
    expiry: float | None = None
    revoked_at: str | None = None

    def is_live(self, now: float) -> bool:
        """Whether it opens anything at `now`, in seconds since the epoch."""
        return self.revoked_at is None and (self.expiry is None or self.expiry > now)

    def principal(self) -> Principal:
        """Who asks when a request carries this key."""
        return Principal(
            org_id=self.org_id,
            actor=self.id,
            actor_type="api_key",
            scopes=frozenset(self.scopes),
            allow=self.allow,
            expires_at=self.expiry,
            digest=self.digest,
        )


@dataclass(frozen=True, slots=True)
class PutSecret:
    """The change that makes a secret what it says."""

    org_id: str
    metadata: Metadata
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DropSecret:
    """The change that makes a secret absent."""

    org_id: str
    name: str


@dataclass(frozen=True, slots=True)
class PutApiKey:
    """The change that makes an API key what it says; a revoked one says since when."""

    key: ApiKey


@dataclass(frozen=True, slots=True)
class Rekey:
    """The change that puts secrets of one organisation under another master key, and no more."""

    secrets: tuple[PutSecret, ...]


# A change of one resource, and any change.
Single = PutSecret | DropSecret | PutApiKey
Change = Single | Rekey


def singles(change: Change) -> Iterable[tuple[Ref, Single]]:
    """The changes of single resources that a change consists of."""
    match change:
        case PutSecret(org_id, metadata):
            # Not the id in the file: events name this one.
            yield (org_id, secret_id(org_id, metadata.name)), change
        case DropSecret(org_id, name):
            yield (org_id, secret_id(org_id, name)), change
        case PutApiKey(key):
            yield (key.org_id, key.id), change
        case Rekey(secrets):
            for secret in secrets:
                yield from singles(secret)
