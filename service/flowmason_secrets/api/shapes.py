"""What goes over the wire, as types: validation and OpenAPI both come from them."""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..core import times
from ..core.drafts import Resolved, Revealed
from ..core.errors import Unresolved
from ..core.events import Detail, Line, Receipt
from ..core.keyring import KeyState, KeyUsage
from ..core.names import MAX_DESCRIPTION, MAX_LABEL, MAX_NAME
from ..core.ports import Count
from ..core.records import ApiKey
from ..core.template import MAX_SECRETS
from ..core.witness import WitnessState

Category = Literal["api_key", "token", "credential", "other"]
Scope = Literal["full", "read", "execute", "deploy"]

_EXPIRES = Meta(description="RFC 3339 with a zone", examples=["2030-01-31T12:00:00Z"])
Time = Annotated[str, _EXPIRES]
Label = Annotated[str, Meta(min_length=1, max_length=MAX_LABEL)]


class SecretIn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A secret to create, or to replace as a whole."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
    value: Annotated[str, Meta(max_length=65536, description="At most 65,536 bytes as UTF-8.")]
    description: Annotated[str, Meta(max_length=MAX_DESCRIPTION)] = ""
    category: Category = "other"
    expires_at: Time | None = None

    def __repr__(self) -> str:
        return f"<SecretIn {self.name!r}>"


class SecretValue(msgspec.Struct, frozen=True):
    """A secret with its value."""

    name: str
    value: str
    category: str
    is_expired: bool
    version: int

    def __repr__(self) -> str:
        return f"<SecretValue {self.name!r}>"


class ReadReceipt(msgspec.Struct, frozen=True):
    """The event of the read of one secret, as `Audit-Seq` and `Audit-Id` name it."""

    name: str
    seq: int
    id: str


class ResolveIn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A JSON document with references to secrets, and what it is of, for the event log."""

    document: Annotated[
        msgspec.Raw,
        Meta(
            description="Any JSON. In its strings {{secrets.NAME}} is a reference; "
            "\\{{secrets.NAME}} stands for that text.",
            examples=[{"headers": {"Authorization": "Bearer {{secrets.OPENAI_API_KEY}}"}}],
        ),
    ]
    pipeline: Label | None = None
    stage: Label | None = None

    def __repr__(self) -> str:
        return f"<ResolveIn of {self.pipeline!r}>"


class ResolvedOut(msgspec.Struct, frozen=True):
    """The document with values in the place of references, and the read of each secret."""

    document: msgspec.Raw
    receipts: list[ReadReceipt]

    def __repr__(self) -> str:
        return f"<ResolvedOut of {len(self.receipts)} secrets>"


class BatchIn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Names of secrets, and what their values are for, for the event log."""

    names: Annotated[list[str], Meta(max_length=MAX_SECRETS)]
    pipeline: Label | None = None
    stage: Label | None = None


class BatchOut(msgspec.Struct, frozen=True):
    """Secrets with their values, each name once, in the order asked for; and the read of each."""

    secrets: list[SecretValue]
    receipts: list[ReadReceipt]


class AuditEntry(msgspec.Struct, frozen=True):
    """One event of the log."""

    id: str
    seq: int
    timestamp: str
    user_id: str | None
    api_key_id: str | None
    action: str
    resource_type: str
    resource_id: str | None
    details: dict[str, Detail]
    success: bool
    error_message: str | None
    ip_address: str | None


class AuditCount(msgspec.Struct, frozen=True):
    """So many events with this action, outcome, actor or name, in the hour or day from `start` on.
    Events without an actor or name have null for it.
    """

    start: str
    key: str | None
    count: int


class AuditSummary(msgspec.Struct, frozen=True):
    """How many events there are, in the order of time; where there are none, there is no count.
    With `complete_since`, older events were archived, and are not counted.
    """

    by: str
    bucket: str
    total: int
    counts: list[AuditCount]
    complete_since: str | None


class ApiKeyIn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An API key to create."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_LABEL)]
    scopes: Annotated[list[Scope], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["full"]
    )
    allow: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=64)
    ] = msgspec.field(default_factory=list)
    expires_at: Time | None = None


class ApiKeyOut(msgspec.Struct, frozen=True):
    """An API key without the key."""

    id: str
    name: str
    scopes: list[str]
    allow: list[str]
    created_at: str
    created_by: str | None
    expires_at: str | None
    revoked_at: str | None
    is_active: bool


class ApiKeyIssued(msgspec.Struct, frozen=True):
    """A new API key: `raw_key` is told this once."""

    api_key: ApiKeyOut
    raw_key: str

    def __repr__(self) -> str:
        return f"<ApiKeyIssued {self.api_key.id}>"


class WhoAmI(msgspec.Struct, frozen=True):
    """Who the API key belongs to and what it may do."""

    org_id: str
    api_key_id: str
    scopes: list[str]
    allow: list[str]
    expires_at: str | None


class Message(msgspec.Struct, frozen=True):
    """What was done."""

    message: str


