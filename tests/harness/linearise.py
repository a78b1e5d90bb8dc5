"""The checker of histories: could all of it have happened one at a time?

After Wing and Gong, "Testing and Verifying Concurrent Objects" (1993), with Lowe's memory of
configurations, "Testing for Linearizability" (2017). Pure: no clock, no input, no output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

Kind = Literal["set", "delete", "get", "metadata", "revoke", "use"]
Outcome = Literal[
    "created",
    "updated",
    "deleted",
    "found",
    "revoked",
    "used",
    "missing",
    "conflict",
    "refused",
    "unforeseen",
]


class Call(msgspec.Struct, frozen=True):
    """What was asked for: of a secret, or `revoke` and `use` of an API key.

    `key` is the API key that it was asked with, if that is one which may be revoked.
    """

    kind: Kind
    subject: str
    value: str | None = None
    if_match: str | None = None
    if_none_match: bool = False
    key: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """What came back; None where the interface doesn't tell. `refused` is a 401.

    `unforeseen` is what should never come back, told in `value`: no order explains it.
    """

    outcome: Outcome
    value: str | None = None
    version: int | None = None
    etag: str | None = None


class Operation(msgspec.Struct, frozen=True):
    """One operation of a history. Times are of one clock for all processes, in nanoseconds.

    Without an answer its outcome is unknown: it may have happened at any time after its
    invocation, or never.
    """

    process: str
    call: Call
    invoked_at: int
    completed_at: int | None = None
    answer: Answer | None = None

    @property
    def subjects(self) -> tuple[str, ...]:
        """The secrets and API keys that it tells something about, all at the same moment."""
        refused = self.answer is not None and self.answer.outcome == "refused"
        subject = () if self.call.kind == "use" or refused else (self.call.subject,)
        key = () if self.call.key in (None, *subject) else (self.call.key,)
        return (*subject, *(one for one in key if one is not None))

    def precedes(self, other: "Operation") -> bool:
        """Whether it was over before the other one began."""
        return self.completed_at is not None and self.completed_at < other.invoked_at


class Stored(NamedTuple):
    """A secret that is there. Without an `etag`, nobody was told it; it is none of `other_than`."""

    value: str | None
    version: int
    etag: str | None = None
    other_than: frozenset[str] = frozenset()


class Impossible:
    """An operation can't have had this answer in this state."""


# A secret that is absent or there; an API key that is live or not.
State = Stored | None | bool
IMPOSSIBLE = Impossible()


@dataclass(frozen=True, slots=True)
class Violation:
    """A history that can't have happened one at a time. `stuck`: what fits nowhere, in the longest
    order that was found for the others.
    """

    operations: tuple[Operation, ...]
    stuck: tuple[Operation, ...]

    def __str__(self) -> str:
        origin = min(operation.invoked_at for operation in self.operations)
        lines = [_line(one, origin, "!" if one in self.stuck else " ") for one in self.operations]
        return "\n".join(["no order explains what has a '!' (times in µs):", *lines])


def find_violation(history: Sequence[Operation]) -> Violation | None:
    """None if there is an order of the operations, true to their times, in which each answer is
    right. All secrets are absent at first, and all API keys live.
    """
    for together in _components(history):
        found = _Search(together).violation()
        if found is not None:
            return found
    return None


def _components(history: Sequence[Operation]) -> list[list[Operation]]:
    """The operations by what they are about, as linearisability is local (Herlihy and Wing,
    1990). What an operation touches at one moment, a secret and an API key, belongs together.
    """
    group: dict[str, str] = {}

    def root(subject: str) -> str:
        while (above := group.setdefault(subject, subject)) != subject:
            subject = above
        return subject

    for operation in history:
        for subject in operation.subjects:
            group[root(subject)] = root(operation.subjects[0])
    found: dict[str, list[Operation]] = {}
    for operation in history:
        if operation.subjects:
            found.setdefault(root(operation.subjects[0]), []).append(operation)
    return list(found.values())


