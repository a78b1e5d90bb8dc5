"""Sealing: giving the events of a whole block their postings, step by step. After the last block
of a group, the postings of all of them are merged.
"""

import sqlite3
from collections.abc import Sequence

from . import pieces
from .database import insert
from .pieces import Span, pack, placed, whole
from .postings import GROUP, checked, every, key, merged, seal, unchecked

# One statement for each column of terms, in the order in which they are sealed.
_COLUMNS = (
    "select seq, org from event where seq >= ? and seq < ?",
    "select seq, type from event where seq >= ? and seq < ?",
    "select seq, action from event where seq >= ? and seq < ?",
    "select seq, outcome from event where seq >= ? and seq < ?",
    "select seq, name from event where seq >= ? and seq < ?",
    "select seq, actor from event where seq >= ? and seq < ?",
)

_TIMES = (
    "select (seq - ?) / ?, min(time), max(time) from event where seq >= ? and seq < ? group by 1"
)

# How many terms are merged in one step.
_TERMS = 64


def seal_step(connection: sqlite3.Connection, low: int, block: int, step: int) -> bool:
    """Take this step to seal the block that begins with event `low`; whether it is the last one."""
    number, term = low // block, (step - len(_COLUMNS)) * _TERMS
    if step < len(_COLUMNS):
        _seal_column(connection, low, block, step)
        return step + 1 == len(_COLUMNS) and not _ends_group(number)
    _merge(connection, number // GROUP, term)
    return term + _TERMS > _last_term(connection)


def _seal_column(connection: sqlite3.Connection, low: int, block: int, column: int) -> None:
    bounds, number = (low, low + block), low // block
    found = connection.execute(_COLUMNS[column], bounds).fetchall()
    seqs, terms = zip(*found, strict=True)
    places = [seq - low for seq in seqs]
    postings = list(seal([terms], places, number, block))
    if column + 1 == len(_COLUMNS):
        postings.append(every(places, number, block))
        times = connection.execute(_TIMES, (low, pieces.PIECE, *bounds))
        note_times(connection, number, placed(times, block))
    insert(connection, "posting", checked(postings))


def note_times(connection: sqlite3.Connection, number: int, spans: Sequence[Span]) -> None:
    """Note when the events of a block happened."""
    insert(connection, "block", [(number, *whole(spans))])
    insert(connection, "piece", checked([(number, pack(spans))]))


def _ends_group(number: int) -> bool:
    return (number + 1) % GROUP == 0


def _last_term(connection: sqlite3.Connection) -> int:
    (last,) = connection.execute("select max(id) from term").fetchone()
    return last or 0


def _merge(connection: sqlite3.Connection, group: int, term: int) -> None:
    """Merge the postings of some terms, from this one on."""
    found: list[tuple[int, object]] = []
    for number in range(group * GROUP, (group + 1) * GROUP):
        postings = connection.execute(
            "select id, bits from posting where id >= ? and id < ?",
            (key(number, term), key(number, term + _TERMS)),
        )
        found += postings
    insert(connection, "merged", merged(unchecked(found), group))