class KeyCount(msgspec.Struct, frozen=True):
    """How many secrets are under a master key: the `active` one encrypts, others that are `held`
    only decrypt, and what is under a `missing` one can't be read.
    """

    key_id: str
    secrets: int
    state: KeyState


class IndexBuilding(msgspec.Struct, frozen=True):
    """The index is being built: `indexed` of so many `events` are in it."""

    indexed: int
    events: int


class WitnessHealth(msgspec.Struct, frozen=True):
    """How it stands with a witness of the log: up to which size, in events, it has cosigned it, and
    when (by its own clock). `error` says why it has not cosigned anything since `since`.
    """

    name: str
    size: int
    cosigned_at: str | None
    error: str | None
    since: str | None


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether the service is `alive`, or `ready`; with `warnings` it is `warning`: ready, but not
    for long if nobody sees to them. If it is `unavailable`, there is a reason.

    While the index is being built, `index` says how far, and `keys` is not there.
    """

    status: str
    reason: str | None = None
    keys: list[KeyCount] | None = None
    index: IndexBuilding | None = None
    witnesses: list[WitnessHealth] | None = None
    warnings: list[str] | None = None


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error, after RFC 9457. `code` is stable; `field` names what was wrong in the request.
    `minimum` is the `seq` of the first event that was not archived; `errors` lists the secrets
    because of which none of those `asked` for was revealed. The others are the data of the error,
    where it has such.
    """

    code: str
    title: str
    status: int
    detail: str
    request_id: str
    field: str | None = None
    reason: str | None = None
    name: str | None = None
    seq: int | None = None
    expires_at: str | None = None
    current: str | None = None
    key_id: str | None = None
    held: Sequence[str] | None = None
    minimum: int | None = None
    errors: Sequence[Unresolved] | None = None
    asked: int | None = None


def audit_out(line: Line) -> AuditEntry:
    """The wire form of an event."""
    details: dict[str, Detail] = {
        "name": line["name"],
        "version": line["version"],
        "outcome": line["outcome"],
        "status": line["status"],
        "request_id": line["request_id"],
        "user_agent": line["user_agent"],
    }
    details = {key: value for key, value in details.items() if value is not None}
    details |= line["details"]
    success = line["outcome"] == "success"
    is_key = line["actor_type"] == "api_key"
    return AuditEntry(
        id=line["id"],
        seq=line["seq"],
        timestamp=line["time"],
        user_id=None if is_key else line["actor"],
        api_key_id=line["actor"] if is_key else None,
        action=line["action"],
        resource_type=line["resource_type"],
        resource_id=line["resource_id"],
        details=details,
        success=success,
        error_message=None if success else str(line["details"].get("error", line["outcome"])),
        ip_address=line["client_ip"],
    )


def resolved_out(resolved: Resolved) -> ResolvedOut:
    """The wire form of a resolved document."""
    document = msgspec.Raw(resolved.document.reveal().encode())
    return ResolvedOut(document, [_read(*one) for one in resolved.receipts.items()])


def batch_out(found: Sequence[Revealed]) -> BatchOut:
    """The wire form of several secrets with their values."""
    secrets = [
        SecretValue(one.name, value.reveal(), one.category, False, one.version)
        for one, value, _ in found
    ]
    return BatchOut(secrets, [_read(one.metadata.name, one.receipt) for one in found])


def _read(name: str, receipt: Receipt) -> ReadReceipt:
    return ReadReceipt(name, receipt.seq, receipt.id)


def audit_summary(
    by: str, bucket: str, counts: Sequence[Count], complete_since: str | None
) -> AuditSummary:
    """The wire form of counts of events."""
    shown = [AuditCount(times.render(start), key, events) for start, key, events in counts]
    return AuditSummary(by, bucket, sum(one.count for one in shown), shown, complete_since)


def key_counts(usage: Sequence[KeyUsage]) -> list[KeyCount]:
    """The wire form of what is under which master key."""
    return [KeyCount(*one) for one in usage]


def ready(
    warnings: list[str],
    keys: list[KeyCount] | None,
    index: IndexBuilding | None,
    witnesses: list[WitnessHealth] | None,
) -> Health:
    """Ready, with or without warnings."""
    status = "warning" if warnings else "ready"
    return Health(status, None, keys, index, witnesses, warnings or None)


def witnesses_out(states: Sequence[WitnessState]) -> list[WitnessHealth] | None:
    """The wire form of how it stands with the witnesses; None if there are none."""
    return [
        WitnessHealth(
            one.name,
            one.size,
            times.render(one.cosigned_at) if one.size else None,
            one.error,
            None if one.since is None else times.render(one.since),
        )
        for one in states
    ] or None


def api_key_out(key: ApiKey, now: float) -> ApiKeyOut:
    """The wire form of an API key; `now` in seconds since the epoch."""
    return ApiKeyOut(
        id=key.id,
        name=key.name,
        scopes=list(key.scopes),
        allow=list(key.allow),
        created_at=key.created_at,
        created_by=key.created_by,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        is_active=key.is_live(now),
    )
