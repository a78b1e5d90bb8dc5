"""Counting the events of an audit query, a few blocks at a time."""

from collections import Counter
from itertools import islice

from ..core.ports import AuditQuery, Grouping
from .candidates import Source
from .events import state
from .plan import plan
from .shelf import Open
from .terms import ACTION, ACTOR, NAME, OUTCOME

# The start of a bucket in seconds since the epoch, and what its events have in common.
Counts = Counter[tuple[int, str | None]]

# How many blocks are counted in one go: others wait for that long.
_BLOCKS = 2

_FIELDS = {"action": ACTION, "outcome": OUTCOME, "actor": ACTOR, "name": NAME}

# The epoch, in days since the year 1: no event is older, and SQLite divides towards zero.
_ERA = 719_162 * 86_400


def count(
    opened: Open, query: AuditQuery, grouping: Grouping, bounds: tuple[int, int]
) -> tuple[Counts, int]:
    """Count the newest of the events from one seq up to and without another, which are indexed; and
    before which one to go on, 0 if that was all. Needs a consistent view.

    Raises:
        Damaged: a term is not what it should be.
    """
    known, found = state(opened.connection), Counts()
    wanted = plan(opened.terms, query, bounds)
    if wanted is None:
        return found, 0
    source = Source(opened, wanted, known.sealed)
    if wanted.high > known.sealed:
        spans, rest = [(known.sealed, wanted.high)], known.sealed
    else:
        blocks = list(islice(source.blocks(wanted.high), _BLOCKS))
        spans = [source.bounds(candidates) for candidates in blocks]
        rest = blocks[-1].base if blocks else 0
    field = _FIELDS[grouping.by]
    for span in spans:
        for bucket, term, events in source.counts(span, field, (_ERA, grouping.seconds)):
            text = opened.terms.text(field, term, wanted.org)
            found[bucket * grouping.seconds - _ERA, text] += events
    return found, rest
