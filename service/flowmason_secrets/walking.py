"""Walking a log from its first line to its last one, for a verification. FORMAT.md §5.2."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .core.ledger import Differences, Ledger, Statement
from .core.merkle import HASH_BYTES, Unverified
from .core.tiles import WIDTH, Edge, Tile, split_hashes
from .processes import Pool
from .storage import scanning
from .storage.scanning import Quote, Scanned, Source
from .storage.tree import TileFiles

# How many torn tails are named.
_FEW = 20


class Torn(NamedTuple):
    """Where the valid lines of a segment end before it does, and what is wrong with the next."""

    source: Source
    seq: int
    place: int
    problem: str


@dataclass(slots=True)
class Position:
    """How far the lines have been read: the seq of the next one; of those below `absent` there
    were only hashes.
    """

    seq: int = 0
    absent: int = 0
    first_time: str = ""
    last_time: str = ""
    torn: list[Torn] = field(default_factory=list)


class Archived(NamedTuple):
    """Lines below `minimum` may be missing. Their tiles have their hashes; if those are missing
    too, `edge` has what of their tree is needed to go on. # format §11.1
    """

    minimum: int = 0
    edge: tuple[bytes, ...] = ()


class Log(NamedTuple):
    """The files of a log."""

    sources: Sequence[Source]
    tiles: TileFiles
    archived: Archived
    pool: Pool


class Walk:
    """Takes all lines that follow each other without gaps, and gives their hashes to a ledger.

    `quoted` makes statements of the checkpoints in the lines.
    """

    def __init__(
        self,
        log: Log,
        ledger: Ledger,
        differences: Differences,
        quoted: Callable[[Quote], Statement | None],
    ) -> None:
        self._log = log
        self._ledger = ledger
        self._differences = differences
        self._quoted = quoted
        self._torn: Torn | None = None
        self.position = Position()

    def run(self, signed: int, advance: Callable[[int], None]) -> Position:
        """Walk. Lines below `signed` have to be there; `advance` is told how many bytes are done.

        Raises:
            OSError: something can't be read.
        """
        blocks = itertools.chain.from_iterable(map(scanning.blocks, self._log.sources))
        scanned = self._log.pool.each(scanning.scan, blocks, scanning.TOGETHER)
        groups = itertools.groupby(scanned, key=lambda one: one.segment)
        done = 0
        for source, (_, group) in zip(self._log.sources, groups, strict=True):
            if not self._follows(source):
                return self.position
            if source.first >= self.position.seq:
                self._read(source, _counted(group, source, done, advance))
            done += source.size
        torn = self._torn
        if torn is not None and (torn.seq < signed or torn.place == 0):
            self._differences.add(torn.seq, "", torn.problem)
        elif torn is not None:
            self._forgive(torn)
        return self.position

    def _forgive(self, torn: Torn) -> None:
        """A crash left it. # format §5.2"""
        if len(self.position.torn) < _FEW:
            self.position.torn.append(torn)

    def _follows(self, source: Source) -> bool:
        """Whether the segment continues the log, if need be after lines that were archived."""
        seq, first, torn = self.position.seq, source.first, self._torn
        if torn is not None and (first != seq or torn.place == 0):
            self._differences.add(seq, "", torn.problem)
            return False
        if torn is not None:
            self._forgive(torn)
        if first < seq == self.position.absent:
            # Of segments that were about to be removed, when there was no other way to go on.
            return True
        if first < seq:
            problem = f"is there twice: the segment before it goes on to event {seq - 1}"
            self._differences.add(first, "", problem)
            return False
        if seq < first <= self._log.archived.minimum:
            return self._without_lines(first)
        if seq < first:
            which = f"event {seq} is" if first == seq + 1 else f"events {seq} to {first - 1} are"
            self._differences.add(seq, f"before {source.name}", f"{which} missing")
            return False
        return True

    def _without_lines(self, stop: int) -> bool:
        """Go on behind archived lines, with the hashes in their tiles, or with their edge."""
        position, (minimum, edge) = self.position, self._log.archived
        problem = None
        while position.seq < stop and problem is None:
            problem = self._from_tile(stop)
        if problem is not None and not edge:
            self._differences.add(position.seq, *problem)
            return False
        if problem is not None:
            try:
                self._ledger.resume(Edge(minimum, lambda tile: edge[tile.level]))
            except (Unverified, IndexError):
                self._differences.add(position.seq, "minimum", "has no edge of such a tree")
                return False
            position.seq = minimum
        elif stop == minimum and edge and self._ledger.edge() != edge:
            self._differences.add(minimum, "minimum", "has another edge than the tree in tree/")
        position.absent = position.seq
        return True

    def _from_tile(self, stop: int) -> tuple[str, str] | None:
        """Take the hashes of the next lines from their tile; returns what is wrong with it."""
        position = self.position
        number, place = divmod(position.seq, WIDTH)
        width = min(stop - number * WIDTH, WIDTH)
        data = self._log.tiles.stored(Tile(0, number, width))
        if data is None:
            path = Tile(0, number).path
            return f"tree/{path}", "is missing: it has the hashes of lines that are not there"
        self._ledger.extend(split_hashes(data, width)[place:])
        position.seq = number * WIDTH + width
        return None

    def _read(self, source: Source, group: Iterable[Scanned]) -> None:
        """Take the lines of a segment, up to the first one that is not valid."""
        position = self.position
        place, bad = 0, None
        for one in group:
            if bad is not None:
                continue
            if one.first not in (-1, position.seq):
                bad = f"has seq {one.first} in place of {position.seq}"
                continue
            if one.first >= 0:
                self._take(one)
                place = one.end
            bad = one.bad
        if place == 0 and bad is None:
            bad = "is not there: its segment is empty"
        self._torn = None if bad is None else Torn(source, position.seq, place, bad)

    def _take(self, one: Scanned) -> None:
        position = self.position
        begin, end = one.times
        if begin < position.last_time:
            problem = f"its time {begin} is before that of the line before it, {position.last_time}"
            self._differences.add(one.first, "", problem)
        for fault in one.faults:
            self._differences.add(fault.seq, "", fault.problem)
        for quote in one.quotes:
            statement = self._quoted(quote)
            if statement is not None:
                self._ledger.expect(statement)
        leaves = split_hashes(one.leaves, len(one.leaves) // HASH_BYTES)
        self._ledger.extend(leaves)
        position.seq = one.first + len(leaves)
        position.first_time = position.first_time or begin
        position.last_time = max(position.last_time, end)


def _counted(
    group: Iterable[Scanned], source: Source, done: int, advance: Callable[[int], None]
) -> Iterator[Scanned]:
    for one in group:
        yield one
        advance(done + min(one.end, source.size))
