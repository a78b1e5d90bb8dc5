"""Sealing many blocks: whoever has much to index writes the postings of a group only merged."""

import sqlite3
from itertools import chain
from typing import NamedTuple

from .columns import Columns
from .database import insert
from .pieces import Span, spans_of
from .postings import GROUP, checked, every, merged, seal
from .sealing import note_times


class _Block(NamedTuple):
    """The postings of a block with their keys, and when its events happened."""

    number: int
    postings: list[tuple[int, bytes]]
    spans: list[Span]


class Gathered:
    """Blocks that were indexed, from the beginning of a group on, and are sealed in memory only."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._blocks: list[_Block] = []

    @property
    def events(self) -> int:
        """How many there are in them."""
        return len(self._blocks) * self._block

    def forget(self) -> None:
        """What was indexed in a transaction that did not commit is void."""
        self._blocks.clear()

    def keep(self, sealed: int, position: int) -> None:
        """Forget them unless they are what is indexed and not sealed: another process does this
        work, too.
        """
        if self._blocks:
            first = self._blocks[0].number * self._block
            if (first, first + self.events) != (sealed, position):
                self.forget()

    def takes(self, columns: Columns, sealed: int) -> bool:
        """Whether these events can be added: a whole block, the next one, or the first of a group
        if there is none yet.
        """
        first = columns.first
        whole = columns.end - first == self._block and first == sealed + self.events
        return whole and bool(self._blocks or first // self._block % GROUP == 0)

    def add(self, connection: sqlite3.Connection, columns: Columns) -> int:
        """Add a block. If its group is whole now, it is written: how many events that are."""
        number, places = columns.first // self._block, range(self._block)
        postings = [
            every(places, number, self._block),
            *seal(columns.terms, places, number, self._block),
        ]
        self._blocks.append(_Block(number, postings, spans_of(columns.times)))
        if (number + 1) % GROUP:
            return 0
        all_of_them = chain.from_iterable(one.postings for one in self._blocks)
        insert(connection, "merged", merged(all_of_them, number // GROUP))
        return self._finish(connection)

    def write(self, connection: sqlite3.Connection) -> int:
        """Write them block by block, since what is missing of their group won't come soon: how many
        events that are.
        """
        for one in self._blocks:
            insert(connection, "posting", checked(one.postings))
        return self._finish(connection)

    def _finish(self, connection: sqlite3.Connection) -> int:
        for one in self._blocks:
            note_times(connection, one.number, one.spans)
        events = self.events
        self._blocks.clear()
        return events
