"""Postings as they are read: those that were used last are kept decoded, for they never change."""

import sqlite3
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import NamedTuple

from .postings import decode, union
from .terms import Terms

# In bytes: what is asked again and again fits in, whatever the length of the log.
_ROOM = 32 << 20
_ENTRY = 100


class Shelf:
    """The postings of one open database. `block` is how many events have theirs together."""

    def __init__(self, connection: sqlite3.Connection, block: int) -> None:
        self.block = block
        self._connection = connection
        # By what it is of and the block's number, the one that was not used for longest first.
        self._kept: OrderedDict[tuple[object, int], int] = OrderedDict()
        self._size = 0

    def forget(self) -> None:
        """What was read in a transaction that did not commit is void."""
        self._kept.clear()
        self._size = 0

    def having(self, term: int, numbers: Collection[int]) -> dict[int, int]:
        """The events that have a term, as bits: of each of these blocks."""
        found, missing = self._at_hand(term, numbers)
        found |= dict.fromkeys(missing, 0)
        for where, blob in self._read(term, missing):
            found[where >> 32] = decode(blob, where, self.block)
        self._keep(term, missing, found)
        return found

    def having_any(
        self, name: object, terms: Collection[int], numbers: Collection[int]
    ) -> dict[int, int]:
        """The events that have one of the terms. `name` stands for all of them that there are."""
        found, missing = self._at_hand(name, numbers)
        rows: dict[int, list[tuple[int, object]]] = {number: [] for number in missing}
        for term in terms if missing else ():
            for where, blob in self._read(term, missing):
                rows[where >> 32].append((where, blob))
        for number, postings in rows.items():
            found[number] = union(postings, self.block)
        self._keep(name, missing, found)
        return found

    def _at_hand(self, name: object, numbers: Collection[int]) -> tuple[dict[int, int], set[int]]:
        found: dict[int, int] = {}
        for number in numbers:
            bits = self._kept.get((name, number))
            if bits is not None:
                found[number] = bits
                self._kept.move_to_end((name, number))
        return found, set(numbers) - found.keys()

    def _read(self, term: int, numbers: Collection[int]) -> Iterator[tuple[int, object]]:
        """The postings of a term with their keys."""
        if numbers:
            rows = self._connection.execute(
                "select id, bits from block cross join posting on id = number << 32 | ?"
                " where number between ? and ?",
                (term, min(numbers), max(numbers)),
            )
            for where, blob in rows:
                if where >> 32 in numbers:
                    yield where, blob

    def _keep(self, name: object, numbers: Collection[int], found: dict[int, int]) -> None:
        for number in numbers:
            self._kept[name, number] = found[number]
            self._size += _ENTRY + found[number].bit_length() // 8
        while self._size > _ROOM:
            _, bits = self._kept.popitem(last=False)
            self._size -= _ENTRY + bits.bit_length() // 8


class Open(NamedTuple):
    """A database that is open, and what is kept of it in memory."""

    connection: sqlite3.Connection
    terms: Terms
    shelf: Shelf
