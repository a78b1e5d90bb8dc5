"""When the events of a block happened, piece by piece: of a block that is partly within the times
that a query asks for, most needs no look at its rows.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# How many events are a piece.
PIECE = 1024

_SPAN = struct.Struct("<qq")


class Span(NamedTuple):
    """The first and the last time of some events, in microseconds since the epoch."""

    first: int
    last: int


# Of no events: no time is within.
_NEVER = Span(2**63 - 1, -(2**63))


def whole(spans: Sequence[Span]) -> Span:
    """The span of all of them."""
    return Span(min(one.first for one in spans), max(one.last for one in spans))


def spans_of(times: Sequence[int]) -> list[Span]:
    """The spans of a whole block's pieces, from the time of each event."""
    pieces = (times[low : low + PIECE] for low in range(0, len(times), PIECE))
    return [Span(min(piece), max(piece)) for piece in pieces]


def placed(found: Iterable[tuple[int, int, int]], block: int) -> list[Span]:
    """The same from the number of each piece with events and its times."""
    spans = [_NEVER] * -(-block // PIECE)
    for number, first, last in found:
        spans[number] = Span(first, last)
    return spans


def pack(spans: Sequence[Span]) -> bytes:
    """Spans as they are stored."""
    return b"".join(_SPAN.pack(*span) for span in spans)


def unpack(data: bytes) -> list[Span]:
    """What was stored so."""
    return [Span(*span) for span in _SPAN.iter_unpack(data)]
