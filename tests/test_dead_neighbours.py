"""Processes that share a data directory, of which one dies: the others go on with what is there,
and what they acknowledge no power loss takes away.
"""

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from flowmason_secrets.core.events import Receipt
from flowmason_secrets.core.records import PutSecret
from flowmason_secrets.storage import files as files_module
from flowmason_secrets.storage.eventlog import SegmentLimits
from flowmason_secrets.storage.files import FilesStore

from .harness.faults import PowerOff, Stopping, Unplugged, Watched
from .harness.load import read_log
from .harness.loss import Volatile
from .test_stores import caught_up, drop, files_store, on, put, read


async def bury(store: FilesStore) -> None:
    """Release what a dead process held."""
    with contextlib.suppress(PowerOff):
        await store.close()


@pytest.mark.parametrize(("theirs", "ours"), [(1, 64 << 20), (64 << 20, 1), (1, 1)])
async def test_what_a_dead_process_appended_is_durable_before_it_is_built_on(
    theirs: int, ours: int, tmp_path: Path
) -> None:
    """The line, or the name of the segment, was not synced by the one who died: the next one does
    it, whether it goes on in that segment or begins another one.
    """
    for calls in itertools.count():
        root = tmp_path / str(calls) / "root"
        before = files_store(root)
        await before.commit([put("A")])
        await before.close()
        medium = Volatile(root.parent)
        disk = Unplugged(medium)
        dying = files_store(root, disk, SegmentLimits(theirs))
        await caught_up(dying)
        disk.arm(calls)
        with contextlib.suppress(PowerOff):
            await dying.commit([read("A")])
        alive = files_store(root, Watched(medium), SegmentLimits(ours))
        (verdict,) = await alive.commit([read("A")])
        assert isinstance(verdict, Receipt)
        place = tmp_path / f"{calls}-lost"
        medium.after_loss(place, None)
        lines = read_log(place / "root")
        assert len(lines) > verdict.seq, f"acknowledged, and lost with its segment ({calls=})"
        assert lines[verdict.seq]["id"] == verdict.id
        await alive.close()
        await bury(dying)
        medium.close()
        if not disk.off.is_set():
            break
    assert calls > 1


async def test_nothing_is_published_whose_event_could_vanish(tmp_path: Path) -> None:
    """One dies between writing an event and syncing it; then the machine stops at any moment of
    the recovery by the next one.
    """

    class Dying(Unplugged):
        # Off at the sync that follows the second write: the journal's was the first.
        def before(self, kind: str) -> None:
            if kind == "sync" and self.steps.count("write") == 2:
                self.arm(0)

    root = tmp_path / "disk" / "root"
    before = files_store(root)
    await before.commit([put("OLD")])
    await before.close()
    medium = Volatile(root.parent)
    dying = files_store(root, Dying(medium))
    with pytest.raises(PowerOff):
        await dying.commit([put("NEW")])
    await bury(dying)
    places: list[Path] = []

    def moment(when: str) -> None:
        for chance in range(8):
            places.append(tmp_path / str(len(places)))
            medium.after_loss(places[-1], Random(f"{when} {chance}") if chance else None)

    alive = files_store(root, Stopping(moment, medium))
    await caught_up(alive)
    await alive.close()
    medium.close()
    came_through: Counter[bool] = Counter()
    for place in places:
        after = files_store(place / "root")
        await caught_up(after)
        record = await after.load("acme", "NEW")
        await after.close()
        assert record is None or record.damage is None
        there = any(line["name"] == "NEW" for line in read_log(place / "root"))
        assert (record is not None) == there
        came_through[there] += 1
    assert min(came_through[True], came_through[False]) > 5


async def test_a_journal_that_another_process_removed_is_not_written_to(tmp_path: Path) -> None:
    """One opens the directory meanwhile, which settles the other's journal; then that one dies."""
    for calls in itertools.count():
        root = tmp_path / str(calls)
        disk = Unplugged()
        dying = files_store(root, disk)
        await dying.commit([put("A")])
        other = files_store(root)
        await caught_up(other)
        assert os.listdir(root / "staged") == []
        disk.arm(calls)
        try:
            acknowledged = isinstance((await dying.commit([put("A", 2)]))[0], Receipt)
        except PowerOff:
            acknowledged = False
        await caught_up(other)
        record = await other.load("acme", "A")
        assert record is not None
        changes = sum(line["action"] == "secret.create" for line in read_log(root))
        assert (record.damage, record.metadata.version) == (None, changes)
        assert changes == 2 or not acknowledged
        await other.close()
        await bury(dying)
        if not disk.off.is_set():
            break
    assert calls > 6


