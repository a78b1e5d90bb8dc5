"""Reading on: an organisation's events, the oldest first, up to now or as they come.

A reader is a position in the log and nothing more: however slow he is, he only has more ahead.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from .attempts import Path
from .core.access import FULL, READ, Caller
from .core.errors import EventArchived, InvalidInput, Overloaded, SecretsError, Unauthenticated
from .core.events import Entry
from .core.intents import Intent
from .core.ports import AuditQuery, Clock, Index, Store
from .gate import Gate

# How many readers each process has at once: those that follow, wait for the next event, or export.
READERS = 128

# Seconds between two looks at what others appended, and after which a follower hears something
# even if there is nothing new.
_LOOK = 0.2
_TURN = 1.0

_SCOPES = frozenset({FULL, READ})


class Following:
    """The readers of one process. Belongs to one event loop."""

    def __init__(self, stores: tuple[Store, Index], gate: Gate, path: Path, clock: Clock) -> None:
        store, self._index = stores
        self._path = path
        self._clock = clock
        self._growth = Growth(store, gate)
        # Each reader's place, and whether he may finish when the service ends.
        self._places: dict[asyncio.Timeout, bool] = {}
        self._ended = False

    @contextlib.asynccontextmanager
    async def place(self, *, to_the_end: bool = False) -> AsyncIterator[None]:
        """A reader's place for the duration of a block. `end` ends the block too, at whatever it
        waits for, unless it may go on `to_the_end`.

        Raises:
            Overloaded: all places are taken, or the service is about to end.
        """
        if self._ended or len(self._places) >= READERS:
            raise Overloaded("Too many are reading the audit log at once")
        block = asyncio.timeout(None)
        self._places[block] = to_the_end
        try:
            async with block:
                yield
        except TimeoutError:
            if not block.expired():
                raise
        finally:
            del self._places[block]

    def end(self) -> None:
        """End all that would not end by itself, and let nobody begin."""
        if self._ended:
            return
        self._ended = True
        now = asyncio.get_running_loop().time()
        for block, to_the_end in self._places.items():
            if not to_the_end:
                block.reschedule(now)

    async def begin(self, caller: Caller, query: AuditQuery) -> AuditQuery:
        """The query with the event after which it begins: without one, the newest that matches now.

        Raises:
            InvalidInput: the log has no such event.
            EventArchived: events after that one are not there any more.
            Denied: recorded in the log.
        """
        position = await self._permit(caller)
        minimum = (await self._index.minimum()).minimum
        if query.after is None:
            # Not the newest of all: how many events others have is not told.
            newest = query._replace(limit=1, allow=caller.principal.allow)
            found = await self._index.audit(newest, position)
            return query._replace(after=found[0].line["seq"] if found else max(0, minimum - 1))
        if query.after < minimum - 1:
            raise EventArchived(minimum)
        if query.after >= position:
            raise InvalidInput("after", "this log has no such event yet; was it another log's?")
        return query

    async def export(self, caller: Caller, query: AuditQuery) -> AsyncIterator[list[Entry]]:
        """All matching events that had happened before this was asked for, in pages.

        Raises:
            Denied: recorded in the log.
            Unauthenticated: the API key was revoked in the meantime.
            EventArchived: what comes next was archived in the meantime.
        """
        position = await self._permit(caller)
        query = query._replace(after=-1, allow=caller.principal.allow)
        while page := await self._index.audit(query, position):
            yield page
            if len(page) < query.limit:
                return
            query = query._replace(after=page[-1].line["seq"])
            await self._permit(caller)

    async def follow(self, caller: Caller, query: AuditQuery) -> AsyncIterator[list[Entry]]:
        """Matching events after `query.after`, in pages, as they come; about once a second an empty
        page if there are none. It never ends by itself.

        Raises:
            Unauthenticated: the API key was revoked, or has expired.
            EventArchived: the reader was so slow that what comes next was archived.
            LogUnavailable, IndexUnavailable: it can't be found out now what is new.
        """
        query = query._replace(allow=caller.principal.allow)
        while True:
            position = await self._permit(caller)
            page = await self._index.audit(query, position)
            yield page
            if len(page) == query.limit:
                query = query._replace(after=page[-1].line["seq"])
                continue
            # Whatever did not match is not looked at again.
            query = query._replace(after=position - 1)
            while not await self._growth.beyond(position, _TURN):
                self._check_expiry(caller)
                yield []

    async def _permit(self, caller: Caller) -> int:
        """The size of the log now, when the caller may read it."""
        self._check_expiry(caller)
        return await self._path.permit(
            caller, "audit.read", "audit_log", lambda who: who.require(_SCOPES)
        )

    def _check_expiry(self, caller: Caller) -> None:
        expires_at = caller.principal.expires_at
        if expires_at is not None and expires_at <= self._clock():
            raise Unauthenticated


class Growth:
    """Tells when the log has grown, by whomever: one look for all, while anybody waits."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._looking: asyncio.Task[None] | None = None

    async def beyond(self, position: int, seconds: float) -> bool:
        """Whether the log has more than `position` events, or may have, within so many seconds.

        Never at once, so that who asks again and again takes little from others.
        """
        grown = asyncio.get_running_loop().create_future()
        self._waiting[grown] = position
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            async with asyncio.timeout(seconds):
                await grown
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(grown, None)
        return True

    async def _look(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(_LOOK)
                if not self._waiting:
                    break
                doubtful = False
                try:
                    await self._gate.is_current(Intent(None, ()))
                except Overloaded:
                    # It is not the log that has a problem.
                    continue
                except SecretsError:
                    # Everybody finds out himself what it is.
                    doubtful = True
                for grown, position in self._waiting.items():
                    if not grown.done() and (doubtful or self._store.position > position):
                        grown.set_result(None)
        finally:
            self._looking = None
