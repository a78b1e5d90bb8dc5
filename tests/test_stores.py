"""The contract of the `Store` port: one suite that every store passes."""

import asyncio
import contextlib
import fcntl
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from flowmason_secrets.core.errors import InvalidInput, LogDamaged, LogUnavailable
from flowmason_secrets.core.events import Event, Ids, Receipt
from flowmason_secrets.core.intents import Intent
from flowmason_secrets.core.names import secret_id
from flowmason_secrets.core.ports import STALE, Sources, Store, Verdict
from flowmason_secrets.core.records import (
    ApiKey,
    Change,
    DropSecret,
    Metadata,
    PutApiKey,
    PutSecret,
    Ref,
)
from flowmason_secrets.storage import files as files_module
from flowmason_secrets.storage import wire
from flowmason_secrets.storage.cache import CiphertextCache
from flowmason_secrets.storage.chunks import ChunkReader
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.engine import Environment
from flowmason_secrets.storage.eventlog import SegmentLimits
from flowmason_secrets.storage.files import FilesStore
from flowmason_secrets.storage.memory import MemoryStore
from flowmason_secrets.storage.published import Layout, Published

from .harness.faults import Faulty, PowerOff, Watched, io_error

ORG = "acme"
_ids = Ids(time.time, os.urandom)
Depends = tuple[tuple[Ref, int], ...]


def files_store(
    root: Path, durable: Durable | None = None, limits: SegmentLimits | None = None
) -> FilesStore:
    """A store over a data directory."""
    durable = durable or Durable()
    layout = Layout(root)
    return FilesStore(
        Environment(
            layout=layout,
            durable=durable,
            published=Published(layout, durable, lambda: "oldest"),
            cache=CiphertextCache(1 << 20),
            sources=Sources(time.time, _ids),
            limits=limits or SegmentLimits(),
        )
    )


def event(action: str, name: str | None = None, resource: str | None = None) -> Event:
    """An event about a secret, or about another resource."""
    if resource is None and name is not None:
        resource = secret_id(ORG, name)
    return Event(_ids(), action, "success", ORG, "secret", resource, name)


def metadata(name: str, version: int = 1, revision: str | None = None) -> Metadata:
    moment = "2026-01-31T12:00:00.000000Z"
    return Metadata(
        id=secret_id(ORG, name),
        name=name,
        description="d" * (version % 50),
        category="token",
        created_at=moment,
        updated_at=moment,
        created_by="tester",
        expires_at=None,
        version=version,
        revision=revision or _ids(),
        key_id="aabbccdd",
    )


def put(name: str, version: int = 1, depends: Depends = (), token: bytes = b"gAAAA") -> Intent:
    change = PutSecret(ORG, metadata(name, version), token)
    return Intent(event("secret.create", name), depends, change)


def drop(name: str, depends: Depends = ()) -> Intent:
    return Intent(event("secret.delete", name), depends, DropSecret(ORG, name))


def read(name: str, depends: Depends = ()) -> Intent:
    return Intent(event("secret.read", name), depends)


def on(name: str, as_of: int) -> Depends:
    """What an intent depends on that read this secret then."""
    return (((ORG, secret_id(ORG, name)), as_of),)


def api_key(number: int, org: str = ORG) -> ApiKey:
    return ApiKey(
        id=f"key_{number}",
        org_id=org,
        name=f"key {number}",
        digest=f"{number:064x}",
        scopes=("full", "read"),
        allow=("A_*",),
        created_at=f"2026-01-31T12:00:{number:02}.000000Z",
        created_by="tester",
        expires_at="2030-01-31T12:00:00.000000Z",
        expiry=1896091200.0,
    )


def put_key(key: ApiKey, depends: Depends = ()) -> Intent:
    action = "api_key.create" if key.revoked_at is None else "api_key.revoke"
    about = Event(_ids(), action, "success", key.org_id, "api_key", key.id, key.name)
    return Intent(about, depends, PutApiKey(key))


def seq(verdict: Verdict) -> int:
    assert isinstance(verdict, Receipt), verdict
    return verdict.seq


class Opened(NamedTuple):
    """The store that a test works on, and one through which it looks: the same, or another."""

    store: Store
    other: Store
    lines: Callable[[], list[bytes]]


