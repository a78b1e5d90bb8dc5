"""Events by the column, as they are indexed: nothing else of their lines is decoded."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import accumulate, repeat
from operator import add, floordiv, sub

import msgspec
import orjson

from ..core.errors import LogDamaged
from ..core.events import BETWEEN_LINES, KEY_ROTATE, Line, is_change
from ..core.ports import Chunk
from .listing import Changed
from .terms import FIELDS, Indexed, Terms

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_decoder = msgspec.json.Decoder(Indexed)


class Columns:
    """Events that follow one another, from seq `first` on; `last` is the id of the last one.

    `times` are in microseconds, `terms` has a column for each field. `changed` are the secrets that
    they changed, but for those events before seq `filled`.
    """

    def __init__(self, filled: int) -> None:
        self._filled = filled
        self.first = 0
        self.last: str | None = None
        self.segments: list[int] = []
        self.offsets: list[int] = []
        self.times: list[int] = []
        self.terms: list[list[int]] = [[] for _ in FIELDS]
        self.changed: set[Changed] = set()

    @property
    def end(self) -> int:
        """The seq that follows."""
        return self.first + len(self.times)

    def rows(self) -> Iterator[tuple[int, ...]]:
        """The events as their table has them."""
        seqs = range(self.first, self.end)
        return zip(seqs, self.segments, self.offsets, self.times, *self.terms, strict=True)

    def read(self, chunk: Chunk, terms: Terms) -> None:
        """Add the lines of a chunk.

        Raises:
            LogDamaged: one of them is not the event that it should be.
        """
        lines = chunk.data.split(b"\n")[:-1]
        events = _decode(chunk, lines)
        if not self.times:
            self.first = chunk.first
        elif chunk.first != self.end:
            raise LogDamaged(f"Event {self.end} is missing from the log.")
        self.last = events[-1].id
        since = map(sub, [event.time for event in events], repeat(_EPOCH))
        self.times += map(floordiv, since, repeat(_MICROSECOND))
        self.segments += [chunk.segment] * len(lines)
        lengths = accumulate(map(len, lines[:-1]), initial=chunk.offset)
        self.offsets += map(add, lengths, range(len(lines)))
        for column, more in zip(self.terms, terms.columns(events), strict=True):
            column += more
        for place in range(max(0, self._filled - chunk.first), len(lines)):
            if _may_change(events[place]):
                self.changed.update(_changes(orjson.loads(lines[place])))


def _decode(chunk: Chunk, lines: list[bytes]) -> list[Indexed]:
    try:
        events: list[Indexed] = _decoder.decode_lines(chunk.data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        events = []
    if not len(events) == len(lines) == chunk.data.count(BETWEEN_LINES) + 1:
        events = _one_by_one(chunk.first, lines)
    seqs = [event.seq for event in events]
    expected = range(chunk.first, chunk.first + len(lines))
    if seqs != list(expected):
        seq, said = next(pair for pair in zip(expected, seqs, strict=True) if pair[0] != pair[1])
        raise LogDamaged(f"Line {seq} of the log says that it is event {said}.")
    return events


def _may_change(event: Indexed) -> bool:
    # Most events are reads, and need not be decoded as a whole.
    if event.resource_type == "secret":
        return event.action != "secret.read" and event.outcome == "success"
    return event.action == KEY_ROTATE


def _changes(line: Line) -> list[Changed]:
    org_id = line["org_id"] or ""
    if line["action"] == KEY_ROTATE:
        secrets = line["details"].get("secrets")
        return [(org_id, secret, None) for secret in secrets] if isinstance(secrets, list) else []
    if not is_change(line["action"], line["outcome"]):
        return []
    return [(org_id, line["resource_id"], line["name"])]


def _one_by_one(seq: int, lines: list[bytes]) -> list[Indexed]:
    events: list[Indexed] = []
    for line in lines:
        try:
            events.append(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            problem = f"What follows event {seq + len(events) - 1} of the log is not an event."
            raise LogDamaged(problem) from None
    return events
