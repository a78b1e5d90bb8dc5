"""Reads that an agent served by itself: durable at the agent, and in the log exactly once."""

import asyncio
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowmason_secrets import app
from flowmason_secrets.api import shapes
from flowmason_secrets.api.deliveries import OfflineReadIn
from flowmason_secrets.client import Options
from flowmason_secrets.client.address import address
from flowmason_secrets.client.errors import Refused, UnexpectedAnswer, Unreachable
from flowmason_secrets.core import errors
from flowmason_secrets.core.access import Caller, Peer
from flowmason_secrets.core.drafts import Delivery, OfflineRead, Usage
from flowmason_secrets.core.errors import SecretsError, Unresolved, UnresolvedReferences
from flowmason_secrets.core.events import Ids
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import Sources
from flowmason_secrets.core.records import SecretMetadata
from flowmason_secrets.service import Service
from flowmason_secrets.sidecar.agent.background import Changes, Deliveries
from flowmason_secrets.sidecar.agent.lastknown import Known, LastKnown
from flowmason_secrets.sidecar.agent.queue import LIMIT, OfflineQueue
from flowmason_secrets.sidecar.agent.serving import Secrets
from flowmason_secrets.sidecar.agent.upstream import Upstream

from .conftest import Client
from .harness.between import between
from .harness.server import issue_key, serving, settings_for

TICKET = Plaintext("ab" * 32)
PATH = "/api/v1/auth/audit-log/offline"
KEY = Plaintext("fm_live_" + "1" * 48)
PEER = Peer(1000, 4242)
ID = "01890a5d-ac96-774b-bcce-b302099a8057"


def reads(first: int, last: int) -> tuple[OfflineRead, ...]:
    """Reads with these numbers."""
    when = "2026-01-31T12:00:00Z"
    return tuple(OfflineRead(n, ID, when, f"S{n}", n, PEER) for n in range(first, last + 1))


