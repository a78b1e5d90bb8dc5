"""Verifying a log from its files alone: no server, no database, nothing is written. FORMAT.md §9.8.

What was stated of it is read here; `walking` reads its lines, and `core.ledger` compares them.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from typing import NamedTuple

from .core import checkpoint
from .core.checkpoint import Checkpoint
from .core.ledger import Difference, Differences, Ledger, Statement
from .core.merkle import Unverified
from .core.note import Verifier
from .processes import pool
from .storage import history, scanning
from .storage.checkpoints import Checkpoints
from .storage.durable import Durable
from .storage.published import Layout
from .storage.scanning import Quote
from .storage.tree import TileFiles
from .walking import Archived, Log, Position, Torn, Walk

# Logs below so many bytes are verified before other processes have started.
SMALL = 16 << 20

# How many keys that are not known are named.
_FEW = 5


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify. `verifiers` are the log's keys; if there are none, no signature is checked.

    `since` is an older checkpoint of which the log has to be the continuation. So many `processes`
    do it, unless there is little to do.
    """

    root: Path
    verifiers: Sequence[Verifier] = ()
    since: bytes | None = None
    archives: Sequence[Path] = ()
    archived: Archived = Archived()  # noqa: RUF009 - it is immutable
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. Without `differences` the log is the one that was signed as `origin`.

    It has `events` lines with root `root`, `signed` of them under the newest checkpoint; of the
    first `absent` there are only hashes. `times` are those of the first and the last line. The
    history has so many `checkpoints`; `unknown` counts statements about fewer than `absent` events
    that could not be compared, because even the hashes are gone. `foreign` names keys of
    checkpoints in the lines that are not among the log's keys. `differences` are the first of
    `count`.
    """

    origin: str | None
    events: int
    signed: int
    root: bytes
    absent: int
    times: tuple[str, str]
    checkpoints: int
    unknown: int
    foreign: list[str]
    torn: list[str]
    differences: list[Difference]
    count: int


class _Known(NamedTuple):
    """What was there when it began: the newest checkpoint, the newest cosigned one, and how long
    the history was before they were read and after it. The service writes the history first.
    """

    newest: bytes | None
    cosigned: bytes | None
    before: int
    after: int


def verify(
    request: Request, advance: Callable[[int, int], None] = lambda done, of: None
) -> Verdict:
    """Verify a log, which may grow meanwhile. `advance` is told how many bytes are done, of how
    many.

    Raises:
        OSError: something can't be read.
    """
    layout = Layout(request.root)
    known = _known(layout)
    # Only now: they have what the checkpoint covers.
    sources = scanning.sources(layout.events, request.archives)
    total = sum(source.size for source in sources)
    # It is never asked to write.
    tiles = TileFiles(layout.tree, layout.events, Durable())
    with pool(request.processes if total + known.after >= SMALL else 1) as workers:
        log = Log(sources, tiles, request.archived, workers)
        return _Verification(request, known, log).run(lambda done: advance(done, total))


def _known(layout: Layout) -> _Known:
    checkpoints = Checkpoints(layout, Durable())
    before = _length(layout.checkpoints)
    newest, cosigned = checkpoints.newest(), checkpoints.cosigned()
    return _Known(newest, cosigned, before, _length(layout.checkpoints))


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _by_size(statement: Statement) -> int:
    return statement.size


class _Verification:
    """One verification, from the first file to the verdict."""

    def __init__(self, request: Request, known: _Known, log: Log) -> None:
        self._verifiers = request.verifiers
        self._since = request.since
        self._history_file = Layout(request.root).checkpoints
        self._known = known
        self._log = log
        self._differences = Differences()
        self._checkpoints = 0
        # The sizes of the last two of the history that were there before `checkpoint` was read,
        # and of the last one of all.
        self._before = (0, 0)
        self._last = 0
        self._foreign: set[str] = set()
        # The largest checkpoint that a line quotes: its size, and the line.
        self._quoted_most = (0, 0)

    def run(self, advance: Callable[[int], None]) -> Verdict:
        """Verify."""
        newest = self._statement("the newest checkpoint", self._known.newest)
        since = self._statement("the older checkpoint", self._since)
        others = [
            one for one in (newest, since, self._cosigned(), *self._headers()) if one is not None
        ]
        others.sort(key=_by_size)
        signed = max(newest.size if newest else 0, self._last_signed())
        statements = merge(self._signed(), others, key=_by_size)
        ledger = Ledger(statements, self._log.tiles.stored, signed, self._differences)
        walk = Walk(self._log, ledger, self._differences, self._quoted)
        position = walk.run(signed, advance)
        if ledger.late:
            again = Walk(self._log, ledger.again(), Differences(), lambda quote: None)
            again.run(signed, lambda done: None)
        ledger.finish()
        self._hold_newest(newest, position)
        return self._verdict(position, ledger, signed)

    # --- what was stated ----------------------------------------------------------------------

    def _statement(self, place: str, note: bytes | None) -> Statement | None:
        if note is None:
            return None
        try:
            found = history.verified(note, self._verifiers)
        except Unverified as error:
            self._differences.add(None, place, str(error))
            return None
        return Statement(found.size, found.root, place)

    def _signed(self) -> Iterator[Statement]:
        """All that were ever signed, sorted by size. # format §9.3"""
        if not self._known.after:
            return
        batches = history.batches(self._history_file, self._known.after, self._verifiers)
        entries = self._log.pool.each(history.entries, batches)
        torn = 0
        for entry in itertools.chain.from_iterable(entries):
            # After a line that a crash tore there is a whole one.
            first = torn if entry.problem is not None and torn else entry.line
            place = f"line {first} of checkpoints.ndjson"
            if entry.problem is not None:
                self._differences.add(None, place, entry.problem)
            torn = entry.line if entry.statement is None and entry.problem is None else 0
            if entry.statement is None:
                continue
            _, size, root, *_ = entry.statement
            if size < self._last:
                problem = f"is of {size} events, and the one before it of {self._last}"
                self._differences.add(None, place, problem)
                continue
            self._checkpoints += 1
            self._last = size
            if entry.end <= self._known.before:
                self._before = (self._before[1], size)
            yield Statement(size, root, place)

    def _last_signed(self) -> int:
        """The size of the largest checkpoint at the end of the history."""
        if not self._known.after:
            return 0
        tail = history.tail(self._history_file, self._known.after, self._verifiers)
        return max((one.statement.size for one in tail if one.statement), default=0)

    def _headers(self) -> Iterator[Statement | None]:
        """What the first lines of segments quote. # format §5.3"""
        for source in self._log.sources:
            note = scanning.previous_checkpoint(source)
            if note is not None:
                yield self._quoted(Quote(source.first, note))

    def _quoted(self, quote: Quote) -> Statement | None:
        seq, note = quote
        try:
            found, ours = self._maybe_older(note.encode())
        except Unverified as error:
            self._differences.add(seq, "", f"quotes what is no checkpoint of this log: {error}")
            return None
        if found.size > seq:
            problem = f"quotes a checkpoint of {found.size} events, which were not there yet"
            self._differences.add(seq, "", problem)
            return None
        if ours or not self._verifiers:
            self._quoted_most = max(self._quoted_most, (found.size, seq))
        return Statement(found.size, found.root, f"the checkpoint in event {seq}")

    def _cosigned(self) -> Statement | None:
        """# format §9.7"""
        place = "the cosigned checkpoint"
        if self._known.cosigned is None:
            return None
        try:
            found, _ = self._maybe_older(self._known.cosigned)
        except Unverified as error:
            self._differences.add(None, place, str(error))
            return None
        return Statement(found.size, found.root, place)

    def _maybe_older(self, note: bytes) -> tuple[Checkpoint, bool]:
        """What is stated, maybe under a key that the log had before, and whether it is not.

        Raises:
            Unverified: it is not a checkpoint, or its signature by a key of the log is wrong.
        """
        found, parsed = checkpoint.read(note)
        ours = any(key.made(by) for key in self._verifiers for by in parsed.signatures)
        if ours:
            checkpoint.verify(note, self._verifiers)
        elif self._verifiers and len(self._foreign) < _FEW:
            self._foreign |= {f"{by.name}+{by.key_id.hex()}" for by in parsed.signatures}
        return found, ours

    def _hold_newest(self, newest: Statement | None, position: Position) -> None:
        """Whether `checkpoint` and the history belong together. # format §9.3"""
        add = self._differences.add
        if self._known.newest is None:
            if self._before[0] or (position.seq and not self._checkpoints):
                add(None, "the newest checkpoint", "is missing: nothing says what was signed last")
        elif not self._known.after:
            add(None, "checkpoints.ndjson", "is missing")
        elif newest is not None and newest.size < self._before[0]:
            problem = f"is of {newest.size} events, an old one: {self._before[1]} were signed"
            add(None, "the newest checkpoint", problem)
        elif newest is not None and newest.size > self._last:
            add(None, "checkpoints.ndjson", f"lacks the newest checkpoint, of {newest.size} events")
        size, seq = self._quoted_most
        if size > self._last and _length(self._history_file) == self._known.after:
            problem = f"lacks the checkpoint of {size} events that event {seq} quotes"
            add(None, "checkpoints.ndjson", problem)

    # --- the verdict --------------------------------------------------------------------------

    def _verdict(self, position: Position, ledger: Ledger, signed: int) -> Verdict:
        note = self._known.newest
        differences = [
            one if one.place or one.seq is None else one._replace(place=self._place(one.seq))
            for one in self._differences.first()
        ]
        return Verdict(
            origin=_origin(note),
            events=position.seq,
            signed=min(signed, position.seq),
            root=ledger.root(),
            absent=position.absent,
            times=(position.first_time, position.last_time),
            checkpoints=self._checkpoints,
            unknown=ledger.unknown,
            foreign=sorted(self._foreign),
            torn=[_tail(torn) for torn in position.torn],
            differences=differences,
            count=self._differences.count,
        )

    def _place(self, seq: int) -> str:
        """Where a line is, or should be."""
        sources = self._log.sources
        index = bisect_right([source.first for source in sources], seq) - 1
        if index < 0:
            return f"event {seq}"
        return f"event {seq}, line {seq - sources[index].first + 1} of {sources[index].name}"


def _origin(note: bytes | None) -> str | None:
    try:
        return None if note is None else checkpoint.read(note)[0].origin
    except Unverified:
        return None


def _tail(torn: Torn) -> str:
    return f"{torn.source.name} from byte {torn.place} on"
