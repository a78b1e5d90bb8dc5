"""Postings: which events of one block carry a term, as a checked string of bytes. Pure.

An int with bit `i` set stands for the event at place `i` of the block.
"""

import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from .database import Damaged

# Up to here a list of places is both smaller and about as quick to read as a bitmap.
_SPARSE = 64

# The term that every event carries.
EVERY = 0

Codes = tuple[int, int, int, int, int, int, int]


def key(number: int, term: int) -> int:
    """Where the posting of a term is kept. Blocks come first: a new one only appends."""
    return number << 32 | term


def seal(columns: Iterable[Sequence[int]], places: Sequence[int], number: int, block: int) -> Sealed:
    """The keys and postings of a block's events, in the order of the keys.

    `columns` hold one term for each event, `places` where in the block the event is.
    """
    found: dict[int, bytes] = {EVERY: _few(places, block)}
    for column in columns:
        found.update(_column(column, places, block))
    for term in sorted(found):
        where = key(number, term)
        yield where, found[term] + _check(found[term], where)


def _column(column: Sequence[int], places: Sequence[int], block: int) -> Iterator[tuple[int, bytes]]:
    terms = list(set(column) - {0})
    # Fields without a value are coded 0, and nobody can ask for them.
    if len(terms) <= _DISTINCT and len(places) == block:
        yield from _bitmaps(column, terms, block)
        return
    found: defaultdict[int, list[int]] = defaultdict(list)
    for place, term in zip(places, column, strict=True):
        found[term].append(place)
    for term in terms:
        yield term, _few(found[term], block)


def _bitmaps(column: Sequence[int], terms: list[int], block: int) -> Iterator[tuple[int, bytes]]:
    """For a whole block of few terms: one pass over its bytes for each, not one step for each event."""
    index = {term: i for i, term in enumerate(terms, 1)} | {0: 0}
    digits = bytes(map(index.__getitem__, reversed(column)))
    for term in terms:
        count = digits.count(index[term])
        if count <= _SPARSE:
            last = block - 1
            yield term, _few([last - i for i, d in enumerate(digits) if d == index[term]][::-1], block)
            continue
        table = bytearray(b"0" * 256)
        table[index[term]] = 49
        bits = int(digits.translate(table), 2)
        yield term, b"" if count == block else bits.to_bytes(block // 8, "little")


def _few(places: Sequence[int], block: int) -> bytes:
    """Nothing for a full block, two bytes for each of a few places, or a bitmap."""
    count = len(places)
    if count == block:
        return b""
    if count <= _SPARSE and 2 * count < block // 8:
        return struct.pack(f"<{count}H", *places)
    digits = bytearray(b"0" * block)
    for place in places:
        digits[place] = 49
    digits.reverse()
    return int(bytes(digits), 2).to_bytes(block // 8, "little")


def decode(blob: object, where: int, block: int) -> int:
    """Raises:
    Damaged: not what `encode` made for this key.
    """
    # SQLite may hand out any type if the file is damaged.
    if not isinstance(blob, bytes):
        raise Damaged("a posting is not a string of bytes")
    data = blob[:-4]
    if _check(data, where) != blob[-4:]:
        raise Damaged("a posting does not match its checksum")
    if not data:
        return (1 << block) - 1
    if len(data) == block // 8:
        return int.from_bytes(data, "little")
    bitmap = bytearray(block // 8)
    for place in struct.unpack(f"<{len(data) // 2}H", data):
        bitmap[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(bitmap, "little")


def _check(data: bytes, where: int) -> bytes:
    # The key seeds the sum, so that a posting can't pass for another one.
    return zlib.crc32(data, (where ^ where >> 32) & 0xFFFFFFFF).to_bytes(4, "little")
