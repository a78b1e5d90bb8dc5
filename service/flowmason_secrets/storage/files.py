"""The files store: the port over the engine and the published files."""

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import aiofiles.os

from .. import forking
from ..core.errors import LogUnavailable
from ..core.intents import Intent
from ..core.minimum import Minimum
from ..core.names import secret_id
from ..core.ports import Chunk, Space, Verdict
from ..core.records import ApiKey, Inventory, Metadata, SecretRecord
from .chunks import ChunkReader, read_lines
from .engine import JOURNAL_LIMIT, Engine, Environment
from .minimum import MinimumFile
from .reserve import Reserve
from .staging import Journal

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Seconds for which changes stay staged, so that a busy secret's files are synced once for many.
SETTLE_AFTER = 1.0


class FilesStore:
    """A data directory, shared with every other process that opens it. Belongs to one event loop.

    It takes one thread for commits, so that they are in order, and a few for reading.
    """

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        self._reserve = Reserve(environment.layout, environment.durable, environment.reserve_bytes)
        self._engine = Engine(environment, self._reserve)
        self._committer = ThreadPoolExecutor(1, "flowmason-commit")
        self._readers = ThreadPoolExecutor(4, "flowmason-read")
        self._settling: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        # Ends the watch, if this process has it.
        self._watching: Callable[[], None] | None = None
        self._commit = aiofiles.os.wrap(self._engine.commit)
        self._load = aiofiles.os.wrap(environment.published.secret)

    @property
    def position(self) -> int:
        """How many events of the log this process has caught up with."""
        return self._engine.position

    def peek(self, org_id: str, name: str) -> SecretRecord | None:
        """See `Store.peek`."""
        record = self._env.cache.get((org_id, secret_id(org_id, name)))
        # The id is a short hash: the name decides.
        return record if record is not None and record.metadata.name == name else None

    def forget(self, org_id: str, name: str) -> None:
        """See `Store.forget`."""
        self._env.cache.drop((org_id, secret_id(org_id, name)))

    async def load(self, org_id: str, name: str) -> SecretRecord | None:
        """See `Store.load`."""
        as_of = self._engine.position
        record: SecretRecord | None = await self._load(org_id, name, as_of, executor=self._readers)
        if record is not None and record.damage is None:
            self._env.cache.put((org_id, secret_id(org_id, name)), record)
        return record

    async def load_all(self, org_id: str, names: Sequence[str]) -> list[SecretRecord | None]:
        """See `Store.load_all`."""
        as_of = self._engine.position
        load = aiofiles.os.wrap(self._env.published.secrets)
        records: list[SecretRecord | None] = await load(
            org_id, names, as_of, executor=self._readers
        )
        return records

    async def org_hashes(self) -> list[str]:
        """See `Store.org_hashes`."""
        found: list[str] = await aiofiles.os.wrap(self._env.published.organisations)(
            executor=self._readers
        )
        return found

    async def inventory(self, org_hash: str) -> Inventory:
        """See `Store.inventory`."""
        return await self._read(self._env.published.inventory, org_hash)

    async def load_api_key(self, digest: str) -> ApiKey | None:
        """See `Store.load_api_key`."""
        return await self._read(self._env.published.api_key, digest)

    async def api_keys(self, org_id: str) -> list[ApiKey]:
        """See `Store.api_keys`."""
        return await self._read(self._env.published.api_keys, org_id)

    async def commit(self, batch: Sequence[Intent]) -> list[Verdict]:
        """See `Store.commit`."""
        verdicts: list[Verdict] = await self._commit(batch, executor=self._committer)
        if self._settling is None and self._engine.staged:
            self._settling = asyncio.create_task(self._settle())
        return verdicts

    async def probe(self) -> None:
        """See `Store.probe`."""
        await aiofiles.os.wrap(self._engine.probe)(executor=self._readers)

    async def space(self) -> Space:
        """See `Store.space`."""
        try:
            found: Space = await aiofiles.os.wrap(self._reserve.space)(executor=self._readers)
        except OSError as error:
            raise LogUnavailable.of(error) from error
        return found

    async def watch(self) -> bool:
        """See `Store.watch`. # format §10"""
        if self._watching is None:
            claim = aiofiles.os.wrap(_claim)
            self._watching = await claim(self._env.layout.staged, executor=self._readers)
        if self._watching is None:
            return False
        await aiofiles.os.wrap(self._engine.keep_reserve)(executor=self._committer)
        return True

    async def close(self) -> None:
        """See `Store.close`."""
        self._closing.set()
        if self._watching is not None:
            self._watching()
        if self._settling is not None:
            await self._settling
        try:
            await aiofiles.os.wrap(self._engine.close)(executor=self._committer)
        finally:
            self._committer.shutdown()
            self._readers.shutdown()

    async def _settle(self) -> None:
        """Sync what was published in the meantime and drop it from `staged/`."""
        try:
            if self._engine.staged < JOURNAL_LIMIT:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), SETTLE_AFTER)
            seal = aiofiles.os.wrap(self._engine.seal_journal)
            journal: Journal | None = await seal(executor=self._committer)
            if journal is not None:
                await aiofiles.os.wrap(journal.settle)(executor=self._readers)
        except OSError as error:
            # It stays staged: the next one to open the directory publishes it from there again.
            _log.warning("published files could not be synced: %s", error)
        finally:
            self._settling = None

    async def _read(self, function: Callable[[str], T], argument: str) -> T:
        result: T = await aiofiles.os.wrap(function)(argument, executor=self._readers)
        return result


class FilesTail:
    """What the projections of a data directory are made from. Blocking."""

    def __init__(self, environment: Environment) -> None:
        self._layout = environment.layout
        self._reader = ChunkReader(environment.layout.events)
        self._minimum = MinimumFile(environment.layout.minimum)
        self._published = environment.published

    def claim(self) -> Callable[[], None] | None:
        """See `Tail.claim`. # format §8"""
        return _claim(self._layout.events)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """See `Tail.chunks`."""
        return self._reader.read(start, stop)

    def minimum(self) -> Minimum:
        """See `Tail.minimum`."""
        return self._minimum.read()

    def lines_at(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Tail.lines_at`."""
        return read_lines(self._layout.events, places)

    def organisations(self) -> list[str]:
        """See `Tail.organisations`."""
        return self._published.organisations()

    def stems(self, org_hash: str) -> list[str]:
        """See `Tail.stems`."""
        return self._published.stems(org_hash)

    def settled(self) -> bool:
        """See `Tail.settled`."""
        return self._published.settled()

    def metadata(self, org_hash: str, stem: str) -> Metadata | None:
        """See `Tail.metadata`."""
        return self._published.metadata(org_hash, stem)


def _claim(directory: Path) -> Callable[[], None] | None:
    """Lock a directory: what is returned unlocks it. None while another process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    forking.close_in_children(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        forking.close(descriptor)
        return None
    return partial(forking.close, descriptor)
