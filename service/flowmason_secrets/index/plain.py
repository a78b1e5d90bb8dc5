"""What `_speedups` does, in Python: for unusual lines, and where that was not compiled."""

import struct
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from itertools import accumulate, repeat
from operator import add, floordiv, sub
from typing import Annotated

import msgspec

from ..core.errors import LogDamaged
from ..core.events import BETWEEN_LINES
from .terms import NAME, OUTCOME, Mappings

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# Events of a block: two bytes for each of a few places, in their order, or a bitmap; which of them,
# its size tells.
Events = bytes
_FEW = 512


# What lines are to have, in JSON, where it is not None: organisation, type, action, outcome, any
# other outcome than this, name, and actor.
Wanted = tuple[
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
]


# Events by the column: their times in microseconds, and the terms of their fields.
Columns = tuple["array[int]", ...]


class Indexed(msgspec.Struct, gc=False):
    """The fields of an event that are indexed."""

    id: str
    seq: int
    time: Annotated[datetime, msgspec.Meta(tz=True)]
    action: str
    outcome: str
    org_id: str | None
    resource_type: str
    name: str | None
    actor: str | None


_decoder = msgspec.json.Decoder(Indexed)
decode = _decoder.decode


def read_columns(
    data: bytes, place: int, seq: int, known: Mappings, /
) -> tuple[int, list[list[int]]]:
    """As `_speedups.read_columns`, but lines of any kind, to the end of the data.

    Raises:
        LogDamaged: one of them is not the event that it should be.
    """
    data = data[place:]
    lines = data.split(b"\n")[:-1]
    events = _decode(data, lines, seq)
    starts = map(add, accumulate(map(len, lines[:-1]), initial=place), range(len(lines)))
    since = map(sub, [event.time for event in events], repeat(_EPOCH))
    orgs, types, actions, outcomes, names, actors = known
    return place + len(data), [
        list(starts),
        list(map(floordiv, since, repeat(_MICROSECOND))),
        [orgs[event.org_id] for event in events],
        [types[event.resource_type] for event in events],
        [actions[event.action] for event in events],
        [outcomes[event.outcome] for event in events],
        [names[event.org_id][event.name] for event in events],
        [actors[event.actor] for event in events],
    ]


def _decode(data: bytes, lines: list[bytes], first: int) -> list[Indexed]:
    try:
        events: list[Indexed] = _decoder.decode_lines(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        events = []
    if not len(events) == len(lines) == data.count(BETWEEN_LINES) + 1:
        events = _one_by_one(first, lines)
    seqs = [event.seq for event in events]
    expected = range(first, first + len(lines))
    if seqs != list(expected):
        seq, said = next(pair for pair in zip(expected, seqs, strict=True) if pair[0] != pair[1])
        raise LogDamaged(f"Line {seq} of the log says that it is event {said}.")
    return events


def _one_by_one(seq: int, lines: list[bytes]) -> list[Indexed]:
    events: list[Indexed] = []
    for line in lines:
        try:
            events.append(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            problem = f"What follows event {seq + len(events) - 1} of the log is not an event."
            raise LogDamaged(problem) from None
    return events


def postings(
    column: Sequence[int], places: Sequence[int], block: int, few: int, /
) -> dict[int, bytes]:
    """As `_speedups.postings`."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for place, term in zip(places, column, strict=True):
        found[term].append(place)
    return {term: encode(of, block, few) for term, of in found.items()}


def encode(places: Sequence[int], block: int, few: int) -> bytes:
    """Nothing for a full block, two bytes for each of a few places, or a bitmap."""
    count = len(places)
    if count == block:
        return b""
    if count <= few:
        return struct.pack(f"<{count}H", *places)
    bitmap = bytearray(block // 8)
    for place in places:
        bitmap[place >> 3] |= 1 << (place & 7)
    return bytes(bitmap)


def among(
    blocks: Mapping[int, Events | None], postings: dict[int, Events], size: int, /
) -> dict[int, Events]:
    """Those of the events that a posting has, too, by their blocks; None stands for all of a block.
    Blocks without any are left out. `size` is that of a bitmap.
    """
    both = {
        number: postings[number]
        if events is None
        else of_bits(as_bits(events, size) & as_bits(postings[number], size), size)
        for number, events in blocks.items()
        if number in postings
    }
    return {number: events for number, events in both.items() if events}


def without(
    blocks: dict[int, Events], postings: dict[int, Events], size: int, /
) -> dict[int, Events]:
    """Those of the events that no posting has, by their blocks."""
    left = {
        number: of_bits(as_bits(events, size) & ~as_bits(postings[number], size), size)
        if number in postings
        else events
        for number, events in blocks.items()
    }
    return {number: events for number, events in left.items() if events}


def matching(
    columns: Columns,
    terms: Sequence[int],
    names: AbstractSet[int] | None,
    times: tuple[int, int],
    low: int,
    high: int,
    /,
) -> list[int]:
    """Those from one place up to and without another that have these terms, but not the last one,
    which is an outcome (-1 asks for nothing), one of the names, and a time from the first of two up
    to and without the second.
    """
    (happened, *fields), (since, until), (*wanted, but) = columns, times, terms
    asked = [(column, term) for column, term in zip(fields, wanted, strict=True) if term >= 0]
    outcomes, named = fields[OUTCOME], fields[NAME]
    return [
        place
        for place in range(low, high)
        if since <= happened[place] < until
        and all(column[place] == term for column, term in asked)
        and outcomes[place] != but
        and (names is None or named[place] in names)
    ]


def union(postings: list[Events], size: int, /) -> Events:
    """The events that any of the postings has. `size` is that of a bitmap."""
    bits = 0
    for posting in postings:
        bits |= as_bits(posting, size)
    return of_bits(bits, size)


def as_bits(events: Events, size: int) -> int:
    """A bit for each place."""
    if len(events) == size:
        return int.from_bytes(events, "little")
    bitmap = bytearray(size)
    for place in places_of(events):
        bitmap[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(bitmap, "little")


def of_bits(bits: int, size: int) -> Events:
    """The same back."""
    bitmap = bits.to_bytes(size, "little")
    if bits.bit_count() > few_of(size):
        return bitmap
    places = []
    for start in range(0, size, 8):
        word = int.from_bytes(bitmap[start : start + 8], "little")
        while word:
            places.append(8 * start + (word & -word).bit_length() - 1)
            word &= word - 1
    return struct.pack(f"<{len(places)}H", *places)


def places_of(events: Events) -> tuple[int, ...]:
    """Of a few events, that are no bitmap, their places."""
    return struct.unpack(f"<{len(events) // 2}H", events)


def few_of(size: int) -> int:
    """Of how many events there are places, if a bitmap has this size: up to here, they are both
    smaller and about as quick to read.
    """
    return min(_FEW, (size - 1) // 2)


def unlike(
    lines: Sequence[bytes], seqs: Sequence[int], wanted: Wanted, /
) -> tuple[list[int], set[bytes]]:
    """As `_speedups.unlike`, which may leave any line to its caller: all of them here."""
    return list(range(len(lines))), set()
