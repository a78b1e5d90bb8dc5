"""Sealing: giving the events of a whole block their postings, all at once or column by column."""

import sqlite3
from collections.abc import Sequence

from .columns import Columns
from .database import insert
from .postings import every, seal

# One statement for each column of terms, in the order in which they are sealed.
_COLUMNS = (
    "select seq, org from event where seq >= ? and seq < ?",
    "select seq, type from event where seq >= ? and seq < ?",
    "select seq, action from event where seq >= ? and seq < ?",
    "select seq, outcome from event where seq >= ? and seq < ?",
    "select seq, name from event where seq >= ? and seq < ?",
    "select seq, actor from event where seq >= ? and seq < ?",
)


def seal_columns(connection: sqlite3.Connection, columns: Columns, block: int) -> None:
    """Seal the block that these events are, the whole of it."""
    number, places, times = columns.first // block, range(block), columns.times
    _put(connection, columns.terms, places, number, block)
    _finish(connection, places, (min(times), max(times)), number, block)


def seal_column(connection: sqlite3.Connection, low: int, block: int, column: int) -> bool:
    """Seal one column of the block that begins with event `low`; whether it was the last one."""
    bounds, number = (low, low + block), low // block
    found = connection.execute(_COLUMNS[column], bounds).fetchall()
    seqs, terms = zip(*found, strict=True)
    places = [seq - low for seq in seqs]
    _put(connection, [terms], places, number, block)
    if column + 1 < len(_COLUMNS):
        return False
    times = connection.execute(
        "select min(time), max(time) from event where seq >= ? and seq < ?", bounds
    ).fetchone()
    _finish(connection, places, times, number, block)
    return True


def _put(
    connection: sqlite3.Connection,
    columns: Sequence[Sequence[int]],
    places: Sequence[int],
    number: int,
    block: int,
) -> None:
    insert(connection, "posting", seal(columns, places, number, block))


def _finish(
    connection: sqlite3.Connection,
    places: Sequence[int],
    times: tuple[int, int],
    number: int,
    block: int,
) -> None:
    connection.execute("insert into posting values (?, ?)", every(places, number, block))
    # Queries see the block from here on.
    connection.execute("insert into block values (?, ?, ?)", (number, *times))
