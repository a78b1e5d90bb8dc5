"""The gate: what waits together is committed together, and everybody gets his own answer."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from flowmason_secrets import app
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.errors import (
    DecryptionFailed,
    InvalidInput,
    LogDamaged,
    LogUnavailable,
    Overloaded,
    SecretsError,
)
from flowmason_secrets.core.events import Event, Receipt
from flowmason_secrets.core.intents import Intent
from flowmason_secrets.core.keyring import MasterKey, Plaintext
from flowmason_secrets.core.ports import STALE
from flowmason_secrets.gate import Gate
from flowmason_secrets.service import Service
from flowmason_secrets.storage import wire
from flowmason_secrets.storage.files import FilesStore

from .harness.faults import Faulty, Watched, io_error, no_space
from .harness.server import settings_for
from .test_stores import event, files_store, on, put, read

Stores = Callable[[Watched], FilesStore]


class Held(Watched):
    """Holds each sync of the log until it is let go, so that tests decide what waits together."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()
        self.waiting = threading.Event()

    def before(self, kind: str) -> None:
        if kind == "sync" and not self.free.is_set():
            self.waiting.set()
            assert self.free.wait(20)

    def hold(self) -> None:
        self.waiting.clear()
        self.free.clear()

    async def is_waiting(self) -> None:
        """Return when the commit thread is in a sync."""
        assert await asyncio.to_thread(self.waiting.wait, 20)


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[Stores]:
    """Opens a store that has caught up already, and has its first segment."""
    opened: list[FilesStore] = []

    async def warm(disk: Watched) -> None:
        await opened[-1].commit([put("A")])
        disk.steps.clear()

    def make(disk: Watched) -> FilesStore:
        opened.append(files_store(tmp_path, disk))
        return opened[-1]

    yield make
    for store in opened:
        await store.close()


def events_in(root: Path) -> list[str]:
    return [
        wire.decode_line(line)["id"]
        for path in sorted((root / "events").iterdir())
        for line in path.read_bytes().splitlines()
    ]


def new(name: str = "A") -> tuple[Event, Intent]:
    intent = read(name)
    assert intent.event is not None
    return intent.event, intent


async def test_reads_that_wait_together_share_one_sync(stores: Stores, tmp_path: Path) -> None:
    disk = Watched()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    disk.steps.clear()
    verdicts = await asyncio.gather(*(gate.submit(read("A")) for _ in range(64)))
    assert disk.steps == ["write", "sync"]
    assert [type(verdict) for verdict in verdicts] == [Receipt] * 64
    assert len({verdict.seq for verdict in verdicts if isinstance(verdict, Receipt)}) == 64


async def test_a_batch_is_not_larger_than_the_loop_can_bear(stores: Stores) -> None:
    disk = Watched()
    store = stores(disk)
    await store.commit([put("A")])
    gate, position = Gate(store), store.position
    disk.steps.clear()
    verdicts = await asyncio.gather(*(gate.submit(read("A")) for _ in range(2500)))
    assert disk.steps == ["write", "sync"] * 3
    seqs = [verdict.seq for verdict in verdicts if isinstance(verdict, Receipt)]
    assert seqs == list(range(position, position + 2500))


async def test_changes_that_wait_together_share_two_syncs(stores: Stores) -> None:
    disk = Watched()
    store = stores(disk)
    # The journal is there: what it costs to begin one is not asked here.
    await store.commit([put("A")])
    gate = Gate(store)
    disk.steps.clear()
    await asyncio.gather(*(gate.submit(put(f"N{number}")) for number in range(64)))
    assert disk.steps.count("sync") == 2
    # First the changes are durable, then their events, and only then they are published.
    assert disk.steps[:5] == ["write", "sync", "write", "sync", "place"]
    assert "sync_path" not in disk.steps


