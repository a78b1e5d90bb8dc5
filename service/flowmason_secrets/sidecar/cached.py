"""What `run` does while the server is away: the agent's cache, and its queues of offline reads.

Processes with the same API key share the cache. Each has a queue of its own for as long as it
lives; whoever comes next delivers what is left in those of others.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from aiofiles.os import wrap

from ..client import AsyncSecretsClient, Options
from ..client.address import address
from ..core import times
from ..core.drafts import Usage
from ..core.errors import (
    ConfigurationError,
    SecretsError,
    Unauthenticated,
    Unresolved,
    UnresolvedReferences,
)
from ..core.events import Ids
from ..core.keyring import Plaintext
from ..core.ports import Sources
from ..storage.durable import StateDirectory
from .agent.background import Deliveries
from .agent.lastknown import Known, LastKnown, place_of
from .agent.queue import OfflineQueue
from .agent.serving import Secrets, Served
from .agent.upstream import Upstream, is_away, own_peer
from .source import AT_ONCE, Listed, Selection, Source, Values

_log = logging.getLogger(__name__)

# Seconds: for which a value may be used without the server; after which the server counts as away
# if everything is in the cache; that a delivery may take; between attempts in the background.
_MAX_AGE = 86400.0
_TIMEOUT = 2.0
_DELIVER = 5.0
_AGAIN = 1.0
# What the list of secrets is kept under: no secret has this name.
_LIST = ""


class NotCached(SecretsError):
    """The server was not to be asked, and the cache has not all that is needed."""

    code = "not_cached"
    title = "Not in the cache"


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Whose values are kept, and where. `only`: the server is never asked."""

    url: str
    api_key: Plaintext
    insecure: bool
    state_dir: Path
    only: bool
    max_age: float = _MAX_AGE

    @property
    def root(self) -> Path:
        """Each API key has a directory of its own."""
        return self.state_dir / "run" / place_of(self.api_key)