@pytest.fixture(params=["memory", "files", "two files"])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opened]:
    if request.param == "memory":
        memory = MemoryStore(Sources(time.time, _ids))
        yield Opened(memory, memory, lambda: [c.data for c in memory.chunks(0, memory.position)])
        return
    first = files_store(tmp_path / "data")
    second = files_store(tmp_path / "data") if request.param == "two files" else first

    def lines() -> list[bytes]:
        reader = ChunkReader(tmp_path / "data" / "events")
        size = max(first.position, second.position)
        return [
            line for chunk in reader.read(0, size) for line in chunk.data.splitlines(keepends=True)
        ]

    yield Opened(first, second, lines)
    await first.close()
    if second is not first:
        await second.close()
    assert os.listdir(tmp_path / "data" / "staged") == []


async def caught_up(store: Store) -> int:
    assert await store.commit([Intent(None, ())]) == [None]
    return store.position


async def test_several_events_of_one_intent_are_all_or_none(opened: Opened) -> None:
    store, other, lines = opened
    created = seq((await store.commit([put("A"), put("B")]))[1]) + 1
    before = len(lines())

    def reads(*names: str, depends: Depends) -> Intent:
        first, *more = (event("secret.read", name) for name in names)
        return Intent(first, depends, more=tuple(more))

    both = (*on("A", created), *on("B", created))
    batch = [read("A"), reads("A", "B", "C", depends=both), read("B"), put("B", 2)]
    verdicts = [seq(verdict) for verdict in await other.commit(batch)]
    assert verdicts == [before, before + 3, before + 4, before + 5]
    written = [wire.decode_line(line.rstrip()) for line in lines()[before:]]
    assert [line["name"] for line in written] == ["A", "A", "B", "C", "B", "B"]
    assert [line["id"] for line in written[1:4]] == [one.id for one in _events(batch[1])]
    # One thing that has changed, and none of them is there.
    before = len(lines())
    assert await store.commit([reads("A", "C", "B", depends=both)]) == [STALE]
    assert len(lines()) == before


def _events(intent: Intent) -> list[Event]:
    assert intent.event is not None
    return [intent.event, *intent.more]


async def test_one_event_that_cannot_be_a_line_refuses_those_with_it(tmp_path: Path) -> None:
    large = event("secret.read", "L")._replace(details={"error": "x" * 9000})
    broken = Intent(event("secret.read", "A"), (), more=(large, event("secret.read", "B")))
    store = files_store(tmp_path / "data")
    try:
        bad, good = await store.commit([broken, read("A")])
        assert isinstance(bad, InvalidInput)
        assert seq(good) == store.position - 1 == 1
    finally:
        await store.close()


async def test_receipts_are_consecutive_and_in_order(opened: Opened) -> None:
    store = opened.store
    wanted: list[str] = []
    for size in (1, 3, 1, 40):
        batch = [read(f"N{number}") for number in range(size)]
        verdicts = await store.commit(batch)
        for intent, verdict in zip(batch, verdicts, strict=True):
            assert intent.event is not None
            assert isinstance(verdict, Receipt)
            assert verdict == Receipt(len(wanted) + 1, intent.event.id)
            wanted.append(verdict.id)
        assert store.position == len(wanted) + 1
    decoded = [wire.decode_line(line) for line in opened.lines()]
    assert [line["seq"] for line in decoded] == list(range(len(wanted) + 1))
    assert decoded[0]["action"] == "log.segment"
    assert [line["id"] for line in decoded[1:]] == wanted


async def test_an_empty_batch_has_no_verdicts(opened: Opened) -> None:
    assert await opened.store.commit([]) == []
    assert [wire.decode_line(line)["action"] for line in opened.lines()] in ([], ["log.segment"])