async def test_what_is_left_to_do_is_done_when_the_batch_closes(stores: Stores) -> None:
    """One after the other, for all that wait; who can't be prepared is not in the log."""
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate, position = Gate(store), store.position
    disk.hold()
    first = gate.submit(read("A"))
    await disk.is_waiting()
    prepared: list[int] = []
    refusal = DecryptionFailed("A", "k1", ())

    def prepare(number: int) -> SecretsError | None:
        prepared.append(number)
        if number == 3:
            raise ZeroDivisionError
        return refusal if number == 1 else None

    defect = gate.submit(read("A"), partial(prepare, 3))
    others = [gate.submit(read("A"), partial(prepare, number)) for number in range(3)]
    gone = gate.submit(read("A"), partial(prepare, 1))
    gone.cancel()
    await asyncio.sleep(0)
    assert prepared == []
    disk.free.set()
    verdicts = await asyncio.gather(first, *others)
    assert prepared == [3, 0, 1, 2, 1]
    with pytest.raises(ZeroDivisionError):
        await defect
    assert verdicts[2] is refusal
    seqs = [verdict.seq for verdict in verdicts if isinstance(verdict, Receipt)]
    assert seqs == [position, position + 1, position + 2]
    await gate.drain()
    assert store.position == position + 3


async def test_what_has_time_is_done_during_the_sync(stores: Stores) -> None:
    """A few at a time while the sync takes, so that the loop goes on; the rest before anybody has
    his answer; nothing for those who are gone.
    """
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate, position = Gate(store), store.position
    done: list[int] = []

    def later(number: int) -> None:
        done.append(number)
        if number == 5:
            raise ZeroDivisionError

    disk.hold()
    waiting = [gate.submit(read("A"), None, partial(later, number)) for number in range(100)]
    waiting[90].cancel()
    turns: list[int] = []
    while len(done) < 99:
        await asyncio.sleep(0)
        turns.append(len(done))
    assert not any(future.done() for place, future in enumerate(waiting) if place not in (5, 90))
    assert max(after - before for before, after in pairwise([0, *turns])) == 8
    await disk.is_waiting()
    disk.free.set()
    verdicts = await asyncio.gather(*waiting, return_exceptions=True)
    assert done == [number for number in range(100) if number != 90]
    # The event of a defect is in the log all the same.
    assert isinstance(verdicts[5], ZeroDivisionError)
    seqs = [verdict.seq for verdict in verdicts if isinstance(verdict, Receipt)]
    assert seqs == [position + n for n in range(100) if n not in (5, 90)]


async def test_what_has_time_is_done_when_there_is_a_verdict(stores: Stores) -> None:
    """However little time there was, and whatever the verdict is."""
    store = stores(Watched())
    await store.commit([put("A")])
    gate = Gate(store)
    done: list[int] = []
    outdated = Intent(event("secret.read", "A"), on("A", 0))
    waiting = [gate.submit(outdated, None, partial(done.append, number)) for number in range(50)]
    waiting[-1].add_done_callback(lambda _: done.append(-1))
    assert await asyncio.gather(*waiting) == [STALE] * 50
    assert done == [*range(50), -1]


