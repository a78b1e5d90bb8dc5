"""The index: one database, one worker thread, and a task that follows the log."""

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import aiofiles.os

from ..core.errors import IndexUnavailable, InvalidInput
from ..core.events import Entry
from ..core.minimum import Minimum
from ..core.names import org_hash
from ..core.ports import AuditQuery, Building, Count, Grouping, ListQuery, Tail
from ..core.records import Metadata
from . import audit, events, listing, summary
from .database import Damaged, Database, Unsettled, is_damage, transaction, unwritten
from .gathering import Gathered
from .progress import Progress
from .recent import Recent
from .shelf import Open, Shelf
from .terms import Terms

_LOG = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_TOO_MANY = "gives more than {:,} counts; take 'day', or a shorter time between 'since' and 'until'"

# Steps of the background, each some milliseconds long: a query waits for at most one, and so does
# whatever else there is to do in this process.
_EVENTS = 512
_SECRETS = 128

# How many secrets a listing looks at before other queries get their turn.
_SCAN = 2048

# The background works for at most so long without a pause, pauses thirty-nine times as long as
# it worked (three times while it is in a hurry), and for a while after an error. Seconds.
_WORK = 0.002
_PAUSE = 0.5
_REST = 39
_REST_IN_HURRY = 3
_AFTER_ERROR = 5.0

# With more than so many blocks missing, the index counts as being built; with more than so many, it
# is in a hurry: whoever asks next waits until nothing is missing.
_FAR = 8
_TOO_FAR = 32


# SQLite keeps what it knows of locks per process, and a forked child inherits that: nobody forks
# in the middle of a transaction.
_working = threading.Lock()
os.register_at_fork(
    before=_working.acquire, after_in_parent=_working.release, after_in_child=_working.release
)