async def test_what_was_put_is_loaded_and_what_was_dropped_is_not(opened: Opened) -> None:
    store, other = opened.store, opened.other
    assert await store.load(ORG, "A") is None
    intent = put("A", token=b"gAAAAlong" * 100)
    assert isinstance(intent.change, PutSecret)
    await store.commit([intent])
    for one in (store, other):
        await caught_up(one)
        record = await one.load(ORG, "A")
        assert record is not None
        assert (record.metadata, record.token) == (intent.change.metadata, intent.change.token)
        assert (record.damage, record.as_of) == (None, one.position)
        assert one.peek(ORG, "A") == record
        # Neither another organisation's nor another name.
        assert (await one.load("globex", "A"), await one.load(ORG, "a")) == (None, None)
        assert one.peek("globex", "A") is None
    # A shorter one in its place.
    shorter = put("A", 2, token=b"gAAAAs")
    assert isinstance(shorter.change, PutSecret)
    await store.commit([shorter])
    for one in (store, other):
        one.forget(ORG, "A")
        record = await one.load(ORG, "A")
        assert record is not None
        assert (record.metadata, record.token) == (shorter.change.metadata, b"gAAAAs")
    await store.commit([drop("A")])
    for one in (store, other):
        one.forget(ORG, "A")
        assert one.peek(ORG, "A") is None
        assert await one.load(ORG, "A") is None
    # Again, so that nothing of the deletion is in the way.
    await store.commit([put("A", 3)])
    record = await other.load(ORG, "A")
    assert record is not None
    assert record.metadata.version == 3


async def test_an_intent_is_stale_exactly_if_what_it_read_has_changed_since(
    opened: Opened,
) -> None:
    store, other = opened.store, opened.other
    await store.commit([read("A")])
    before = await caught_up(other)
    created = seq((await store.commit([put("A")]))[0]) + 1
    assert await other.commit(
        [read("A", on("A", before)), put("A", 2, on("A", before)), read("A", on("A", created - 1))]
    ) == [STALE, STALE, STALE]
    assert other.position == created
    # It is what it depends on that counts, not what it is about.
    verdicts = await other.commit(
        [read("A", on("A", created)), read("A", on("B", created)), read("B", on("A", before))]
    )
    assert [isinstance(verdict, Receipt) for verdict in verdicts] == [True, True, False]
    # Reads and refusals change nothing.
    refused = event("secret.create", "A")._replace(outcome="denied")
    await store.commit([read("A"), Intent(refused, ()), read("A")])
    assert isinstance((await other.commit([read("A", on("A", created))]))[0], Receipt)
    # Nor does the change of another secret.
    await store.commit([put("B")])
    assert isinstance((await other.commit([read("A", on("A", created))]))[0], Receipt)
    # A stale intent leaves nothing in the log.
    size = store.position
    deleted = seq((await store.commit([drop("A", on("A", created))]))[0]) + 1
    assert deleted > size
    size = len(opened.lines())
    assert await other.commit([read("A", on("A", created))]) == [STALE]
    assert await store.commit([drop("A", on("A", created))]) == [STALE]
    assert len(opened.lines()) == size
    both = (*on("B", deleted), *on("A", deleted))
    assert isinstance((await other.commit([put("A", 1, both)]))[0], Receipt)
    assert await other.commit([put("A", 1, both)]) == [STALE]


async def test_reads_of_a_batch_go_before_its_changes(opened: Opened) -> None:
    store = opened.store
    now = seq((await store.commit([put("A")]))[0]) + 1
    seen = on("A", now)
    batch = [put("A", 2, seen), read("A", seen), drop("A", seen), read("A", seen), read("B")]
    first, one, lost, two, three = await store.commit(batch)
    assert lost is STALE
    assert [seq(verdict) for verdict in (one, two, three, first)] == list(range(now, now + 4))
    record = await opened.other.load(ORG, "A")
    assert record is not None
    assert record.metadata.version == 2


async def test_of_two_changes_of_a_batch_one_wins(opened: Opened) -> None:
    store = opened.store
    as_of = await caught_up(store)
    creates = [put("A", 1, on("A", as_of), b"gAAAA%d" % n) for n in range(5)]
    verdicts = await store.commit(creates)
    assert [isinstance(verdict, Receipt) for verdict in verdicts] == [True] + [False] * 4
    assert verdicts[1:] == [STALE] * 4
    record = await opened.other.load(ORG, "A")
    assert record is not None
    assert record.token == b"gAAAA0"
    # Without dependencies both happen, in their order.
    verdicts = await store.commit([put("B", 1, token=b"gAAAA1"), put("B", 2, token=b"gAAAA2")])
    assert seq(verdicts[1]) == seq(verdicts[0]) + 1
    record = await opened.other.load(ORG, "B")
    assert record is not None
    assert record.token == b"gAAAA2"


