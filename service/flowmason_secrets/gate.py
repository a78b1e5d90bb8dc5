"""The gate: the single place where intents become events.

Intents that wait together are committed together. One batch is in flight, the next one fills.
"""

import asyncio
from collections.abc import Callable
from itertools import islice

from .core.errors import LogUnavailable, Overloaded, SecretsError
from .core.events import Receipt
from .core.intents import Intent
from .core.ports import STALE, Store, Verdict

# How many intents may wait before others are turned away.
QUEUE_LIMIT = 10_000
# How many are committed together at most: preparing them holds up the loop.
_BATCH = 1024
# How much is done in one turn of the loop while a batch is being committed.
_TURN = 8

# What is left to do of an intent when its batch closes. It returns why that can't be, if so.
Prepare = Callable[[], SecretsError | None]
# What has time until the event of an intent is durable, because it can't fail.
Later = Callable[[], None]
# An intent that waits.
_Waiting = tuple[Intent, asyncio.Future[Verdict], Prepare | None, Later | None]


class Gate:
    """Group commit over one store. Belongs to one event loop."""

    def __init__(self, store: Store, limit: int = QUEUE_LIMIT) -> None:
        self._loop = asyncio.get_running_loop()
        self._store = store
        self._limit = limit
        self._waiting: list[_Waiting] = []
        self._running: asyncio.Task[None] | None = None
        # Why the last event could not be written; None once one could.
        self.unavailable: str | None = None

    def submit(
        self, intent: Intent, prepare: Prepare | None = None, later: Later | None = None
    ) -> asyncio.Future[Verdict]:
        """Queue an intent for the next batch. The future's result is a receipt when its event is
        durable and its change published (of several events, the last one's receipt), `STALE` if
        something that it depends on has changed, or None if it has no event and all that it
        depends on is as it was. What `prepare` returns instead of None is the result as well: then
        the intent is withdrawn. `later` has been called when there is a result, whatever that is.

        It raises LogUnavailable if the event is not acknowledged, LogDamaged as `Store.commit`.

        Raises:
            Overloaded: too many are waiting; nothing happened.
        """
        waiting = self._waiting
        if len(waiting) >= self._limit:
            raise Overloaded
        future: asyncio.Future[Verdict] = self._loop.create_future()
        waiting.append((intent, future, prepare, later))
        if self._running is None:
            self._running = self._loop.create_task(self._run())
        return future

    async def is_current(self, intent: Intent) -> bool:
        """Whether all that the intent depends on is as it was, now, in every process.

        Raises:
            LogUnavailable: not even the state of the log can be read.
            Overloaded: too many are waiting.
        """
        return await self.submit(intent) is not STALE

    async def drain(self) -> None:
        """Return when everything that was submitted is decided."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                await self._commit(_prepared(batch))
        finally:
            self._running = None

    async def _gather(self) -> None:
        """Let the requests that have arrived already join the batch: a sync costs the same for
        few as for many. Ends when four rounds of the loop, some microseconds, bring no more.
        """
        quiet = 0
        while quiet < 4:
            size = len(self._waiting)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == size else 0

    async def _commit(self, batch: list[_Waiting]) -> None:
        committing = self._loop.create_task(
            self._store.commit([intent for intent, _, _, _ in batch])
        )
        await _do_meanwhile(batch, committing)
        try:
            verdicts = await committing
        except Exception as error:
            # It belongs to those who wait, not to this task.
            self.unavailable = str(error)
            for _, future, _, _ in batch:
                if not future.done():
                    future.set_exception(_for_waiter(error))
            return
        # One fdatasync covered the batch: waiters resume after it, so nobody sees an event that
        # could vanish.
        for (_, future, _, _), verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, Receipt):
                self.unavailable = None
            elif isinstance(verdict, LogUnavailable):
                self.unavailable = str(verdict)
            if future.done():
                continue
            if isinstance(verdict, SecretsError):
                future.set_exception(_for_waiter(verdict))
            else:
                future.set_result(verdict)


def _prepared(batch: list[_Waiting]) -> list[_Waiting]:
    """What is left of a batch when it closes."""
    prepared = []
    for waiting in batch:
        _, future, prepare, _ = waiting
        try:
            error = None if prepare is None else prepare()
        except Exception as defect:
            # It belongs to the one who waits, and the others go on.
            if not future.done():
                future.set_exception(defect)
            continue
        if error is None:
            prepared.append(waiting)
        elif not future.done():
            future.set_result(error)
    return prepared


async def _do_meanwhile(batch: list[_Waiting], committing: asyncio.Task[list[Verdict]]) -> None:
    """What has time until a batch is durable: a few at a time as long as that takes, so that the
    loop hears what arrives, and then the rest.
    """
    left = iter([(future, later) for _, future, _, later in batch if later is not None])
    # It has begun before anything else does.
    await asyncio.sleep(0)
    while some := list(left if committing.done() else islice(left, _TURN)):
        for future, later in some:
            if future.done():
                continue
            try:
                later()
            except Exception as defect:
                # As above.
                future.set_exception(defect)
        if not committing.done():
            await asyncio.sleep(0)


def _for_waiter(error: Exception) -> Exception:
    # Every waiter raises it from his own place, so each gets his own. Not by its constructor,
    # which makes the message from something else.
    own = type(error).__new__(type(error), *error.args)
    own.__dict__.update(error.__dict__)
    return own
