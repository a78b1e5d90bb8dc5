"""The commit of the files store: lock, catch up, admit, stage, append, publish, unlock.

Everything here blocks, and runs in the one commit thread of its store.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from ..core.errors import InvalidInput, LogDamaged, LogUnavailable
from ..core.events import CHANGES, Receipt, changed
from ..core.intents import Admission, Changes, Intent, admit
from ..core.ports import STALE, Sources, Verdict
from ..core.records import Change, Proof, PutSecret, Ref, SecretRecord, Single, singles
from . import wire
from .cache import CiphertextCache
from .commitlock import CommitLock
from .durable import PRIVATE_FILE, Durable
from .eventlog import HEADER_BYTES, Archived, EventLog, SegmentLimits
from .published import Layout, Published
from .reserve import RESERVE_BYTES, Reserve, ordinary
from .staging import Journal, Leftovers, sync_published
from .wire import Followed

# A journal is settled when it has grown this large, in bytes.
JOURNAL_LIMIT = 8 << 20

_KEPT = f"{os.strerror(errno.ENOSPC)}; the reserve is kept for refusals, deletions and operators"


@dataclass(frozen=True, slots=True)
class Environment:
    """What an engine works with."""

    layout: Layout
    durable: Durable
    published: Published
    cache: CiphertextCache
    sources: Sources
    limits: SegmentLimits
    reserve_bytes: int = RESERVE_BYTES


class Engine:
    """One process's hand on a data directory.

    After an OSError nothing in memory is trusted: `commit` opens the directory anew, which is
    the same recovery as after a crash.
    """

    def __init__(self, environment: Environment, reserve: Reserve) -> None:
        self._env = environment
        self._reserve = reserve
        self._log: EventLog | None = None
        # One that is not opened yet, but has been read already.
        self._approached: EventLog | None = None
        self._lock = CommitLock(environment.layout, environment.durable, self._prepare)
        self._changes = Changes(0)
        # How long the log was with the newest change by others of which nobody has looked yet
        # whether it is published; 0 without one.
        self._foreign = 0
        self._journal: Journal | None = None
        # Whether the log may hold lines that nobody has synced.
        self._unsynced = False
        # Why committed changes can't be published. Nothing is appended as long as it lasts.
        self._stuck: OSError | None = None
        self.position = 0

    @property
    def staged(self) -> int:
        """Bytes of changes that are staged and not yet settled."""
        return 0 if self._journal is None else self._journal.size

    def commit(self, batch: Sequence[Intent]) -> list[Verdict]:
        """One verdict for each intent; see `Store.commit`."""
        self._approach()
        with self._lock.held():
            try:
                verdicts = self._commit_within_room(batch, self._caught_up())
            except OSError as error:
                self._abandon()
                self._reserve.release(error)
                raise LogUnavailable.of(error) from error
            except BaseException:
                self._abandon()
                raise
        return self._durable(verdicts)

    def seal_journal(self) -> Journal | None:
        """Take the journal out of use, to be settled: in this thread, the settling in any other."""
        journal, self._journal = self._journal, None
        return journal

    def probe(self) -> None:
        """See `Store.probe`. In any thread."""
        draft = self._env.layout.staged / f"{uuid4().hex}.tmp"
        try:
            if self._reserve.in_use() and not self._reserve.has_room():
                raise OSError(errno.ENOSPC, _KEPT)
            # Not synced, which would cost more than it tells.
            self._env.durable.create(draft, bytes(HEADER_BYTES), PRIVATE_FILE, sync=False)
            self._env.durable.unlink(draft)
        except OSError as error:
            raise LogUnavailable.of(error) from error

    def keep_reserve(self) -> None:
        """See `Store.watch`."""
        with self._lock.held():
            try:
                self._reserve.keep()
            except OSError as error:
                raise LogUnavailable.of(error) from error

    def close(self) -> None:
        """Settle and release everything."""
        journal = self.seal_journal()
        try:
            if journal is not None:
                journal.settle()
        finally:
            self._abandon()
            self._lock.close()

    def _prepare(self) -> None:
        """Make all directories that there have to be."""
        layout, durable = self._env.layout, self._env.durable
        new = [path for path in (layout.root, *layout.root.parents) if not path.exists()]
        for directory in (layout.root, layout.events, layout.staged, layout.keys):
            durable.make_directory(directory)
        for path in new:
            durable.sync_path(path.parent)
        # FlowMason 1.0 made its directories with the default mode.
        for org in layout.organisations():
            durable.restrict(layout.root / org)
        durable.sync_path(layout.root)

    def _approach(self) -> None:
        """Read what others have appended before the lock is asked for, however much that is: while
        it is held, everybody waits.
        """
        try:
            if self._log is not None:
                self._follow(self._log.approach())
            else:
                if self._approached is None:
                    self._approached = self._new_log()
                for _ in self._approached.approach():
                    pass
        except (OSError, LogDamaged):
            # Whatever is wrong shows itself again under the lock, where it is told.
            self._abandon()

    def _new_log(self) -> EventLog:
        env = self._env
        return EventLog(env.layout, env.durable, env.sources, env.limits)

    def _follow(self, lines: Iterable[Followed]) -> None:
        """Note what others have changed."""
        for line in lines:
            self._unsynced = True
            # Nearly all are reads.
            for ref in changed(line) if line.action in CHANGES else ():
                self._changes.record(ref, line.seq + 1)
                self._env.cache.drop(ref)
                self._foreign = line.seq + 1

    def _caught_up(self) -> EventLog:
        """The log with everything in it that any process has appended, and all of it published."""
        try:
            behind = self._log is not None and self._log.changed()
        except Archived:
            # What happened since can't be read any more here: as if it began now.
            self._abandon()
        log = self._log
        if log is None:
            return self._open()
        if behind:
            self._follow(log.catch_up())
        foreign, self._foreign = self._foreign, 0
        if self._stuck is not None or (foreign and foreign > self._lock.published):
            self._recover(log)
        # Not before: whoever reads files now that are not published must not pass for having read
        # them after these events.
        self.position = log.position
        return log

    def _open(self) -> EventLog:
        env = self._env
        log, self._approached = self._approached or self._new_log(), None
        try:
            log.open()
            if log.position < self.position:
                raise LogDamaged(
                    f"The log has {log.position} events, and had {self.position} before. "
                    "Put back what is missing, and start again."
                )
            self._recover(log)
        except BaseException:
            log.close()
            raise
        self._log = log
        self._unsynced = True
        self._foreign = 0
        # Whatever was read before this is read again.
        self._changes = Changes(log.position)
        env.cache.clear()
        self.position = log.position
        return log

    def _recover(self, log: EventLog) -> None:
        """Publish what is staged and has its event in the log; drop what has not.

        What can't be published, on a full disk, stays staged, and is read from there.

        Only the newest change of each resource counts: if that one is not staged any more, it is
        published and durable, and what is staged of older ones must not come back.
        """
        leftovers = Leftovers(self._env.layout.staged, self._env.durable)
        if leftovers:
            # Nothing is published whose event could still vanish.
            log.sync()
            staged = leftovers.changes()
            newest: dict[Ref, str] = {}
            for line in log.lines(leftovers.position):
                newest.update(dict.fromkeys(changed(line), line.id))
            due = [staged[place] for place in newest.items() if place in staged]
            if not self._published_again(due):
                return
        leftovers.remove()
        self._env.published.hold(())
        self._stuck = None
        # Too small a number is safe: it makes others recover once more. Without it, metadata
        # would not be readable on a full disk.
        with contextlib.suppress(OSError):
            self._lock.published = log.position

    def _published_again(self, changes: Sequence[Single]) -> bool:
        published = self._env.published
        try:
            paths = {path for change in changes for path in published.publish_again(change)}
            sync_published(paths, self._env.durable)
        except OSError as error:
            # They are committed, so they may have of the reserve whatever they are.
            if self._reserve.release(error):
                return self._published_again(changes)
            published.hold(changes)
            self._stuck = error
            return False
        return True

    def _commit_within_room(self, batch: Sequence[Intent], log: EventLog) -> list[Verdict]:
        """Commit all of it; or without what is ordinary, as long as the reserve is in use."""
        if not self._reserve.in_use():
            return self._commit(batch, log)
        if any(ordinary(intent.event) for intent in batch) and self._reserve.refill():
            return self._commit(batch, log)
        return self._commit_without_ordinary(batch, log)

    def _commit_without_ordinary(self, batch: Sequence[Intent], log: EventLog) -> list[Verdict]:
        rest = [intent for intent in batch if not ordinary(intent.event)]
        decided = iter(self._commit(rest, log))
        return [
            LogUnavailable(_KEPT) if ordinary(intent.event) else next(decided) for intent in batch
        ]

    def _again(self, batch: Sequence[Intent], position: int, error: OSError) -> list[Verdict]:
        """Commit on the reserve what the disk had no room for."""
        ids = {intent.event.id for intent in batch if intent.event is not None}
        log = self._caught_up()
        if any(line.id in ids for line in log.lines(position)):
            # Some got into the log. That is allowed for what is not acknowledged, but once only.
            return [LogUnavailable.of(error) if intent.event else STALE for intent in batch]
        return self._commit_without_ordinary(batch, log)

    def _commit(self, batch: Sequence[Intent], log: EventLog) -> list[Verdict]:
        verdicts: list[Verdict] = [None] * len(batch)
        position = log.position
        admission = admit(batch, self._changes, log.position)
        for index in admission.stale:
            verdicts[index] = STALE
        try:
            if admission.events:
                if self._stuck is not None:
                    raise self._stuck
                self._append(admission, verdicts, log)
        except wire.Unwritable as error:
            refused = {admission.events[n][0]: reason for n, reason in error.reasons.items()}
            return self._without(batch, refused, log)
        except OSError as error:
            # What needs no event is answered all the same: metadata stay readable.
            self._abandon()
            if self._reserve.release(error):
                return self._again(batch, position, error)
            for index, _ in admission.events:
                verdicts[index] = LogUnavailable.of(error)
        return verdicts

    def _durable(self, verdicts: list[Verdict]) -> list[Verdict]:
        """The verdicts, once every line that they rest on is on stable storage.

        Without the lock: whoever appends behind these lines meanwhile syncs them with his own, and
        no change waits here to be published. So several processes sync at once.
        """
        if self._log is None or not self._unsynced:
            return verdicts
        try:
            self._log.sync()
        except OSError as error:
            # What needs no event is answered all the same.
            self._abandon()
            self._reserve.release(error)
            return [LogUnavailable.of(error) if isinstance(v, Receipt) else v for v in verdicts]
        self._unsynced = False
        return verdicts

    def _without(
        self, batch: Sequence[Intent], refused: dict[int, str], log: EventLog
    ) -> list[Verdict]:
        """Refuse what can't be a line; decide anew over the others, which have other seqs then."""
        # The changes of the others were recorded with those seqs.
        self._changes = Changes(log.position)
        self.position = log.position
        rest = [intent for index, intent in enumerate(batch) if index not in refused]
        decided = iter(self._commit(rest, log))
        return [
            InvalidInput("event", refused[index]) if index in refused else next(decided)
            for index in range(len(batch))
        ]

    def _append(
        self,
        admission: Admission,
        verdicts: list[Verdict],
        log: EventLog,
    ) -> None:
        admitted, changes = admission.events, admission.changes
        if changes:
            self._stage(changes, log.position)
        log.append([event for _, event in admitted])
        self._unsynced = True
        if changes:
            log.sync()
            self._unsynced = False
            self._publish([change for _, change in changes], log)
        for seq, (index, event) in enumerate(admitted, log.position - len(admitted)):
            verdicts[index] = Receipt(seq, event.id)
        # If publishing failed, the log is abandoned: whoever read the old files meanwhile must not
        # pass for having read them after this batch.
        if self._log is log:
            self.position = log.position

    def _stage(self, changes: Sequence[tuple[str, Change]], position: int) -> None:
        if self._journal is not None and self._journal.orphaned():
            self._journal.close()
            self._journal = None
        if self._journal is None:
            env = self._env
            self._journal = Journal(env.layout.staged, env.durable, uuid4().hex, position)
        self._journal.stage(changes)

    def _publish(self, changes: Sequence[Change], log: EventLog) -> None:
        """Publish in the order of commits: the lock is still held."""
        env, journal = self._env, self._journal
        assert journal is not None  # noqa: S101 - _stage has set it
        parts = [part for change in changes for part in singles(change)]
        try:
            for _, single in parts:
                journal.published.update(env.published.publish(single))
            self._lock.published = log.position
        except OSError:
            # They are committed: recovery publishes them as soon as it can, before anything else.
            self._abandon()
            return
        for ref, single in parts:
            if isinstance(single, PutSecret):
                record = SecretRecord(single.metadata, single.token, log.position, proof=Proof())
                env.cache.put(ref, record)

    def _abandon(self) -> None:
        for log in (self._log, self._approached):
            if log is not None:
                log.close()
        self._log = self._approached = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._env.cache.clear()