class _Queues:
    """The queues of all processes with this API key. Blocking."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._durable = StateDirectory()
        self._durable.make_directory(directory)
        self._durable.restrict(directory)
        self._lock = directory.with_name(f"{directory.name}.lock")
        self._new_id = Ids(time.time, os.urandom)
        self.own = self._begin()

    def left(self) -> Iterator[OfflineQueue]:
        """Those of processes that have ended, oldest first; a lock is held on each."""
        for path in sorted(self._directory.iterdir()):
            # Its process lives, or somebody else delivers it, or has done so.
            with contextlib.suppress(ConfigurationError, FileNotFoundError):
                with self._durable.locked(self._lock):
                    queue = OfflineQueue(path, self._new_id) if path.is_dir() else None
                if queue is not None:
                    yield queue

    def remove(self, queue: OfflineQueue) -> None:
        """Remove one of which all was delivered."""
        with self._durable.locked(self._lock):
            queue.remove()

    def end(self) -> None:
        """Let the own one go: there is nothing in it, or it is for the next process."""
        if self.own.take(1) is None:
            self.remove(self.own)
        else:
            self.own.close()

    def _begin(self) -> OfflineQueue:
        with self._durable.locked(self._lock):
            return OfflineQueue(self._directory / self._new_id(), self._new_id)


class _Known:
    """What the cache has of a selection."""

    def __init__(self, cache: LastKnown, selection: Selection) -> None:
        self.cache = cache
        self._selection = selection
        # Whether all of it was there at the start.
        self.covered = self._covers()

    def listed(self) -> Sequence[Listed] | None:
        """The last list; the list does not matter if there are just names."""
        now = time.time()
        if (found := self.cache.get(_LIST)) is not None:
            return [
                one._replace(is_expired=one.is_expired or _is_past(one.expires_at, now))
                for one in msgspec.json.decode(found[0].value, type=list[Listed])
            ]
        if self._selection.patterns:
            return None
        return [Listed(name, "", False) for name in self.cache.names]

    def _covers(self) -> bool:
        names = set(self._selection.names)
        if self._selection.patterns:
            listed = self.listed()
            if listed is None:
                return False
            names |= {one.name for one in self._selection.of_listed(listed) if not one.is_expired}
        return all(self.cache.get(name) is not None for name in names)


def _is_past(expires_at: str | None, now: float) -> bool:
    return expires_at is not None and times.parse(expires_at, "expires_at") <= now


class CachedSource:
    """A server's secrets, in place of which the cache has to do at the start. Belongs to one event
    loop.
    """

    def __init__(
        self, inner: Source, client: AsyncSecretsClient, secrets: Secrets, known: _Known
    ) -> None:
        self._inner = inner
        self._client = client
        self._secrets = secrets
        self.covered, self._known = known.covered, known.cache
        self._expected = known
        # Why the cache is used without another question to the server.
        self._away: SecretsError | None = None
        # Once values were read, a program has them: what can't be read anew does not change.
        self._started = False
        self._was_offline = False

    def do_without(self, reason: SecretsError) -> None:
        """Don't ask the server before values were read; `reason` is raised if some are missing."""
        self._away = reason

    async def listed(self) -> Sequence[Listed]:
        if self._away is None or self._started:
            try:
                return await self._list()
            except SecretsError as error:
                self._away = await self._weigh(error)
        found = self._expected.listed()
        if found is None:
            raise self._away
        return found

    async def read(self, names: Sequence[str]) -> Values:
        values: dict[str, Plaintext] = {}
        failed: list[Unresolved] = []
        for start in range(0, len(names), AT_ONCE):
            try:
                for one in await self._read(names[start : start + AT_ONCE]):
                    values[one.known.name] = Plaintext(one.known.value)
            except UnresolvedReferences as error:
                # Whoever has to see to it wants to know all of them at once.
                failed += error.errors
        if failed:
            raise UnresolvedReferences(failed, len(names))
        self._started = True
        return values

    async def notices(self, selection: Selection) -> AsyncIterator[None]:
        begun = False
        while True:
            try:
                notices = self._inner.notices(selection)
                # Whether the server is there must not take longer than the start may.
                async with asyncio.timeout(_TIMEOUT if self.covered and not begun else None):
                    await anext(notices)
                begun = True
                yield
                async for _ in notices:
                    yield
            except TimeoutError:
                pass
            except SecretsError as error:
                if not is_away(error) or not (begun or self.covered):
                    raise
            if not begun:
                begun = True
                yield
            await asyncio.sleep(_AGAIN)

    async def _list(self) -> Sequence[Listed]:
        drops = self._known.drops
        listed = [Listed.of(one) for one in await self._client.list()]
        there = {one.name for one in listed}
        for name in self._known.names:
            if name not in there and name != _LIST:
                self._secrets.drop(name)
        text = msgspec.json.encode(listed).decode()
        self._known.put(Known(_LIST, text, "", 0, 0, time.time()), drops)
        self._secrets.store(_LIST)
        if not self._was_offline:
            return listed
        # Other versions than those that came with values of the cache, so that they are read.
        return [one._replace(version=f"{one.version} read") for one in listed]

    async def _read(self, names: Sequence[str]) -> list[Served]:
        if self._away is None or self._started:
            try:
                return await self._secrets.ask(names, Usage(), own_peer())
            except SecretsError as error:
                self._away = await self._weigh(error)
        found = await self._secrets.recall(names, own_peer())
        if found is None:
            raise self._away
        self._was_offline = True
        age = max(one.age for one in found)
        _log.warning("the server was not asked, values are from the cache: %d seconds old", age)
        return found

    async def _weigh(self, error: SecretsError) -> SecretsError:
        """Return it if the cache may stand in.

        Raises:
            SecretsError: it may not.
        """
        if isinstance(error, Unauthenticated):
            self._known.clear()
            await self._secrets.run(self._known.purge)
        if self._started or not is_away(error):
            raise error
        return error


