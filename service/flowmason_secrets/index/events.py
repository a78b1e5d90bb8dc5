"""Indexing events: from the lines of the log to rows and postings."""

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import orjson

from ..core.errors import LogDamaged
from ..core.events import KEY_ROTATE, Entry, Line, is_change
from ..core.ports import Chunk, Tail
from .database import Damaged, writing
from .listing import Changed, note
from .sealing import seal_column, seal_rows
from .terms import ACTION, ACTOR, NAME, ORG, SUCCESS, TYPE, Terms

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# How many whole blocks may wait for their postings while there are events to index: sealing takes
# longer than a query that finds a few new events should.
_WAITING = 2

# seq, segment, offset, time in microseconds, and the terms: organisation, resource type, action,
# success, name, actor.
Row = tuple[int, int, int, int, int, int, int, int, int, int]


class State(NamedTuple):
    """How far the index is: `position` events, of which the first `sealed` have postings, and those
    of the next block for `columns` of their columns.

    What changed before `filled` was in the metadata when the listing was filled. `segment`,
    `offset` and `event` are the place and the id of the last event.
    """

    position: int
    sealed: int
    columns: int
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
        'select position, sealed, columns, filled, block, segment, "offset", event from state'
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
    if known.position:
        _, line = fetch(tail, known.position - 1, known.segment, known.offset)
        if line["id"] != known.event:
            raise Damaged("it belongs to another log")


