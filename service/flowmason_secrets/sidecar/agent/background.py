"""What the agent does by itself: deliver reads, follow changes, find out about its server."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from ...api.shapes import AuditEntry
from ...client import AsyncSecretsClient, Filters
from ...core.errors import Denied, SecretsError, Unauthenticated
from .lastknown import LastKnown
from .queue import OfflineQueue
from .serving import Secrets
from .upstream import Upstream, is_away, own_peer

_log = logging.getLogger(__name__)

# How many reads are delivered at once.
_MOST = 100
# Seconds between attempts: at a server that is away, at one that refuses, and between looks at
# the list of secrets where the audit stream may not be read. Each gets half as much by chance.
_AGAIN = 0.4
_MUCH_LATER = 20.0
_LOOK = 5.0

Chance = Callable[[], float]


class Deliveries:
    """Brings the queue of offline reads to the log."""

    def __init__(
        self, upstream: Upstream, queue: OfflineQueue, secrets: Secrets, chance: Chance
    ) -> None:
        self._upstream = upstream
        self._queue = queue
        self._secrets = secrets
        self._chance = chance

    async def run(self) -> None:
        """Deliver whatever is queued, without an end."""
        while True:
            self._secrets.queued.clear()
            try:
                await self.flush()
            except (SecretsError, OSError) as error:
                away = isinstance(error, SecretsError) and is_away(error)
                if not away:
                    _log.error("offline reads are not delivered, and kept: %s", error)
                await asyncio.sleep((_AGAIN if away else _MUCH_LATER) * (1 + self._chance() / 2))
            else:
                await self._secrets.queued.wait()

    async def flush(self) -> None:
        """Deliver everything.

        Raises:
            SecretsError: the server is away, or refuses.
            OSError: the queue can't be read.
        """
        queue, run = self._queue, self._secrets.run
        while (batch := await run(partial(queue.take, _MOST))) is not None:
            delivered = await self._upstream.deliver(batch.ticket, batch.reads)
            await run(partial(queue.deliver, batch, delivered))


class Changes:
    """Keeps what the cache knows current: by the audit stream, or where the API key may not read
    it, by looking at the list of secrets now and then.
    """

    def __init__(
        self, client: AsyncSecretsClient, cache: LastKnown, secrets: Secrets, chance: Chance
    ) -> None:
        self._client = client
        self._cache = cache
        self._secrets = secrets
        self._chance = chance

    async def run(self) -> None:
        """Follow, without an end."""
        while True:
            try:
                pause = await self._follow_once()
            except SecretsError as error:
                pause = _AGAIN if is_away(error) else _LOOK
                if isinstance(error, Unauthenticated):
                    # Whoever asks next would be told, but perhaps nobody does.
                    await self._secrets.check()
            await asyncio.sleep(pause * (1 + self._chance() / 2))

    async def _follow_once(self) -> float:
        """Follow as long as it goes; returns how many seconds to wait then.

        Raises:
            SecretsError: the server is away, or refuses.
        """
        try:
            newest = await self._client.audit(limit=1)
        except Denied:
            await self._compare()
            return _LOOK
        after = newest[0].seq if newest else 0
        await self._compare()
        both = [
            asyncio.create_task(self._follow("secret.create", after, self._changed)),
            asyncio.create_task(self._follow("secret.delete", after, self._deleted)),
        ]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both)
        return _AGAIN

    async def _follow(
        self, action: str, after: int, take: Callable[[AuditEntry], Awaitable[None]]
    ) -> None:
        events = self._client.follow(Filters(action=action, success=True), after)
        async with contextlib.aclosing(events) as following:
            async for event in following:
                await take(event)

    async def _changed(self, event: AuditEntry) -> None:
        name = str(event.details.get("name"))
        if -1 < self._cache.seq(name) < event.seq:
            await self._secrets.refresh([name], own_peer())

    async def _deleted(self, event: AuditEntry) -> None:
        name = str(event.details.get("name"))
        if self._cache.seq(name) < event.seq:
            self._secrets.drop(name)

    async def _compare(self) -> None:
        """Read anew what has another version now, and forget what is gone."""
        known = self._cache.names
        if not known:
            return
        there = {found.name: found.version for found in await self._client.list()}
        for name in known:
            if name not in there:
                self._secrets.drop(name)
        changed = [n for n in known if n in there and not self._cache.has(n, there[n])]
        await self._secrets.refresh(changed, own_peer())
