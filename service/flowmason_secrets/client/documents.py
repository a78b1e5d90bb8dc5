"""What clients give back, and what they take to choose events."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime

from ..api import shapes
from ..core import times
from ..core.events import Receipt
from ..core.records import SecretMetadata

ApiKeys = list[shapes.ApiKeyOut]


class Entries(list[shapes.AuditEntry]):
    """Events. With `complete_since`, older ones were archived: from that time on, all are here."""

    complete_since: str | None = None


class Export:
    """The pieces of an export, to be iterated once. `complete_since` is as that of `Entries`, and
    known when the first piece is.
    """

    def __init__(self, pour: "Callable[[Export], AsyncIterator[bytes]]") -> None:
        self.complete_since: str | None = None
        self._pieces = pour(self)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces


@dataclass(frozen=True, slots=True)
class Reading:
    """A value as it was read. `receipt` names the event of this read."""

    name: str
    value: str = field(repr=False)
    category: str
    version: int
    etag: str
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Stored(SecretMetadata):
    """A secret's metadata as it is stored now, with the `etag` for conditional writes; `created` if
    this made it. `receipt` names the event of a write.
    """

    etag: str
    created: bool = False
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class Filters:
    """Which events: all that match everything that is given. `until` is exclusive."""

    resource_type: str | None = None
    action: str | None = None
    name: str | None = None
    actor: str | None = None
    success: bool | None = None
    since: datetime | str | None = None
    until: datetime | str | None = None

    def query(self) -> dict[str, object]:
        """The same as parameters of a request.

        Raises:
            InvalidInput: a time without a zone.
        """
        return {
            "resource_type": self.resource_type,
            "action": self.action,
            "name": self.name,
            "actor": self.actor,
            "success": self.success,
            "since": times.text(self.since, "since"),
            "until": times.text(self.until, "until"),
        }


def query(given: dict[str, object]) -> dict[str, str]:
    """Parameters of a request as text, those that are given."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    }
