"""Postings as they are read: those that were used last are kept decoded, for they never change."""

import sqlite3
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from .gathering import Gathered
from .plain import Events
from .postings import GROUP, among, decode, key, split, union, without
from .recent import Recent
from .terms import Terms

# In bytes: what is asked again and again fits in, whatever the length of the log.
_ROOM = 32 << 20
_ENTRY = 100


# Blocks that have their postings read together: those of a group that is merged, or a single one.
Stretch = range
# By their blocks.
_Parts = dict[int, Events]


class Shelf:
    """The postings of one open database. `block` is how many events have theirs together, and
    `size` that of their bitmap.
    """

    def __init__(self, connection: sqlite3.Connection, block: int) -> None:
        self.block, self.size = block, block // 8
        self._connection = connection
        # By what they are of and where, those that were not used for longest first.
        self._kept: OrderedDict[tuple[object, Stretch], _Parts] = OrderedDict()
        self._size = 0

    def forget(self) -> None:
        """What was read in a transaction that did not commit is void."""
        self._kept.clear()
        self._size = 0

    def among(
        self, term: int, stretch: Stretch, candidates: Mapping[int, Events | None]
    ) -> dict[int, Events]:
        """Those of the candidates that have a term, by their blocks, all of which are in the
        stretch; blocks without one are left out. None stands for all events of a block.
        """
        return self.among_any(term, (term,), stretch, candidates)

    def among_any(
        self,
        name: object,
        terms: Collection[int],
        stretch: Stretch,
        candidates: Mapping[int, Events | None],
    ) -> dict[int, Events]:
        """Those of the candidates that have one of the terms, for all of which `name` stands."""
        return among(candidates, self._parts(name, terms, stretch), self.size)

    def without(
        self, term: int, stretch: Stretch, candidates: dict[int, Events]
    ) -> dict[int, Events]:
        """Those of the candidates that don't have a term."""
        return without(candidates, self._parts(term, (term,), stretch), self.size)

    def keeps(self, name: object, stretch: Stretch) -> bool:
        """Whether the postings there of what has this name need not be read."""
        return (name, stretch) in self._kept

    def _parts(self, name: object, terms: Collection[int], stretch: Stretch) -> _Parts:
        place = name, stretch
        if (parts := self._kept.get(place)) is not None:
            self._kept.move_to_end(place)
            return parts
        read = self._single if len(stretch) == 1 else self._merged
        parts = self._kept[place] = {
            number: some[0] if len(some) == 1 else union(some, self.size)
            for number, some in read(stretch[0], terms).items()
        }
        self._size += self._room(parts)
        while self._size > _ROOM:
            self._size -= self._room(self._kept.popitem(last=False)[1])
        return parts

    def _single(self, number: int, terms: Collection[int]) -> dict[int, list[Events]]:
        found: dict[int, list[Events]] = {}
        for where in (key(number, term) for term in terms):
            stored = self._connection.execute("select bits from posting where id = ?", (where,))
            for (blob,) in stored:
                found.setdefault(number, []).append(decode(blob, where, self.block))
        return found

    def _merged(self, first: int, terms: Collection[int]) -> dict[int, list[Events]]:
        found: dict[int, list[Events]] = {}
        for where in (key(first // GROUP, term) for term in terms):
            stored = self._connection.execute("select parts from merged where id = ?", (where,))
            for (blob,) in stored:
                for number, posting in split(blob, where, self.block).items():
                    found.setdefault(number, []).append(posting)
        return found

    def _room(self, parts: _Parts) -> int:
        return _ENTRY + sum(_ENTRY + len(one) for one in parts.values())


class Open(NamedTuple):
    """A database that is open, and what is kept of it in memory."""

    connection: sqlite3.Connection
    terms: Terms
    shelf: Shelf
    recent: Recent
    gathered: Gathered
