"""Changes of secrets: only real ones, and not too many."""

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from ..core.errors import Denied, InvalidInput, SecretsError, UnresolvedReferences
from .source import Found, Selection, Source, Values, find

_log = logging.getLogger(__name__)

# What stays so until something changes.
_FINAL = (Denied, InvalidInput, UnresolvedReferences)


@dataclass(frozen=True, slots=True)
class Pace:
    """How soon after a change something is done about it. Times in seconds.

    `settle` is for what is changed together. Between two changes there is at least a pause, which
    doubles up to `longest` while they come faster than in twice its time. Without a notice, there
    is a look every `look`: secrets expire, and are deleted.
    """

    settle: float = 1.0
    longest: float = 60.0
    look: float = 60.0

    def pause(self, before: float, calm: float) -> float:
        """The next pause, after one of `before` and so much time since the last change."""
        return self.settle if calm > 2 * before else min(2 * before, self.longest)


class Watcher:
    """Follows what is selected. Of the values it keeps only an HMAC, under a key that dies with
    this process.
    """

    def __init__(self, source: Source, selection: Selection, pace: Pace | None = None) -> None:
        self._source = source
        self._selection = selection
        self._pace = pace or Pace()
        self._key = secrets.token_bytes(32)
        self._complaint = ""
        # The versions that can't be read: trying again would only fill the log with refusals.
        self._refused: Mapping[str, str] | None = None

    async def begin(self) -> Found:
        """Read it for the first time.

        Raises:
            SecretsError: as `find`.
        """
        self._notices = self._source.notices(self._selection)
        await anext(self._notices)
        found = await find(self._source, self._selection)
        self._versions, self._digest = found.versions, self._hmac(found.values)
        return found

    async def changes(self) -> AsyncIterator[Found]:
        """Everything anew, whenever a value is another one, is new, or is gone. Never ends; what
        can't be read is logged, and looked at again with the next notice.
        """
        clock = asyncio.get_running_loop().time
        dirty = asyncio.Event()
        listener = asyncio.create_task(self._listen(dirty))
        last, pause = clock() - self._pace.settle, self._pace.settle
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pace.look):
                        await dirty.wait()
                await asyncio.sleep(max(self._pace.settle, last + pause - clock()))
                dirty.clear()
                found = await self._look()
                if found is not None:
                    pause, last = self._pace.pause(pause, clock() - last), clock()
                    yield found
                # The values are not ours to keep.
                del found
        finally:
            listener.cancel()
            await asyncio.wait([listener])

    async def _listen(self, dirty: asyncio.Event) -> None:
        try:
            async for _ in self._notices:
                dirty.set()
        except SecretsError as error:
            _log.error("changes are no longer noticed: %s", error)

    async def _look(self) -> Found | None:
        versions: Mapping[str, str] | None = None
        try:
            listed = self._selection.of_listed(await self._source.listed())
            versions = {one.name: one.version for one in listed}
            if versions in (self._versions, self._refused):
                return None
            found = await find(self._source, self._selection)
        except SecretsError as error:
            if isinstance(error, _FINAL):
                self._refused = versions
            self._complain(str(error))
            return None
        self._complaint, self._refused = "", None
        digest = self._hmac(found.values)
        before, self._versions, self._digest = self._digest, found.versions, digest
        return None if hmac.compare_digest(before, digest) else found

    def _complain(self, problem: str) -> None:
        # Once, and not as often as somebody looks.
        if problem != self._complaint:
            _log.warning("secrets can't be read anew, the old ones stay: %s", problem)
        self._complaint = problem

    def _hmac(self, values: Values) -> bytes:
        digest = hmac.new(self._key, digestmod="sha256")
        for name in sorted(values):
            for text in (name, values[name].reveal()):
                data = text.encode()
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.digest()
