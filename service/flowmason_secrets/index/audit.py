"""Audit queries: in the order of time or against it, whole blocks at a time through postings."""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice

import orjson

from ..core.errors import EventArchived
from ..core.events import Entry, Line
from ..core.ports import AuditQuery, Tail
from .candidates import Source
from .database import Damaged
from .events import check, fetch, state
from .plain import Wanted
from .plan import Plan, plan
from .shelf import Open
from .terms import matcher

try:
    from ._speedups import unlike
except ImportError:
    from .plain import unlike

_NULL = b"null"


class Page:
    """The seqs of a page, in its order; how many are to be skipped before."""

    def __init__(self, offset: int, limit: int) -> None:
        self.skip = max(0, offset)
        self._limit = limit
        self.seqs: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.seqs) >= self._limit

    def add(self, seqs: Iterable[int]) -> None:
        """Add these, as far as there is room."""
        rest = iter(seqs)
        for _ in islice(rest, self.skip):
            self.skip -= 1
        self.seqs.extend(islice(rest, self._limit - len(self.seqs)))


def search(opened: Open, tail: Tail, query: AuditQuery, position: int) -> list[Entry]:
    """The page of a query among the first `position` events. Needs a consistent view.

    Raises:
        EventArchived: see `Index.audit`.
        Damaged: an event that was found is not in the log, or does not match.
    """
    while True:
        minimum = tail.minimum().minimum
        if query.after is not None and -1 < query.after < minimum - 1:
            raise EventArchived(minimum)
        try:
            return _search(opened, tail, query, (minimum, position))
        except Damaged:
            # Unless it was archived meanwhile.
            if tail.minimum().minimum == minimum:
                raise


def _search(opened: Open, tail: Tail, query: AuditQuery, bounds: tuple[int, int]) -> list[Entry]:
    known, (minimum, position) = state(opened.connection), bounds
    wanted = plan(opened.terms, query, (minimum, min(position, known.position)))
    page = Page(query.offset, query.limit)
    if wanted is None or page.full:
        return []
    _fill(page, Source(opened, wanted, known.sealed), wanted, known.sealed)
    return _checked(fetch(tail, _places(opened, page.seqs)), page.seqs, query)


def _fill(page: Page, source: Source, wanted: Plan, sealed: int) -> None:
    for fill in (_fill_blocks, _fill_rows) if wanted.ascending else (_fill_rows, _fill_blocks):
        fill(page, source, wanted.high, sealed)
        if page.full:
            return


def _fill_rows(page: Page, source: Source, high: int, sealed: int) -> None:
    page.add(source.newest(sealed, high))


def _fill_blocks(page: Page, source: Source, high: int, sealed: int) -> None:
    for candidates in source.blocks(min(sealed, high)):
        if not (candidates.timely and candidates.named):
            page.add(source.matching(candidates))
        elif page.skip and (found := source.count(candidates)) <= page.skip:
            page.skip -= found
        else:
            skip, page.skip = page.skip, 0
            page.add(source.seqs(candidates, skip))
        if page.full:
            return


def _places(opened: Open, seqs: list[int]) -> list[tuple[int, int]]:
    kept = {seq: opened.recent.place(seq) for seq in seqs}
    # In the order in which they are stored: reading ahead goes only that way.
    if left := sorted(seq for seq, place in kept.items() if place is None):
        rows = opened.connection.execute(
            'select seq, segment, "offset" from json_each(?) cross join event on seq = value',
            (str(left),),
        )
        kept |= {seq: (segment, offset) for seq, segment, offset in rows}
    places = []
    for seq in seqs:
        if (place := kept[seq]) is None:
            raise Damaged(f"event {seq} has postings but no row")
        places.append(place)
    return places


def _checked(lines: list[bytes], seqs: list[int], query: AuditQuery) -> list[Entry]:
    """The events. Nothing leaves that was not asked for, whatever the database says.

    Raises:
        Damaged: one of them is not the event with its seq, or does not match.
    """
    entries = [Entry(line, orjson.loads) for line in lines]
    # Of nearly all their bytes tell it; and a page has few names, each many times.
    doubtful, names = unlike(lines, seqs, _wanted(query))
    may_name = cache(matcher(query.allow))
    for place in doubtful:
        check(entries[place], seqs[place])
        if not _matches(entries[place].line, query, may_name):
            raise Damaged(f"event {seqs[place]} is not what its terms say")
    if query.allow and not all(name != _NULL and may_name(orjson.loads(name)) for name in names):
        raise Damaged("an event has a name that its terms don't say")
    return entries


def _wanted(query: AuditQuery) -> Wanted:
    """What each line must have, as it stands in it."""
    success = orjson.dumps("success")
    kind = "secret" if query.allow else query.resource_type
    return (
        _token(query.org_id),
        _token(kind),
        _token(query.action),
        success if query.success is True else None,
        success if query.success is False else None,
        _token(query.name),
        _token(query.actor),
    )


def _token(value: str | None) -> bytes | None:
    return None if value is None else orjson.dumps(value)


def _matches(line: Line, query: AuditQuery, may_name: Callable[[str], bool]) -> bool:
    return (
        query.org_id in (None, line["org_id"])
        and query.resource_type in (None, line["resource_type"])
        and query.action in (None, line["action"])
        and query.name in (None, line["name"])
        and query.actor in (None, line["actor"])
        and query.success in (None, line["outcome"] == "success")
        and (
            not query.allow
            or (
                line["resource_type"] == "secret"
                and line["name"] is not None
                and may_name(line["name"])
            )
        )
    )
