"""Where the events of a query are: rows for the newest ones, postings for all others."""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import NamedTuple

from . import pieces
from .database import Damaged
from .pieces import Span, unpack
from .plain import Events
from .plan import Plan
from .postings import GROUP, between, count, in_order, unchecked
from .shelf import Open, Stretch

# Of fewer candidates in a piece that postings don't settle, each has its row looked up.
_FEW = 32

_SECOND = 1_000_000

_MATCHING = (
    " from event where seq >= :from and seq < :to"
    " and (:org is null or org = :org) and (:type is null or type = :type)"
    " and (:action is null or action = :action)"
    " and (:outcome is null or outcome = :outcome) and (:but is null or outcome <> :but)"
    " and (:name is null or name = :name) and (:actor is null or actor = :actor)"
    " and time >= :since and time < :until "
)

_BLOCKS = (
    "select number, first, last from block where number between ? and ?"
    " and last >= ? and first < ? order by number"
)


# A row costs as much as so many postings of a block, of which some are at hand.
_ROWS = 2


class Candidates(NamedTuple):
    """Events of one block, whose places are counted from event `base` on: they match, unless their
    time may be another one (not `timely`), or their name (not `named`).
    """

    base: int
    events: Events
    timely: bool
    named: bool


class Source:
    """The events of a plan, where the first `sealed` events have postings."""

    def __init__(self, opened: Open, plan: Plan, sealed: int) -> None:
        self._connection, self._shelf, self._recent = (
            opened.connection,
            opened.shelf,
            opened.recent,
        )
        self._block, self._size = self._shelf.block, self._shelf.size
        # How many groups of blocks have merged postings.
        self._merged = sealed // self._block // GROUP
        self._plan = plan
        self._parameters = plan._asdict() | {"names": None, "named": plan.names is not None}
        self._order = "" if plan.ascending else " desc"

    def newest(self, sealed: int, high: int) -> Iterator[int]:
        """The matching events without postings below `high`, one by one, in the plan's order."""
        self._recent.read(self._connection, sealed, high)
        kept = self._recent.matching(self._plan, high)
        left = self.rows(self._recent.end, high) if self._recent.end < high else ()
        return chain(kept, left) if self._plan.ascending else chain(left, kept)

    def rows(self, low: int, high: int) -> Iterator[int]:
        """The matching events with `low` <= seq < `high`, one by one, in the plan's order."""
        found = self._connection.execute(
            "select seq, name" + _MATCHING + "order by seq" + self._order,
            self._parameters | self._span(low, high),
        )
        names = self._plan.names
        for seq, name in found:
            if names is None or name in names:
                yield seq

    def counts(
        self, span: tuple[int, int], field: int, bucket: tuple[int, int]
    ) -> Iterator[tuple[int, int, int]]:
        """How many of the events from one seq up to and without another match, by their time and a
        field: the bucket, the term and how many. A bucket's number is its time divided by the
        second figure, from the first one before the epoch on; in seconds.
        """
        (low, high), (before, seconds), names = span, bucket, self._plan.names
        found = self._connection.execute(
            "select (time + :before) / :unit,"
            " case :by when 2 then action when 3 then outcome when 4 then name else actor end,"
            " case when :named then name end, count(*)" + _MATCHING + "group by 1, 2, 3",
            self._parameters
            | self._span(low, high)
            | {"by": field, "before": before * _SECOND, "unit": seconds * _SECOND},
        )
        for number, term, name, events in found:
            if names is None or name in names:
                yield number, term, events

    def blocks(self, high: int) -> Iterator[Candidates]:
        """All blocks with candidates below `high`, in the plan's order."""
        plan = self._plan
        numbers = plan.low // self._block, (high - 1) // self._block
        blocks = self._connection.execute(
            _BLOCKS + self._order,
            (*numbers, plan.since, plan.until),
        )
        for stretch, some in groupby(blocks, lambda row: self._stretch(row[0])):
            times = {number: (first, last) for number, first, last in some}
            found, named = self._named(stretch, self._candidates(stretch, times))
            for number, events in found.items():
                base = number * self._block
                if base < plan.low or base + self._block > high:
                    low, stop = max(plan.low - base, 0), min(high - base, self._block)
                    events = between(events, low, stop, self._size)
                if events:
                    first, last = times[number]
                    timely = plan.since <= first and last < plan.until
                    yield Candidates(base, events, timely, named)

    def _stretch(self, number: int) -> Stretch:
        """Where the postings of this block are."""
        group = number // GROUP
        if group < self._merged:
            return range(group * GROUP, (group + 1) * GROUP)
        return range(number, number + 1)

    def count(self, candidates: Candidates) -> int:
        """How many candidates there are."""
        return count(candidates.events, self._size)

    def seqs(self, candidates: Candidates, skip: int = 0) -> Iterator[int]:
        """All candidates in the plan's order, but for the first ones."""
        for place in in_order(candidates.events, self._plan.ascending, self._size, skip):
            yield candidates.base + place

    def bounds(self, candidates: Candidates) -> tuple[int, int]:
        """From the first seq up to and without the second there are candidates."""
        first, last = (
            next(in_order(candidates.events, ascending, self._size)) for ascending in (True, False)
        )
        return candidates.base + first, candidates.base + last + 1

    def matching(self, candidates: Candidates) -> Iterator[int]:
        """The matching events among candidates, in the plan's order. If they are many, or their
        times are in question, then piece by piece: a page is often full before all of them were
        looked at.
        """
        plan = self._plan
        if candidates.timely and self.count(candidates) <= _FEW:
            yield from self._one_by_one(candidates)
            return
        spans = self._spans(candidates.base)
        lows = range(0, self._block, pieces.PIECE)
        for low in lows if plan.ascending else reversed(lows):
            first, last = spans[low // pieces.PIECE]
            if last < plan.since or first >= plan.until:
                continue
            events = between(candidates.events, low, low + pieces.PIECE, self._size)
            if not events:
                continue
            timely = plan.since <= first and last < plan.until
            some = Candidates(candidates.base, events, timely, candidates.named)
            if some.timely and some.named:
                yield from self.seqs(some)
            elif self.count(some) > _FEW:
                yield from self.rows(*self.bounds(some))
            else:
                yield from self._one_by_one(some)

    def _spans(self, base: int) -> list[Span]:
        number = base // self._block
        stored = self._connection.execute(
            "select number, spans from piece where number = ?", (number,)
        )
        for _, data in unchecked(stored):
            return unpack(data)
        raise Damaged(f"block {number} has no times")

    def _one_by_one(self, some: Candidates) -> Iterator[int]:
        plan, seqs = self._plan, list(self.seqs(some))
        rows = self._connection.execute(
            "select seq, name from json_each(?) cross join event on seq = value"
            " where time >= ? and time < ?",
            (str(seqs), plan.since, plan.until),
        )
        found = {seq for seq, name in rows if plan.names is None or name in plan.names}
        return (seq for seq in seqs if seq in found)

    def _span(self, low: int, high: int) -> dict[str, int]:
        return {"from": max(low, self._plan.low), "to": min(high, self._plan.high)}

    def _candidates(self, stretch: Stretch, blocks: Iterable[int]) -> dict[int, Events]:
        """The events of these blocks there that have all terms, by their blocks, in their order."""
        first, *others = self._plan.terms
        found = self._shelf.among(first, stretch, dict.fromkeys(blocks))
        for term in others:
            if not found:
                break
            found = self._shelf.among(term, stretch, found)
        if found and self._plan.but is not None:
            found = self._shelf.without(self._plan.but, stretch, found)
        return found

    def _named(self, stretch: Stretch, found: dict[int, Events]) -> tuple[dict[int, Events], bool]:
        """Those that have one of the names, if that is less to read than the events; and whether
        they do.
        """
        plan, names = self._plan, self._plan.names
        if names is None or not found:
            return found, True
        name = plan.org, plan.named
        if self._shelf.keeps(name, stretch) or (
            len(names) * len(stretch)
            <= _ROWS * sum(count(events, self._size) for events in found.values())
        ):
            return self._shelf.among_any(name, names, stretch, found), True
        return found, False