async def test_a_barrier_tells_only_whether_what_was_read_is_current(opened: Opened) -> None:
    store, other = opened.store, opened.other
    await store.commit([read("A")])
    now = seq((await store.commit([put("A")]))[0]) + 1
    size = len(opened.lines())
    barriers = [Intent(None, on("A", as_of)) for as_of in (now, now - 1, now + 5)]
    assert await other.commit([*barriers, Intent(None, ())]) == [None, STALE, None, None]
    assert other.position == now
    assert len(opened.lines()) == size
    # Beside the change that would outdate it: it goes first, like every read.
    verdicts = await other.commit([put("A", 2, on("A", now)), barriers[0]])
    assert isinstance(verdicts[0], Receipt)
    assert verdicts[1] is None


async def test_api_keys_are_found_by_their_digest_until_after_their_revocation(
    opened: Opened,
) -> None:
    store, other = opened.store, opened.other
    await caught_up(store)
    keys = [api_key(number) for number in (3, 1, 2)]
    await store.commit([put_key(key) for key in keys])
    await store.commit([put_key(api_key(4, "globex"))])
    now = await caught_up(other)
    assert await other.api_keys(ORG) == [api_key(number) for number in (1, 2, 3)]
    assert await other.api_keys("globex") == [api_key(4, "globex")]
    assert await other.api_keys("nobody") == []
    assert await other.load_api_key(keys[0].digest) == keys[0]
    assert await other.load_api_key("0" * 64) is None
    # Whoever uses it depends on it.
    used = (((ORG, "key_3"), now),)
    assert isinstance((await other.commit([read("A", used)]))[0], Receipt)
    revoked = replace(keys[0], revoked_at="2026-02-01T00:00:00.000000Z")
    verdicts = await store.commit([put_key(revoked, used), put_key(revoked, used)])
    assert verdicts[1] is STALE
    assert await other.commit([read("A", used), Intent(None, used)]) == [STALE, STALE]
    assert await other.load_api_key(revoked.digest) == revoked
    assert not revoked.is_live(0)
    assert [key.revoked_at is None for key in await other.api_keys(ORG)] == [True, True, False]
    # Another key is as it was.
    others = (((ORG, "key_1"), now),)
    assert isinstance((await other.commit([read("A", others)]))[0], Receipt)


class Model:
    """What a store has to be like: a dict, and when each of its entries was last changed."""

    def __init__(self) -> None:
        self.secrets: dict[str, tuple[int, bytes]] = {}
        self.changed: dict[str, int] = {}
        self.position = 1

    def decide(self, batch: list[Intent], first: int) -> list[int | None]:
        """The seq of each intent, or None for one that has to be stale, if the first has `first`:
        a new segment takes a seq for its header.
        """
        self.position = first
        found: list[int | None] = [None] * len(batch)
        order = sorted(range(len(batch)), key=lambda index: batch[index].change is not None)
        for index in order:
            intent = batch[index]
            if any(self.changed.get(ref[1], 0) > as_of for ref, as_of in intent.depends):
                continue
            found[index] = self.position
            self.position += 1
            match intent.change:
                case PutSecret(_, meta, token):
                    self.secrets[meta.name] = (meta.version, token)
                    self.changed[meta.id] = self.position
                case DropSecret(_, name):
                    self.secrets.pop(name, None)
                    self.changed[secret_id(ORG, name)] = self.position
        return found


class Views:
    """Several stores on the same data, and what somebody working through each has read."""

    def __init__(self, stores: list[Store], random: Random) -> None:
        self.stores = stores
        self.random = random
        self.read: dict[tuple[int, str], int] = {}
        self.versions = itertools.count(1)

    async def look(self, index: int, name: str) -> None:
        """Read a secret, from memory or from the files."""
        store = self.stores[index]
        as_of = store.position
        record = None if self.random.random() < 0.3 else store.peek(ORG, name)
        if record is None:
            record = await store.load(ORG, name)
        self.read[index, name] = as_of if record is None else record.as_of

    def intent(self, index: int, name: str) -> Intent:
        depends = on(name, self.read[index, name])
        kind = self.random.choice(("read", "put", "drop"))
        if kind == "read":
            return read(name, depends)
        if kind == "drop":
            return drop(name, depends)
        version = next(self.versions)
        return put(name, version, depends, b"gAAAA" + b"%d" % version * self.random.randint(1, 30))


