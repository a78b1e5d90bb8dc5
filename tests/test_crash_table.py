"""Whatever system call a process dies in or that fails, and whatever it is doing: what was
acknowledged is there, and the rest is there whole or not at all.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flowmason_secrets.core.drafts import KeyDraft
from flowmason_secrets.core.errors import LogUnavailable
from flowmason_secrets.service import Service

from .harness.faults import (
    STEPS,
    Call,
    Failing,
    Stopping,
    Watched,
    io_error,
    no_space,
)
from .harness.load import Grown, read_log
from .harness.operations import OPERATIONS, Beginnings, Operation, open_on
from .harness.reopening import check_reopened, run, saying
from .harness.swift import swiftly
from .harness.tally import Tally
from .harness.truth import CALLER, Truth, check_hidden, look

TALLY = Tally("The crash table")


async def test_every_step_of_durable_is_in_the_table(
    beginnings: Beginnings, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: set[str] = set()
    for name, operation in OPERATIONS.items():
        swiftly(monkeypatch)
        root, truth = await beginnings.copy(operation, fast / name)
        disk = Watched()
        await run(operation, root, disk, truth)
        assert disk.calls
        steps.update(disk.steps)
    assert steps == set(STEPS)


@pytest.mark.parametrize("name", OPERATIONS)
async def test_the_process_dies(
    name: str, beginnings: Beginnings, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, within and after every system call: what it did stays, what it did not is not done.

    Dying before a call is dying after the one before it.
    """
    operation = OPERATIONS[name]
    swiftly(monkeypatch)
    root, truth = await beginnings.copy(operation, fast / "running")
    deaths: list[tuple[str, Path, Truth]] = []

    def moment(when: str) -> None:
        place = fast / str(len(deaths))
        deaths.append((when, place, truth.copy()))
        shutil.copytree(root.parent, place)

    await run(operation, root, Stopping(moment), truth)
    for when, place, known in deaths:
        with saying(f"{name}: dies {when}"):
            await check_reopened(place / "data", known)
        TALLY.count(name, "death within" if " into " in when else "death before or after")
        shutil.rmtree(place)
    assert len(deaths) > 8


# --- errors, and the process goes on --------------------------------------------------------


def eio(call: Call) -> Any:
    """It fails, and leaves half of what it was to write."""
    call.do_half()
    raise io_error()


def eio_after(call: Call) -> Any:
    """It happens, and fails all the same."""
    result = call.do()
    if call.name == "open":
        os.close(result)
    raise io_error()


def enospc(call: Call) -> Any:
    """It fails, and nothing of it happens."""
    raise no_space()


def short(call: Call) -> Any:
    """It writes a half, and says so."""
    return call.do_half() if call.size else call.do()


class Column(NamedTuple):
    fault: Callable[[Call], Any]
    lasting: bool = False


COLUMNS = {
    "EIO": Column(eio),
    "EIO after it": Column(eio_after),
    "ENOSPC": Column(enospc),
    "short write": Column(short),
    "EIO from then on": Column(eio, lasting=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_system_call_fails(
    name: str, beginnings: Beginnings, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller learns what he can rely on, and the same process goes on when it can."""
    operation = OPERATIONS[name]
    swiftly(monkeypatch)
    root, truth = await beginnings.copy(operation, fast / "sound")
    watched = Watched()
    await run(operation, root, watched, truth)
    for title, (fault, lasting) in COLUMNS.items():
        for call in watched.calls:
            if fault is short and not call.size:
                continue
            root, truth = await beginnings.copy(operation, fast / "failing")
            disk = Failing(call.number, fault, lasting=lasting)
            with saying(f"{name}: {title} at {call}"):
                await go_on(operation, root, disk, truth)
            if disk.failed:
                TALLY.count(name, title)
            shutil.rmtree(root.parent)
        assert TALLY.counted(name, title) > (0 if fault is short else 8)


async def go_on(operation: Operation, root: Path, disk: Failing, truth: Truth) -> None:
    """Operate on a disk that fails; then in the same process on one that works; then reopen."""
    grown = Grown(root)
    grown.check()
    service = open_on(root, disk, operation.segment)
    try:
        await operation.act(service, truth)
    except (LogUnavailable, OSError):
        if not disk.failed:
            raise
    grown.check()
    if disk.failed and disk.lasting:
        await check_nothing_unaudited(service, root)
    if not disk.failed:
        # It fails while it closes, if at all: what was acknowledged is staged then.
        with contextlib.suppress(OSError):
            await service.close()
    else:
        disk.broken = False
        assert await service.ready() is None
        truth.accept(await look(service, root, truth.raw))
        await operation.act(service, truth)
        await service.close()
        check_hidden(root)
    grown.check()
    await check_reopened(root, truth)


async def check_nothing_unaudited(service: Service, root: Path) -> None:
    """While no event can be written no value leaves the process, and nothing changes."""
    before = read_log(root)
    with pytest.raises(LogUnavailable):
        await service.get(CALLER, "OLD")
    with pytest.raises(LogUnavailable):
        await service.keys.issue(CALLER, KeyDraft("not to be"))
    assert await service.ready() is not None
    assert read_log(root) == before
