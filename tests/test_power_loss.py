"""The machine stops: of what was not synced nothing is left, or anything. What was acknowledged is
there all the same, and the rest is there whole or not at all.
"""

import shutil
from pathlib import Path
from random import Random

import pytest

from .harness.faults import Stopping
from .harness.loss import Volatile
from .harness.operations import OPERATIONS, Beginnings
from .harness.reopening import check_reopened, run, saying
from .harness.swift import swiftly
from .harness.tally import Tally
from .harness.truth import Truth

TALLY = Tally("Power loss")

# How often what was not synced is left to chance, beside once in which all of it is gone.
CHANCES = 2


@pytest.mark.parametrize("name", OPERATIONS)
async def test_what_was_not_synced_is_lost(
    name: str, beginnings: Beginnings, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every system call, and in the middle of each that writes."""
    operation = OPERATIONS[name]
    swiftly(monkeypatch)
    running, truth = await beginnings.copy(operation, fast / "running")
    medium = Volatile(running.parent)
    losses: list[tuple[str, Path, Truth]] = []

    def moment(when: str) -> None:
        known = truth.copy()
        for chance in range(CHANCES + 1):
            place = fast / str(len(losses))
            random = Random(f"{name} {when} {chance}") if chance else None
            medium.after_loss(place, random)
            losses.append((when, place / "data", known))

    await run(operation, running, Stopping(moment, medium), truth)
    medium.close()
    for number, (when, root, known) in enumerate(losses):
        with saying(f"{name}: the power goes off {when}, the {number % (CHANCES + 1)}. time"):
            await check_reopened(root, known)
        TALLY.count(name, "at random" if number % (CHANCES + 1) else "all of it")
        shutil.rmtree(root.parent)
    assert len(losses) > 8 * (CHANCES + 1)
