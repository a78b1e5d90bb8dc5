"""The gate's decision, without any input or output: which intents of a batch become events."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .events import DELIVER, KEY_ROTATE, Event
from .records import Change, Ref

# They stand for a change of which nothing but the event is stored.
_CHANGES_OF_THEIR_OWN = frozenset({DELIVER, KEY_ROTATE})


class Intent(NamedTuple):
    """An operation waiting to happen.

    `depends` names what it read, and how many events the log had when that was read. Without an
    `event` it only asks whether what it read is still current.

    `more` are further events of an operation that consists of several and has no `change`: all of
    them follow `event` at once in the log, or none is in it; after a crash, perhaps only the first.
    """

    event: Event | None
    depends: tuple[tuple[Ref, int], ...]
    change: Change | None = None
    more: tuple[Event, ...] = ()


class Changes:
    """Which resources changed lately, and at which size of the log: a bounded memory.

    What was forgotten counts as changed: the intent is then merely read anew.
    """

    def __init__(self, position: int, limit: int = 65536) -> None:
        self._limit = limit
        self._last: dict[Ref, int] = {}
        self._floor = position

    def record(self, ref: Ref, position: int) -> None:
        """`ref` was changed by the event that made the log `position` events long."""
        self._last.pop(ref, None)
        self._last[ref] = position
        if len(self._last) > self._limit:
            oldest = next(iter(self._last))
            self._floor = max(self._floor, self._last.pop(oldest))

    def outdated(self, depends: Iterable[tuple[Ref, int]]) -> bool:
        """Whether one of these may have changed after the log was so many events long."""
        last, floor = self._last, self._floor
        for ref, position in depends:  # noqa: SIM110 - every read passes here, and `any` costs more
            if last.get(ref, floor) > position:
                return True
        return False


class Admission(NamedTuple):
    """The verdict over a batch. Indices point into it, in the order in which they commit; the index
    of an intent with several events is there as often. `changes` go with the ids of their events.
    """

    events: list[tuple[int, Event]]
    current: list[int]
    stale: list[int]
    changes: list[tuple[str, Change]]


def admit(batch: Sequence[Intent], changes: Changes, position: int) -> Admission:
    """Decide over a batch with the log caught up to `position` events; record what it changes.

    Reads go first: all intents of a batch are concurrent, so any order is a true one, and in this
    one no change of the batch makes a read of it stale.
    """
    verdict = Admission([], [], [], [])
    events, current, stale, made = verdict
    for index in _reads_first(batch):
        event, depends, change, more = batch[index]
        if changes.outdated(depends):
            stale.append(index)
            continue
        if event is None:
            current.append(index)
            continue
        events.append((index, event))
        position += 1
        if change is not None:
            made.append((event.id, change))
        if change is not None or event.action in _CHANGES_OF_THEIR_OWN:
            for ref in event.changed:
                changes.record(ref, position)
        if more:
            events.extend((index, one) for one in more)
            position += len(more)
    return verdict


def _reads_first(batch: Sequence[Intent]) -> Iterable[int]:
    changes = [intent.change for intent in batch]
    if changes.count(None) == len(batch):
        return range(len(batch))
    return sorted(range(len(batch)), key=lambda index: changes[index] is not None)
