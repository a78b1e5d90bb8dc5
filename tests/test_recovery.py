"""Recovery: whatever ends the process, and wherever, what was acknowledged is there."""

import asyncio
import contextlib
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from flowmason_secrets import app
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.errors import ApiKeyNotFound, SecretNotFound, SecretsError
from flowmason_secrets.core.events import Ids, Receipt
from flowmason_secrets.core.keyring import Keyring, MasterKey, Plaintext
from flowmason_secrets.core.names import org_hash, secret_hash
from flowmason_secrets.core.ports import Sources
from flowmason_secrets.core.records import PutSecret
from flowmason_secrets.index.sqlite import SqliteIndex
from flowmason_secrets.masterkeys import MasterKeys
from flowmason_secrets.service import Service
from flowmason_secrets.storage import files as files_module
from flowmason_secrets.storage.cache import CiphertextCache
from flowmason_secrets.storage.durable import Durable, StrPath
from flowmason_secrets.storage.engine import Environment
from flowmason_secrets.storage.eventlog import SegmentLimits
from flowmason_secrets.storage.files import FilesStore, FilesTail
from flowmason_secrets.storage.keysources import FixedKeys
from flowmason_secrets.storage.published import Layout, Published

from .harness.faults import PowerOff, Unplugged, Volatile
from .harness.load import (
    Grown,
    Known,
    Seen,
    check_acknowledged,
    check_pairs,
    check_receipts,
    read_log,
    read_on,
    until_gone,
    write_on,
)
from .harness.server import ServerProcess, issue_key, session
from .test_stores import caught_up, drop, files_store, on, put, read

# --- kill -9 of a real server ---------------------------------------------------------------

ROUNDS = 20
WRITERS = 16
READERS = 16


async def test_kill_9_under_load(data_dir: Path) -> None:
    random = Random(9)
    key = await issue_key(data_dir)
    known = {f"W{number}-{n}": Known() for number in range(WRITERS) for n in range(2)}
    seen, grown = Seen(), Grown(data_dir)
    unanswered = 0
    for round_number in range(ROUNDS + 1):
        # Small segments, so that it also happens while one begins.
        server = ServerProcess(data_dir, FLOWMASON_SECRETS_SEGMENT_BYTES="60000")
        await server.start()
        try:
            async with session(server.url, key) as client:
                await check_acknowledged(client, known, seen, data_dir)
                check_pairs(data_dir)
                grown.check()
                if round_number == ROUNDS:
                    break
                load = [
                    write_on(client, number, known, seen, Random(random.random()))
                    for number in range(WRITERS)
                ] + [
                    read_on(client, list(known), seen, Random(random.random()))
                    for _ in range(READERS)
                ]
                tasks = [asyncio.create_task(until_gone(work)) for work in load]
                await asyncio.sleep(random.uniform(0.15, 1.2))
                assert not any(task.done() for task in tasks)
                await server.kill()
                await asyncio.gather(*tasks)
            unanswered += sum(len(secret.pending) for secret in known.values())
            grown.check()
        finally:
            if server.process is not None and server.process.returncode is None:
                assert await server.stop() == 0
    assert list((data_dir / "staged").iterdir()) == []
    check_pairs(data_dir)
    check_receipts(seen, data_dir)
    changes = sum(action != "secret.read" for _, _, action, _ in seen.receipts)
    segments = len(list((data_dir / "events").iterdir()))
    print(f"{changes} changes and {seen.reads} reads acknowledged, {unanswered} not; {segments=}")
    # It was a load, and the kills came in the middle of it.
    assert changes > 1000
    assert seen.reads > 1000
    assert unanswered > ROUNDS * 5
    assert segments > 5


# --- the power goes off at every step -------------------------------------------------------

CALLER = app.local_caller("acme", "tester")
KEYS = [MasterKey.of("a master key for the table")]
IDS = Ids(time.time, os.urandom)
SIZES = (64 << 20, 1)


def open_on(root: Path, durable: Durable, segment: int = 64 << 20) -> Service:
    """What `app.open_service` makes, with a keyring that is derived once for all cases."""
    layout = Layout(root)
    sources = Sources(time.time, IDS)
    environment = Environment(
        layout=layout,
        durable=durable,
        published=Published(layout, durable, lambda: RING.oldest),
        cache=CiphertextCache(1 << 20),
        sources=sources,
        limits=SegmentLimits(segment),
    )
    store = FilesStore(environment)
    index = SqliteIndex(
        FilesTail(environment), layout.index, lambda: store.position, durable.unlink
    )
    master = MasterKeys(RING, FixedKeys(KEYS), lambda: store.position)
    return Service(store, index, master, sources)


