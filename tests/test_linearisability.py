"""All processes on a data directory behave as one: what they did at once can be told as done one
at a time. And a gate that does not keep that is found out.
"""

import os
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from .harness.broken_gate import PARTS
from .harness.linearise import Operation, find_violation
from .harness.site import processes

# Set HISTORIES for longer runs.
HISTORIES = int(os.environ.get("HISTORIES", "300"))

# Within so many, a broken gate is found out.
BOUND = 40


@pytest.mark.timeout(300 + HISTORIES * 3)
async def test_histories_of_several_processes(data_dir: Path) -> None:
    counted: Counter[str] = Counter()
    async with processes(data_dir) as site:
        for number in range(HISTORIES):
            history = await site.record(number)
            violation = find_violation(history)
            assert violation is None, f"history {number}: {violation}"
            count(history, counted)
    print(f"{HISTORIES} histories, {counted['operations']} operations: {dict(counted)}")
    # Histories without conflicts would show nothing.
    per_history = {kind: counted[kind] / HISTORIES for kind in counted}
    for kind, least in EXPECTED.items():
        assert per_history[kind] >= least, (kind, per_history)
    assert {kind.partition(" by ")[2] for kind in counted if " by " in kind} >= PROCESSES


PROCESSES = {
    *("worker 1", "worker 2", "any worker"),
    *("library", "library 2", "command line", "program"),
}

# How many a history has at least, on average.
EXPECTED = {
    "operations": 40,
    "contended": 20,
    "created": 3,
    "updated": 5,
    "deleted": 3,
    "found": 10,
    "missing": 4,
    "conflict": 4,
    "refused": 1,
    "revoked": 0.3,
    "unknown": 0.3,
}


def count(history: list[Operation], counted: Counter[str]) -> None:
    """Add up how operations ended, who did them, and how many had a rival: one in another process,
    at the same time, on the same secret, of which one is a change.
    """
    contended: set[int] = set()
    for one, other in combinations(range(len(history)), 2):
        if rivals(history[one], history[other]):
            contended |= {one, other}
    counted["contended"] += len(contended)
    counted["operations"] += len(history)
    for operation in history:
        counted["unknown" if operation.answer is None else operation.answer.outcome] += 1
        counted[f"done by {operation.process}"] += 1


def rivals(one: Operation, other: Operation) -> bool:
    return (
        one.process != other.process
        and one.call.subject == other.call.subject
        and not one.precedes(other)
        and not other.precedes(one)
        and not {"get", "metadata"} >= {one.call.kind, other.call.kind}
    )


@pytest.mark.parametrize("part", PARTS)
async def test_a_broken_gate_is_found_out(data_dir: Path, part: str) -> None:
    async with processes(data_dir, without=part) as site:
        for number in range(1, BOUND + 1):
            violation = find_violation(await site.record(number))
            if violation is not None:
                print(f"found in history {number}")
                assert violation.stuck
                return
    pytest.fail(f"{BOUND} histories without the {part}, and nothing was found")
