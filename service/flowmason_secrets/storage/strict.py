"""Lines of the log held strictly against their format, to verify them. FORMAT.md §5.1"""

from operator import attrgetter
from typing import Literal

import msgspec

from ..core.events import BETWEEN_LINES, MAX_LINE, Detail
from ..core.merkle import leaf_hashes

# How a time looks, with 0 for each digit.
_TIME = b"0000-00-00T00:00:00.000000Z"
_DIGITS = bytes.maketrans(b"123456789", b"000000000")

# About how many bytes of lines are looked at together: if one of them is unusual, it was in vain.
_TOGETHER = 1 << 15

# How actions begin that concern the log itself: they are looked at one by one.
_OF_THE_LOG = "log."


class StrictLine(msgspec.Struct, gc=False):
    """A line as the format has it. # format §5.1"""

    v: Literal[1]
    id: str
    seq: int
    time: str
    action: str
    outcome: Literal["success", "denied", "not_found", "expired", "failed"]
    org_id: str | None
    resource_type: str
    resource_id: str | None
    name: str | None
    version: int | None
    actor: str | None
    actor_type: str
    client_ip: str | None
    user_agent: str | None
    request_id: str | None
    status: int | None
    details: dict[str, Detail]


_decoder = msgspec.json.Decoder(StrictLine)
_seq, _time, _action = attrgetter("seq"), attrgetter("time"), attrgetter("action")


def decode(line: bytes) -> StrictLine:
    """Raises:
    ValueError: not such a line, and why.
    """
    # msgspec.DecodeError and UnicodeDecodeError are both ValueErrors.
    return _decoder.decode(line)


def are_times(*texts: str) -> bool:
    """Whether each looks like a time."""
    return "".join(texts).encode().translate(_DIGITS) == _TIME * len(texts)


def take_lines(data: bytes, place: int, seq: int, time: bytes, /) -> tuple[int, bytes, bytes]:
    """As `_speedups.take_lines`, for where that was not compiled: some lines, or none of them."""
    stop = data.rfind(b"\n", place, place + _TOGETHER) + 1
    piece = data[place:stop]
    lines = piece.split(b"\n")[:-1]
    try:
        found: list[StrictLine] = _decoder.decode_lines(piece)
    except ValueError:
        return place, b"", time
    times = [time.decode(), *map(_time, found)]
    if (
        not lines
        or not len(found) == len(lines) == piece.count(BETWEEN_LINES) + 1
        or list(map(_seq, found)) != list(range(seq, seq + len(found)))
        or times != sorted(times)
        or not are_times(*times)
        or max(map(len, lines)) >= MAX_LINE
        or any(action.startswith(_OF_THE_LOG) for action in map(_action, found))
    ):
        return place, b"", time
    return stop, b"".join(leaf_hashes(lines)), times[-1].encode()
