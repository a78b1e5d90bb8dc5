"""What the commands work on: a data directory or a server, behind one interface."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from ..api import shapes
from ..core.drafts import Draft, KeyDraft, Precondition, Usage
from ..core.keyring import Plaintext
from ..core.ports import AuditQuery
from ..core.records import SecretMetadata


class Stored(NamedTuple):
    """A secret's metadata as it is stored now; `created` if this made it."""

    metadata: SecretMetadata
    etag: str
    created: bool = False


class Filters(NamedTuple):
    """Which secrets a listing shows; None: all of them."""

    category: str | None = None
    prefix: str | None = None
    expired: bool | None = None


class OrganisationEntry(shapes.AuditEntry, frozen=True, kw_only=True):
    """An event of any organisation, or of none: the log's own."""

    org_id: str | None


class Server(NamedTuple):
    """Where a target sends its requests."""

    url: str
    api_key: Plaintext
    insecure: bool


class Target(Protocol):
    """The operations of one organisation.

    All of them raise SecretsError or click.ClickException, whose text is safe to show.
    """

    server: Server | None
    """None: it works on the data directory itself."""

    complete_since: str | None
    """The time from which on the last answer about events has all of them, if some were archived.
    """

    async def get(self, name: str) -> shapes.SecretValue:
        """The value; this read is in the event log."""

    async def resolve(self, document: Plaintext, usage: Usage) -> shapes.ResolvedOut:
        """The document with values in the place of references; these reads are in the log."""

    async def read(self, names: Sequence[str]) -> dict[str, Plaintext]:
        """The values of at most 100 secrets, all or none; these reads are in the event log."""

    def changed(self) -> AsyncIterator[str | None]:
        """Says which secret was created or updated, soon after it, without an end; None means that
        it may be any. The first one is None: from then on, nothing is missed.
        """

    async def set(self, draft: Draft, precondition: Precondition | None) -> Stored:
        """Create the secret, or replace all of it."""

    async def delete(self, name: str, precondition: Precondition | None) -> shapes.Message:
        """Delete the secret."""

    async def metadata(self, name: str) -> Stored:
        """Everything about the secret but its value."""

    async def listing(self, filters: Filters) -> list[SecretMetadata]:
        """The secrets, sorted by name."""

    async def audit(self, query: AuditQuery) -> list[shapes.AuditEntry]:
        """Matching events, newest first. Whose events is for the target to say, not the query."""

    def export(self, form: str, query: AuditQuery) -> AsyncIterator[bytes]:
        """All matching events, oldest first, in one of the formats, piece by piece."""

    async def create_key(self, draft: KeyDraft) -> shapes.ApiKeyIssued:
        """A new API key."""

    async def keys(self) -> list[shapes.ApiKeyOut]:
        """All API keys, oldest first, the revoked ones included."""

    async def status(self) -> shapes.Health:
        """Whether values can be served, and how many secrets are under each master key."""

    async def revoke_key(self, key_id: str) -> shapes.Message:
        """Revoke an API key: when this returns, nobody accepts it any more."""


# Opens a target for the duration of a block.
Place = Callable[[], AbstractAsyncContextManager[Target]]
