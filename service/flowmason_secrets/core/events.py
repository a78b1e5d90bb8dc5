"""Events: what is recorded of every access, refusal and change. FORMAT.md §5."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

from .access import Caller
from .records import Ref

Outcome = Literal["success", "denied", "not_found", "expired", "failed"]
Detail = str | int | bool | list[str] | None

MAX_LINE = 8000

# Decoding many lines at once takes any space between objects, also within a line, and objects of
# several lines. Where this stands between all lines, each of them is one object at least: after a
# brace that closes something no object goes on with one that opens something.
BETWEEN_LINES = b"}\n{"

KEY_ROTATE = "key.rotate"
# An agent told of reads that it served while it could not reach the server.
DELIVER = "agent.deliver"
# Which master key encrypts: what every change of a secret depends on.
KEYRING: Ref = ("", "master_key")

# Bounds that keep every line below MAX_LINE even if JSON has to escape each character.
MAX_EVENT_NAME = 256
MAX_RESOURCE_ID = 64
MAX_USER_AGENT = 256
MAX_REQUEST_ID = 128


class Event(NamedTuple):
    """What happened, before the gate gives it its `seq` and its time."""

    id: str
    action: str
    outcome: Outcome
    org_id: str | None
    resource_type: str
    resource_id: str | None
    name: str | None = None
    version: int | None = None
    actor: str | None = None
    actor_type: str = "system"
    client_ip: str | None = None
    user_agent: str | None = None
    request_id: str | None = None
    status: int | None = None
    details: dict[str, Detail] | None = None

    @property
    def changed(self) -> list[Ref]:
        """What the event changes, if it stands for a change."""
        return _changed(self.action, self.org_id, self.resource_id, self.details or {})


class Line(TypedDict):
    """An event as it stands in the log, decoded."""

    v: int
    id: str
    seq: int
    time: str
    action: str
    outcome: Outcome
    org_id: str | None
    resource_type: str
    resource_id: str | None
    name: str | None
    version: int | None
    actor: str | None
    actor_type: str
    client_ip: str | None
    user_agent: str | None
    request_id: str | None
    status: int | None
    details: dict[str, Detail]


class Entry:
    """An event of the log: the bytes of its line, without the newline, and what they say. They are
    known to be that event's, and decoded when somebody asks for it: not everybody does.
    """

    def __init__(self, raw: bytes, decode: Callable[[bytes], Line]) -> None:
        self.raw = raw
        self._decode = decode

    @cached_property
    def line(self) -> Line:
        """What the line says."""
        return self._decode(self.raw)


class Receipt(NamedTuple):
    """What the caller gets back: the event that records his operation, durable by now."""

    seq: int
    id: str


# What an event has to be, for it to have made anything visible.
CHANGES = frozenset(
    {"secret.create", "secret.delete", "api_key.create", "api_key.revoke", KEY_ROTATE, DELIVER}
)


class Recorded(Protocol):
    """An event of the log, as far as it tells what it made visible."""

    @property
    def action(self) -> str: ...
    @property
    def outcome(self) -> str: ...
    @property
    def org_id(self) -> str | None: ...
    @property
    def resource_id(self) -> str | None: ...
    @property
    def details(self) -> dict[str, Any]: ...


def is_change(action: str, outcome: str) -> bool:
    """Whether the event made something visible, so that what others cached of it is outdated."""
    return outcome == "success" and action in CHANGES


def changed(event: Recorded) -> list[Ref]:
    """What the event made visible; empty if it is no change."""
    if not is_change(event.action, event.outcome):
        return []
    return _changed(event.action, event.org_id, event.resource_id, event.details)


def _changed(
    action: str, org_id: str | None, resource_id: str | None, details: dict[str, Detail]
) -> list[Ref]:
    if action != KEY_ROTATE:
        return [(org_id or "", resource_id or "")]
    # format §5.4: a batch names the secrets that it re-encrypted.
    secrets = details.get("secrets")
    if not isinstance(secrets, list):
        return [KEYRING]
    return [(org_id or "", secret) for secret in secrets]


def event(
    event_id: str,
    caller: Caller,
    action: str,
    outcome: Outcome,
    resource: tuple[str, str | None, str | None],
    status: int,
    version: int | None = None,
    details: dict[str, Detail] | None = None,
) -> Event:
    """Compose the event of one operation. `resource` is its type, its id and its name."""
    principal, _, client_ip, user_agent, request_id, peer = caller
    if peer is not None:
        details = {**(details or {}), "peer_uid": peer.uid, "peer_pid": peer.pid}
    kind, resource_id, name = resource
    return Event(
        event_id,
        action,
        outcome,
        principal.org_id,
        kind,
        resource_id if resource_id is None else resource_id[:MAX_RESOURCE_ID],
        name if name is None or len(name) <= MAX_EVENT_NAME else name[:MAX_EVENT_NAME],
        version,
        principal.actor,
        principal.actor_type,
        client_ip,
        user_agent,
        request_id,
        status,
        details,
    )


class Ids:
    """Makes event ids: UUIDv7 (RFC 9562 §5.7) from a clock in seconds and random bytes."""

    # One call for many ids: a call for each is a measurable part of a read.
    _BLOCK = 4000

    def __init__(self, clock: Callable[[], float], random: Callable[[int], bytes]) -> None:
        self._clock = clock
        self._random = random
        self._pool = ""
        self._used = 0
        # The millisecond of the last id, and how ids of it begin.
        self._ms = -1
        self._front = ""

    def __call__(self) -> str:
        start = self._used
        if start >= len(self._pool):
            self._pool = _tails(self._random(10 * self._BLOCK)).hex()
            start = 0
        middle, self._used = start + 8, start + 20
        pool = self._pool
        ms = int(self._clock() * 1000)
        if ms != self._ms:
            digits = f"{ms:012x}"
            self._ms, self._front = ms, f"{digits[:8]}-{digits[8:]}-"
        return (
            f"{self._front}{pool[start : start + 4]}-{pool[start + 4 : middle]}"
            f"-{pool[middle : self._used]}"
        )


def _tails(random: bytes) -> bytes:
    """Random bytes as the ends of ids, ten each, with the version and the variant in them."""
    tails = bytearray(random)
    tails[0::10] = tails[0::10].translate(_VERSION)
    tails[2::10] = tails[2::10].translate(_VARIANT)
    return bytes(tails)


# What a byte becomes that has the version in its upper half, or the variant in its two top bits.
_VERSION = bytes(0x70 | byte & 0x0F for byte in range(256))
_VARIANT = bytes(0x80 | byte & 0x3F for byte in range(256))