NAMES = ("A", "B", "C")


async def check_against_the_model(stores: list[Store], random: Random, batches: int) -> int:
    """Run random batches through random stores; how many intents were stale."""
    views, model = Views(stores, random), Model()
    stale = 0
    # Each store has read nothing of a log before it has seen it.
    await stores[0].commit([read("A")])
    model.position += 1
    for index, store in enumerate(stores):
        await caught_up(store)
        for name in NAMES:
            await views.look(index, name)
    for _ in range(batches):
        index = random.randrange(len(stores))
        store = stores[index]
        for name in NAMES:
            if random.random() < 0.6:
                await views.look(index, name)
        batch = [views.intent(index, random.choice(NAMES)) for _ in range(random.randint(1, 5))]
        verdicts = await store.commit(batch)
        receipts = [verdict.seq for verdict in verdicts if isinstance(verdict, Receipt)]
        first = min(receipts, default=model.position)
        assert first - model.position in (0, 1)
        wanted = model.decide(batch, first)
        assert len(verdicts) == len(wanted)
        for verdict, expected, intent in zip(verdicts, wanted, batch, strict=True):
            if verdict is STALE:
                assert expected is None
                stale += 1
                store.forget(ORG, intent.event.name if intent.event and intent.event.name else "")
            else:
                assert isinstance(verdict, Receipt)
                assert verdict.seq == expected
        assert store.position == model.position
    for store in stores:
        await caught_up(store)
        for name in NAMES:
            store.forget(ORG, name)
            record = await store.load(ORG, name)
            found = None if record is None else (record.metadata.version, record.token)
            assert found == model.secrets.get(name)
    return stale


@pytest.mark.parametrize("kind", ["memory", "files", "two files", "three files, small segments"])
async def test_random_batches_do_what_a_dict_would_do(kind: str, tmp_path: Path) -> None:
    stale = 0
    for seed in range(40 if kind == "memory" else 8):
        stores: list[Store]
        if kind == "memory":
            stores = [MemoryStore(Sources(time.time, _ids))]
        else:
            count = {"files": 1, "two files": 2}.get(kind, 3)
            limits = SegmentLimits(size=4000) if count == 3 else None
            stores = [files_store(tmp_path / str(seed), None, limits) for _ in range(count)]
        stale += await check_against_the_model(stores, Random(seed), 40)
        for store in stores:
            await store.close()
    assert stale > 100


async def test_a_cached_record_of_another_process_is_invalidated(tmp_path: Path) -> None:
    one, two = files_store(tmp_path), files_store(tmp_path)
    await one.commit([put("A"), put("B")])
    await caught_up(two)
    for name in ("A", "B"):
        await two.load(ORG, name)
        assert two.peek(ORG, name) is not None
    await one.commit([put("A", 2)])
    await caught_up(two)
    assert two.peek(ORG, "A") is None
    assert two.peek(ORG, "B") is not None
    await one.close()
    await two.close()


async def test_two_stores_that_create_the_same_secret_at_once(tmp_path: Path) -> None:
    stores = [files_store(tmp_path) for _ in range(4)]
    for store in stores:
        await caught_up(store)

    async def create(store: FilesStore, name: str) -> bool:
        as_of = store.position
        record = await store.load(ORG, name)
        depends = on(name, as_of if record is None else record.as_of)
        version = 1 if record is None else record.metadata.version + 1
        return isinstance((await store.commit([put(name, version, depends)]))[0], Receipt)

    for number in range(25):
        # All have read its absence before any of them writes.
        won = await asyncio.gather(*(create(store, f"N{number}") for store in stores))
        assert any(won)
        record = await stores[0].load(ORG, f"N{number}")
        assert record is not None
        # Each one who won has seen the one before: no version was lost.
        assert record.metadata.version == sum(won)
    for store in stores:
        await store.close()