async def test_a_value_that_was_read_before_is_decrypted_during_the_sync(
    data_dir: Path, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key that was at hand then, even if that one is taken away meanwhile; a key that is
    away before is missed before anything is recorded.
    """
    disk = Held()
    service = await app.open_service(settings_for(data_dir), disk)
    keyring = service._master.keyring
    keys, others = [*keyring._keys.values()], [MasterKey.of("another master key, and a long one")]
    await service.set(caller, Draft("A", Plaintext("value")))
    assert (await service.get(caller, "A")).value.reveal() == "value"
    decrypted: list[bytes] = []
    key = keyring.derived(caller.principal.org_id, keyring.active)
    assert key is not None
    decrypt = key._fernet.decrypt

    def noted(token: bytes) -> bytes:
        decrypted.append(token)
        keyring.hold(others)
        return decrypt(token)

    key._fernet.decrypt = noted  # type: ignore[method-assign, assignment]
    disk.hold()
    monkeypatch.setattr(service._master._source, "load", lambda: others)
    reading = [asyncio.create_task(service.get(caller, "A")) for _ in range(2)]
    await disk.is_waiting()
    while len(decrypted) < 2:
        await asyncio.sleep(0)
    assert not any(one.done() for one in reading)
    disk.free.set()
    for one in reading:
        assert (await one).value.reveal() == "value"
    with pytest.raises(DecryptionFailed):
        await service.get(caller, "A")
    assert len(decrypted) == 2
    monkeypatch.setattr(service._master._source, "load", lambda: keys)
    await service.reload_keys()
    assert (await service.get(caller, "A")).value.reveal() == "value"
    await service.close()
    segments = sorted((data_dir / "events").iterdir())
    lines = [wire.decode_line(one) for path in segments for one in path.read_bytes().splitlines()]
    outcomes = [line["outcome"] for line in lines if line["action"] == "secret.read"]
    assert outcomes == ["success"] * 3 + ["failed", "success"]


async def test_what_arrives_during_a_commit_is_the_next_batch(stores: Stores) -> None:
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    disk.hold()
    first = gate.submit(read("A"))
    await disk.is_waiting()
    disk.steps.clear()
    others = [gate.submit(read("A")) for _ in range(200)]
    await asyncio.sleep(0)
    assert not first.done()
    disk.free.set()
    verdicts = await asyncio.gather(first, *others)
    assert disk.steps == ["write", "sync"]
    seqs = [verdict.seq for verdict in verdicts if isinstance(verdict, Receipt)]
    assert seqs == list(range(seqs[0], seqs[0] + 201))


async def test_concurrent_use_of_the_service_shares_syncs(data_dir: Path, caller: Caller) -> None:
    disk = Watched()
    service = await app.open_service(settings_for(data_dir), disk)
    for number in range(64):
        await service.set(caller, Draft(f"N{number}", Plaintext("value")))
    disk.steps.clear()

    async def client(number: int) -> None:
        for _ in range(5):
            revealed = await service.get(caller, f"N{number}")
            assert revealed.value.reveal() == "value"

    await asyncio.gather(*(client(number) for number in range(64)))
    assert disk.steps.count("write") <= 40 < 320
    assert disk.steps.count("sync") <= 40
    disk.steps.clear()
    drafts = [Draft(f"N{number}", Plaintext("another")) for number in range(64)]
    await asyncio.gather(*(service.set(caller, draft) for draft in drafts))
    assert disk.steps.count("sync") <= 10
    await service.close()


async def test_nobody_gets_an_answer_before_the_sync(stores: Stores, tmp_path: Path) -> None:
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    disk.hold()
    written, intent = new()
    future = gate.submit(intent)
    await disk.is_waiting()
    # It is in the file already, but might vanish.
    assert events_in(tmp_path)[-1] == written.id
    for _ in range(50):
        await asyncio.sleep(0.001)
        assert not future.done()
    disk.free.set()
    assert await future == Receipt(2, written.id)


async def test_a_waiter_that_leaves_disturbs_nobody(stores: Stores, tmp_path: Path) -> None:
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)

    async def wait_for(intent: Intent) -> object:
        return await gate.submit(intent)

    disk.hold()
    pairs = [new() for _ in range(9)]
    # The first three are in the batch that is in flight, the others in the one that fills.
    tasks = [asyncio.create_task(wait_for(intent)) for _, intent in pairs[:3]]
    await disk.is_waiting()
    tasks += [asyncio.create_task(wait_for(intent)) for _, intent in pairs[3:]]
    await asyncio.sleep(0.01)
    for index in (0, 4, 8):
        tasks[index].cancel()
    await asyncio.sleep(0)
    disk.free.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for index, (result, (written, _)) in enumerate(zip(results, pairs, strict=True)):
        if index in (0, 4, 8):
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert isinstance(result, Receipt)
            assert result.id == written.id
    await gate.drain()
    # Those of the ones who left are there as well: they asked, and others count on the order.
    assert events_in(tmp_path)[2:] == [written.id for written, _ in pairs]


async def test_a_change_of_a_caller_who_left_happens_whole(stores: Stores) -> None:
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    disk.hold()
    gone = gate.submit(put("A", 2))
    await disk.is_waiting()
    gone.cancel()
    disk.free.set()
    await gate.drain()
    record = await store.load("acme", "A")
    assert record is not None
    assert (record.metadata.version, record.damage) == (2, None)


async def test_beyond_the_limit_others_are_turned_away(stores: Stores, tmp_path: Path) -> None:
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store, 5)
    disk.hold()
    waiting = [gate.submit(read("A"))]
    await disk.is_waiting()
    waiting += [gate.submit(read("A")) for _ in range(5)]
    refused, intent = new()
    with pytest.raises(Overloaded):
        gate.submit(intent)
    disk.free.set()
    assert [type(verdict) for verdict in await asyncio.gather(*waiting)] == [Receipt] * 6
    assert refused.id not in events_in(tmp_path)
    # There is room again.
    assert isinstance(await gate.submit(intent), Receipt)
    assert events_in(tmp_path)[-1] == refused.id


async def test_a_failure_reaches_each_waiter_as_his_own(stores: Stores) -> None:
    disk = Faulty({"write"}, no_space)
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    disk.broken = True
    errors = await asyncio.gather(
        *(gate.submit(read("A")) for _ in range(8)), return_exceptions=True
    )
    assert [type(error) for error in errors] == [LogUnavailable] * 8
    assert len({id(error) for error in errors}) == 8
    for error in errors:
        assert isinstance(error, LogUnavailable)
        assert error.reason == os.strerror(28)
        assert str(error) == gate.unavailable
    disk.broken = False
    assert isinstance(await gate.submit(read("A")), Receipt)
    assert gate.unavailable is None


async def test_every_failure_reaches_each_waiter_as_his_own(stores: Stores, tmp_path: Path) -> None:
    """One exception that several tasks raise collects the tracebacks of all of them."""
    store = stores(Watched())
    await store.commit([put("A")])
    gate = Gate(store)
    (tmp_path / "events" / "audit-000000000002.ndjson").write_bytes(b"")
    errors = await asyncio.gather(
        *(gate.submit(read("A")) for _ in range(4)), return_exceptions=True
    )
    assert [type(error) for error in errors] == [LogDamaged] * 4
    assert len({str(error) for error in errors}) == 1
    assert "audit-000000000002.ndjson" in str(errors[0])
    assert len({id(error) for error in errors}) == 4
    (tmp_path / "events" / "audit-000000000002.ndjson").unlink()
    assert isinstance(await gate.submit(read("A")), Receipt)


async def test_what_needs_no_event_is_answered_beside_what_fails(stores: Stores) -> None:
    disk = Faulty({"write"}, no_space)
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    now = store.position
    disk.broken = True
    answers = await asyncio.gather(
        gate.submit(Intent(None, on("A", now))),
        gate.submit(read("A", on("A", now))),
        gate.submit(Intent(None, on("A", 0))),
        return_exceptions=True,
    )
    assert answers[0] is None
    assert isinstance(answers[1], LogUnavailable)
    assert answers[2] is STALE
    disk.broken = False


@pytest.mark.parametrize("order", ["stale last", "stale first", "stale alone, afterwards"])
async def test_only_a_written_event_shows_that_events_can_be_written(
    stores: Stores, order: str
) -> None:
    """An outdated intent has written nothing, so it says nothing about the log."""
    disk = Faulty({"write"}, no_space)
    store = stores(disk)
    await store.commit([read("A"), put("A")])
    gate = Gate(store)
    disk.broken = True
    good, stale = read("A"), read("A", on("A", 0))
    if order == "stale alone, afterwards":
        with pytest.raises(LogUnavailable):
            await gate.submit(good)
        assert await gate.submit(stale) is STALE
    else:
        both = [good, stale] if order == "stale last" else [stale, good]
        await asyncio.gather(*map(gate.submit, both), return_exceptions=True)
    assert gate.unavailable is not None
    disk.broken = False
    await gate.submit(good)
    assert gate.unavailable is None


async def test_one_event_that_can_not_be_written_spoils_no_others(stores: Stores) -> None:
    store = stores(Watched())
    await store.commit([put("A")])
    gate = Gate(store)
    too_long = event("secret.read", "A")._replace(details={"allow": ["x" * 9000]})
    no_text = event("secret.read", "A")._replace(actor="\ud800")
    for bad in (too_long, no_text):
        first, failed, last = await asyncio.gather(
            gate.submit(read("A")),
            gate.submit(Intent(bad, ())),
            gate.submit(read("A")),
            return_exceptions=True,
        )
        assert isinstance(failed, Exception)
        assert isinstance(first, Receipt), first
        assert isinstance(last, Receipt), last


@pytest.mark.parametrize("character", ["a", "\0", '"', "é", "\U0001f511"])
async def test_an_api_key_with_as_many_patterns_as_are_allowed(
    service: Service, caller: Caller, character: str
) -> None:
    """What is not refused as invalid fits into its event."""
    await service.set(caller, Draft("A", Plaintext("value")))
    for count in (1, 4, 8, 16, 64):
        for length in (4, 8, 16, 32, 64, 120, 253):
            patterns = tuple(f"{number:02}" + character * length for number in range(count))
            issuing = service.keys.issue(caller, KeyDraft("many", allow=patterns))
            issued, revealed = await asyncio.gather(
                issuing, service.get(caller, "A"), return_exceptions=True
            )
            assert not isinstance(revealed, BaseException), repr(revealed)
            if isinstance(issued, BaseException):
                assert isinstance(issued, InvalidInput), repr(issued)
                assert issued.field == "allow"
                assert character == "\0" or count * length > 64
            else:
                assert issued.key.allow == patterns


async def test_draining_waits_for_everything(stores: Stores) -> None:
    disk = Held()
    store = stores(disk)
    await store.commit([put("A")])
    gate = Gate(store)
    await gate.drain()
    disk.hold()
    futures = [gate.submit(read("A"))]
    await disk.is_waiting()
    futures += [gate.submit(read("A")) for _ in range(20)]
    draining = asyncio.create_task(gate.drain())
    await asyncio.sleep(0.01)
    assert not draining.done()
    disk.free.set()
    await draining
    assert all(isinstance(future.result(), Receipt) for future in futures)


async def test_closing_a_service_finishes_what_is_under_way(data_dir: Path, caller: Caller) -> None:
    service = await app.open_service(settings_for(data_dir))
    await service.set(caller, Draft("A", Plaintext("value")))
    under_way = [
        asyncio.create_task(service.set(caller, Draft(f"N{number}", Plaintext("value"))))
        for number in range(20)
    ]
    while service.gate._running is None:
        await asyncio.sleep(0)
    await service.close()
    written = await asyncio.gather(*under_way, return_exceptions=True)
    ids = set(events_in(data_dir))
    for one in written:
        # Either it was refused, or it is there.
        if isinstance(one, BaseException):
            assert isinstance(one, SecretsError), repr(one)
        else:
            assert one.receipt.id in ids
    assert os.listdir(data_dir / "staged") == []


async def test_a_failure_is_over_when_it_is_over(data_dir: Path, caller: Caller) -> None:
    disk = Faulty({"sync"}, io_error)
    service = await app.open_service(settings_for(data_dir), disk)
    await service.set(caller, Draft("A", Plaintext("value")))
    for _ in range(3):
        disk.broken = True
        with pytest.raises(LogUnavailable):
            await service.get(caller, "A")
        disk.broken = False
        began = time.perf_counter()
        assert (await service.get(caller, "A")).value.reveal() == "value"
        assert time.perf_counter() - began < 5
    await service.close()