def lines(data_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of the log."""
    segments = sorted((data_dir / "events").glob("audit-*.ndjson"))
    found = []
    for line in b"".join(one.read_bytes() for one in segments).splitlines(keepends=True):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def numbers(data_dir: Path) -> list[int]:
    """The numbers of the offline reads in the log."""
    found = [line["details"] for line in lines(data_dir) if line["action"] == "secret.read"]
    return [details["number"] for details in found if details.get("offline") is True]


# --- the server's side


async def test_each_is_recorded_once_however_often_it_is_delivered(
    service: Service, caller: Caller, data_dir: Path
) -> None:
    offline = service.offline
    assert await offline.record(caller, Delivery(TICKET, reads(1, 3))) == 3
    assert await offline.record(caller, Delivery(TICKET, reads(1, 3))) == 3
    assert await offline.record(caller, Delivery(TICKET, reads(2, 5))) == 5
    assert await offline.record(caller, Delivery(TICKET, reads(1, 2))) == 5
    assert numbers(data_dir) == [1, 2, 3, 4, 5]
    # Another agent's queue has numbers of its own.
    assert await offline.record(caller, Delivery(Plaintext("cd" * 32), reads(2, 3))) == 3
    assert numbers(data_dir) == [1, 2, 3, 4, 5, 2, 3]
    (event,) = [e for e in lines(data_dir) if e["details"].get("number") == 4]
    assert (event["action"], event["outcome"], event["status"]) == ("secret.read", "success", 200)
    assert (event["name"], event["version"], event["actor"]) == ("S4", 4, "tester")
    assert {**event["details"], "queue": ""} == {
        "offline": True,
        "read_at": "2026-01-31T12:00:00Z",
        "read_id": ID,
        "queue": "",
        "number": 4,
        "peer_uid": 1000,
        "peer_pid": 4242,
    }
    assert TICKET.reveal() not in json.dumps(lines(data_dir))


async def test_processes_that_take_over_the_same_reads_at_once(data_dir: Path) -> None:
    services = [await app.open_service(settings_for(data_dir)) for _ in range(3)]
    try:
        callers = [app.local_caller("acme", f"u{number}") for number in range(3)]
        done = await asyncio.gather(
            *(
                service.offline.record(caller, Delivery(TICKET, reads(1, last)))
                for last in (4, 7, 9)
                for service, caller in zip(services, callers, strict=True)
            )
        )
        assert max(done) == 9
        assert numbers(data_dir) == list(range(1, 10))
    finally:
        for service in services:
            await service.close()


@pytest.mark.parametrize("survivors", range(6))
@pytest.mark.parametrize("torn", [False, True])
async def test_a_crash_in_the_middle_of_a_delivery(
    survivors: int, torn: bool, data_dir: Path
) -> None:
    caller = app.local_caller("acme", "tester")
    service = await app.open_service(settings_for(data_dir))
    await service.offline.record(caller, Delivery(TICKET, reads(1, 2)))
    before = len(lines(data_dir))
    # What tells how far it is, and four reads: of these five lines, the disk has the first ones.
    await service.offline.record(caller, Delivery(TICKET, reads(3, 6)))
    await service.close()
    (segment,) = (data_dir / "events").glob("audit-*.ndjson")
    whole = segment.read_bytes().splitlines(keepends=True)
    kept = b"".join(whole[: before + survivors])
    rest = b"".join(whole[before + survivors :])
    segment.write_bytes(kept + (rest[:40] if torn else b""))
    # It was an index of more than there is now.
    for path in data_dir.glob("index.sqlite3*"):
        path.unlink()

    service = await app.open_service(settings_for(data_dir))
    try:
        other = app.local_caller("acme", "somebody else")
        await service.offline.record(other, Delivery(Plaintext("cd" * 32), reads(7, 9)))
        assert await service.offline.record(caller, Delivery(TICKET, reads(3, 6))) == 6
    finally:
        await service.close()
    assert Counter(numbers(data_dir)) == Counter(range(1, 10))


async def test_what_is_refused(client: Client, data_dir: Path) -> None:
    one = {
        "number": 1,
        "id": ID,
        "time": "2026-01-31T12:00:00Z",
        "name": "S1",
        "version": 1,
        "uid": 1000,
        "pid": 1,
    }
    good = {"ticket": "ab" * 32, "reads": [one]}
    bad = [
        {**good, "ticket": "short"},
        {**good, "reads": []},
        {**good, "reads": [one] * 101},
        {**good, "reads": [one, one]},
        {**good, "reads": [{**one, "time": "yesterday"}]},
        {**good, "reads": [{**one, "id": "x"}]},
        {**good, "reads": [{**one, "number": 0}]},
        {**good, "reads": [{**one, "uid": -1}]},
        {**good, "reads": [{**one, "pid": 1 << 32}]},
    ]
    agent = await client(scopes=("execute",))
    for body in bad:
        async with agent.post(PATH, json=body) as response:
            assert response.status == 422, body
    reader = await client(scopes=("read",))
    async with reader.post(PATH, json=good) as response:
        assert response.status == 403
    assert not numbers(data_dir)
    # An API key that is limited to other names: the value is out, so it is recorded; as refused.
    limited = await client(scopes=("execute",), allow=("OTHER",))
    async with limited.post(PATH, json=good) as response:
        assert await response.json() == {"delivered": 1}
    (event,) = [e for e in lines(data_dir) if e["details"].get("offline")]
    assert (event["outcome"], event["status"]) == ("denied", 403)


@pytest.mark.parametrize(
    "header", ["", "uid=1", "uid=1;pid=", "uid=-1;pid=2", "uid=1;pid=2;", "uid=12345678901;pid=1"]
)
async def test_for_whom_an_agent_asks_has_one_form(header: str, client: Client) -> None:
    full = await client()
    async with full.get("/api/v1/secrets/X", headers={"X-FlowMason-Peer": header}) as response:
        assert response.status == 400


# --- the agent's queue


def entry(name: str = "A") -> OfflineReadIn:
    """A read that has no number yet."""
    return OfflineReadIn(1, ID, "2026-01-31T12:00:00Z", name, 1, 1000, 4242)


LOST = ["reset before", "reset after", "cut after", "proxy's 503 after", "proxy's 504 after"]


@pytest.mark.parametrize("fault", [*LOST, "unavailable before"])
async def test_a_delivery_whose_answer_is_lost(fault: str, data_dir: Path, tmp_path: Path) -> None:
    api_key = Plaintext(await issue_key(data_dir, scopes=("execute",)))
    async with serving(data_dir, "--workers=2") as server, between(server.url) as peer:
        upstream = Upstream(address(peer.url), api_key, Options(retries=0, timeout=5))
        queue = OfflineQueue(tmp_path / "queue", lambda: ID)
        cache = LastKnown(tmp_path / "known", api_key, lambda: 0.0, 60)
        secrets = Secrets(upstream, cache, queue, Sources(lambda: 0.0, lambda: ID))
        deliveries = Deliveries(upstream, queue, secrets, lambda: 0.0)
        queue.append([entry() for _ in range(5)])
        peer.faults = [fault]
        with pytest.raises(SecretsError):
            await deliveries.flush()
        queue.append([entry()])
        await deliveries.flush()
        assert queue.take(1) is None
        await secrets.close()
        await upstream.close()
        queue.close()
        assert numbers(data_dir) == [1, 2, 3, 4, 5, 6]


def queue_in(place: Path, limit: int = LIMIT) -> OfflineQueue:
    return OfflineQueue(place / "q", Ids(time.time, os.urandom), limit)


def delivered(queue: OfflineQueue) -> list[tuple[str, int, str]]:
    """Deliver everything: ticket, number and name of each read."""
    seen = []
    while (batch := queue.take(2)) is not None:
        seen += [(batch.ticket, read.number, read.name) for read in batch.reads]
        queue.deliver(batch, batch.reads[-1].number)
    return seen


def test_the_queue_goes_on_after_a_start(tmp_path: Path) -> None:
    queue = queue_in(tmp_path)
    queue.append([entry(f"N{number}") for number in range(2)])
    queue.append([entry("N2")])
    batch = queue.take(2)
    assert batch is not None
    with pytest.raises(errors.LogDamaged):
        queue.deliver(batch, 1)
    queue.deliver(batch, 2)
    queue.close()
    # Delivered ones come again: the server knows them by their ticket and number.
    queue = queue_in(tmp_path)
    queue.append([entry("N3")])
    with pytest.raises(errors.ConfigurationError, match="Another agent"):
        queue_in(tmp_path)
    seen = delivered(queue)
    assert [(number, name) for _, number, name in seen] == [
        (1, "N0"),
        (2, "N1"),
        (3, "N2"),
        # Not number 4 of the same queue: who knows whether a copy of it goes on elsewhere.
        (1, "N3"),
    ]
    tickets = [ticket for ticket, _, _ in seen]
    assert {ticket == batch.ticket for ticket in tickets[:3]} == {True}
    assert tickets[3] != batch.ticket
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["lock"]
    queue.append([entry("N4")])
    assert [(number, name) for _, number, name in delivered(queue)] == [(1, "N4")]
    queue.close()


@pytest.mark.parametrize("left", [b"", b'{"ticket":"ab', b'{"ticket":"abab"}\n{"number":1,'])
def test_a_segment_that_a_crash_cut_off(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "0.ndjson").write_bytes(left)
    queue = queue_in(tmp_path)
    queue.append([entry("A")])
    assert [(number, name) for _, number, name in delivered(queue)] == [(1, "A")]
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["lock"]
    queue.close()


@pytest.mark.parametrize("call", ["write", "fdatasync"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_durable_is_not_acknowledged(
    call: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_in(tmp_path)
    if not first:
        queue.append([entry("before")])

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(errors.LogUnavailable):
            queue.append([entry("lost")])
    queue.append([entry("after")])
    seen = delivered(queue)
    # What was not acknowledged may be there, once; its number is not given again.
    acknowledged = [name for _, _, name in seen if name != "lost"]
    assert acknowledged == ([] if first else ["before"]) + ["after"]
    assert len({(ticket, number) for ticket, number, _ in seen}) == len(seen)
    queue.close()


def test_the_queue_has_a_limit(tmp_path: Path) -> None:
    queue = queue_in(tmp_path, limit=1 << 20)
    many = [entry("x" * 200) for _ in range(4000)]
    queue.append(many)
    with pytest.raises(errors.LogUnavailable, match="full"):
        queue.append([entry()])
    assert len(delivered(queue)) == len(many)
    queue.append([entry()])
    queue.close()


# --- what falls back to the cache


class FakeServer:
    """Stands for the server: gives `values`, or fails with `error`."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values
        self.error: SecretsError | None = None
        self.expires_at: str | None = None
        self.asked = 0
        self.seq = 0
        self.version = 1
        # Something else that happens while the answer is on its way.
        self.meanwhile: Callable[[], None] | None = None

    async def read(
        self, wanted: Sequence[str], usage: Usage, peer: Peer
    ) -> list[tuple[shapes.SecretValue, shapes.ReadReceipt]]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.meanwhile is not None:
            self.meanwhile()
        found = []
        for name in wanted:
            self.seq += 1
            value = shapes.SecretValue(name, self.values[name], "other", False, self.version)
            found.append((value, shapes.ReadReceipt(name, self.seq, ID)))
        return found

    async def metadata(self, name: str) -> SecretMetadata:
        return SecretMetadata(
            "i", name, "", "other", "", "", None, self.expires_at, False, self.version
        )


class Bench:
    """An agent without its process."""

    def __init__(self, place: Path, api_key: Plaintext = KEY, max_age: float = 60.0) -> None:
        self.now = 1_000_000.0
        self.server = FakeServer({"A": "eh", "B": "bee"})
        self.cache = LastKnown(place / "known", api_key, lambda: self.now, max_age)
        self.cache.load()
        self.queue = OfflineQueue(place / "offline", Ids(lambda: self.now, os.urandom))
        sources = Sources(lambda: self.now, Ids(lambda: self.now, os.urandom))
        self.secrets = Secrets(
            self.server,  # type: ignore[arg-type] # a fake
            self.cache,
            self.queue,
            sources,
        )

    async def read(self, *names: str) -> list[str]:
        """The values, each marked if it comes from the cache."""
        found = await self.secrets.read(names, Usage(), PEER)
        return [f"{one.known.value}{'' if one.receipt else ' (cached)'}" for one in found]

    async def close(self) -> None:
        await self.secrets.close()
        self.queue.close()


def queued(bench: Bench) -> list[str]:
    """The names of the reads that are to be delivered."""
    batch = bench.queue.take(10)
    return [] if batch is None else [read.name for read in batch.reads]


def unresolved(code: str) -> UnresolvedReferences:
    return UnresolvedReferences([Unresolved("A", code)], 1)


# What the server fails with → whether the cache stands in, and which secrets it still has then.
FAILURES: list[tuple[SecretsError, bool, set[str]]] = [
    (Unreachable("u", "gone"), True, {"A", "B"}),
    (UnexpectedAnswer("u", 502), True, {"A", "B"}),
    (UnexpectedAnswer("u", 200), False, {"A", "B"}),
    (UnexpectedAnswer("u", 302), False, {"A", "B"}),
    (Refused(500, "internal", "x", "r"), True, {"A", "B"}),
    (Refused(429, "slow", "x", "r"), False, {"A", "B"}),
    (errors.LogUnavailable("full"), True, {"A", "B"}),
    (errors.Overloaded(), True, {"A", "B"}),
    (unresolved("decryption_failed"), True, {"A", "B"}),
    (unresolved("secret_damaged"), True, {"A", "B"}),
    (unresolved("secret_not_found"), False, {"B"}),
    (unresolved("secret_expired"), False, {"B"}),
    (unresolved("denied"), False, {"B"}),
    (errors.Denied("scopes"), False, {"B"}),
    (errors.Unauthenticated(), False, set()),
]


@pytest.mark.parametrize(("error", "stands_in", "left"), FAILURES)
async def test_what_the_cache_stands_in_for(
    error: SecretsError, stands_in: bool, left: set[str], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    assert await bench.read("A", "B") == ["eh", "bee"]
    bench.server.error = error
    if stands_in:
        assert await bench.read("A") == ["eh (cached)"]
        assert queued(bench) == ["A"]
    else:
        with pytest.raises(SecretsError):
            await bench.read("A")
        assert queued(bench) == []
    assert set(bench.cache.names) == left
    await bench.close()
    # On disk as well.
    again = LastKnown(tmp_path / "known", KEY, lambda: bench.now, 60.0)
    again.load()
    assert set(again.names) == left


async def test_nothing_is_revealed_before_its_read_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    await bench.read("A")
    bench.server.error = Unreachable("u", "gone")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        results = await asyncio.gather(*(bench.read("A") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(one, errors.LogUnavailable) for one in results), results
        assert len({id(one) for one in results}) == 3
    assert await bench.read("A") == ["eh (cached)"]
    await bench.close()


async def test_all_or_none_from_the_cache(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.read("A")
    bench.server.error = Unreachable("u", "gone")
    with pytest.raises(Unreachable):
        await bench.read("A", "B")
    assert queued(bench) == []
    await bench.close()


async def test_a_value_does_not_outlive_its_age_or_its_expiry(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.server.expires_at = "1970-01-12T13:47:00Z"  # 1,000,020 seconds after the epoch
    await bench.read("A")
    bench.server.expires_at = None
    await bench.read("B")
    bench.server.error = Unreachable("u", "gone")
    for name, lives in (("A", 19.0), ("B", 59.0)):
        bench.now = 1_000_000.0 + lives
        assert (await bench.read(name))[0].endswith("(cached)")
        bench.now += 2
        with pytest.raises(Unreachable):
            await bench.read(name)
    await bench.close()
    for path in (tmp_path / "known").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_the_cache_is_bound_to_its_api_key(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    # So long that no ciphertext has them by chance.
    bench.server.values = {"A": "the value of A", "B": "the value of B"}
    await bench.read("A", "B")
    await bench.close()
    known = list((tmp_path / "known").iterdir())
    assert len(known) == 2
    text = b"".join(path.read_bytes() + path.name.encode() for path in known)
    assert not any(word in text for word in (b"the value", b'"A"'))
    other = Bench(tmp_path, Plaintext("fm_live_" + "2" * 48))
    assert other.cache.names == []
    other.server.error = Unreachable("u", "gone")
    with pytest.raises(Unreachable):
        await other.read("A")
    await other.close()
    assert not list((tmp_path / "known").iterdir())


async def test_an_answer_from_before_does_not_bring_back_what_was_dropped(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.server.meanwhile = lambda: bench.secrets.drop("A")
    assert await bench.read("A", "B") == ["eh", "bee"]
    assert bench.cache.names == ["B"]
    await bench.close()


def test_the_newer_of_two_answers_stays(tmp_path: Path) -> None:
    cache = LastKnown(tmp_path / "known", KEY, lambda: 5.0, 60.0)
    assert cache.put(Known("A", "new", "other", 1, 9, 5.0), 0)
    # A later version with a lower number: it was deleted and made anew in between.
    assert not cache.put(Known("A", "old", "other", 7, 8, 5.0), 0)
    found = cache.get("A")
    assert found is not None
    assert found[0].value == "new"
    assert "new" not in repr(found[0])


async def test_a_server_that_was_away_is_not_asked_by_everybody(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.read("A")
    bench.server.error = Unreachable("u", "gone")
    for _ in range(20):
        await bench.read("A")
    assert bench.server.asked == 2
    bench.server.error = None
    # Less than a second later everything comes from the server again.
    await asyncio.sleep(0.3)
    assert await bench.read("A") == ["eh"]
    await bench.close()


class FakeClient:
    """A server for whoever follows it, whose audit log may not be read."""

    def __init__(self, versions: dict[str, int]) -> None:
        self.versions = versions

    async def audit(self, limit: int) -> list[object]:
        raise errors.Denied("read or full")

    async def list(self) -> list[SecretMetadata]:
        return [
            SecretMetadata("i", name, "", "other", "", "", None, None, False, version)
            for name, version in self.versions.items()
        ]


@pytest.mark.parametrize(
    ("versions", "asked", "left"),
    [
        ({"A": 1, "B": 1}, 0, {"A": "eh", "B": "bee"}),
        ({"A": 2, "B": 1}, 1, {"A": "new", "B": "bee"}),
        ({"A": 1}, 0, {"A": "eh"}),
        ({"A": 1, "B": 1, "C": 4}, 0, {"A": "eh", "B": "bee"}),
    ],
)
async def test_the_cache_follows_without_the_audit_log(
    versions: dict[str, int], asked: int, left: dict[str, str], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.read("A", "B")
    before = bench.server.asked
    bench.server.values["A"] = "new" if versions["A"] == 2 else "eh"
    bench.server.version = versions["A"]
    changes = Changes(
        FakeClient(versions),  # type: ignore[arg-type] # a fake
        bench.cache,
        bench.secrets,
        lambda: 0.0,
    )
    following = asyncio.create_task(changes.run())
    await asyncio.sleep(0.1)
    following.cancel()
    known = {name: bench.cache.get(name) for name in bench.cache.names}
    assert {name: found[0].value for name, found in known.items() if found} == left
    assert bench.server.asked - before == asked
    await bench.close()
