"""The newest events, which have no postings yet: they are kept by the column."""

import sqlite3
from array import array
from collections.abc import Iterator

from .database import Damaged
from .plan import Plan

try:
    from ._speedups import matching
except ImportError:
    from .plain import matching

# How many events are read for one query at most: that takes some milliseconds.
_AT_ONCE = 2048
# And how many are looked at together: a page is often full before all of them were.
_TOGETHER = 1024
# Of more blocks the events are left in the database: those won't be without postings for long.
_BLOCKS = 2


class Recent:
    """Events of one open database that follow one another, from seq `first` up to and without
    `end`.
    """

    def __init__(self, block: int) -> None:
        self._most = _BLOCKS * block
        self.first = self._sealed = 0
        # As they are looked at; see `plain.Columns`.
        self._columns = (array("q"), *(array("I") for _ in range(6)))
        self._segments, self._offsets = array("q"), array("q")
        self._all = (*self._columns, self._segments, self._offsets)

    def forget(self) -> None:
        """What was read in a transaction that did not commit is void."""
        self._drop(-1)

    @property
    def end(self) -> int:
        """The seq that follows."""
        return self.first + len(self._offsets)

    def read(self, connection: sqlite3.Connection, sealed: int, position: int) -> None:
        """Forget those that have postings by now, the first `sealed` events, and read some more of
        those that don't.

        Raises:
            Damaged: one has no row, or a row is not what it should be.
        """
        if sealed != self._sealed:
            self._drop(sealed)
        stop = min(position, sealed + self._most, self.end + _AT_ONCE)
        if self.end >= stop:
            return
        rows = connection.execute(
            "select seq, time, org, type, action, outcome, name, actor, segment,"
            ' "offset" from event where seq >= ? and seq < ? order by seq',
            (self.end, stop),
        ).fetchall()
        if not rows:
            return
        seqs, *columns = zip(*rows, strict=True)
        if not len(self._offsets):
            # A log whose beginning was archived has none before.
            self.first = seqs[0]
        if seqs != tuple(range(self.end, self.end + len(seqs))):
            raise Damaged("events have no row")
        try:
            for column, more in zip(self._all, columns, strict=True):
                column.extend(more)
        except (TypeError, OverflowError) as error:
            raise Damaged("a row is not made of numbers") from error

    def matching(self, plan: Plan, high: int) -> Iterator[int]:
        """The seqs below `high` of those that match, in the plan's order."""
        wanted = (plan.org, plan.type, plan.action, plan.outcome, plan.name, plan.actor, plan.but)
        terms = tuple(-1 if term is None else term for term in wanted)
        low, high = (min(max(seq, self.first), self.end) - self.first for seq in (plan.low, high))
        starts = range(low, high, _TOGETHER)
        for start in starts if plan.ascending else reversed(starts):
            found = matching(
                self._columns,
                terms,
                plan.names,
                (plan.since, plan.until),
                start,
                min(start + _TOGETHER, high),
            )
            for place in found if plan.ascending else reversed(found):
                yield self.first + place

    def place(self, seq: int) -> tuple[int, int] | None:
        """The segment and the offset of an event, None if it is none of these."""
        if not self.first <= seq < self.end:
            return None
        return self._segments[seq - self.first], self._offsets[seq - self.first]

    def _drop(self, sealed: int) -> None:
        kept = self.first <= sealed <= self.end
        for column in self._all:
            del column[: sealed - self.first if kept else None]
        self.first = self._sealed = sealed