def fetch(tail: Tail, seq: int, segment: int, offset: int) -> Entry:
    """Raises:
    Damaged: the log has no such event there; its segment may have been archived.
    """
    try:
        if segment < 0 or offset < 0:
            raise ValueError("a negative place")
        raw = tail.line(segment, offset)
        line: Line = orjson.loads(raw)
        if line["seq"] == seq:
            return Entry(raw, line)
    # OverflowError: a place that no file can have.
    except (FileNotFoundError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise Damaged(f"event {seq} is not where it should be: {type(error).__name__}") from error
    raise Damaged(f"event {seq} is not where it should be")


def extend(terms: Terms, connection: sqlite3.Connection, tail: Tail, stop: int, most: int) -> bool:
    """Take one step in one transaction; whether there was one to take.

    A step indexes at most `most` events below `stop`, or seals a column of a whole block. What
    another process did meanwhile is not done again.

    Raises:
        LogDamaged: the log does not hold the events it should.
        Damaged: events that were not indexed yet have been archived.
    """
    terms.trim()
    try:
        with writing(connection, tail):
            known = state(connection)
            waiting = known.position - known.sealed
            bound = known.block * (_WAITING if most < known.block else 1)
            if waiting >= (known.block if known.position >= stop else bound):
                _seal(connection, known)
            elif known.position < stop:
                _extend(terms, connection, tail, known, (stop, most))
            else:
                return False
            return True
    except BaseException:
        terms.forget()
        raise


def _seal(connection: sqlite3.Connection, known: State) -> None:
    if seal_column(connection, known.sealed, known.block, known.columns):
        connection.execute("update state set columns = 0, sealed = sealed + block")
    else:
        connection.execute("update state set columns = columns + 1")


def _extend(
    terms: Terms,
    connection: sqlite3.Connection,
    tail: Tail,
    known: State,
    bounds: tuple[int, int],
) -> None:
    rows: list[Row] = []
    changed: set[Changed] = set()
    batch = _batch(tail, known, *bounds)
    try:
        last = _read(batch, terms, known.filled, rows, changed)
    except (KeyError, TypeError, ValueError) as error:
        raise LogDamaged(
            f"What follows event {known.position + len(rows) - 1} of the log is not an event."
        ) from error
    if last is None:
        raise LogDamaged(f"The log ends before event {known.position}, which was acknowledged.")
    connection.executemany("insert into event values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    note(connection, tail, changed)
    first, position = rows[0][0], rows[-1][0] + 1
    # A log whose beginning was archived has no events in the blocks before.
    sealed = known.sealed if known.position else first - first % known.block
    if len(rows) == known.block and first == sealed:
        seal_rows(connection, rows, known.block)
        sealed = position
    connection.execute(
        'update state set position = ?, sealed = ?, segment = ?, "offset" = ?, event = ?',
        (position, sealed, rows[-1][1], rows[-1][2], last["id"]),
    )


def _batch(tail: Tail, known: State, stop: int, most: int) -> Iterator[Chunk]:
    """The next lines, not over the end of a block."""
    start, end = known.position, 0
    for chunk in tail.chunks(start, stop):
        if not end:
            if chunk.first > start > 0:
                raise Damaged(f"the log begins with event {chunk.first} by now")
            start = start or chunk.first
            end = min(start + most, start - start % known.block + known.block, stop)
        if chunk.first != start:
            raise LogDamaged(f"Event {start} is missing from the log.")
        lines = chunk.data.count(b"\n")
        yield chunk if start + lines <= end else _head(chunk, end - start)
        start += lines
        if start >= end:
            return


def _head(chunk: Chunk, lines: int) -> Chunk:
    data = b"\n".join(chunk.data.split(b"\n", lines)[:lines]) + b"\n"
    return chunk._replace(data=data)


class _Kind(NamedTuple):
    """What events of the same organisation, resource type, action and outcome have in common."""

    org: int
    type: int
    action: int
    success: int
    changes: bool
    names: dict[str | None, int]


def _read(
    batch: Iterator[Chunk], terms: Terms, filled: int, rows: list[Row], changed: set[Changed]
) -> Line | None:
    """Add the events to `rows` and the changes of secrets to `changed`; return the last event."""
    line: Line | None = None
    second, base = "", 0
    kinds: dict[tuple[str | None, str, str, str], _Kind] = {}
    actors = terms.known(ACTOR, 0)
    for chunk in batch:
        seq, segment, offset = chunk.first, chunk.segment, chunk.offset
        for raw in chunk.data.split(b"\n")[:-1]:
            line = _decode(raw, seq)
            time = line["time"]
            if len(time) == 27 and time[:19] == second and time[26] == "Z":
                micros = base + int(time[20:26])
            else:
                micros = _micros(time)
                second, base = time[:19], micros - micros % 1_000_000
            common = (line["org_id"], line["resource_type"], line["action"], line["outcome"])
            kind = kinds.get(common)
            if kind is None:
                kind = kinds[common] = _kind(terms, line)
            org, type_, action, success, changes, names = kind
            text = line["name"]
            name = names.get(text)
            if name is None:
                name = terms.code(NAME, org, text)
            text = line["actor"]
            actor = actors.get(text)
            if actor is None:
                actor = terms.code(ACTOR, 0, text)
            rows.append((seq, segment, offset, micros, org, type_, action, success, name, actor))
            if changes and seq >= filled:
                changed.update(_changes(line))
            seq += 1
            offset += len(raw) + 1
    return line


def _kind(terms: Terms, line: Line) -> _Kind:
    org = terms.code(ORG, 0, line["org_id"])
    return _Kind(
        org,
        terms.code(TYPE, 0, line["resource_type"]),
        terms.code(ACTION, 0, line["action"]),
        terms.code(SUCCESS, 0, str(line["outcome"] == "success")),
        line["action"] == KEY_ROTATE or (line["resource_type"] == "secret" and is_change(line)),
        terms.known(NAME, org),
    )


def _changes(line: Line) -> list[Changed]:
    org_id = line["org_id"] or ""
    if line["action"] == KEY_ROTATE:
        secrets = line["details"].get("secrets")
        return [(org_id, secret, None) for secret in secrets] if isinstance(secrets, list) else []
    return [(org_id, line["resource_id"], line["name"])]


def _decode(raw: bytes, seq: int) -> Line:
    line: Line = orjson.loads(raw)
    if line["seq"] != seq:
        raise LogDamaged(f"Line {seq} of the log says that it is event {line['seq']}.")
    return line


def _micros(time: str) -> int:
    return (datetime.fromisoformat(time) - _EPOCH) // _MICROSECOND
