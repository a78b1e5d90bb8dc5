"""Postings as they are read: those that were used last are kept decoded, for they never change."""

import sqlite3
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from .gathering import Gathered
from .postings import GROUP, Events, Posting, as_bits, common, decode, key, split, union
from .terms import Terms

# In bytes: what is asked again and again fits in, whatever the length of the log.
_ROOM = 32 << 20
_ENTRY = 100
_PLACE = 40


class _Unread(NamedTuple):
    """What has to be read: the groups whose postings are merged, and single blocks."""

    groups: list[int]
    blocks: set[int]

    @property
    def numbers(self) -> Iterator[int]:
        """All blocks that are read then: those of the groups, too, that nobody asked for."""
        for group in self.groups:
            yield from range(group * GROUP, (group + 1) * GROUP)
        yield from self.blocks


class Shelf:
    """The postings of one open database. `block` is how many events have theirs together."""

    def __init__(self, connection: sqlite3.Connection, block: int) -> None:
        self.block = block
        self._connection = connection
        # By what it is of and the block's number, the one that was not used for longest first.
        self._kept: OrderedDict[tuple[object, int], Posting] = OrderedDict()
        self._size = 0

    def forget(self) -> None:
        """What was read in a transaction that did not commit is void."""
        self._kept.clear()
        self._size = 0

    def among(self, term: int, candidates: Mapping[int, Events]) -> dict[int, Events]:
        """Those of the candidates that have a term, by their blocks; blocks without one are left
        out.
        """
        found, missing = self._at_hand(term, candidates)
        unread = self._to_read(missing)
        found.update(self._read(term, unread))
        for number in unread.numbers:
            self._keep((term, number), found.get(number, ()))
        result: dict[int, Events] = {}
        for number, events in candidates.items():
            posting = found.get(number, ())
            if isinstance(posting, bytes) and isinstance(events, int):
                posting = as_bits(posting, self.block)
                self._keep((term, number), posting)
            if both := common(events, posting, self.block):
                result[number] = both
        self._trim()
        return result

    def having_any(
        self, name: object, terms: Collection[int], numbers: Collection[int]
    ) -> dict[int, int]:
        """The events that have one of the terms, as bits: of each of these blocks. `name` stands
        for all terms that there are.
        """
        known, missing = self._at_hand(name, numbers)
        found = {number: as_bits(posting, self.block) for number, posting in known.items()}
        unread = self._to_read(missing)
        read: dict[int, list[Posting]] = {number: [] for number in unread.numbers}
        for term in terms if read else ():
            for number, posting in self._read(term, unread):
                read[number].append(posting)
        for number, postings in read.items():
            found[number] = union(postings, self.block)
            self._keep((name, number), found[number])
        self._trim()
        return found

    def _at_hand(
        self, name: object, numbers: Collection[int]
    ) -> tuple[dict[int, Posting], set[int]]:
        found: dict[int, Posting] = {}
        for number in numbers:
            posting = self._kept.get((name, number))
            if posting is not None:
                found[number] = posting
                self._kept.move_to_end((name, number))
        return found, set(numbers) - found.keys()

    def _to_read(self, numbers: Collection[int]) -> "_Unread":
        (merged,) = self._connection.execute(
            "select sealed / block / ? from state", (GROUP,)
        ).fetchone()
        groups = {number // GROUP for number in numbers if number // GROUP < merged}
        return _Unread(sorted(groups), {one for one in numbers if one // GROUP >= merged})

    def _read(self, term: int, unread: "_Unread") -> Iterator[tuple[int, Posting]]:
        """The postings of a term, by their blocks."""
        for group in unread.groups:
            where = key(group, term)
            row = self._connection.execute(
                "select parts from merged where id = ?", (where,)
            ).fetchone()
            if row is not None:
                yield from split(row[0], where, self.block).items()
        if unread.blocks:
            rows = self._connection.execute(
                "select id, bits from block cross join posting on id = number << 32 | ?"
                " where number between ? and ?",
                (term, min(unread.blocks), max(unread.blocks)),
            )
            for where, blob in rows:
                if where >> 32 in unread.blocks:
                    yield where >> 32, decode(blob, where, self.block)

    def _keep(self, key: tuple[object, int], posting: Posting) -> None:
        self._size += _room(posting) - _room(self._kept.pop(key, None))
        self._kept[key] = posting

    def _trim(self) -> None:
        while self._size > _ROOM:
            _, posting = self._kept.popitem(last=False)
            self._size -= _room(posting)


def _room(posting: Posting | None) -> int:
    if posting is None:
        return 0
    if isinstance(posting, int):
        return _ENTRY + posting.bit_length() // 8
    return _ENTRY + len(posting) * (1 if isinstance(posting, bytes) else _PLACE)


class Open(NamedTuple):
    """A database that is open, and what is kept of it in memory."""

    connection: sqlite3.Connection
    terms: Terms
    shelf: Shelf
    gathered: Gathered