async def test_opening_beside_a_process_that_settles_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that its owner removes while another process recovers is no failure."""
    one = files_store(tmp_path)
    await one.commit([put("A"), put("B")])
    (journal,) = (tmp_path / "staged").iterdir()

    class Meanwhile(Watched):
        # Between listing `staged/` and reading what is in it, recovery syncs the log.
        def before(self, kind: str) -> None:
            if kind == "sync" and journal.exists():
                sealed = one._engine.seal_journal()
                assert sealed is not None
                sealed.settle()

    two = files_store(tmp_path, Meanwhile())
    assert await two.commit([Intent(None, ()), read("A")]) == [
        None,
        Receipt(3, (await last_id(tmp_path))),
    ]
    assert not journal.exists()
    record = await two.load(ORG, "A")
    assert record is not None
    assert record.damage is None
    await one.close()
    await two.close()


async def test_an_answer_rests_on_nothing_that_others_have_not_synced(tmp_path: Path) -> None:
    """They may have died before they could."""
    disk = Watched()
    one, two = files_store(tmp_path), files_store(tmp_path, disk)
    await one.commit([put("A")])
    await caught_up(two)
    for appended in (1, 0, 2, 0):
        if appended:
            await one.commit([read("A")] * appended)
        disk.steps.clear()
        await caught_up(two)
        assert ("sync" in disk.steps) == bool(appended)
    await one.close()
    await two.close()


class ReadUnderTheLock:
    """How many bytes of the log were read by those who held the commit lock at that time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size = 0
        self._held = False
        flock, pread = fcntl.flock, os.pread

        def locking(descriptor: int, operation: int) -> None:
            flock(descriptor, operation)
            self._held = operation == fcntl.LOCK_EX

        def reading(descriptor: int, size: int, place: int) -> bytes:
            data = pread(descriptor, size, place)
            # The hint in the lock's own file has eight bytes.
            self.size += len(data) if self._held and size > 8 else 0
            return data

        monkeypatch.setattr(fcntl, "flock", locking)
        monkeypatch.setattr(os, "pread", reading)