class _Courier:
    """Delivers what is queued."""

    def __init__(self, upstream: Upstream, secrets: Secrets, queues: _Queues) -> None:
        self._upstream = upstream
        self._secrets = secrets
        self._queues = queues

    async def deliver_left(self) -> None:
        """Deliver what other processes have left.

        Raises:
            SecretsError: the server is away, or refuses.
            OSError: a queue can't be read.
        """
        run, left = self._secrets.run, self._queues.left()
        while (queue := await run(partial(next, left, None))) is not None:
            try:
                await self._deliveries(queue).flush()
            except BaseException:
                await run(queue.close)
                raise
            await run(partial(self._queues.remove, queue))

    async def run(self) -> None:
        """Deliver everything, without an end."""
        while True:
            try:
                await self.deliver_left()
                break
            except (SecretsError, OSError) as error:
                if not isinstance(error, SecretsError) or not is_away(error):
                    _log.error("offline reads are not delivered, and kept: %s", error)
                    break
            await asyncio.sleep(_AGAIN)
        await self._deliveries(self._queues.own).run()

    def _deliveries(self, queue: OfflineQueue) -> Deliveries:
        return Deliveries(self._upstream, queue, self._secrets, random.random)


@contextlib.asynccontextmanager
async def opened(
    settings: CacheSettings, inner: Source, selection: Selection, *, watching: bool
) -> AsyncIterator[CachedSource]:
    """The source for the duration of a block. Before it is there, what others have left is
    delivered, if the server is there; while `watching`, in the background, too.

    Raises:
        OSError: the directory can't be used.
    """
    known = LastKnown(settings.root / "known", settings.api_key, time.time, settings.max_age)
    await wrap(known.load)()
    queues = await wrap(_Queues)(settings.root / "offline")
    expected = _Known(known, selection)
    options = _options(settings, hasty=expected.covered)
    upstream = Upstream(
        address(settings.url, insecure=settings.insecure), settings.api_key, options
    )
    client = AsyncSecretsClient(settings.url, settings.api_key.reveal(), options)
    secrets = Secrets(upstream, known, queues.own, Sources(time.time, Ids(time.time, os.urandom)))
    courier = _Courier(upstream, secrets, queues)
    source = CachedSource(inner, client, secrets, expected)
    tasks = []
    try:
        if settings.only:
            source.do_without(
                NotCached("The server is not asked, and the cache has not all of it.")
            )
        else:
            await _deliver_first(courier, source)
        if watching:
            tasks.append(asyncio.create_task(courier.run()))
        yield source
    finally:
        for task in tasks:
            task.cancel()
            await asyncio.wait([task])
        try:
            await secrets.run(queues.end)
        except OSError as error:
            _log.warning("a queue of offline reads can't be ended: %s", error.strerror)
        await secrets.close()
        await client.close()
        await upstream.close()


async def _deliver_first(courier: _Courier, source: CachedSource) -> None:
    try:
        async with asyncio.timeout(_DELIVER):
            await courier.deliver_left()
    except TimeoutError:
        _log.warning("not all offline reads are delivered yet")
    except SecretsError as error:
        if is_away(error):
            if source.covered:
                source.do_without(error)
        elif not isinstance(error, Unauthenticated):
            # Otherwise the reads that follow say so.
            _log.error("offline reads are not delivered, and kept: %s", error)
    except OSError as error:
        _log.error("offline reads are not delivered, and kept: %s", error.strerror)


def _options(settings: CacheSettings, *, hasty: bool) -> Options:
    if not hasty:
        return Options(retries=2, insecure=settings.insecure)
    return Options(
        timeout=_TIMEOUT,
        connect_timeout=_TIMEOUT / 2,
        deadline=_TIMEOUT,
        retries=0,
        insecure=settings.insecure,
    )
