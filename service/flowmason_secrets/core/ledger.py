"""Holding a log against what was stated about it: the state of a verification. FORMAT.md §9."""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from . import merkle
from .checkpoint import MAX_SIZE
from .merkle import HASH_BYTES, Unverified
from .tiles import WIDTH, Edge, Tile, TileHashes, level_size, split_hashes

# Of how many differences there is talk; those behind them are counted.
MOST = 20

# How many lines that may not be the signed ones are remembered, and how many of the newest roots.
_SUSPECTS = 1000
_RECENT = 10_000

# The bytes of a tile as they are stored, None if they are not.
Stored = Callable[[Tile], bytes | None]


class Difference(NamedTuple):
    """Something that is not as it has to be, with the first bad place.

    `seq` is that of the first bad line, None if the lines are not what is wrong. `place` is empty
    if it is that line.
    """

    seq: int | None
    place: str
    problem: str


class Differences:
    """The first differences of each kind that were found, and how many there were."""

    def __init__(self) -> None:
        self.count = 0
        self._found: list[Difference] = []

    def add(self, seq: int | None, place: str, problem: str) -> None:
        """Note a difference."""
        self.count += 1
        # The first bad line is wanted, and they don't come in its order.
        self._found.append(Difference(seq, place, problem))
        if len(self._found) > 2 * MOST:
            self._found = self.first()

    def first(self) -> list[Difference]:
        """The first ones: those of lines by their seq, then the others in the order they came."""
        return sorted(self._found, key=lambda one: (one.seq is None, one.seq or 0))[:MOST]


class Statement(NamedTuple):
    """What is stated somewhere: with so many lines the root was this."""

    size: int
    root: bytes
    place: str


class _Range(NamedTuple):
    """The statement is not true of the lines, the last of a size up to `good` was."""

    good: int
    statement: Statement


