"""The use cases of whoever verifies the log: checkpoints, tiles and proofs."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import aiofiles.os

from .attempts import Path
from .core.access import FULL, READ, Caller
from .core.errors import (
    CheckpointPending,
    EventArchived,
    EventNotFound,
    NotCosigned,
    TileNotFound,
)
from .core.ports import AuditQuery, Backend
from .core.tiles import Tile
from .core.witness import WitnessState

T = TypeVar("T")

_FULL_OR_READ = frozenset({FULL, READ})

# How long a proof waits for the checkpoint that covers a new event, and how often it looks, in
# seconds.
_PATIENCE = 2.0
_LOOK_EVERY = 0.1


class Trail:
    """What a server gives to those who don't trust it. Never a line of the log."""

    def __init__(self, backend: Backend, path: Path) -> None:
        self._index = backend.index
        self._tree = backend.tree
        self._path = path
        # One thread: proofs are made one after the other, and nothing else waits for them.
        self._thread = ThreadPoolExecutor(1, "flowmason-tree")

    async def checkpoint(self, caller: Caller, *, cosigned: bool = False) -> bytes:
        """The newest signed checkpoint, or the newest that witnesses have cosigned, as it is
        published.

        Raises:
            CheckpointPending, NotCosigned: there is none yet.
        """
        await self._path.barrier(caller)
        note = await self._run(partial(self._tree.newest, cosigned=cosigned))
        if note is None:
            raise NotCosigned if cosigned else CheckpointPending
        return note

    async def tile(self, caller: Caller, tile: Tile) -> bytes:
        """The hashes of a tile that the newest checkpoint covers.

        Raises:
            TileNotFound: it covers none such, or it would be of lines instead of hashes.
        """
        await self._path.barrier(caller)
        data = await self._run(self._tree.tile, tile)
        if data is None:
            raise TileNotFound
        return data

    async def witnesses(self) -> list[WitnessState]:
        """How it stands with the witnesses."""
        return await self._run(self._tree.witnesses)

    async def proof(self, caller: Caller, seq: int, *, cosigned: bool = False) -> bytes:
        """The proof file that an event of the caller's organisation is in the log; if asked for,
        with a checkpoint that witnesses have cosigned. If it is a new event, this waits for the
        checkpoint.

        Raises:
            Denied: recorded in the log.
            EventNotFound: it is of another organisation, or not there.
            EventArchived: whoever has the archive can prove it.
            CheckpointPending: no checkpoint covers it after two seconds.
            NotCosigned: there is no cosigned checkpoint at all.
            LogDamaged: the log is not the one that was signed.
        """
        position = await self._path.permit(
            caller, "log.proof", "log", lambda who: who.require(_FULL_OR_READ)
        )
        minimum = (await self._index.minimum()).minimum
        if seq < minimum:
            raise EventArchived(minimum)
        who = caller.principal
        query = AuditQuery(who.org_id, before=seq + 1, limit=1, allow=who.allow)
        found = await self._index.audit(query, position)
        if not found or found[0].line["seq"] != seq:
            raise EventNotFound(seq)
        for _ in range(round(_PATIENCE / _LOOK_EVERY)):
            proof = await self._run(partial(self._tree.prove, seq, cosigned=cosigned))
            if proof is not None:
                return proof
            await asyncio.sleep(_LOOK_EVERY)
        if cosigned and await self._run(partial(self._tree.newest, cosigned=True)) is None:
            raise NotCosigned
        raise CheckpointPending

    def close(self) -> None:
        """Release the thread."""
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        result: T = await aiofiles.os.wrap(work)(*arguments, executor=self._thread)
        return result