@pytest.mark.parametrize("who", ["opens", "follows"])
async def test_nobody_waits_for_one_who_reads_what_others_appended(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it is: it is read before the lock is taken."""
    limits = SegmentLimits(size=1 << 20)
    one, two = files_store(tmp_path, limits=limits), files_store(tmp_path, limits=limits)
    await one.commit([put("A")])
    if who == "follows":
        await caught_up(two)
    for _ in range(10):
        await one.commit([read("A")] * 1000)
    await one.commit([put("A", 2)])
    under_lock = ReadUnderTheLock(monkeypatch)
    assert await caught_up(two) == one.position > 10_000
    assert under_lock.size == 0
    record = await two.load(ORG, "A")
    assert record is not None
    assert record.metadata.version == 2
    # What comes after that is seen as well.
    await one.commit([put("A", 3)])
    verdicts = await two.commit([read("A", on("A", record.as_of)), read("A", on("A", 0))])
    assert verdicts == [STALE, STALE]
    await one.close()
    await two.close()


async def test_what_is_committed_but_not_yet_published_is_not_known_to_others(
    tmp_path: Path,
) -> None:
    """They meet its event without the lock; files that they read then are older than it."""
    committed, go_on = threading.Event(), threading.Event()

    class Slow(Durable):
        waits = False

        def put(self, path: str, data: bytes, mode: int) -> None:
            if self.waits:
                committed.set()
                assert go_on.wait(30)
            super().put(path, data, mode)

    slow = Slow()
    one, two = files_store(tmp_path, slow), files_store(tmp_path)
    await one.commit([put("A")])
    before = await caught_up(two)
    slow.waits = True
    writing = asyncio.create_task(one.commit([put("A", 2)]))
    assert await asyncio.to_thread(committed.wait, 30)
    waiting = asyncio.create_task(two.commit([read("A")]))
    # It has read the event when it waits for the lock.
    log = two._engine._log
    assert log is not None
    while log.position == before:
        await asyncio.sleep(0.001)
    old = await two.load(ORG, "A")
    assert old is not None
    assert (old.metadata.version, old.as_of, two.position) == (1, before, before)
    go_on.set()
    await writing
    assert isinstance((await waiting)[0], Receipt)
    assert await two.commit([read("A", on("A", old.as_of))]) == [STALE]
    # What was read then is not kept either.
    kept = two.peek(ORG, "A")
    assert kept is None or await two.commit([read("A", on("A", kept.as_of))]) == [STALE]
    await one.close()
    await two.close()


async def test_a_change_that_was_read_early_is_published_if_nobody_did(tmp_path: Path) -> None:
    """Its writer dies between the commit and the publishing, while another waits for the lock."""
    one, two = files_store(tmp_path), files_store(tmp_path)
    await one.commit([put("A")])
    before = await caught_up(two)

    class Dying(Durable):
        def put(self, path: str, data: bytes, mode: int) -> None:
            raise PowerOff

    dying = files_store(tmp_path, Dying())
    with pytest.raises(PowerOff):
        await dying.commit([put("A", 2)])
    await dying.close()
    # Read without the lock, and then nothing is left to be read with it.
    two._engine._approach()
    assert two.position == before
    assert await caught_up(two) == before + 1
    record = await two.load(ORG, "A")
    assert record is not None
    assert (record.metadata.version, record.damage) == (2, None)
    await one.close()
    await two.close()


async def last_id(root: Path) -> str:
    """The id of the newest event."""
    (segment,) = (root / "events").iterdir()
    return wire.decode_line(segment.read_bytes().splitlines()[-1])["id"]


async def test_opening_again_and_again_beside_a_busy_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "SETTLE_AFTER", 0.0)
    one = files_store(tmp_path)
    await one.commit([put("A")])
    done = False
    acknowledged = 1

    async def write() -> None:
        nonlocal acknowledged
        while not done:
            await one.commit([put("A", acknowledged + 1), put("B", acknowledged + 1)])
            acknowledged += 1

    writing = asyncio.create_task(write())
    try:
        for _ in range(60):
            known = acknowledged
            two = files_store(tmp_path)
            assert await two.commit([Intent(None, ())]) == [None]
            as_of = two.position
            record = await two.load(ORG, "A")
            assert record is not None
            verdict = (await two.commit([read("A", on("A", as_of))]))[0]
            if isinstance(verdict, Receipt):
                assert record.damage is None
                assert record.metadata.version >= known
            await two.close()
    finally:
        done = True
        await writing
    await one.close()
    assert os.listdir(tmp_path / "staged") == []


async def test_a_clean_stop_settles_a_journal_that_is_just_being_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the background is when `close` comes: nothing is left in `staged/`."""
    monkeypatch.setattr(files_module, "SETTLE_AFTER", 0.0)
    for turns in range(12):
        store = files_store(tmp_path / str(turns))
        await store.commit([put("A")])
        for _ in range(turns):
            await asyncio.sleep(0)
        # Threads get their turn, the event loop does not.
        time.sleep(0.02)
        await store.close()
        assert os.listdir(tmp_path / str(turns) / "staged") == [], turns


async def test_closing_while_all_readers_are_busy_settles_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "SETTLE_AFTER", 0.0)
    store = files_store(tmp_path)
    gone = threading.Event()
    busy = [store._readers.submit(gone.wait, 5) for _ in range(4)]
    await store.commit([put("A")])
    # The journal is sealed, and its settling waits for a thread.
    while store._engine.staged or store._readers._work_queue.empty():
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, gone.set)
    await store.close()
    assert all(one.done() for one in busy)
    assert os.listdir(tmp_path / "staged") == []


async def test_a_failing_close_releases_everything_all_the_same(tmp_path: Path) -> None:
    disk = Faulty({"sync_paths"}, io_error)
    store = files_store(tmp_path, disk)
    await store.commit([put("A")])
    before = set(os.listdir("/proc/self/fd"))
    disk.broken = True
    with contextlib.suppress(OSError, LogUnavailable):
        await store.close()
    assert disk.failed
    # The lock at least: its descriptor would stay until the process ends.
    assert not [
        target
        for target in map(_target, set(os.listdir("/proc/self/fd")) & before)
        if target.startswith(str(tmp_path))
    ]
    # What was acknowledged is still staged, so the next one has it.
    again = files_store(tmp_path)
    await caught_up(again)
    assert await again.load(ORG, "A") is not None
    await again.close()


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


