"""Indexing events: from the lines of the log to rows and postings."""

import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import orjson

from ..core.errors import LogDamaged
from ..core.events import Entry
from ..core.ports import Chunk, Tail
from .columns import Columns
from .database import Damaged, insert, writing
from .listing import note
from .sealing import seal_step
from .shelf import Open

# How many whole blocks may wait for their postings while there are events to index: sealing takes
# longer than a query that finds a few new events should.
_WAITING = 2


class State(NamedTuple):
    """How far the index is: `position` events, of which the first `sealed` have postings. To seal
    the next block, `steps` were taken.

    What changed before `filled` was in the metadata when the listing was filled. `segment`,
    `offset` and `event` are the place and the id of the last event.
    """

    position: int
    sealed: int
    steps: int
    filled: int
    block: int
    segment: int
    offset: int
    event: str


def state(connection: sqlite3.Connection) -> State:
    """Raises:
    Damaged: there is none, or one that can't be.
    """
    row = connection.execute(
        'select position, sealed, steps, filled, block, segment, "offset", event from state'
    ).fetchone()
    if row is None:
        raise Damaged("its state is missing")
    found = State(*row)
    # SQLite may hand out any type if the file is damaged.
    if any(type(value) is not int for value in found[:-1]):
        raise Damaged("its state is not made of numbers")
    if not 0 <= found.sealed <= found.position or found.sealed % found.block:
        raise Damaged("its state contradicts itself")
    return found


def verify(connection: sqlite3.Connection, tail: Tail) -> None:
    """Raises:
    Damaged: the last event that was indexed is not where the log has it.
    """
    known = state(connection)
    if known.position and known.position <= tail.minimum().minimum:
        raise Damaged("the events that follow were archived")
    if known.position:
        (raw,) = fetch(tail, [(known.segment, known.offset)])
        last = Entry(raw, orjson.loads)
        check(last, known.position - 1)
        if last.line["id"] != known.event:
            raise Damaged("it belongs to another log")


def fetch(tail: Tail, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """The lines at these places, each a segment and an offset.

    Raises:
        Damaged: the log has none there; its segment may have been archived.
    """
    try:
        if any(segment < 0 or offset < 0 for segment, offset in places):
            raise ValueError("a negative place")
        return tail.lines_at(places)
    # OverflowError: a place that no file can have.
    except (FileNotFoundError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise Damaged(f"events are not where they should be: {type(error).__name__}") from error


def check(entry: Entry, seq: int) -> None:
    """Raises:
    Damaged: it is not the event with this seq.
    """
    try:
        if entry.line["seq"] == seq:
            return
    except (LookupError, TypeError, ValueError) as error:
        raise Damaged(f"event {seq} is not where it should be: {type(error).__name__}") from error
    raise Damaged(f"event {seq} is not where it should be")


def extend(opened: Open, tail: Tail, stop: int, most: int) -> bool:
    """Take one step in one transaction; whether there was one to take.

    A step indexes at most `most` events below `stop`, or is one of those that seal a block. What
    another process did meanwhile is not done again.

    Raises:
        LogDamaged: the log does not hold the events it should.
        Damaged: events that were not indexed yet have been archived.
    """
    connection, gathered = opened.connection, opened.gathered
    opened.terms.trim()
    try:
        with writing(connection, tail):
            known = state(connection)
            gathered.keep(known.sealed, known.position)
            waiting = known.position - known.sealed - gathered.events
            bound = known.block * (_WAITING if most < known.block else 1)
            if gathered.events and known.block > min(most, stop - known.position):
                _advance(connection, gathered.write(connection))
            elif waiting >= (known.block if known.position >= stop else bound):
                _seal(connection, known)
            elif known.position < stop:
                _extend(opened, tail, known, (stop, most))
            else:
                return False
            return True
    except BaseException:
        opened.terms.forget()
        gathered.forget()
        raise


def _seal(connection: sqlite3.Connection, known: State) -> None:
    # Queries see the postings of the block once all steps were taken.
    if seal_step(connection, known.sealed, known.block, known.steps):
        _advance(connection, known.block)
    else:
        connection.execute("update state set steps = steps + 1")


def _advance(connection: sqlite3.Connection, events: int) -> None:
    connection.execute("update state set steps = 0, sealed = sealed + ?", (events,))


def _extend(opened: Open, tail: Tail, known: State, bounds: tuple[int, int]) -> None:
    connection, gathered = opened.connection, opened.gathered
    columns = Columns(known.filled)
    for chunk in _batch(tail, known, *bounds):
        columns.read(chunk, opened.terms)
    if columns.last is None:
        if known.position < tail.minimum().minimum:
            raise Damaged("the events that follow were archived")
        raise LogDamaged(f"The log ends before event {known.position}, which was acknowledged.")
    insert(connection, "event", columns.rows())
    note(connection, tail, columns.changed)
    first, position = columns.first, columns.end
    # A log whose beginning was archived has no events in the blocks before.
    sealed = known.sealed if known.position else first - first % known.block
    if gathered.takes(columns, sealed):
        sealed += gathered.add(connection, columns)
    connection.execute(
        'update state set position = ?, sealed = ?, segment = ?, "offset" = ?, event = ?',
        (position, sealed, columns.segments[-1], columns.offsets[-1], columns.last),
    )


def _batch(tail: Tail, known: State, stop: int, most: int) -> Iterator[Chunk]:
    """The next lines, not over the end of a block."""
    start = known.position
    if not start:
        # Where the log begins, only its first lines tell.
        start = next((chunk.first for chunk in tail.chunks(0, stop)), 0)
    chunks = tail.chunks(start, min(start + most, start - start % known.block + known.block, stop))
    for first in chunks:
        if first.first > start:
            raise Damaged(f"the log begins with event {first.first} by now")
        yield first
        yield from chunks
