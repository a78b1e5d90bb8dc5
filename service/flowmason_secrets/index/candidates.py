"""Where the events of a query are: rows for the newest ones, postings for all others."""

from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

from . import pieces
from .database import Damaged
from .pieces import Span, unpack
from .plan import Plan
from .postings import ALL, Events, as_bits, in_order, unchecked, without
from .shelf import Open

# Of fewer candidates in a piece that postings don't settle, each has its row looked up.
_FEW = 32

# How many blocks have their postings read together: the first page of most queries is in the newest
# one, and many blocks at once cost less than one after the other.
_RUN = 64


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


# A row costs as much as so many postings, of which some are at hand.
_ROWS = 4


class Candidates(NamedTuple):
    """Events of one block as bits, the lowest for event `base`: they match, unless their time may
    be another one (not `timely`), or their name (not `named`).
    """

    base: int
    bits: int
    timely: bool
    named: bool

    @property
    def bounds(self) -> tuple[int, int]:
        """From the first seq up to and without the second."""
        lowest = (self.bits & -self.bits).bit_length() - 1
        return self.base + lowest, self.base + self.bits.bit_length()


class Source:
    """The events of a plan."""

    def __init__(self, opened: Open, plan: Plan) -> None:
        self._connection, self._shelf = opened.connection, opened.shelf
        self._block = self._shelf.block
        self._plan = plan
        self._parameters = plan._asdict() | {"names": None, "named": plan.names is not None}
        self._order = "" if plan.ascending else " desc"

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
        plan, length = self._plan, 1
        numbers = plan.low // self._block, (high - 1) // self._block
        found = self._connection.execute(
            _BLOCKS + self._order,
            (*numbers, plan.since, plan.until),
        )
        while run := list(islice(found, length)):
            candidates = self._candidates([number for number, _, _ in run])
            named = self._named(candidates)
            for number, first, last in run:
                base, bits = number * self._block, candidates.get(number, 0)
                if number in named:
                    bits &= named[number]
                if base + self._block > high:
                    bits &= (1 << (high - base)) - 1
                if base < plan.low:
                    bits &= -1 << (plan.low - base)
                if bits:
                    timely = plan.since <= first and last < plan.until
                    yield Candidates(base, bits, timely, plan.names is None or number in named)
            length = min(2 * length, _RUN)

    def matching(self, candidates: Candidates) -> Iterator[int]:
        """The matching events among candidates, in the plan's order. Piece by piece: a page is
        often full before all of them were looked at.
        """
        plan, spans = self._plan, self._spans(candidates.base // self._block)
        lows = range(0, self._block, pieces.PIECE)
        for low in lows if plan.ascending else reversed(lows):
            first, last = spans[low // pieces.PIECE]
            if last < plan.since or first >= plan.until:
                continue
            bits = candidates.bits >> low & ((1 << pieces.PIECE) - 1)
            timely = plan.since <= first and last < plan.until
            piece = Candidates(candidates.base + low, bits, timely, candidates.named)
            if piece.timely and piece.named:
                yield from self._seqs(piece)
            elif bits.bit_count() > _FEW:
                yield from self.rows(*piece.bounds)
            else:
                yield from self._one_by_one(piece)

    def _spans(self, number: int) -> list[Span]:
        stored = self._connection.execute(
            "select number, spans from piece where number = ?", (number,)
        )
        for _, data in unchecked(stored):
            return unpack(data)
        raise Damaged(f"block {number} has no times")

    def _seqs(self, piece: Candidates) -> Iterator[int]:
        return (piece.base + place for place in in_order(piece.bits, self._plan.ascending))

    def _one_by_one(self, piece: Candidates) -> Iterator[int]:
        plan = self._plan
        for seq in self._seqs(piece):
            row = self._connection.execute(
                "select name from event where seq = ? and time >= ? and time < ?",
                (seq, plan.since, plan.until),
            ).fetchone()
            if row is not None and (plan.names is None or row[0] in plan.names):
                yield seq

    def _span(self, low: int, high: int) -> dict[str, int]:
        return {"from": max(low, self._plan.low), "to": min(high, self._plan.high)}

    def _candidates(self, numbers: Collection[int]) -> dict[int, int]:
        """The events that have all terms, by their blocks."""
        found: dict[int, Events] = dict.fromkeys(numbers, ALL)
        for term in self._plan.terms:
            found = self._shelf.among(term, found)
        if self._plan.but is not None:
            for number, events in self._shelf.among(self._plan.but, found).items():
                found[number] = without(found[number], events, self._block)
        return {number: as_bits(events, self._block) for number, events in found.items()}

    def _named(self, candidates: dict[int, int]) -> dict[int, int]:
        """The events with one of the names, where that is less to read than the candidates."""
        plan, names = self._plan, self._plan.names
        if names is None:
            return {}
        many = [n for n, bits in candidates.items() if len(names) <= _ROWS * bits.bit_count()]
        return self._shelf.having_any((plan.org, plan.named), names, many)
