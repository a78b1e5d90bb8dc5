"""Following the log and signing it, in one of the processes that share a data directory."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import aiofiles.os

from .core.errors import LogDamaged, SecretsError
from .core.events import Event
from .core.intents import Intent
from .core.ports import Backend, Progress, Sources
from .cosigner import Cosigner
from .gate import Gate

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Seconds between two checkpoints, and between two of them that are put into the log itself.
INTERVAL = 1.0
ANCHOR_EVERY = 3600.0

# While the log grows, so many of its lines at most are hashed every so many seconds: those of a
# whole second at once would hold up everything else in this process. Whether it grows is seen soon.
_PORTION = 1536
_TICK = 0.06
_SOON = 0.1

# Seconds until the next attempt after an error.
_AFTER_ERROR = 5.0


class LogSigner:
    """Signs a checkpoint a second while the log grows, if no other process does it.

    It has a thread of its own: no commit waits for it. Belongs to one event loop.
    """

    def __init__(self, backend: Backend, gate: Gate, sources: Sources) -> None:
        self._tree = backend.tree
        self._store = backend.store
        self._gate = gate
        self._sources = sources
        self._thread = ThreadPoolExecutor(1, "flowmason-sign")
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        # Whether this process has the lock, and has checked the log since.
        self._leads = False
        # How many events are hashed.
        self._size = 0
        self._cosigner = Cosigner(backend.witnesses, self._tree, self._run, sources)

    async def open(self) -> None:
        """Hold the log against what was signed, whoever signs from now on.

        Raises:
            LogDamaged: it is shorter than, or different from, what was signed.
            ConfigurationError: the signing key can't be used.
        """
        leads = await self._run(self._tree.lead)
        await self._check()
        self._leads = leads

    def start(self) -> None:
        """Sign in the background; `open` has returned."""
        self._task = asyncio.get_running_loop().create_task(self._follow())
        self._cosigner.start()

    async def close(self) -> None:
        """Sign what was not signed yet, and let another process go on."""
        self._closing.set()
        await self._cosigner.close()
        if self._task is not None:
            await self._task
        try:
            if self._leads:
                with contextlib.suppress(SecretsError, OSError):
                    await self.sign()
        finally:
            await self._run(self._tree.close)
            self._thread.shutdown(wait=False)

    async def _check(self) -> None:
        await self._run(self._tree.begin)
        await self._run(self._tree.check, await self._position())

    async def _follow(self) -> None:
        pause = INTERVAL
        while not self._closing.is_set():
            try:
                if not await self._closed_after(pause):
                    pause = INTERVAL
                    await self._step()
            except Exception as error:
                _report(error)
                # Nothing that was in memory is trusted any more.
                self._leads = False
                await self._run(self._tree.close)
                pause = _AFTER_ERROR

    async def _closed_after(self, seconds: float) -> bool:
        """Wait, and hash in the meantime what is new."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            grows = self._leads and self._size < self._store.position
            if await self._closed_within(min(left, _TICK if grows else _SOON)):
                break
            if grows:
                self._size = await self._run(self._tree.grow, self._store.position, _PORTION)
        return self._closing.is_set()

    async def _closed_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return self._closing.is_set()

    async def _step(self) -> None:
        led = self._leads
        self._leads = False
        if not await self._run(self._tree.lead):
            return
        if not led:
            await self._check()
        self._leads = True
        progress = await self.sign()
        if progress.note:
            self._cosigner.offer(progress.note)
        await self._anchor(progress)

    async def sign(self) -> Progress:
        """Sign the log as it is now, or a part of what is new if that is much; `open` has returned,
        and no other process signs.
        """
        progress = await self._run(self._tree.sign, await self._position())
        self._size = progress.size
        return progress

    async def _anchor(self, progress: Progress) -> None:
        """Put the checkpoint into the log where shippers take it along, if it is time to."""
        last = progress.anchor
        overdue = self._sources.clock() - last.time >= ANCHOR_EVERY
        if last.sealed or (overdue and progress.size > last.seq + 1):
            event = Event(
                self._sources.new_id(),
                "log.checkpoint",
                "success",
                None,
                "log",
                None,
                details={"checkpoint": progress.note},
            )
            await self._gate.submit(Intent(event, ()))

    async def _position(self) -> int:
        """How many events the log has now, those of other processes included."""
        await self._gate.is_current(Intent(None, ()))
        return self._store.position

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        result: T = await aiofiles.os.wrap(work)(*arguments, executor=self._thread)
        return result


def _report(error: Exception) -> None:
    if isinstance(error, LogDamaged):
        _log.critical("the log is not signed any more: %s", error)
    elif isinstance(error, SecretsError | OSError):
        _log.warning("the log can't be signed now: %s", error)
    else:
        _log.error("the log can't be signed now", exc_info=error)
