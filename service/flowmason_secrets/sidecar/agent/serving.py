"""From a name to its value: always by the server; by the cache only while the server is away."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from ...api import shapes
from ...api.deliveries import OfflineReadIn
from ...core import times
from ...core.access import Peer
from ...core.drafts import Usage
from ...core.errors import (
    DecryptionFailed,
    Denied,
    SecretExpired,
    SecretNotFound,
    SecretsError,
    Unauthenticated,
    UnresolvedReferences,
)
from ...core.events import Receipt
from ...core.ports import Sources
from .lastknown import Known, LastKnown
from .queue import OfflineQueue
from .upstream import Upstream, is_away, refused

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds for which the server isn't asked again once it did not answer. Less than a second, within
# which answers have to be right again.
_HESITATE = 0.25

# What the agent knows of its server: nothing yet, that it answers, that it is away, that it does
# not accept the API key.
State = Literal["unknown", "serving", "away", "denied"]


class Served(NamedTuple):
    """A value, and where it comes from: the server, with the receipt of this read; or the cache,
    with the id of the read in the queue, confirmed `age` seconds ago.
    """

    known: Known
    receipt: Receipt | None = None
    read_id: str = ""
    age: float = 0.0


class Secrets:
    """Reads for local processes. Belongs to one event loop."""

    def __init__(
        self, upstream: Upstream, cache: LastKnown, queue: OfflineQueue, sources: Sources
    ) -> None:
        self._upstream = upstream
        self._cache = cache
        self._queue = queue
        self._clock, self._new_id = sources
        self._loop = asyncio.get_running_loop()
        # One thread: files change in the order in which the cache and the queue did.
        self._thread = ThreadPoolExecutor(1, "flowmason-agent")
        self._until = 0.0
        self._waiting: list[tuple[list[OfflineReadIn], asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._storing: set[asyncio.Future[None]] = set()
        self.state: State = "unknown"
        # Set when there is something to deliver.
        self.queued = asyncio.Event()

    async def read(self, wanted: Sequence[str], usage: Usage, peer: Peer) -> list[Served]:
        """The values of secrets, each name once: all or none.

        Raises:
            SecretsError: the server refused; or it is away, and some of them are not known.
        """
        wanted = list(dict.fromkeys(wanted))
        away: SecretsError | None = None
        if self._loop.time() < self._until:
            recalled = await self.recall(wanted, peer)
            if recalled is not None:
                return recalled
        try:
            return await self._ask(wanted, usage, peer)
        except SecretsError as error:
            if not is_away(error):
                raise
            away = error
        recalled = await self.recall(wanted, peer)
        if recalled is None:
            raise away
        return recalled

    async def recall(self, wanted: Sequence[str], peer: Peer) -> list[Served] | None:
        """What the cache has, without a question to the server; None if it has not all of them.

        Raises:
            LogUnavailable: the reads can't be recorded.
        """
        found = self._known(wanted)
        return None if found is None else await self._offline(found, peer)

    async def refresh(self, names: Sequence[str], peer: Peer) -> None:
        """Read secrets for the cache itself, each on its own; one that can't be read is logged."""
        for name in names:
            try:
                await self._ask([name], Usage(), peer)
            except SecretsError as error:
                _log.info("%r can't be read anew: %s", name, error.code)

    async def check(self) -> None:
        """Find out whether the server is there and accepts the API key."""
        try:
            await self._upstream.check()
        except SecretsError as error:
            self._note(error, [])
        else:
            self.state = "serving"

    def drop(self, name: str) -> None:
        """Forget a secret: it is gone."""
        if self._cache.drop(name):
            self.store(name)

    async def run(self, step: Callable[[], T]) -> T:
        """Do something with files."""
        return await self._loop.run_in_executor(self._thread, step)

    async def close(self) -> None:
        """Write what is to be written."""
        if self._committing is not None:
            await asyncio.wait([self._committing])
        if self._storing:
            await asyncio.wait(self._storing)
        self._thread.shutdown()

    async def _ask(self, wanted: list[str], usage: Usage, peer: Peer) -> list[Served]:
        try:
            return await self.ask(wanted, usage, peer)
        except UnresolvedReferences as error:
            if len(wanted) == 1:
                raise _alone(error) from None
            raise

    async def ask(self, wanted: Sequence[str], usage: Usage, peer: Peer) -> list[Served]:
        """The values of secrets, by the server only; the cache learns from the answer.

        Raises:
            SecretsError: it refused, or is away.
        """
        drops = self._cache.drops
        try:
            answered = await self._upstream.read(wanted, usage, peer)
        except SecretsError as error:
            self._note(error, wanted)
            raise
        self.state, self._until = "serving", 0.0
        return list(
            await asyncio.gather(*(self._learn(one, read, drops) for one, read in answered))
        )

    async def _learn(
        self, value: shapes.SecretValue, read: shapes.ReadReceipt, drops: int
    ) -> Served:
        """Keep what the server gave, before it is handed on."""
        name, cache = value.name, self._cache
        known = Known(
            name, value.value, value.category, value.version, read.seq, self._clock(), None
        )
        if cache.has(name, value.version) and cache.seq(name) < read.seq:
            if cache.confirm(name, read.seq):
                self.store(name)
        elif cache.seq(name) < read.seq:
            try:
                # Its expiry: a value must not outlive it in the cache. No event.
                metadata = await self._upstream.metadata(name)
            except SecretsError as error:
                _log.info("%r is not kept: %s", name, error.code)
            else:
                await self._keep(known, metadata.version, metadata.expires_at, drops)
        return Served(known, Receipt(read.seq, read.id))

    async def _keep(self, known: Known, version: int, expires_at: str | None, drops: int) -> None:
        if version != known.version:
            return
        expiry = None if expires_at is None else times.parse(expires_at, "expires_at")
        known = Known(
            known.name,
            known.value,
            known.category,
            known.version,
            known.seq,
            known.confirmed,
            expiry,
        )
        if self._cache.put(known, drops):
            self.store(known.name)

    def _note(self, error: SecretsError, wanted: Sequence[str]) -> None:
        """Take the consequences of an error of the server's."""
        if is_away(error):
            self.state = "away" if self.state != "denied" else "denied"
            self._until = self._loop.time() + _HESITATE
            return
        self._until = 0.0
        if isinstance(error, Unauthenticated):
            if self.state != "denied":
                _log.error("the server does not accept the API key any more: the cache is emptied")
            self.state = "denied"
            for name in self._cache.clear():
                self.store(name)
            return
        self.state = "serving"
        # 403 without names: the scopes of the API key cover none of them.
        gone = wanted if isinstance(error, Denied) else list(refused(error))
        for name in gone:
            self.drop(name)

    def _known(self, wanted: Sequence[str]) -> list[tuple[Known, float]] | None:
        found = [known for known in map(self._cache.get, wanted) if known is not None]
        return found if len(found) == len(wanted) and found else None

    async def _offline(self, found: list[tuple[Known, float]], peer: Peer) -> list[Served]:
        """Hand out values of the cache once their reads are on stable storage.

        Raises:
            LogUnavailable: they can't be.
        """
        now = times.render(self._clock())
        reads = [
            OfflineReadIn(1, self._new_id(), now, known.name, known.version, peer.uid, peer.pid)
            for known, _ in found
        ]
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((reads, done))
        if self._committing is None:
            self._committing = self._loop.create_task(self._commit())
        await done
        return [
            Served(known, None, read.id, age)
            for (known, age), read in zip(found, reads, strict=True)
        ]

    async def _commit(self) -> None:
        """Reads that wait together are made durable together."""
        try:
            while self._waiting:
                # Those that have arrived already join.
                await asyncio.sleep(0)
                batch, self._waiting = self._waiting, []
                reads = [read for some, _ in batch for read in some]
                try:
                    await self.run(partial(self._queue.append, reads))
                except SecretsError as error:
                    for _, done in batch:
                        if not done.done():
                            done.set_exception(_own(error))
                    continue
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)
                self.queued.set()
        finally:
            self._committing = None

    def store(self, name: str) -> None:
        """Make the file of a secret what the cache says, in the background."""

        def step() -> None:
            try:
                self._cache.store(name)
            except OSError as error:
                _log.warning("the cache can't be written: %s", error.strerror)

        future = self._loop.run_in_executor(self._thread, step)
        self._storing.add(future)
        future.add_done_callback(self._storing.discard)


def _alone(error: UnresolvedReferences) -> SecretsError:
    """The error that a read of the only secret would be, as far as it can be told."""
    name, code = error.errors[0].name, error.errors[0].code
    if code == SecretNotFound.code:
        return SecretNotFound(name)
    if code == SecretExpired.code:
        expired = SecretExpired(name, "")
        expired.args = (f"Secret {name!r} has expired. Set it again to renew it.",)
        return expired
    if code == Denied.code:
        return Denied(f"The API key of the agent may not use the name {name!r}.")
    if code == DecryptionFailed.code:
        return DecryptionFailed(name, "unknown", ())
    return error


def _own(error: SecretsError) -> SecretsError:
    # Every waiter raises it from his own place.
    own = type(error).__new__(type(error), *error.args)
    own.__dict__.update(error.__dict__)
    return own