class _Search:
    """The search over the operations of one component.

    A configuration is the set of operations that have happened, as bits, and the states then.
    """

    def __init__(self, history: Sequence[Operation]) -> None:
        # A read that nobody got an answer to says nothing.
        told = [
            one for one in history if one.answer or one.call.kind in ("set", "delete", "revoke")
        ]
        self._operations = sorted(told, key=lambda one: one.invoked_at)
        self._ends = [_end(one) for one in self._operations]
        subjects = sorted({subject for one in told for subject in one.subjects})
        self._place = {subject: number for number, subject in enumerate(subjects)}
        keys = {one.call.key for one in told}
        keys |= {one.call.subject for one in told if one.call.kind == "revoke"}
        self._initial: tuple[State, ...] = tuple(
            True if subject in keys else None for subject in subjects
        )

    def violation(self) -> Violation | None:
        """None if some order explains everything."""
        wanted = sum(1 << number for number, one in enumerate(self._operations) if one.answer)
        seen: set[tuple[int, tuple[State, ...]]] = set()
        furthest = 0
        stack = [(0, self._initial)]
        while stack:
            done, states = stack.pop()
            done = self._settle(done, states)
            if done & wanted == wanted:
                return None
            if (done, states) in seen:
                continue
            seen.add((done, states))
            if (done & wanted).bit_count() > (furthest & wanted).bit_count():
                furthest = done
            for number in self._next(done):
                after = self._after(number, states)
                if after is not None and after != states:
                    stack.append((done | 1 << number, after))
        stuck = [one for number, one in enumerate(self._operations) if not furthest >> number & 1]
        return Violation(tuple(self._operations), tuple(one for one in stuck if one.answer))

    def _settle(self, done: int, states: tuple[State, ...]) -> int:
        """Let everything happen that can and changes nothing: if it fits later, it fits now."""
        before = None
        while before != done:
            before = done
            for number in self._next(done):
                if self._after(number, states) == states:
                    done |= 1 << number
        return done

    def _next(self, done: int) -> Iterator[int]:
        """What may happen next: nothing that has not happened was over before it began."""
        deadline = float("inf")
        # The lowest bit that is not set.
        first = (~done & (done + 1)).bit_length() - 1
        for number in range(first, len(self._operations)):
            if self._operations[number].invoked_at > deadline:
                return
            if not done >> number & 1:
                deadline = min(deadline, self._ends[number])
                yield number

    def _after(self, number: int, states: tuple[State, ...]) -> tuple[State, ...] | None:
        """The states after an operation; None if it can't have happened in these."""
        operation = self._operations[number]
        call, answer = operation.call, operation.answer
        if answer is not None and answer.outcome == "unforeseen":
            return None
        refused = answer is not None and answer.outcome == "refused"
        if call.key is not None and states[self._place[call.key]] is refused:
            return None
        if refused or call.kind == "use":
            return states
        place = self._place[call.subject]
        after = _after(call, answer, states[place])
        if isinstance(after, Impossible):
            return None
        return states if after is states[place] else (*states[:place], after, *states[place + 1 :])


def _after(call: Call, answer: Answer | None, state: State) -> State | Impossible:
    if call.kind == "revoke":
        if answer is not None and answer.outcome == "missing":
            return IMPOSSIBLE if state else state
        return False if state else IMPOSSIBLE
    assert not isinstance(state, bool)
    conflict = answer is not None and answer.outcome == "conflict"
    found = _checked(call, state, met=not conflict)
    if isinstance(found, Impossible) or conflict:
        return found
    if call.kind == "set":
        return _written(call, answer, found)
    if call.kind == "delete":
        missing = answer is not None and answer.outcome == "missing"
        return None if (found is None) == missing else IMPOSSIBLE
    assert answer is not None
    return _read(answer, found)


def _checked(call: Call, stored: Stored | None, met: bool) -> Stored | Impossible | None:
    """What is stored if the precondition was met, or was not: as much more as that tells."""
    if call.if_none_match:
        return stored if (stored is None) == met else IMPOSSIBLE
    if call.if_match is None:
        return stored if met else IMPOSSIBLE
    if stored is None or call.if_match == "*":
        return stored if (stored is not None) == met else IMPOSSIBLE
    if met:
        return _told(stored, call.if_match)
    if stored.etag is None:
        return stored._replace(other_than=stored.other_than | {call.if_match})
    return IMPOSSIBLE if stored.etag == call.if_match else stored


def _told(stored: Stored, etag: str | None) -> Stored | Impossible:
    """What is stored, now that this was told as its entity tag."""
    if etag in (None, stored.etag):
        return stored
    if stored.etag is not None or etag in stored.other_than:
        return IMPOSSIBLE
    return Stored(stored.value, stored.version, etag)


def _written(call: Call, answer: Answer | None, before: Stored | None) -> Stored | Impossible:
    version = 1 if before is None else before.version + 1
    if answer is None:
        return Stored(call.value, version)
    outcome = "created" if before is None else "updated"
    if answer.outcome != outcome or answer.version not in (None, version):
        return IMPOSSIBLE
    return Stored(call.value, version, answer.etag)


def _read(answer: Answer, stored: Stored | None) -> Stored | Impossible | None:
    if stored is None or answer.outcome == "missing":
        return None if stored is None and answer.outcome == "missing" else IMPOSSIBLE
    if answer.value not in (None, stored.value) or answer.version not in (None, stored.version):
        return IMPOSSIBLE
    return _told(stored, answer.etag)


def _end(operation: Operation) -> float:
    return float("inf") if operation.completed_at is None else operation.completed_at


def _line(operation: Operation, origin: int, mark: str) -> str:
    begin, end = (operation.invoked_at - origin) // 1000, operation.completed_at
    until = "?" if end is None else str((end - origin) // 1000)
    return (
        f"{mark} {begin:>8}-{until:<8} {operation.process:<12} "
        f"{_shown(operation.call)} -> {_shown(operation.answer) or 'unknown'}"
    )


def _shown(shape: Call | Answer | None) -> str:
    if shape is None:
        return ""
    fields = msgspec.structs.asdict(shape).items()
    return " ".join(f"{name}={text}" for name, text in fields if text not in (None, False))
