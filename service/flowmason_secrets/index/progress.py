"""How far the index is, for those who wait for it."""

import logging
from collections.abc import Callable

from ..core.ports import Building

_LOG = logging.getLogger(__name__)

# Seconds between two lines of the program's log.
_EVERY = 10.0


class Progress:
    """`building` is None unless more than `much` events are missing. `clock` in seconds."""

    def __init__(self, much: int, clock: Callable[[], float]) -> None:
        self._much = much
        self._clock = clock
        self._told: float | None = None
        self.building: Building | None = None

    def see(self, indexed: int, events: int) -> None:
        """So many events are indexed, of so many."""
        if events - indexed <= self._much:
            self.building = self._told = None
            return
        self.building, now = Building(indexed, events), self._clock()
        if self._told is None:
            self._told = now
        elif now - self._told >= _EVERY:
            self._told = now
            _LOG.warning(
                "The index is being built: %s of %s events.", f"{indexed:,}", f"{events:,}"
            )
