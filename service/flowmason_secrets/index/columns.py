"""Events by the column, as they are indexed: nothing else of their lines is decoded."""

from collections.abc import Iterator
from itertools import repeat
from operator import add

import orjson

from ..core.errors import LogDamaged
from ..core.events import KEY_ROTATE, Line, is_change
from ..core.ports import Chunk
from . import plain
from .listing import Changed
from .terms import ACTION, FIELDS, OUTCOME, TYPE, Terms

try:
    from ._speedups import read_columns
except ImportError:
    from .plain import read_columns


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
        if not self.times:
            self.first = chunk.first
        elif chunk.first != self.end:
            raise LogDamaged(f"Event {self.end} is missing from the log.")
        place, data, known = 0, chunk.data, terms.known()
        while place < len(data):
            place, columns = read_columns(data, place, self.end, known)
            self._add(chunk, 0, columns)
            if place < len(data):
                end = data.index(b"\n", place) + 1
                _, columns = plain.read_columns(data[place:end], 0, self.end, known)
                self._add(chunk, place, columns)
                place = end
        self.last = plain.decode(data[data.rfind(b"\n", 0, -1) + 1 :]).id
        for place in self._may_change(max(chunk.first, self._filled), terms):
            start = self.offsets[place] - chunk.offset
            line = orjson.loads(data[start : data.index(b"\n", start)])
            self.changed.update(_changes(line))

    def _add(self, chunk: Chunk, place: int, columns: list[list[int]]) -> None:
        places, times, *terms = columns
        self.segments += [chunk.segment] * len(places)
        self.offsets += map(add, places, repeat(chunk.offset + place))
        self.times += times
        for column, more in zip(self.terms, terms, strict=True):
            column += more

    def _may_change(self, start: int, terms: Terms) -> Iterator[int]:
        """The events from this seq on that may change a secret, by their places. Most events are
        reads, and need not be decoded as a whole.
        """
        secret, read = terms.of(TYPE).get("secret"), terms.of(ACTION).get("secret.read")
        rotate, success = terms.of(ACTION).get(KEY_ROTATE), terms.of(OUTCOME).get("success")
        for place in range(start - self.first, len(self.times)):
            action = self.terms[ACTION][place]
            if self.terms[TYPE][place] == secret:
                changing = action != read and self.terms[OUTCOME][place] == success
            else:
                changing = action == rotate
            if changing:
                yield place


def _changes(line: Line) -> list[Changed]:
    org_id = line["org_id"] or ""
    if line["action"] == KEY_ROTATE:
        secrets = line["details"].get("secrets")
        return [(org_id, secret, None) for secret in secrets] if isinstance(secrets, list) else []
    if not is_change(line["action"], line["outcome"]):
        return []
    return [(org_id, line["resource_id"], line["name"])]