RING = Keyring(KEYS)
RING.derive("acme", RING.active)


@dataclass
class Truth:
    """What a case has acknowledged, and what its last operation would have made of it."""

    secrets: dict[str, str] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    revoked: set[str] = field(default_factory=set)
    receipts: list[tuple[Receipt, str]] = field(default_factory=list)


Operation = Callable[[Service, Truth], Awaitable[None]]


async def set_to(service: Service, truth: Truth, name: str, value: str) -> None:
    written = await service.set(CALLER, Draft(name, Plaintext(value)))
    truth.secrets[name] = value
    truth.receipts.append((written.receipt, "secret.create"))


async def create(service: Service, truth: Truth) -> None:
    await set_to(service, truth, "NEW", "new")


async def update(service: Service, truth: Truth) -> None:
    await set_to(service, truth, "OLD", "a new value, longer than the one before " * 9)


async def shrink(service: Service, truth: Truth) -> None:
    await set_to(service, truth, "LONG", "short")


async def delete(service: Service, truth: Truth) -> None:
    receipt = await service.delete(CALLER, "OLD")
    truth.secrets.pop("OLD")
    truth.receipts.append((receipt, "secret.delete"))


async def get(service: Service, truth: Truth) -> None:
    revealed = await service.get(CALLER, "OLD")
    assert revealed.value.reveal() == truth.secrets["OLD"]
    truth.receipts.append((revealed.receipt, "secret.read"))


async def issue(service: Service, truth: Truth) -> None:
    issued = await service.keys.issue(CALLER, KeyDraft("second"))
    truth.live.add(issued.key.id)
    truth.receipts.append((issued.receipt, "api_key.create"))


async def revoke(service: Service, truth: Truth) -> None:
    (key_id,) = truth.live
    receipt = await service.keys.revoke(CALLER, key_id)
    truth.live.clear()
    truth.revoked.add(key_id)
    truth.receipts.append((receipt, "api_key.revoke"))


async def several(service: Service, truth: Truth) -> None:
    """One after the other, so that a later one finds the journal of an earlier one."""
    for one in STEPS_OF_SEVERAL:
        await one(service, truth)


async def create_again(service: Service, truth: Truth) -> None:
    await set_to(service, truth, "OLD", "born again")


STEPS_OF_SEVERAL: tuple[Operation, ...] = (update, delete, create_again, get)

OPERATIONS: dict[str, Operation] = {
    "create": create,
    "update": update,
    "shrink": shrink,
    "delete": delete,
    "read": get,
    "key create": issue,
    "key revoke": revoke,
    "several": several,
}


async def begin(root: Path) -> Truth:
    """A directory with something in it, closed cleanly."""
    truth = Truth()
    service = open_on(root, Durable())
    await set_to(service, truth, "OLD", "old")
    await set_to(service, truth, "LONG", "a long value " * 500)
    await issue(service, truth)
    await service.close()
    return truth


