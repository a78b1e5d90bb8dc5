"""The gate: the single place where intents become events.

Intents that wait together are committed together. One batch is in flight, the next one fills.
"""

import asyncio

from .core.errors import LogUnavailable, Overloaded
from .core.events import Receipt
from .core.intents import Intent
from .core.ports import STALE, Stale, Store, Verdict

# How many intents may wait before others are turned away.
QUEUE_LIMIT = 10_000


class Gate:
    """Group commit over one store. Belongs to one event loop."""

    def __init__(self, store: Store, limit: int = QUEUE_LIMIT) -> None:
        self._store = store
        self._limit = limit
        self._waiting: list[tuple[Intent, asyncio.Future[Verdict]]] = []
        self._running: asyncio.Task[None] | None = None
        # Why the last event could not be written; None once one could.
        self.unavailable: str | None = None

    async def commit(self, intent: Intent) -> Receipt | Stale:
        """Return when the event of the intent is durable and its change published.

        `STALE` if something that it depends on has changed: read anew and try again.

        Raises:
            LogUnavailable: not acknowledged.
            Overloaded: too many are waiting; nothing happened.
        """
        verdict = await self._submit(intent)
        if verdict is None:
            raise TypeError("an intent without an event is for `is_current`")
        return verdict

    async def is_current(self, intent: Intent) -> bool:
        """Whether all that the intent depends on is as it was, now, in every process.

        Raises:
            LogUnavailable: not even the state of the log can be read.
            Overloaded: too many are waiting.
        """
        return await self._submit(intent) is not STALE

    async def drain(self) -> None:
        """Return when everything that was submitted is decided."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _submit(self, intent: Intent) -> Receipt | Stale | None:
        waiting = self._waiting
        if len(waiting) >= self._limit:
            raise Overloaded
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        waiting.append((intent, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        verdict = await future
        if isinstance(verdict, LogUnavailable):
            raise LogUnavailable(verdict.reason)
        return verdict

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._commit(batch)
        finally:
            self._running = None

    async def _commit(self, batch: list[tuple[Intent, asyncio.Future[Verdict]]]) -> None:
        try:
            verdicts = await self._store.commit([intent for intent, _ in batch])
        except Exception as error:
            # It belongs to those who wait, not to this task.
            self.unavailable = str(error)
            for _, future in batch:
                if not future.done():
                    future.set_exception(_for_waiter(error))
            return
        # One fdatasync covered the batch: waiters resume after it, so nobody sees an event that
        # could vanish.
        for (_, future), verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, LogUnavailable):
                self.unavailable = str(verdict)
            elif isinstance(verdict, Receipt):
                self.unavailable = None
            if not future.done():
                future.set_result(verdict)


def _for_waiter(error: Exception) -> Exception:
    # Every waiter raises it from his own place, so each gets his own.
    return LogUnavailable(error.reason) if isinstance(error, LogUnavailable) else error
