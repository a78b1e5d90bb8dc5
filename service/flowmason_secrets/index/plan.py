"""What an audit query asks for, in terms of the database."""

from typing import NamedTuple

from ..core.ports import AuditQuery
from .postings import EVERY
from .terms import ACTION, ACTOR, NAME, ORG, OUTCOME, TYPE, Terms, matcher

# Times beyond these are the same as these; SQLite's integers have 64 bits.
_FIRST, _LAST = -(2**62), 2**62


class Plan(NamedTuple):
    """The terms that an event must have: all of them, one of `names` if given, and not `but`.
    `named` is what the names have in common: one name in all organisations, or their patterns.

    Times are in microseconds: `since` <= time < `until`. Only events with `low` <= seq < `high`
    count, and come in the order of their seqs if `ascending`, else in reverse.
    """

    org: int | None
    type: int | None
    action: int | None
    outcome: int | None
    but: int | None
    name: int | None
    actor: int | None
    names: set[int] | None
    named: str | tuple[str, ...]
    since: int
    until: int
    low: int
    high: int
    ascending: bool

    @property
    def terms(self) -> list[int]:
        """The rarest kind first: blocks without it need no further look. A name has a term in each
        organisation, which need not be asked for then.
        """
        org = self.org if self.name is None else None
        order = (self.name, self.actor, self.action, self.outcome, self.type, org)
        return [term for term in order if term is not None] or [EVERY]


def plan(terms: Terms, query: AuditQuery, bounds: tuple[int, int]) -> Plan | None:
    """The plan of a query among the events from one seq up to and without another, or None if
    nothing can match.
    """
    minimum, position = bounds
    low = max(minimum, 0 if query.after is None else min(query.after + 1, position))
    high = position if query.before is None else min(position, query.before)
    if low >= high:
        return None
    kind = query.resource_type
    if query.allow:
        if kind not in (None, "secret"):
            return None
        kind = "secret"
        if query.name is not None and not matcher(query.allow)(query.name):
            return None
    success = None if query.success is None else "success"
    wanted = ((ORG, query.org_id), (TYPE, kind), (ACTION, query.action), (ACTOR, query.actor))
    found = {field: _find(terms, field, value) for field, value in (*wanted, (OUTCOME, success))}
    if query.success is False:
        but, found[OUTCOME] = found[OUTCOME], None
    else:
        but = None
    name, names = _names(terms, query, found[ORG])
    if _UNKNOWN in (*found.values(), name) or names == set():
        return None
    return Plan(
        found[ORG],
        found[TYPE],
        found[ACTION],
        found[OUTCOME],
        None if but == _UNKNOWN else but,
        name,
        found[ACTOR],
        names,
        query.allow if query.name is None else query.name,
        since=_FIRST if query.since is None else _micros(query.since),
        until=_LAST if query.until is None else _micros(query.until),
        low=low,
        high=high,
        ascending=query.after is not None,
    )


_UNKNOWN = -1


def _find(terms: Terms, field: int, value: str | None) -> int | None:
    """The term; None without a value, `_UNKNOWN` if no event has it."""
    if value is None:
        return None
    found = terms.find(field, 0, value)
    return _UNKNOWN if found is None else found


def _names(terms: Terms, query: AuditQuery, org: int | None) -> tuple[int | None, set[int] | None]:
    """The term of the name if it is one, or the terms of all names that match."""
    if query.name is None:
        return None, terms.allowed(org, query.allow) if query.allow else None
    if org is None:
        return None, terms.names(query.name)
    term = terms.find(NAME, org, query.name)
    return (_UNKNOWN if term is None else term), None


def _micros(seconds: float) -> int:
    # Also bounds the infinities, which no integer stands for.
    return round(min(max(seconds * 1e6, _FIRST), _LAST))
