"""Counting the events of an audit query, a few blocks at a time."""

import sqlite3
from collections import Counter
from itertools import islice

from ..core.ports import AuditQuery, Grouping
from .candidates import Source
from .events import state
from .plan import plan
from .terms import ACTION, ACTOR, NAME, OUTCOME, Terms

# The start of a bucket in seconds since the epoch, and what its events have in common.
Counts = Counter[tuple[int, str | None]]

# How many blocks are counted in one go: others wait for that long.
_BLOCKS = 2

_FIELDS = {"action": ACTION, "outcome": OUTCOME, "actor": ACTOR, "name": NAME}

# The epoch, in days since the year 1: no event is older, and SQLite divides towards zero.
_ERA = 719_162 * 86_400


def count(
    terms: Terms,
    connection: sqlite3.Connection,
    query: AuditQuery,
    grouping: Grouping,
    high: int,
) -> tuple[Counts, int]:
    """Count the newest of the events before `high`, which are indexed; and before which one to go
    on, 0 if that was all. Needs a consistent view.

    Raises:
        Damaged: a term is not what it should be.
    """
    known, found = state(connection), Counts()
    wanted = plan(terms, query, high)
    if wanted is None:
        return found, 0
    source = Source(connection, wanted, known.block)
    if wanted.high > known.sealed:
        spans, rest = [(known.sealed, wanted.high)], known.sealed
    else:
        blocks = list(islice(source.blocks(wanted.high), _BLOCKS))
        spans = [candidates.bounds for candidates in blocks]
        rest = blocks[-1].base if blocks else 0
    field = _FIELDS[grouping.by]
    for span in spans:
        for bucket, term, events in source.counts(span, field, (_ERA, grouping.seconds)):
            text = terms.text(field, term, wanted.org)
            found[bucket * grouping.seconds - _ERA, text] += events
    return found, rest
