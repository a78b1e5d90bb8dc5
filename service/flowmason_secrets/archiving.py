"""Archiving: moving old segments out of a data directory, beside whoever works on it."""

from collections.abc import Sequence
from typing import NamedTuple

import aiofiles.os

from .core.access import Caller
from .core.errors import InvalidInput
from .core.events import Event
from .core.intents import Intent
from .core.minimum import Minimum
from .core.ports import Index, Sources, Store
from .gate import Gate
from .storage.archive import FilesArchive, Sealed, Target
from .storage.staticlayout import Tell


class Archived(NamedTuple):
    """So many segments with so many events went; what is left."""

    segments: int
    events: int
    left: Minimum


class Archiving:
    """Archives segments of the files store. For local callers: whoever has the files."""

    def __init__(
        self, ports: tuple[Store, Index], gate: Gate, archive: FilesArchive, sources: Sources
    ) -> None:
        self._store, self._index = ports
        self._gate = gate
        self._archive = archive
        self._sources = sources

    async def archive(
        self, caller: Caller, before: float, to: Target, tell: Tell
    ) -> Archived | None:
        """Move the oldest segments away all of whose events are older than that; None if there are
        none that may go. Interrupted anywhere, it can be done again. # format §11.3

        Raises:
            InvalidInput: the time is in the future.
            AnotherLog: the place has other files of those names.
            LogDamaged: the log is not what was signed.
            LogUnavailable, IndexUnavailable, OSError: there is no room to go on.
        """
        if before > self._sources.clock():
            raise InvalidInput("before", "is in the future")
        await self._gate.is_current(Intent(None, ()))
        position = self._store.position
        chosen: list[Sealed] = await aiofiles.os.wrap(self._archive.choose)(before, position)
        if not chosen:
            # What one left who was interrupted.
            await aiofiles.os.wrap(self._archive.remove)(None)
            return None
        minimum: Minimum = await aiofiles.os.wrap(self._archive.copy)(chosen, to, tell)
        # An index that has not read them yet would have to begin anew.
        await self._index.organisations(position)
        await self._announce(caller, chosen)
        await aiofiles.os.wrap(self._archive.remove)(minimum)
        return Archived(len(chosen), minimum.minimum - chosen[0].first, minimum)

    async def _announce(self, caller: Caller, chosen: Sequence[Sealed]) -> None:
        principal, first, minimum = caller.principal, chosen[0].first, chosen[-1].stop
        event = Event(
            id=self._sources.new_id(),
            action="log.archive",
            outcome="success",
            org_id=None,
            resource_type="log",
            resource_id=None,
            actor=principal.actor,
            actor_type=principal.actor_type,
            status=200,
            details={
                "segments": len(chosen),
                "events": minimum - first,
                "first": first,
                "last": minimum - 1,
                "minimum": minimum,
            },
        )
        await self._gate.submit(Intent(event, ()))
