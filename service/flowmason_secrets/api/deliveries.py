"""What agents deliver: reads that they served while they could not reach the server."""

from typing import Annotated

import msgspec
from msgspec import Meta

from . import shapes

# Of what an agent delivers at once.
MAX_DELIVERED = 100
# Numbers that every JSON parser keeps, and ids of users and processes.
MAX_COUNT = (1 << 53) - 1
MAX_ID = (1 << 32) - 1
_UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"


class OfflineReadIn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A read that an agent served while it could not reach the server: its number in the agent's
    queue, an id of its own, and for which process it was.
    """

    number: Annotated[int, Meta(ge=1, le=MAX_COUNT)]
    id: Annotated[str, Meta(pattern=_UUID)]
    time: shapes.Time
    name: str
    version: Annotated[int, Meta(ge=0, le=MAX_COUNT)]
    uid: Annotated[int, Meta(ge=0, le=MAX_ID)]
    pid: Annotated[int, Meta(ge=0, le=MAX_ID)]


class OfflineIn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Reads from the queue of an agent, by ascending numbers. The ticket names the queue; only the
    agent knows it.
    """

    ticket: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    reads: Annotated[list[OfflineReadIn], Meta(min_length=1, max_length=MAX_DELIVERED)]

    def __repr__(self) -> str:
        return f"<OfflineIn of {len(self.reads)} reads>"


class OfflineOut(msgspec.Struct, frozen=True):
    """Up to which number the log has the reads of the queue."""

    delivered: int
