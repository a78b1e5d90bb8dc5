"""The checker itself: it accepts what can have happened one at a time, and nothing else."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness.every_order import Store, answers, explains
from .harness.linearise import Answer, Call, Operation, find_violation

A, B, KEY = "A", "B", "key"


def op(begin: int, end: int | None, call: Call, answer: Answer | None) -> Operation:
    return Operation("p", call, begin, end, answer)


def put(begin: int, end: int, value: str, version: int, **more: object) -> Operation:
    """An acknowledged write of `value`, whose entity tag is `e-<value>`."""
    answer = Answer("created" if version == 1 else "updated", None, version, f"e-{value}")
    return op(begin, end, Call("set", A, value, **more), answer)  # type: ignore[arg-type]


def read(begin: int, end: int, value: str | None, key: str | None = None) -> Operation:
    """A read that returned `value`, or that there is none."""
    answer = Answer("missing") if value is None else Answer("found", value)
    return op(begin, end, Call("get", A, key=key), answer)


def lost(begin: int, kind: str, **more: object) -> Operation:
    """An operation whose outcome nobody learnt."""
    return op(begin, None, Call(kind, A, **more), None)  # type: ignore[arg-type]


def delete(begin: int, end: int, outcome: str = "deleted", **more: object) -> Operation:
    return op(begin, end, Call("delete", A, **more), Answer(outcome))  # type: ignore[arg-type]


def failed(begin: int, end: int, value: str, **more: object) -> Operation:
    """A conditional write that was turned down."""
    return op(begin, end, Call("set", A, value, **more), Answer("conflict"))  # type: ignore[arg-type]


def revoke(begin: int, end: int, outcome: str = "revoked", key: str | None = None) -> Operation:
    return op(begin, end, Call("revoke", KEY, key=key), Answer(outcome))  # type: ignore[arg-type]


def refused(begin: int, end: int) -> Operation:
    return op(begin, end, Call("get", A, key=KEY), Answer("refused"))


def unversioned(begin: int, end: int, value: str, outcome: str) -> Operation:
    """A write of which neither version nor entity tag were told."""
    return op(begin, end, Call("set", A, value), Answer(outcome))  # type: ignore[arg-type]


def etag(begin: int, end: int, version: int, tag: str) -> Operation:
    return op(begin, end, Call("metadata", A), Answer("found", None, version, tag))


POSSIBLE: dict[str, list[Operation]] = {
    "nothing": [],
    "read of what is absent": [read(0, 1, None)],
    "write, then read": [put(0, 1, "x", 1), read(2, 3, "x")],
    "a read beside a write sees it already": [put(0, 9, "x", 1), read(1, 2, "x")],
    "a read beside a write does not see it yet": [put(0, 9, "x", 1), read(1, 2, None)],
    "reads beside a write, old then new": [
        put(0, 9, "x", 1),
        read(1, 2, None),
        read(3, 4, "x"),
    ],
    "two writers, in either order": [
        put(0, 9, "x", 2),
        put(1, 8, "y", 1),
        read(10, 11, "x"),
    ],
    "times that touch are concurrent": [put(0, 5, "x", 1), read(5, 6, None)],
    "created, deleted, created": [
        put(0, 1, "x", 1),
        delete(2, 3),
        put(4, 5, "y", 1),
        read(6, 7, "y"),
    ],
    "a delete of what another delete took": [
        put(0, 1, "x", 1),
        delete(2, 9),
        delete(3, 8, "missing"),
    ],
    "one winner of two that only create": [
        put(0, 9, "x", 1, if_none_match=True),
        failed(1, 8, "y", if_none_match=True),
    ],
    "one winner of two that replace the same version": [
        put(0, 1, "x", 1),
        put(2, 9, "y", 2, if_match="e-x"),
        failed(3, 8, "z", if_match="e-x"),
        read(10, 11, "y"),
    ],
    "a conditional write of what is absent": [failed(0, 1, "x", if_match="*")],
    "a conditional delete of what is absent": [delete(0, 1, "conflict", if_match="e-x")],
    "an unknown write happened": [lost(0, "set", value="x"), read(5, 6, None), read(7, 8, "x")],
    "an unknown write never happened": [lost(0, "set", value="x"), read(5, 6, None)],
    "an unknown delete happened late": [
        put(0, 1, "x", 1),
        lost(2, "delete"),
        read(3, 4, "x"),
        read(5, 6, None),
    ],
    "an unknown write took a version": [
        put(0, 1, "x", 1),
        lost(2, "set", value="y"),
        put(3, 4, "z", 3),
    ],
    "an unknown revocation happened": [
        op(0, None, Call("revoke", KEY), None),
        refused(1, 2),
    ],
    "a key used until it is revoked": [
        read(0, 1, None, key=KEY),
        revoke(2, 5),
        read(3, 4, None, key=KEY),
        refused(4, 7),
        revoke(6, 8, "missing"),
    ],
    "a key that revokes itself": [revoke(0, 1, key=KEY), refused(2, 3)],
    "an entity tag nobody was told is learnt later": [
        unversioned(0, 1, "x", "created"),
        etag(2, 3, 1, "t"),
        put(4, 5, "y", 2, if_match="t"),
    ],
    "of two with the same version, the second has the tag": [
        unversioned(0, 1, "x", "created"),
        etag(2, 9, 1, "t"),
        delete(3, 4),
        unversioned(5, 6, "y", "created"),
        put(7, 8, "z", 2, if_match="t"),
    ],
}

IMPOSSIBLE: dict[str, list[Operation]] = {
    "read of what nobody wrote": [read(0, 1, "x")],
    "stale read": [put(0, 1, "x", 1), put(2, 3, "y", 2), read(4, 5, "x")],
    "a write that is not there": [put(0, 1, "x", 1), read(2, 3, None)],
    "read of a deleted value": [put(0, 1, "x", 1), delete(2, 3), read(4, 5, "x")],
    "new, then old again": [
        put(0, 1, "x", 1),
        put(2, 9, "y", 2),
        read(3, 4, "y"),
        read(5, 6, "x"),
    ],
    "lost update: both made version 2": [
        put(0, 1, "x", 1),
        put(2, 9, "y", 2),
        put(3, 8, "z", 2),
    ],
    "lost update: neither is there": [
        put(0, 1, "x", 1),
        unversioned(2, 3, "y", "updated"),
        read(4, 5, "x"),
    ],
    "two winners of If-None-Match": [
        put(0, 9, "x", 1, if_none_match=True),
        put(1, 8, "y", 1, if_none_match=True),
    ],
    "two winners of one version": [
        put(0, 1, "x", 1),
        put(2, 9, "y", 2, if_match="e-x"),
        put(3, 8, "z", 3, if_match="e-x"),
    ],
    "no winner": [
        put(0, 1, "x", 1),
        failed(2, 9, "y", if_match="e-x"),
        failed(3, 8, "z", if_match="e-x"),
    ],
    "created twice": [put(0, 1, "x", 1), unversioned(2, 3, "y", "created")],
    "updated what is absent": [unversioned(0, 1, "x", "updated")],
    "deleted twice": [put(0, 1, "x", 1), delete(2, 9), delete(3, 8)],
    "a delete that misses what is there": [put(0, 1, "x", 1), delete(2, 3, "missing")],
    "an unknown write seen before it was asked for": [
        read(0, 1, "x"),
        lost(2, "set", value="x"),
    ],
    "an unknown write happened twice": [
        lost(0, "set", value="x"),
        read(1, 2, "x"),
        delete(3, 4),
        read(5, 6, "x"),
    ],
    "an unknown delete that happened and did not": [
        put(0, 1, "x", 1),
        lost(2, "delete"),
        read(3, 4, None),
        read(5, 6, "x"),
    ],
    "a revoked key used": [revoke(0, 1), read(2, 3, None, key=KEY)],
    "a key refused before anybody revoked it": [refused(0, 1), revoke(2, 3)],
    "used after it was refused": [revoke(0, 9), refused(1, 2), read(3, 4, None, key=KEY)],
    "revoked twice": [revoke(0, 9), revoke(1, 8)],
    # Right for the secret alone, and for the key alone.
    "a key whose write came after its revocation": [
        op(0, 9, Call("set", A, "x", key=KEY), Answer("created", None, 1)),
        revoke(1, 2),
        read(3, 4, None),
        read(5, 6, "x"),
    ],
    "a tag that was not the one": [
        unversioned(0, 1, "x", "created"),
        failed(2, 3, "y", if_match="t"),
        etag(4, 5, 1, "t"),
    ],
    "two tags of one version": [
        unversioned(0, 1, "x", "created"),
        etag(2, 3, 1, "t"),
        etag(4, 5, 1, "u"),
    ],
    "a version that is not the next": [put(0, 1, "x", 1), put(2, 3, "y", 3)],
    "what should never come back": [op(0, 1, Call("get", A), Answer("unforeseen", "500"))],
}


@pytest.mark.parametrize("history", POSSIBLE.values(), ids=POSSIBLE.keys())
def test_it_accepts(history: list[Operation]) -> None:
    assert find_violation(history) is None


@pytest.mark.parametrize("history", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_it_finds(history: list[Operation]) -> None:
    found = find_violation(history)
    assert found is not None
    assert found.stuck
    assert str(found).count("\n") == len(found.operations)


def test_it_names_what_does_not_fit() -> None:
    others = [op(0, 9, Call("get", B), Answer("missing"))]
    wrong = read(4, 5, "x")
    found = find_violation([*others, put(0, 1, "x", 1), put(2, 3, "y", 2), wrong])
    assert found is not None
    assert found.stuck == (wrong,)
    assert others[0] not in found.operations


def test_it_is_fast_where_everything_overlaps() -> None:
    writes = [put(number, 1000 - number, f"v{number}", number + 1) for number in range(60)]
    reads = [read(number, 1000 - number, f"v{number}") for number in range(60)]
    assert find_violation([*writes, *reads]) is None
    assert find_violation([*writes[1:], *reads]) is not None


calls = st.builds(
    Call,
    st.sampled_from(["set", "set", "delete", "get", "metadata"]),
    st.sampled_from([A, A, B]),
    st.just("value"),
    st.sampled_from([None, None, None, "t0", "t1", "*"]),
    st.just(False),
    st.sampled_from([None, None, None, KEY]),
) | st.builds(Call, st.just("revoke"), st.just(KEY), key=st.sampled_from([None, None, KEY]))


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """What a right store would have answered in some order, some of it hidden, some of it wrong."""
    store: Store = {}
    found: list[Operation] = []
    for number in range(draw(st.integers(3, 5))):
        call = draw(calls)
        if call.kind == "set":
            call = Call(
                "set",
                call.subject,
                f"v{number}",
                call.if_match,
                call.if_match is None and draw(st.booleans()),
                call.key,
            )
        else:
            call = Call(
                call.kind,
                call.subject,
                None,
                call.if_match if call.kind == "delete" else None,
                False,
                call.key,
            )
        answer = answers(store, call, f"t{number}")
        begin = 4 * number - draw(st.integers(0, 6))
        end = 4 * number + draw(st.integers(0, 6))
        found.append(shaken(draw, Operation("p", call, begin, end, answer)))
    return found


def shaken(draw: st.DrawFn, right: Operation) -> Operation:
    """The operation as it was, with less told, unanswered, or with a wrong answer."""
    answer = right.answer
    assert answer is not None
    match draw(st.integers(0, 9)):
        case 0:
            return Operation(right.process, right.call, right.invoked_at)
        case 1 | 2:
            told = Answer(answer.outcome, answer.value)
        case 3:
            told = Answer(
                answer.outcome,
                answer.value,
                answer.version,
                draw(st.sampled_from(["t0", "t1", "t2"])) if answer.etag is not None else None,
            )
        case 4:
            told = Answer(
                answer.outcome,
                draw(st.sampled_from(["v0", "v1"])) if answer.value is not None else None,
            )
        case 5:
            told = Answer(draw(st.sampled_from(_OTHER[right.call.kind])))
        case _:
            told = answer
    return Operation(right.process, right.call, right.invoked_at, right.completed_at, told)


_OTHER: dict[str, list[str]] = {
    "set": ["created", "updated", "conflict"],
    "delete": ["deleted", "missing", "conflict"],
    "get": ["found", "missing"],
    "metadata": ["found", "missing"],
    "revoke": ["revoked", "missing"],
}


def test_it_agrees_with_trying_every_order() -> None:
    verdicts = Counter[bool]()

    @settings(max_examples=500, deadline=None)
    @given(histories())
    def agree(history: list[Operation]) -> None:
        verdict = find_violation(history) is None
        assert verdict == explains(history)
        verdicts[verdict] += 1

    agree()
    assert min(verdicts[True], verdicts[False]) > 50, verdicts
