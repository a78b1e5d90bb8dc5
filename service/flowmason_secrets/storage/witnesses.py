"""How it stands with the witnesses of the log, for whoever is asked. FORMAT.md §9.7. Blocking."""

import contextlib
from collections.abc import Sequence

import msgspec

from ..core.witness import WitnessState
from .durable import PRIVATE_FILE, Durable
from .published import Layout


class WitnessStates:
    """The file that the process that signs writes, and that all processes read."""

    def __init__(self, layout: Layout, durable: Durable) -> None:
        self._path = layout.witnesses
        self._draft = layout.signing_draft
        self._durable = durable

    def read(self) -> list[WitnessState]:
        """What was recorded; nothing if that can't be read."""
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            return msgspec.json.decode(self._path.read_bytes(), type=list[WitnessState])
        return []

    def write(self, states: Sequence[WitnessState]) -> None:
        """Record it. Not synced: it may be lost, and is found out again."""
        if not states:
            self._durable.unlink(self._path)
            return
        # Of one who died; nobody else signs now.
        self._durable.unlink(self._draft)
        data = msgspec.json.encode(states)
        self._durable.create(self._draft, data, PRIVATE_FILE, sync=False)
        self._durable.rename(self._draft, self._path)
