"""Audit queries: newest first, whole blocks at a time through the postings of their terms."""

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from ..core.events import Line
from ..core.ports import AuditQuery, Tail
from .database import Damaged
from .events import fetch, state
from .postings import EVERY, decode, key
from .terms import ACTION, ACTOR, NAME, ORG, OUTCOME, TYPE, Terms, matcher

# How many rows are looked at together where postings don't settle it: a page is often full
# before a whole block was read.
_PIECE = 1024

# Times beyond these are the same as these; SQLite's integers have 64 bits.
_FIRST, _LAST = -(2**62), 2**62


class Plan(NamedTuple):
    """A query in terms of the database. `terms` are all required, and one of `names` if given.

    Times are in microseconds: `since` <= time < `until`. Only events before `high` count, and none
    of the outcome `but`.
    """

    org: int | None
    type: int | None
    action: int | None
    outcome: int | None
    but: int | None
    name: int | None
    actor: int | None
    names: set[int] | None
    since: int
    until: int
    high: int

    @property
    def terms(self) -> list[int]:
        """The rarest kind first: blocks without it need no further look."""
        order = (self.name, self.actor, self.action, self.outcome, self.type, self.org)
        return [term for term in order if term is not None] or [EVERY]


class Page:
    """The seqs of a page, filled from the newest on."""

    def __init__(self, offset: int, limit: int) -> None:
        self._skip = max(0, offset)
        self._limit = limit
        self.seqs: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.seqs) >= self._limit

    def add(self, seq: int) -> None:
        if self._skip:
            self._skip -= 1
        elif not self.full:
            self.seqs.append(seq)

    def add_all(self, base: int, bits: int) -> None:
        """Add `base` + i for every bit i of `bits`, the highest first."""
        if self._skip and (count := bits.bit_count()) <= self._skip:
            self._skip -= count
            return
        while bits and not self.full:
            place = bits.bit_length() - 1
            self.add(base + place)
            bits ^= 1 << place


def search(
    terms: Terms, connection: sqlite3.Connection, tail: Tail, query: AuditQuery, position: int
) -> list[Line]:
    """The page of a query among the first `position` events. Needs a consistent view.

    Raises:
        Damaged: an event that was found is not in the log, or does not match.
    """
    known = state(connection)
    plan = _plan(terms, query, min(position, known.position))
    page = Page(query.offset, query.limit)
    if plan is None or page.full:
        return []
    _fill(page, _Source(connection, plan, known.block), known.sealed)
    return [_line(connection, tail, query, seq) for seq in page.seqs]


def _plan(terms: Terms, query: AuditQuery, position: int) -> Plan | None:
    """None if nothing can match."""
    kind = query.resource_type
    if query.allow:
        if kind not in (None, "secret"):
            return None
        kind = "secret"
        if query.name is not None and not matcher(query.allow)(query.name):
            return None
    found: list[int | None] = []
    wanted = ((ORG, query.org_id), (TYPE, kind), (ACTION, query.action), (ACTOR, query.actor))
    for field, value in wanted:
        term = None if value is None else terms.find(field, 0, value)
        if term is None and value is not None:
            return None
        found.append(term)
    org, type_, action, actor = found
    outcome, but = None, None
    if query.success is not None:
        term = terms.find(OUTCOME, 0, "success") or 0
        outcome, but = (term, None) if query.success else (None, term)
    if outcome == 0:
        return None
    name, names = _names(terms, query, org)
    if names is not None and not names:
        return None
    return Plan(
        *(org, type_, action, outcome, but, name, actor, names),
        since=_FIRST if query.since is None else _micros(query.since),
        until=_LAST if query.until is None else _micros(query.until),
        high=position if query.before is None else min(position, query.before),
    )


def _names(terms: Terms, query: AuditQuery, org: int | None) -> tuple[int | None, set[int] | None]:
    """The term of the name if it is one, or the terms of all names that match."""
    if query.name is None:
        return None, terms.allowed(org, query.allow) if query.allow else None
    if org is None:
        return None, terms.names(query.name)
    term = terms.find(NAME, org, query.name)
    return (None, set()) if term is None else (term, None)


