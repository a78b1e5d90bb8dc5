"""Postings as they are read: those that were used last are kept decoded, for they never change."""

import sqlite3
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from .gathering import Gathered
from .plain import Events
from .postings import GROUP, among, decode, key, split, union, without
from .terms import Terms

# In bytes: what is asked again and again fits in, whatever the length of the log.
_ROOM = 32 << 20
_ENTRY = 100
_PLACE = 40


# Blocks that have their postings read together: those of a group that is merged, or a single one.
Stretch = range
# By their blocks.
_Parts = dict[int, Events]


class Shelf:
    """The postings of one open database. `block` is how many events have theirs together."""

    def __init__(self, connection: sqlite3.Connection, block: int) -> None:
        self.block = block
        self._connection = connection
        # By what they are of and where, those that were not used for longest first.
        self._kept: OrderedDict[tuple[object, Stretch], _Parts] = OrderedDict()
        self._size = 0

    def forget(self) -> None:
        """What was read in a transaction that did not commit is void."""
        self._kept.clear()
        self._size = 0

    def stretches(self, numbers: Collection[int]) -> Iterator[Stretch]:
        """Where these blocks have their postings."""
        (merged,) = self._connection.execute(
            "select sealed / block / ? from state", (GROUP,)
        ).fetchone()
        for group in {number // GROUP for number in numbers}:
            whole = range(group * GROUP, (group + 1) * GROUP)
            if group < merged:
                yield whole
            else:
                yield from (range(one, one + 1) for one in whole if one in numbers)

    def keeps(self, name: object, stretch: Stretch) -> bool:
        """Whether the postings there of what has this name need not be read."""
        return (name, stretch) in self._kept

    def among(self, term: int, candidates: Mapping[int, Events | None]) -> dict[int, Events]:
        """Those of the candidates that have a term, by their blocks; blocks without one are left
        out. None stands for all events of a block.
        """
        return self.among_any(term, (term,), candidates)

    def among_any(
        self, name: object, terms: Collection[int], candidates: Mapping[int, Events | None]
    ) -> dict[int, Events]:
        """Those of the candidates that have one of the terms, for all of which `name` stands."""
        return among(candidates, self._parts(name, terms, candidates))

    def without(self, term: int, candidates: dict[int, Events]) -> dict[int, Events]:
        """Those of the candidates that don't have a term."""
        return without(candidates, self._parts(term, (term,), candidates))

    def _parts(self, name: object, terms: Collection[int], numbers: Collection[int]) -> _Parts:
        """The postings of these blocks, and maybe of others."""
        found: _Parts = {}
        missing: list[Stretch] = []
        for stretch in self.stretches(numbers):
            if (parts := self._kept.get((name, stretch))) is None:
                missing.append(stretch)
            else:
                found.update(parts)
                self._kept.move_to_end((name, stretch))
        for stretch, parts in self._read(terms, missing):
            found.update(parts)
            self._kept[name, stretch] = parts
            self._size += self._room(parts)
        while self._size > _ROOM:
            self._size -= self._room(self._kept.popitem(last=False)[1])
        return found

    def _read(
        self, terms: Collection[int], stretches: Collection[Stretch]
    ) -> Iterator[tuple[Stretch, _Parts]]:
        """The events that have one of the terms."""
        single: dict[int, list[Events]] = {one[0]: [] for one in stretches if len(one) == 1}
        for term in terms if single else ():
            for number, posting in self._postings(single, term):
                single[number].append(posting)
        for stretch in stretches:
            if len(stretch) == 1:
                parts = {one: single[one] for one in stretch if single[one]}
            else:
                parts = self._merged(stretch[0] // GROUP, terms)
            yield (
                stretch,
                {
                    number: some[0] if len(some) == 1 else union(some, self.block)
                    for number, some in parts.items()
                },
            )

    def _postings(self, numbers: Collection[int], term: int) -> Iterator[tuple[int, Events]]:
        found = self._connection.execute(
            "select id, bits from block cross join posting on id = number << 32 | ?"
            " where number between ? and ?",
            (term, min(numbers), max(numbers)),
        )
        for where, blob in found:
            if where >> 32 in numbers:
                yield where >> 32, decode(blob, where, self.block)

    def _merged(self, group: int, terms: Collection[int]) -> dict[int, list[Events]]:
        parts: defaultdict[int, list[Events]] = defaultdict(list)
        for term in terms:
            where = key(group, term)
            found = self._connection.execute("select parts from merged where id = ?", (where,))
            for (blob,) in found:
                for number, posting in split(blob, where, self.block).items():
                    parts[number].append(posting)
        return parts

    def _room(self, parts: _Parts) -> int:
        return _ENTRY + sum(
            _ENTRY + len(one) * (_PLACE if isinstance(one, tuple) else 1) for one in parts.values()
        )


class Open(NamedTuple):
    """A database that is open, and what is kept of it in memory."""

    connection: sqlite3.Connection
    terms: Terms
    shelf: Shelf
    gathered: Gathered
