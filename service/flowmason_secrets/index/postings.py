"""Postings: which events of one block carry a term, as a string of bytes. Pure.

Those of a group of blocks are merged, term by term, once all of them are there: a disk that has to
be asked finds what a query needs in one place, not in one for each block.

Of the events of a block, it has the places or a bitmap; see `plain.Events`.
"""

import struct
import zlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from .database import Damaged
from .plain import Events, encode, few_of, places_of

try:
    from ._speedups import among as among
    from ._speedups import postings as postings_of
    from ._speedups import union as union
    from ._speedups import without as without
except ImportError:
    from .plain import among as among
    from .plain import postings as postings_of
    from .plain import union as union
    from .plain import without as without

# How many blocks are a group.
GROUP = 16
# Before each part of a merged posting: which block of its group, and how many bytes.
_PART = struct.Struct("<BH")
# What of a key is the term.
_TERM = 0xFFFFFFFF

# The term that every event carries. In a column it stands for a field without a value, which
# nobody can ask for.
EVERY = 0


def key(number: int, term: int) -> int:
    """Where the posting of a term is kept. Blocks come first: a new one only appends."""
    return number << 32 | term


def seal(
    columns: Iterable[Sequence[int]], places: Sequence[int], number: int, block: int
) -> Iterator[tuple[int, bytes]]:
    """The keys and the postings of a block's events, in the order of the keys.

    `columns` hold one term of each event, `places` where in the block each event is.
    """
    found: dict[int, bytes] = {}
    for column in columns:
        found.update(postings_of(column, places, block, few_of(block // 8)))
    found.pop(EVERY, None)
    for term in sorted(found):
        yield key(number, term), found[term]


def every(places: Sequence[int], number: int, block: int) -> tuple[int, bytes]:
    """The key and the posting of the term that every event carries."""
    return key(number, EVERY), encode(places, block, few_of(block // 8))


def checked(postings: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Postings as they are stored: each with a checksum."""
    for where, data in postings:
        yield where, data + _check(data, where)


def unchecked(stored: Iterable[tuple[int, object]]) -> Iterator[tuple[int, bytes]]:
    """What was stored so.

    Raises:
        Damaged: one is not what was stored for its key.
    """
    for where, blob in stored:
        yield where, _checked(blob, where)


def decode(blob: object, where: int, block: int) -> Events:
    """The events of a posting.

    Raises:
        Damaged: not what was stored for this key.
    """
    return _decode(_checked(blob, where), block)


def merged(postings: Iterable[tuple[int, bytes]], group: int) -> Iterator[tuple[int, bytes]]:
    """The keys and the merged postings of some terms, in the order of the keys, as they are stored.
    All that the blocks of the group have of these terms is given, with the keys.
    """
    parts: defaultdict[int, list[bytes]] = defaultdict(list)
    for where, data in postings:
        parts[where & _TERM] += (_PART.pack((where >> 32) % GROUP, len(data)), data)
    for term in sorted(parts):
        where, data = key(group, term), b"".join(parts[term])
        yield where, data + _check(data, ~where)


def split(blob: object, where: int, block: int) -> dict[int, Events]:
    """What was merged, by the number of the block; blocks without an event have none.

    Raises:
        Damaged: not what `merged` made for this key.
    """
    data = _checked(blob, ~where)
    found: dict[int, Events] = {}
    first, place = (where >> 32) * GROUP, 0
    while place < len(data):
        number, size = _PART.unpack_from(data, place)
        place += _PART.size + size
        found[first + number] = _decode(data[place - size : place], block)
    return found


def _decode(data: bytes, block: int) -> Events:
    return data or b"\xff" * (block // 8)


def count(events: Events, size: int) -> int:
    """How many there are. Here as below, `size` is that of a bitmap."""
    if len(events) != size:
        return len(events) // 2
    return int.from_bytes(events, "little").bit_count()


def between(events: Events, low: int, high: int, size: int) -> Events:
    """Those from one place up to and without another."""
    if len(events) != size:
        places = places_of(events)
        return events[2 * bisect_left(places, low) : 2 * bisect_left(places, high)]
    start, stop = low // 8, min((high + 7) // 8, size)
    bits = int.from_bytes(events[start:stop], "little") & (1 << high - 8 * start) - (
        1 << low - 8 * start
    )
    middle = bits.to_bytes(stop - start, "little")
    return bytes(start) + middle + bytes(size - stop) if bits else b""


def in_order(events: Events, ascending: bool, size: int, skip: int = 0) -> Iterator[int]:
    """The places one by one, the lowest first or the highest, but for the first ones."""
    if len(events) != size:
        places = places_of(events)
        yield from places[skip:] if ascending else places[::-1][skip:]
        return
    starts = range(size - len(events.lstrip(b"\0")), len(events.rstrip(b"\0")), 8)
    for start in starts if ascending else reversed(starts):
        word = int.from_bytes(events[start : start + 8], "little")
        if skip and skip >= (found := word.bit_count()):
            skip -= found
            continue
        while word:
            place = (word & -word if ascending else word).bit_length() - 1
            word ^= 1 << place
            if skip:
                skip -= 1
            else:
                yield 8 * start + place


def _checked(blob: object, where: int) -> bytes:
    # SQLite may hand out any type if the file is damaged.
    if not isinstance(blob, bytes):
        raise Damaged("a posting is not a string of bytes")
    data = blob[:-4]
    if _check(data, where) != blob[-4:]:
        raise Damaged("a posting does not match its checksum")
    return data


def _check(data: bytes, where: int) -> bytes:
    # The key seeds the sum, so that a posting can't pass for another one.
    return zlib.crc32(data, (where ^ where >> 32) & 0xFFFFFFFF).to_bytes(4, "little")