def _micros(seconds: float) -> int:
    # Also bounds the infinities, which no integer stands for.
    return round(min(max(seconds * 1e6, _FIRST), _LAST))


def _fill(page: Page, source: "_Source", sealed: int) -> None:
    for seq in source.rows(sealed, source.plan.high):
        page.add(seq)
        if page.full:
            return
    for base, bits, settled in source.blocks(min(sealed, source.plan.high)):
        if settled:
            page.add_all(base, bits)
        else:
            for seq in source.pieces(base, bits):
                page.add(seq)
                if page.full:
                    return
        if page.full:
            return


class _Source:
    """Where the seqs come from: rows for the newest events, postings for all others."""

    def __init__(self, connection: sqlite3.Connection, plan: Plan, block: int) -> None:
        self.plan = plan
        self._connection = connection
        self._block = block
        self._parameters = plan._asdict() | {"names": None}

    def rows(self, low: int, high: int) -> Iterator[int]:
        """The matching events with `low` <= seq < `high`, one by one."""
        found = self._connection.execute(
            "select seq, name from event where seq >= :from and seq < :to"
            " and (:org is null or org = :org) and (:type is null or type = :type)"
            " and (:action is null or action = :action)"
            " and (:outcome is null or outcome = :outcome) and (:but is null or outcome <> :but)"
            " and (:name is null or name = :name) and (:actor is null or actor = :actor)"
            " and time >= :since and time < :until order by seq desc",
            self._parameters | {"from": low, "to": min(high, self.plan.high)},
        )
        names = self.plan.names
        for seq, name in found:
            if names is None or name in names:
                yield seq

    def blocks(self, high: int) -> Iterator[tuple[int, int, bool]]:
        """For each block with candidates below `high`: its first seq, the candidates as bits, and
        whether they are settled, so that all of them match.
        """
        plan = self.plan
        found = self._connection.execute(
            "select number, first, last from block where number <= ?"
            " and last >= ? and first < ? order by number desc",
            ((high - 1) // self._block, plan.since, plan.until),
        )
        for number, first, last in found:
            base = number * self._block
            bits = self._candidates(number)
            if base + self._block > high:
                bits &= (1 << (high - base)) - 1
            settled = plan.since <= first and last < plan.until
            if bits and plan.names is not None:
                # Whatever is less: the names' postings, or the candidates' rows.
                if len(plan.names) <= bits.bit_count() // 4:
                    bits &= self._union(number, plan.names)
                else:
                    settled = False
            if bits:
                yield base, bits, settled

    def pieces(self, base: int, bits: int) -> Iterator[int]:
        """The matching ones among the candidates of a block, through their rows."""
        for low in reversed(range(0, self._block, _PIECE)):
            piece = bits >> low & ((1 << _PIECE) - 1)
            if piece:
                top = low + piece.bit_length()
                bottom = low + (piece & -piece).bit_length() - 1
                yield from self.rows(base + bottom, base + top)

    def _candidates(self, number: int) -> int:
        bits = -1
        for term in self.plan.terms:
            found = self._posting(number, term)
            bits = found if bits == -1 else bits & found
            if not bits:
                return 0
        # 0 would be the posting of every event.
        return bits & ~self._posting(number, self.plan.but) if self.plan.but else bits

    def _union(self, number: int, terms: set[int]) -> int:
        bits = 0
        for term in terms:
            bits |= self._posting(number, term)
        return bits

    def _posting(self, number: int, term: int) -> int:
        where = key(number, term)
        row = self._connection.execute("select bits from posting where id = ?", (where,)).fetchone()
        return 0 if row is None else decode(row[0], where, self._block)


def _line(connection: sqlite3.Connection, tail: Tail, query: AuditQuery, seq: int) -> Line:
    row = connection.execute('select segment, "offset" from event where seq = ?', (seq,)).fetchone()
    if row is None:
        raise Damaged(f"event {seq} has postings but no row")
    line = fetch(tail, seq, *row)
    # Nothing leaves that was not asked for, whatever the database says.
    if not _matches(line, query):
        raise Damaged(f"event {seq} is not what its terms say")
    return line


def _matches(line: Line, query: AuditQuery) -> bool:
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
                and matcher(query.allow)(line["name"])
            )
        )
    )