class Ledger:
    """Takes the leaf hashes of a log in order, and compares its roots with statements and its tiles
    with stored ones.

    `statements` come sorted by their size. `signed` is the size of the newest checkpoint: tiles
    count up to there.
    """

    def __init__(
        self,
        statements: Iterator[Statement],
        stored: Stored,
        signed: int,
        differences: Differences,
        good: int = 0,
    ) -> None:
        self._statements = statements
        self._stored = stored
        self._signed = signed
        self._differences = differences
        self._edge = Edge()
        self._next = next(statements, None)
        self._soon: list[Statement] = []
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        # Statements about sizes that are further back than the newest roots.
        self.late: list[Statement] = []
        # How many statements could not be compared.
        self.unknown = 0
        self._good = good
        self._wrong: _Range | None = None
        # Statements that are not true, although later ones are.
        self._contradictions: list[Statement] = []
        self._suspects: list[tuple[int, bytes]] = []
        self._tiles: list[str] = []
        self._settle()

    @property
    def size(self) -> int:
        """How many leaves there are."""
        return self._edge.size

    def root(self) -> bytes:
        """The root over all of them."""
        return self._edge.root()

    def edge(self) -> tuple[bytes, ...]:
        """The hashes of the last tile of each level, empty if it is full. # format §11.1"""
        partial = {tile.level: data for tile, data in self._edge.partial()}
        return tuple(partial.get(level, b"") for level in range(max(partial, default=-1) + 1))

    def expect(self, statement: Statement) -> None:
        """Compare one more statement, of any size."""
        if statement.size > self.size:
            heapq.heappush(self._soon, statement)
        elif (root := self._recent.get(statement.size)) is not None:
            self._compare(statement, root)
        else:
            self.late.append(statement)

    def resume(self, edge: Edge) -> None:
        """Go on behind lines of which there is nothing left but the edge of their tree: what was
        stated of fewer can't be compared.
        """
        self._edge = edge
        self._good = edge.size
        while self._next is not None and self._next.size < edge.size:
            self.unknown += 1
            self._next = next(self._statements, None)
        while self._soon and self._soon[0].size < edge.size:
            self.unknown += 1
            heapq.heappop(self._soon)
        self._settle()

    def extend(self, leaves: Sequence[bytes]) -> None:
        """Append leaf hashes."""
        start = 0
        while start < len(leaves):
            stop = min(self._target() - self.size + start, len(leaves))
            for tile, data in self._edge.extend(leaves[start:stop]):
                self._hold_tile(tile, data)
            start = stop
            self._settle()

    def again(self) -> "Ledger":
        """What settles the late statements, before `finish`, from the same leaves."""
        late = iter(sorted(self.late))
        ledger = Ledger(late, lambda tile: None, 0, self._differences, self._good)
        ledger._contradictions = self._contradictions
        return ledger

    def finish(self) -> None:
        """All leaves are there: note what differs, at the first bad place."""
        if self.size < self._signed:
            self._hold_partial()
        beyond, wrong, add = self._beyond(), self._wrong, self._differences.add
        for statement in self._contradictions:
            add(*self._contradicted(statement))
        if wrong is not None:
            add(*self._located(wrong))
        elif beyond is not None:
            add(*self._missing(beyond))
        elif not self._contradictions:
            for path in self._tiles:
                problem = "does not have the hashes of the lines; tree/ is a cache: remove it"
                add(None, f"tree/{path}", problem)

    # --- roots ------------------------------------------------------------------------------

    def _target(self) -> int:
        """The next size whose root is wanted, behind the present one."""
        sizes = [one.size for one in (*self._soon[:1], self._next) if one is not None]
        return min((size for size in (*sizes, self._signed) if size > self.size), default=MAX_SIZE)

    def _settle(self) -> None:
        """Compare the statements about the present size."""
        size, root = self.size, None
        while self._next is not None and self._next.size <= size:
            root = root or self.root()
            self._compare(self._next, root)
            self._next = next(self._statements, None)
        while self._soon and self._soon[0].size <= size:
            root = root or self.root()
            self._compare(heapq.heappop(self._soon), root)
        if root is not None:
            self._recent[size] = root
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        if size == self._signed and size:
            self._hold_partial()

    def _compare(self, statement: Statement, root: bytes) -> None:
        wrong = self._wrong
        if statement.root != root:
            if statement.size <= self._good:
                self._contradict(statement)
            elif wrong is None:
                self._wrong = _Range(self._good, statement)
            elif wrong.statement.size == statement.size and wrong.statement.root != statement.root:
                self._contradict(statement)
        elif statement.size >= self._good:
            if wrong is not None and wrong.statement.size <= statement.size:
                # What came later is true: the lines are right, and this was never said of them.
                self._contradict(wrong.statement)
                self._wrong = None
            self._good = statement.size

    def _contradict(self, statement: Statement) -> None:
        if len(self._contradictions) < MOST:
            self._contradictions.append(statement)

    def _beyond(self) -> Statement | None:
        """The largest statement about more lines than there are."""
        largest = max(self._soon, key=lambda one: one.size, default=None)
        while self._next is not None:
            if largest is None or self._next.size >= largest.size:
                largest = self._next
            self._next = next(self._statements, None)
        return largest

    # --- tiles, and which line it is --------------------------------------------------------

    def _hold_partial(self) -> None:
        for tile, data in self._edge.partial():
            self._hold_tile(tile, data)

    def _hold_tile(self, tile: Tile, data: bytes) -> None:
        covered = level_size(self._signed, tile.level) - tile.number * WIDTH
        if covered <= 0:
            return
        width = min(tile.width, covered)
        stored = self._stored(Tile(tile.level, tile.number, width))
        data = data[: width * HASH_BYTES]
        if stored is None or stored == data:
            return
        if len(self._tiles) < MOST:
            self._tiles.append(tile.full.path)
        if tile.level == 0 and len(self._suspects) < _SUSPECTS:
            pairs = zip(split_hashes(stored, width), split_hashes(data, width), strict=True)
            self._suspects += [
                (tile.number * WIDTH + place, old)
                for place, (old, new) in enumerate(pairs)
                if old != new
            ]

    def _first_changed(self, good: int, statement: Statement) -> int | None:
        """The first line of which the tiles prove that another one was signed in its place."""

        def read(tile: Tile) -> bytes:
            data = self._stored(tile)
            if data is None:
                raise Unverified("a tile is missing")
            return data

        hashes = TileHashes(statement.size, read)
        for seq, leaf in self._suspects:
            if not good <= seq < statement.size:
                continue
            try:
                proof = merkle.inclusion_proof(seq, statement.size, hashes)
                merkle.verify_inclusion(seq, statement.size, leaf, proof, statement.root)
            except Unverified:
                continue
            return seq
        return None

    def _contradicted(self, statement: Statement) -> tuple[int | None, str, str]:
        seq = self._first_changed(0, statement)
        if seq is not None:
            return seq, "", f"was changed since {statement.place} was signed"
        problem = f"was signed over other events than the first {statement.size} of this log"
        return None, statement.place, problem

    def _located(self, wrong: _Range) -> tuple[int, str, str]:
        good, statement = wrong
        seq = self._first_changed(good, statement)
        if seq is not None:
            return seq, "", f"was changed since {statement.place} was signed"
        last = statement.size - 1
        return (
            good,
            "" if good == last else f"somewhere among events {good} to {last}",
            f"changed since {statement.place} was signed (tree/ does not tell which line)",
        )

    def _missing(self, beyond: Statement) -> tuple[int, str, str]:
        seq = self._first_changed(self._good, beyond)
        if seq is not None and seq < self.size:
            return seq, "", f"was changed since {beyond.place} was signed"
        last = beyond.size - 1
        which = f"event {last} is" if self.size == last else f"events {self.size} to {last} are"
        return (
            self.size,
            "the end of the log",
            f"{which} missing: {beyond.place} was signed over them",
        )