class SqliteIndex:
    """The projections in a SQLite file, which several processes may share, or in ":memory:".

    `position` says how many events of the log are committed and published. `remove` deletes a
    file. A file that is gone, damaged or of another log is replaced, and a warning is logged.
    `block` is a multiple of 8, at most 65,536: how many events have their postings together.
    """

    def __init__(
        self,
        tail: Tail,
        path: Path | str,
        position: Callable[[], int],
        remove: Callable[[Path], None],
        block: int = 32768,
    ) -> None:
        self._tail = tail
        self._position = position
        self._block = block
        self._database = Database(path, remove, block, self._first_fill)
        self._opened: Open | None = None
        self._hurry = False
        # What was archived when events were asked for last.
        self._answered: Minimum | None = None
        self._progress = Progress(_FAR * block, time.monotonic)
        # One thread, because SQLite's work is serial anyway and its connection belongs to it.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._follower: asyncio.Task[None] | None = None
        self._closing = False

    async def audit(self, query: AuditQuery, position: int) -> list[Entry]:
        """Matching events among the first `position` ones, newest first unless `query.after` says
        otherwise.

        Raises:
            EventArchived: events after `query.after` were archived, unless that is -1.
            LogDamaged: the log does not hold `position` events.
            IndexUnavailable: the database can't be written.
        """

        def search(opened: Open) -> list[Entry]:
            self._catch_up(opened, position)
            with transaction(opened.connection, "deferred"):
                found = audit.search(opened, self._tail, query, position)
            self._answered = self._tail.minimum()
            return found

        return await self._hop(search)

    async def summary(self, query: AuditQuery, grouping: Grouping, position: int) -> list[Count]:
        """How many of the first `position` events match, by their time and a field, in the order of
        both. Of the query, `limit` and `offset` don't count.

        Raises:
            InvalidInput: there are more counts than `grouping.most`.
            LogDamaged: the log does not hold `position` events.
            IndexUnavailable: the database can't be written.
        """
        counts, rest = summary.Counts(), position
        # What is archived while it counts, counts all the same.
        first = (await self.minimum()).minimum

        def count(opened: Open) -> tuple[summary.Counts, int]:
            self._catch_up(opened, position)
            with transaction(opened.connection, "deferred"):
                return summary.count(opened, query, grouping, (first, rest))

        # In turns with other queries. Events never change, so the counts belong together.
        while rest:
            more, rest = await self._hop(count)
            counts.update(more)
            if len(counts) > grouping.most:
                raise InvalidInput("bucket", _TOO_MANY.format(grouping.most))
        order = sorted(counts, key=lambda one: (one[0], one[1] is not None, one[1] or ""))
        return [Count(start, key, counts[start, key]) for start, key in order]

    async def listing(self, query: ListQuery, position: int) -> list[Metadata]:
        """Matching secrets sorted by name, as they were after `position` events or later.

        Raises:
            LogDamaged: the log does not hold `position` events.
            IndexUnavailable: the database can't be written.
        """
        found: list[Metadata] = []
        after: str | None = query.after
        while len(found) < query.limit:
            rest = query._replace(after=after, limit=query.limit - len(found))
            part, after = await self._hop(partial(self._page, query=rest, position=position))
            found += part
            if after is None:
                break
        return found

    async def organisations(self, position: int) -> list[str]:
        """The ids of all organisations among the first `position` events, archived ones too.

        Raises:
            LogDamaged: the log does not hold `position` events.
            IndexUnavailable: the database can't be written.
        """

        def found(opened: Open) -> list[str]:
            self._catch_up(opened, position)
            archived = self._tail.minimum().organisations
            return sorted({*archived, *opened.terms.organisations()})

        return await self._hop(found)

    async def minimum(self, *, answered: bool = False) -> Minimum:
        """Which events were archived until now, or until the newest answer: it has none of them.

        Raises:
            LogDamaged: what says so can't be read.
        """
        if not answered or self._answered is None:
            self._answered = await self._run(self._tail.minimum)
        return self._answered

    async def key_counts(self, position: int) -> dict[str, int]:
        """How many secrets are under each master key, by key id, over all organisations, as it was
        after `position` events or later.

        Raises:
            LogDamaged: the log does not hold `position` events.
            IndexUnavailable: the database can't be written.
        """

        def count(opened: Open) -> dict[str, int] | None:
            self._catch_up(opened, position)
            while listing.load(opened.connection, self._tail, None, _SECRETS):
                # Within `unwritten`, what was loaded would be lost.
                if not opened.connection.in_transaction:
                    return None
            return listing.key_counts(opened.connection)

        # After a rebuild there is much to load: others get their turn meanwhile.
        while (counts := await self._hop(count)) is None:
            pass
        return counts

    @property
    def building(self) -> Building | None:
        """How far it is, while much of the log is not in it yet."""
        return self._progress.building

    def start(self) -> None:
        """Follow the log in the background, unless another process does."""
        if self._follower is None:
            self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Stop following, and close the database. Nothing is lost: all of it is derived."""
        if self._closing:
            return
        self._closing = True
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await self._run(self._database.close)
        self._executor.shutdown(wait=False)

    async def _follow(self) -> None:
        release: Callable[[], None] | None = None
        try:
            while True:
                try:
                    release = release or await self._run(self._tail.claim)
                    pause = await self._work() if release else await self._hop(self._look)
                except IndexUnavailable as error:
                    _LOG.warning("The index can't follow the log (%s); trying again.", error.reason)
                    pause = _AFTER_ERROR
                except Exception:
                    _LOG.exception("The index can't follow the log; trying again.")
                    pause = _AFTER_ERROR
                await asyncio.sleep(pause)
        finally:
            if release is not None:
                release()

    async def _work(self) -> float:
        """Do some of what there is to do; how many seconds to pause then."""
        worked, more = 0.0, True
        while more and worked < _WORK:
            more, took = await self._hop(self._advance, keep=True)
            worked += took
        rest = _REST_IN_HURRY if self._hurry else _REST
        return max(_PAUSE if not more else 0.0, rest * worked)

    def _look(self, opened: Open) -> float:
        """See how far the process is that follows the log; how many seconds to pause then."""
        self._progress.see(events.state(opened.connection).position, self._position())
        return _PAUSE

    def _advance(self, opened: Open) -> tuple[bool, float]:
        """One small step; whether there is more to do, and how many seconds it took."""
        began = time.perf_counter()
        most = self._block if self._hurry else _EVENTS
        more = self._extend(opened, self._position(), most) or listing.load(
            opened.connection, self._tail, None, _SECRETS
        )
        return more, time.perf_counter() - began

    def _page(
        self, opened: Open, query: ListQuery, position: int
    ) -> tuple[list[Metadata], str | None]:
        self._catch_up(opened, position)
        org = org_hash(query.org_id)
        while listing.load(opened.connection, self._tail, org, _SECRETS):
            self._check_open()
        with transaction(opened.connection, "deferred"):
            return listing.page(opened.connection, query, _SCAN)

    def _catch_up(self, opened: Open, position: int) -> None:
        while (known := events.state(opened.connection)).position < position:
            self._check_open()
            behind = position - known.position
            try:
                self._extend(opened, position, self._block if behind > self._block else _EVENTS)
            except sqlite3.OperationalError as error:
                # Another process held the lock all the time: well, if it does this work.
                if is_damage(error) or events.state(opened.connection) == known:
                    raise

    def _extend(self, opened: Open, stop: int, most: int) -> bool:
        more = events.extend(opened, self._tail, stop, most)
        known = events.state(opened.connection)
        far = stop - known.position > _TOO_FAR * self._block
        self._hurry = far or known.position < known.filled
        self._progress.see(known.position, stop)
        return more

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError("the index is being closed")

    def _first_fill(self, connection: sqlite3.Connection) -> None:
        listing.fill(connection, self._tail, self._position())

    async def _hop(self, work: Callable[[Open], _Result], keep: bool = False) -> _Result:
        """`keep`: the work is of no use if what it writes is lost."""

        def alone() -> _Result:
            with _working:
                return self._guarded(work, keep)

        return await self._run(alone)

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        return await aiofiles.os.wrap(work)(executor=self._executor)

    def _guarded(self, work: Callable[[Open], _Result], keep: bool) -> _Result:
        """Do it, and if the database turns out to be damaged, replace that and do it once more."""
        try:
            return work(self._open())
        except Damaged as damage:
            reason = str(damage)
        except Unsettled as error:
            return self._without_writing(work, keep, error)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                return self._without_writing(work, keep, error)
            reason = str(error)
        self._opened = None
        try:
            self._database.discard(reason)
            return work(self._open())
        except (OSError, sqlite3.DatabaseError, Damaged, Unsettled) as error:
            raise IndexUnavailable(str(error)) from error

    def _without_writing(
        self, work: Callable[[Open], _Result], keep: bool, reason: Exception
    ) -> _Result:
        """Do it in memory, because the database can't be written: on a full disk, say."""
        if keep or self._opened is None:
            raise IndexUnavailable(str(reason)) from reason
        try:
            with unwritten(self._opened.connection):
                return work(self._opened)
        except (sqlite3.DatabaseError, Damaged) as error:
            raise IndexUnavailable(str(reason)) from error
        finally:
            self._opened.terms.forget()
            self._opened.shelf.forget()
            self._opened.recent.forget()
            self._opened.gathered.forget()

    def _open(self) -> Open:
        connection = self._database.current
        if connection is None or self._opened is None:
            self._check_open()
            self._opened = None
            connection = self._database.open()
            self._opened = Open(
                connection,
                Terms(connection),
                Shelf(connection, self._block),
                Recent(self._block),
                Gathered(self._block),
            )
            events.verify(connection, self._tail)
        elif events.state(connection).position > self._position():
            # Another process may know more of the log; or the log was replaced by a shorter one.
            events.verify(connection, self._tail)
        return self._opened
