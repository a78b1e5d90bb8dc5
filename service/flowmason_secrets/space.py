"""Watching the room on the disk: a warning before the log can't be written any more."""

import asyncio
import contextlib
import logging

from .core.errors import SecretsError
from .core.events import Detail, Event
from .core.intents import Intent
from .core.ports import AuditQuery, Backend, Sources
from .gate import Gate

_log = logging.getLogger(__name__)

# Below how many bytes it is little.
WARN_BELOW = 1 << 30

# Seconds between two looks.
INTERVAL = 5.0

_LOW, _OK = "log.space_low", "log.space_ok"


class SpaceWatch:
    """What is known of the room on the disk. One of the processes that serve puts it into the log
    when it gets little, and when that is over. Belongs to one event loop.
    """

    def __init__(self, backend: Backend, gate: Gate, sources: Sources, warn_below: int) -> None:
        self._store = backend.store
        self._index = backend.index
        self._gate = gate
        self._sources = sources
        self._warn_below = warn_below
        self._low = False
        # What the log says; None while this process does not know.
        self._said: bool | None = None
        self._error: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the reserve, and look in the background every few seconds."""
        with contextlib.suppress(SecretsError):
            await self._watches()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def warnings(self) -> list[str]:
        """What somebody should see to before it is too late.

        Raises:
            LogUnavailable: it can't be found out.
        """
        free, missing = await self._store.space()
        # It has to become clearly more again.
        limit = self._warn_below + (self._warn_below // 4 if self._low else 0)
        self._low = free < limit
        found = []
        if self._low:
            found.append(
                f"Only {_size(free)} are free on the disk of the data directory, less than "
                f"{_size(limit)}. Make room before the log can't be written any more."
            )
        if missing and self._task is not None:
            why = self._error or "there is too little room"
            found.append(
                f"The reserve of {_size(missing)} could not be made: {why}. When the disk gets "
                "full, refusals and deletions can't be recorded either."
            )
        return found

    async def _follow(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(INTERVAL)

    async def _look(self) -> None:
        try:
            if await self._watches():
                before = self._low
                warnings = await self.warnings()
                if self._low and not before:
                    _log.warning("%s", warnings[0])
                await self._say()
        except SecretsError as error:
            # Whoever needs the log is told; here it is tried again.
            _log.debug("the room on the disk can't be watched now: %s", error)

    async def _watches(self) -> bool:
        try:
            watches = await self._store.watch()
        except SecretsError as error:
            if self._error is None:
                _log.warning("the reserve can't be made now: %s", error)
            self._error = str(error)
            return True
        self._error = None
        if not watches:
            self._said = None
        return watches

    async def _say(self) -> None:
        """Put a change into the log."""
        if self._said is None:
            self._said = await self._last()
        if self._low == self._said:
            return
        free, _ = await self._store.space()
        action = _LOW if self._low else _OK
        details: dict[str, Detail] = {"free": free, "warn_below": self._warn_below}
        new_id = self._sources.new_id()
        event = Event(new_id, action, "success", None, "log", None, details=details)
        await self._gate.submit(Intent(event, ()))
        self._said = self._low

    async def _last(self) -> bool:
        """Whether the log says that there is little room."""
        await self._gate.is_current(Intent(None, ()))
        newest = [
            (entry.line["seq"], action == _LOW)
            for action in (_LOW, _OK)
            for entry in await self._index.audit(
                AuditQuery(None, action=action, limit=1), self._store.position
            )
        ]
        return max(newest, default=(0, False))[1]


def _size(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