async def run_until_off(
    disk: Unplugged, root: Path, steps: int, operation: Operation, truth: Truth, segment: int
) -> bool:
    """Open, operate and close until the power goes off; whether it did."""
    loop = asyncio.get_running_loop()
    off = asyncio.Event()
    disk.on_off = lambda: loop.call_soon_threadsafe(off.set)
    disk.arm(steps)
    service = open_on(root, disk, segment)

    async def work() -> None:
        await operation(service, truth)
        await service.close()

    working = asyncio.create_task(work())
    waiting = asyncio.create_task(off.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not disk.off.is_set():
        working.result()
    for task in (working, waiting):
        task.cancel()
    results = await asyncio.gather(working, waiting, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return disk.off.is_set()


@dataclass
class Found:
    """What is there after the restart."""

    secrets: dict[str, str]
    live: set[str]
    revoked: set[str]


async def look(root: Path, truth: Truth) -> Found:
    """Reopen with a disk that works."""
    service = open_on(root, Durable())
    found = Found({}, set(), set())
    for name in ("OLD", "LONG", "NEW"):
        with contextlib.suppress(SecretNotFound):
            found.secrets[name] = (await service.get(CALLER, name)).value.reveal()
    for key in await service.keys.all(CALLER):
        (found.live if key.revoked_at is None else found.revoked).add(key.id)
    await service.close()
    assert list((root / "staged").iterdir()) == []
    check_pairs(root)
    lines = read_log(root)
    for receipt, action in truth.receipts:
        assert lines[receipt.seq]["id"] == receipt.id
        assert lines[receipt.seq]["action"] == action
    # The event is the change: what the log says last is what is there.
    said: dict[str, str] = {}
    for line in lines:
        if line["action"] in ("secret.create", "secret.delete") and line["outcome"] == "success":
            said[line["name"] or ""] = line["action"]
    there = {name for name, action in said.items() if action == "secret.create"}
    assert set(found.secrets) == there
    return found


def copy_of(truth: Truth) -> Truth:
    return Truth(dict(truth.secrets), set(truth.live), set(truth.revoked), list(truth.receipts))


async def next_states(name: str, truth: Truth, root: Path) -> list[dict[str, str]]:
    """The secrets after each further acknowledgement, found by doing it on a disk that works."""
    states = [dict(truth.secrets)]

    noting = copy_of(truth)
    service = open_on(root, Durable())
    if name == "several":
        for one in STEPS_OF_SEVERAL:
            await one(service, noting)
            states.append(dict(noting.secrets))
    else:
        await OPERATIONS[name](service, noting)
        states.append(dict(noting.secrets))
    await service.close()
    return states


def check_whole_or_not(
    name: str, found: Found, truth: Truth, before: Truth, states: list[dict[str, str]]
) -> None:
    """Everything acknowledged is there, and at most the one operation after it, whole."""
    first = min(index for index, state in enumerate(states) if state == truth.secrets)
    last = max(index for index, state in enumerate(states) if state == truth.secrets)
    allowed = states[first : last + 2]
    assert found.secrets in allowed, (found.secrets, allowed)
    # Of the keys all are as acknowledged, but for the one that was on its way.
    if (found.live, found.revoked) != (truth.live, truth.revoked):
        if name == "key create":
            assert truth.live == before.live < found.live
            assert (len(found.live), found.revoked) == (2, set())
        else:
            assert name == "key revoke"
            assert (found.live, found.revoked) == (set(), before.live)
            assert not truth.revoked


async def fresh(tmp_path: Path, root: Path) -> Truth:
    """A copy of a directory with something in it, made once for all cases of a test."""
    model = tmp_path / "begin"
    if not model.exists():
        _BEGUN[tmp_path] = await begin(model)
    shutil.copytree(model, root)
    return copy_of(_BEGUN[tmp_path])


_BEGUN: dict[Path, Truth] = {}


@pytest.mark.parametrize("segment", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_the_power_goes_off_at_every_step(
    name: str, segment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends there: what it wrote stays, what it did not do is not done."""
    monkeypatch.setattr(files_module, "SETTLE_AFTER", 0.0)
    states = await next_states(name, await begin(tmp_path / "model"), tmp_path / "model")
    cases = 0
    for steps in itertools.count():
        root = tmp_path / str(steps)
        before = await fresh(tmp_path, root)
        truth = copy_of(before)
        disk = Unplugged()
        went_off = await run_until_off(disk, root, steps, OPERATIONS[name], truth, segment)
        found = await look(root, truth)
        check_whole_or_not(name, found, truth, before, states)
        cases += 1
        if not went_off:
            assert found.secrets == states[-1] == truth.secrets
            break
    print(f"{name}: {cases} cases")
    assert cases > 8


LOSSES = 3


@pytest.mark.parametrize("segment", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_what_was_not_synced_is_lost_at_every_step(
    name: str, segment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine ends there: of what was not synced nothing is left, or anything."""
    monkeypatch.setattr(files_module, "SETTLE_AFTER", 0.0)
    states = await next_states(name, await begin(tmp_path / "model"), tmp_path / "model")
    cases = 0
    for steps in itertools.count():
        root = tmp_path / str(steps) / "root"
        before = await fresh(tmp_path, root)
        truth = copy_of(before)
        disk = Volatile(root.parent)
        went_off = await run_until_off(disk, root, steps, OPERATIONS[name], truth, segment)
        for loss in range(LOSSES):
            place = tmp_path / f"{steps}-{loss}"
            disk.after_loss(place, Random(f"{steps} {loss}") if loss else None)
            found = await look(place / "root", truth)
            check_whole_or_not(name, found, truth, before, states)
            cases += 1
        disk.close()
        if not went_off:
            break
    print(f"{name}: {cases} cases")
    assert cases > 8 * LOSSES


async def test_a_second_crash_during_the_recovery_of_the_first(tmp_path: Path) -> None:
    """At every step of recovering an update, a deletion and a new key of a process that died."""

    async def nothing(service: Service, truth: Truth) -> None:
        await service.recover()

    async def many(service: Service, truth: Truth) -> None:
        await update(service, truth)
        await issue(service, truth)
        await service.delete(CALLER, "LONG")
        truth.secrets.pop("LONG")
        await set_to(service, truth, "NEW", "new")

    cases = 0
    for steps in itertools.count():
        root = tmp_path / str(steps) / "root"
        truth = await fresh(tmp_path, root)
        # Everything is committed, nothing of it is settled, and some of it is not published.
        service = open_on(root, Durable())
        await many(service, truth)
        (root / org_hash("acme") / f"{secret_hash('NEW')}.meta").unlink()
        (root / org_hash("acme") / f"{secret_hash('OLD')}.secret").write_bytes(b"gAAAA-torn")
        disk = Volatile(root.parent)
        went_off = await run_until_off(disk, root, steps, nothing, copy_of(truth), 1)
        for loss in range(2):
            place = tmp_path / f"{steps}-{loss}"
            disk.after_loss(place, Random(f"{steps} {loss}") if loss else None)
            found = await look(place / "root", truth)
            assert (found.secrets, found.live) == (truth.secrets, truth.live)
            cases += 1
        disk.close()
        await service.close()
        if not went_off:
            break
    print(f"recovery: {cases} cases")
    assert cases > 20


async def test_a_first_start_that_is_cut_off_at_every_step(tmp_path: Path) -> None:
    """Of a directory that is only being made, too, all that was acknowledged is there."""

    async def first(service: Service, truth: Truth) -> None:
        await set_to(service, truth, "OLD", "first")
        await get(service, truth)

    for steps in itertools.count():
        parent = tmp_path / str(steps)
        parent.mkdir()
        disk, truth = Volatile(parent), Truth()
        went_off = await run_until_off(disk, parent / "root", steps, first, truth, 64 << 20)
        for loss in range(2):
            place = tmp_path / f"{steps}-{loss}"
            disk.after_loss(place, Random(f"{steps} {loss}") if loss else None)
            found = await look(place / "root", truth)
            assert found.secrets in ({}, {"OLD": "first"})
            assert found.secrets == truth.secrets or not truth.secrets
        disk.close()
        if not went_off:
            break
    assert steps > 15


# --- several processes ----------------------------------------------------------------------


class Process(Unplugged):
    """Has a power switch of its own, on a disk that others share."""

    def __init__(self, disk: Volatile) -> None:
        super().__init__()
        self._disk = disk

    def sync(self, descriptor: int) -> None:
        self._step("sync")
        self._disk.sync(descriptor)

    def sync_path(self, path: StrPath) -> None:
        self._step("sync_path")
        self._disk.sync_path(path)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 64 << 20), (64 << 20, 1), (1, 1)])
async def test_what_a_dead_process_appended_is_durable_before_it_is_built_on(
    theirs: int, ours: int, tmp_path: Path
) -> None:
    """The line, or the name of the segment, was not synced by the one who died: the next one does
    it, whether it goes on in that segment or begins another one.
    """
    for steps in itertools.count():
        root = tmp_path / str(steps) / "root"
        before = files_store(root)
        await before.commit([put("A")])
        await before.close()
        disk = Volatile(root.parent)
        dying = files_store(root, disk, SegmentLimits(theirs))
        await caught_up(dying)
        disk.arm(steps)
        with contextlib.suppress(PowerOff):
            await dying.commit([read("A")])
        went_off = disk.off.is_set()
        # Only that process died: the machine, and what it has not synced yet, goes on.
        disk.off_at = None
        disk.off.clear()
        alive = files_store(root, disk, SegmentLimits(ours))
        (verdict,) = await alive.commit([read("A")])
        assert isinstance(verdict, Receipt)
        place = tmp_path / f"{steps}-lost"
        disk.after_loss(place, None)
        lines = read_log(place / "root")
        assert len(lines) > verdict.seq, f"acknowledged, and lost with its segment ({steps=})"
        assert lines[verdict.seq]["id"] == verdict.id
        await alive.close()
        disk.close()
        if not went_off:
            break
    assert steps > 1


async def test_nothing_is_published_whose_event_could_vanish(tmp_path: Path) -> None:
    """One dies between writing an event and syncing it; then the machine stops at any step of
    the recovery by the next one.
    """

    async def nothing(service: Service, truth: Truth) -> None:
        await service.recover()

    class Dying(Process):
        # Off at the sync that follows the second write: the journal's was the first.
        def before(self, kind: str) -> None:
            if kind == "sync" and self.steps.count("write") == 2:
                self.arm(-1)
            super().before(kind)

    came_through: Counter[bool] = Counter()
    for steps in itertools.count():
        root = tmp_path / str(steps) / "root"
        truth = await fresh(tmp_path, root)
        disk = Volatile(root.parent)
        dying = files_store(root, Dying(disk))
        with pytest.raises(PowerOff):
            await dying.commit([put("NEW")])
        went_off = await run_until_off(disk, root, steps, nothing, copy_of(truth), 64 << 20)
        for loss in range(8):
            place = tmp_path / f"{steps}-{loss}"
            disk.after_loss(place, Random(f"{steps} {loss}") if loss else None)
            after = files_store(place / "root")
            await caught_up(after)
            record = await after.load("acme", "NEW")
            await after.close()
            assert record is None or record.damage is None
            there = any(line["name"] == "NEW" for line in read_log(place / "root"))
            assert (record is not None) == there
            came_through[there] += 1
        disk.close()
        if not went_off:
            break
    assert min(came_through[True], came_through[False]) > 5


async def test_a_journal_that_another_process_removed_is_not_written_to(tmp_path: Path) -> None:
    """One opens the directory meanwhile, which settles the other's journal; then that one dies."""
    for steps in itertools.count():
        root = tmp_path / str(steps)
        disk = Unplugged()
        dying = files_store(root, disk)
        await dying.commit([put("A")])
        other = files_store(root)
        await caught_up(other)
        assert os.listdir(root / "staged") == []
        disk.arm(steps)
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
        if not disk.off.is_set():
            break
    assert steps > 6


async def test_lines_of_a_dead_process_are_durable_before_others_build_on_them(
    tmp_path: Path,
) -> None:
    """One dies at every step of a change; another one, that ran all the time, goes on."""
    for steps in itertools.count():
        root = tmp_path / str(steps) / "root"
        root.parent.mkdir()
        disk = Volatile(root.parent)
        alive, dying = files_store(root, disk), files_store(root, disk)
        await alive.commit([put("A"), put("B")])
        await dying.commit([put("A", 2), read("B")])
        disk.arm(steps)
        with contextlib.suppress(PowerOff):
            await dying.commit([put("A", 3), drop("B"), read("A")])
        went_off = disk.off.is_set()
        disk.off_at = None
        disk.off.clear()
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
            place = tmp_path / f"{steps}-{loss}"
            disk.after_loss(place, Random(f"{steps} {loss}") if loss else None)
            after = files_store(place / "root")
            await caught_up(after)
            found = await after.load("acme", "A")
            assert found is not None
            assert (found.damage, found.metadata) == (None, record.metadata)
            assert (await after.load("acme", "B") is None) == gone
            await after.close()
            assert read_log(place / "root")[verdict.seq]["id"] == verdict.id
        await alive.close()
        disk.close()
        if not went_off:
            break
    assert steps > 8


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
    base = Volatile(parent)

    def start() -> tuple[Process, FilesStore]:
        disk = Process(base)
        return disk, files_store(parent / "root", disk, SegmentLimits(size=6000))

    processes = [start() for _ in range(3)]
    model: dict[str, int] = {}
    receipts: list[Receipt] = []
    deaths = 0
    for version in range(1, 160):
        index = random.randrange(3)
        disk, store = processes[index]
        if random.random() < 0.15:
            disk.arm(random.randint(0, 14))
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
            processes[index] = start()
            # It happened, or not; whoever looks next decides it for all.
            looking = files_store(parent / "root", base)
            await caught_up(looking)
            found = await versions(looking)
            await looking.close()
            assert found in (model, wanted)
            model = found
        if random.random() < 0.2:
            await asyncio.sleep(0.004)
    for loss in range(4):
        place = tmp_path / f"loss-{loss}"
        base.after_loss(place, Random(loss) if loss else None)
        after = files_store(place / "root")
        await caught_up(after)
        assert await versions(after) == model
        await after.close()
        lines = read_log(place / "root")
        for receipt in receipts:
            assert lines[receipt.seq]["id"] == receipt.id
    assert deaths > 3
    for disk, store in processes:
        disk.off_at = None
        with contextlib.suppress(PowerOff):
            await store.close()
    base.close()


async def test_errors_of_the_service_are_its_own_even_after_a_crash(tmp_path: Path) -> None:
    """A torn pair that nobody has staged any more is reported, and can be set again."""
    truth = await begin(tmp_path)
    (tmp_path / org_hash("acme") / f"{secret_hash('OLD')}.meta").write_bytes(b"{")
    service = open_on(tmp_path, Durable())
    with pytest.raises(SecretsError, match="damaged"):
        await service.get(CALLER, "OLD")
    await update(service, truth)
    await get(service, truth)
    with pytest.raises(ApiKeyNotFound):
        await service.keys.revoke(Caller(CALLER.principal), "key_none")
    await service.close()