@pytest.mark.parametrize(
    "kind",
    ["open_append", "open_existing", "write", "sync", "sync_paths", "create", "rename", "put"],
)
async def test_failing_again_and_again_leaks_no_descriptors(kind: str, tmp_path: Path) -> None:
    disk = Faulty({kind}, io_error)
    before = files_store(tmp_path, None, SegmentLimits(size=1))
    await before.commit([put("A")])
    # With nothing staged: what fails first is the step that opens a journal.
    await before.close()
    store = files_store(tmp_path, disk, SegmentLimits(size=1))
    if kind != "open_existing":
        await caught_up(store)
    disk.broken = True
    counts: list[int] = []
    for _ in range(30):
        with contextlib.suppress(LogUnavailable):
            await store.commit([put("A")])
        counts.append(len(os.listdir("/proc/self/fd")))
    assert disk.failed
    assert counts[-1] - counts[9] < 5
    disk.broken = False
    assert isinstance((await store.commit([put("A")]))[0], Receipt)
    await store.close()


def remove_all(root: Path) -> None:
    for directory in ("events", "staged", "keys"):
        for path in (root / directory).iterdir():
            path.unlink()


def remove_segment(root: Path) -> None:
    for path in (root / "events").iterdir():
        path.unlink()


def truncate(root: Path) -> None:
    """What logrotate does with `copytruncate`."""
    for path in (root / "events").iterdir():
        os.truncate(path, 0)


def cut(root: Path) -> None:
    for path in (root / "events").iterdir():
        data = path.read_bytes()
        os.truncate(path, data.rindex(b"\n", 0, -1) + 1)


@pytest.mark.parametrize("damage", [remove_all, remove_segment, truncate, cut])
async def test_no_event_goes_into_a_log_that_was_taken_away(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    """An acknowledged event is in `events/`, and none that was acknowledged before is missing."""
    store = files_store(tmp_path)
    await store.commit([put("A")])
    await store.commit([read("A"), read("A")])
    damage(tmp_path)
    for _ in range(2):
        with pytest.raises((LogDamaged, LogUnavailable)):
            await accept(store)
    await store.close()


async def accept(store: FilesStore) -> None:
    """Commit an event; a refusal of it alone is raised, too."""
    (verdict,) = await store.commit([read("A")])
    if isinstance(verdict, LogUnavailable):
        raise verdict


async def test_removing_the_lock_file_lets_nobody_in_twice(tmp_path: Path) -> None:
    class Slow(Watched):
        # Between numbering the lines and writing them, others get their turn.
        def before(self, kind: str) -> None:
            if kind == "write":
                time.sleep(0.002)

    one, two = files_store(tmp_path, Slow()), files_store(tmp_path, Slow())
    await one.commit([put("A")])
    await caught_up(two)
    (tmp_path / "commit.lock").unlink()
    # One that knows only the new file.
    three = files_store(tmp_path, Slow())
    stores = (three, one, two)
    for _ in range(15):
        for verdicts in await asyncio.gather(*(store.commit([read("A")]) for store in stores)):
            assert isinstance(verdicts[0], Receipt)
    (segment,) = (tmp_path / "events").iterdir()
    lines = [wire.decode_line(line) for line in segment.read_bytes().splitlines()]
    assert [line["seq"] for line in lines] == list(range(47))
    for store in stores:
        await store.close()


def test_a_change_is_staged_and_read_back_as_it_was() -> None:
    changes: list[Change] = [
        PutSecret(ORG, metadata("A\u2028\U0001f511", 7), b"gAAAA="),
        DropSecret("globex", "B\r\n"),
        PutApiKey(api_key(5)),
    ]
    for change in changes:
        line = wire.encode_staged("an-id", change)
        assert line.count(b"\n") == 1
        assert wire.decode_staged(line) == ("an-id", change)
        for end in range(len(line) - 1):
            with pytest.raises(wire.Malformed):
                wire.decode_staged(line[:end])