async def test_lines_of_a_dead_process_are_durable_before_others_build_on_them(
    tmp_path: Path,
) -> None:
    """One dies at every system call of a change; another one, that ran all the time, goes on."""
    for calls in itertools.count():
        root = tmp_path / str(calls) / "root"
        root.parent.mkdir()
        medium = Volatile(root.parent)
        disk = Unplugged(medium)
        alive, dying = files_store(root, Watched(medium)), files_store(root, disk)
        await alive.commit([put("A"), put("B")])
        await dying.commit([put("A", 2), read("B")])
        disk.arm(calls)
        with contextlib.suppress(PowerOff):
            await dying.commit([put("A", 3), drop("B"), read("A")])
        # What it finds is what it acknowledges, so nothing may take it away again.
        await caught_up(alive)
        as_of = alive.position
        record = await alive.load("acme", "A")
        gone = await alive.load("acme", "B") is None
        assert record is not None
        assert (record.damage, record.metadata.version) in ((None, 2), (None, 3))
        assert gone == (record.metadata.version == 3)
        (verdict,) = await alive.commit([read("A", on("A", as_of))])
        assert isinstance(verdict, Receipt)
        for loss in range(3):
            place = tmp_path / f"{calls}-{loss}"
            medium.after_loss(place, Random(f"{calls} {loss}") if loss else None)
            after = files_store(place / "root")
            await caught_up(after)
            found = await after.load("acme", "A")
            assert found is not None
            assert (found.damage, found.metadata) == (None, record.metadata)
            assert (await after.load("acme", "B") is None) == gone
            await after.close()
            assert read_log(place / "root")[verdict.seq]["id"] == verdict.id
        await alive.close()
        await bury(dying)
        medium.close()
        if not disk.off.is_set():
            break
    assert calls > 8


async def versions(store: FilesStore) -> dict[str, int]:
    """The version of each secret, all of them whole."""
    found: dict[str, int] = {}
    for name in "ABC":
        record = await store.load("acme", name)
        if record is not None:
            assert record.damage is None
            found[name] = record.metadata.version
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_live_processes_recover_from_each_others_deaths(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random changes by three processes of which one dies now and then; the power fails at last."""
    monkeypatch.setattr(files_module, "SETTLE_AFTER", 0.003)
    random = Random(seed)
    parent = tmp_path / "disk"
    parent.mkdir()
    medium = Volatile(parent)

    def start() -> tuple[Unplugged, FilesStore]:
        disk = Unplugged(medium)
        return disk, files_store(parent / "root", disk, SegmentLimits(size=6000))

    processes = [start() for _ in range(3)]
    model: dict[str, int] = {}
    receipts: list[Receipt] = []
    deaths = 0
    for version in range(1, 160):
        index = random.randrange(3)
        disk, store = processes[index]
        if random.random() < 0.15:
            disk.arm(random.randint(0, 20))
        name = random.choice("ABC")
        intent = drop(name) if name in model and random.random() < 0.2 else put(name, version)
        wanted = dict(model)
        if isinstance(intent.change, PutSecret):
            wanted[name] = version
        else:
            wanted.pop(name)
        try:
            (verdict,) = await store.commit([intent])
            assert isinstance(verdict, Receipt)
            receipts.append(verdict)
            model = wanted
        except PowerOff:
            deaths += 1
            await bury(store)
            processes[index] = start()
            # It happened, or not; whoever looks next decides it for all.
            looking = files_store(parent / "root", Watched(medium))
            await caught_up(looking)
            found = await versions(looking)
            await looking.close()
            assert found in (model, wanted)
            model = found
        if random.random() < 0.2:
            await asyncio.sleep(0.004)
    for loss in range(4):
        place = tmp_path / f"loss-{loss}"
        medium.after_loss(place, Random(loss) if loss else None)
        after = files_store(place / "root")
        await caught_up(after)
        assert await versions(after) == model
        await after.close()
        lines = read_log(place / "root")
        for receipt in receipts:
            assert lines[receipt.seq]["id"] == receipt.id
    assert deaths > 3
    for _, store in processes:
        await bury(store)
    medium.close()
