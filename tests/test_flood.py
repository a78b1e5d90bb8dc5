"""More than the disk can take, and clients that leave: nothing is lost, and nothing unaudited."""

import asyncio
import contextlib
import fcntl
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmason_secrets.api.connections import Limits
from flowmason_secrets.storage.published import Layout

from .harness.pressed import ENDED, PATIENCE, Peer, Pressed, pressed
from .harness.server import ServerProcess, issue_key, session
from .test_gate import Held

READ = "/api/v1/secrets/A"
ALIVE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def events(data_dir: Path, action: str) -> list[dict[str, object]]:
    """The events of this action, in order."""
    lines = [
        json.loads(line)
        for path in sorted((data_dir / "events").iterdir())
        for line in path.read_bytes().splitlines()
    ]
    return [line for line in lines if line["action"] == action]


def reads(data_dir: Path) -> Counter[object]:
    """How many reads of the values succeeded, by the id of the request."""
    return Counter(
        event["request_id"]
        for event in events(data_dir, "secret.read")
        if event["outcome"] == "success"
    )


async def wait_in_the_gate(site: Pressed, peers: list[Peer]) -> None:
    """Return when each of them has a read waiting in the gate."""
    for number, peer in enumerate(peers):
        # The first answer says that the server has the second request as well.
        peer.send(ALIVE + site.get(READ, f"X-Request-Id: read-{number}"))
    for peer in peers:
        assert (await peer.reply()).status == 200


# --- the queue --------------------------------------------------------------------------------


async def test_beyond_the_queue_others_are_turned_away_at_once(data_dir: Path) -> None:
    disk, loop = Held(), asyncio.get_running_loop()
    async with pressed(data_dir, durable=disk, queue_limit=50) as site:
        disk.hold()
        first, *peers = [await site.connect() for _ in range(121)]
        await wait_in_the_gate(site, [first])
        await disk.is_waiting()
        for number, peer in enumerate(peers):
            peer.send(site.get(READ, f"X-Request-Id: flood-{number}"))
        replies = [asyncio.create_task(peer.reply()) for peer in peers]
        began = loop.time()
        async with asyncio.timeout(PATIENCE):
            while sum(reply.done() for reply in replies) < 70:
                await asyncio.sleep(0.01)
        assert loop.time() - began < 2.0
        refused = [reply.result() for reply in replies if reply.done()]
        assert {(reply.status, reply.code) for reply in refused} == {(503, "overloaded")}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        # What needs no event to be written waits for nobody.
        alive = await site.connect()
        alive.send(ALIVE)
        assert (await alive.reply()).status == 200
        # Those who were refused may ask again on the same connection.
        again = [peer for peer, reply in zip(peers, replies, strict=True) if reply.done()]
        for peer in again:
            peer.send(site.get(READ))
            assert (await peer.reply()).status == 503
        admitted = [reply for reply in replies if not reply.done()]
        assert len(admitted) == 50
        disk.free.set()
        served = [await reply for reply in admitted]
        assert {reply.status for reply in served} == {200}
        assert (await first.reply()).status == 200
        assert all(json.loads(reply.body)["value"] == "the value" for reply in served)
        for peer in again:
            peer.send(site.get(READ))
            assert (await peer.reply()).status == 200
    # Refusals before the gate are no events; each read that was answered is exactly one.
    assert sum(reads(data_dir).values()) == 51 + 70


async def test_a_flood_while_the_disk_is_slow_takes_no_memory(data_dir: Path) -> None:
    disk = Held()
    async with pressed(data_dir, durable=disk, queue_limit=20) as site:
        disk.hold()
        waiting = [await site.connect() for _ in range(30)]
        await wait_in_the_gate(site, waiting[:1])
        await disk.is_waiting()
        await wait_in_the_gate(site, waiting[1:21])
        flood = waiting[21:]

        async def ask(peer: Peer, count: int) -> None:
            for _ in range(count):
                peer.send(site.get(READ))
                assert (await peer.reply()).status == 503

        await asyncio.gather(*(ask(peer, 20) for peer in flood))
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await asyncio.gather(*(ask(peer, 100) for peer in flood))
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # 900 requests of 170 bytes.
        assert after - before < 100_000
        assert peak - before < 2_000_000
        disk.free.set()
        assert [(await peer.reply()).status for peer in waiting[:21]] == [200] * 21


async def test_large_writes_while_the_disk_is_slow(data_dir: Path) -> None:
    """They are bounded by their size, not only by their number."""
    disk = Held()
    limit = 2_000_000
    async with pressed(data_dir, Limits(request_bytes=limit), disk) as site:
        body = b'{"name": "B%d", "value": "' + b"x" * 60_000 + b'"}'
        disk.hold()
        first = await site.connect()
        first.send(site.post(b'{"name": "FIRST", "value": "x"}'))
        await disk.is_waiting()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            peers = [await site.connect() for _ in range(60)]
            replies = [asyncio.create_task(peer.reply()) for peer in peers]
            for number, peer in enumerate(peers):
                await peer.sent(site.post(body % number))
            async with asyncio.timeout(PATIENCE):
                while sum(reply.done() for reply in replies) < 60 - limit // len(body):
                    await asyncio.sleep(0.01)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak - before < 8 * limit
        refused = [reply.result() for reply in replies if reply.done()]
        assert {(reply.status, reply.code) for reply in refused} == {(503, "overloaded")}
        disk.free.set()
        answered = Counter([(await reply).status for reply in replies])
        assert answered == {503: len(refused), 201: 60 - len(refused)}
        assert (await first.reply()).status == 201
    written = events(data_dir, "secret.create")
    assert len(written) == 2 + answered[201]


# --- clients that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_read_whose_client_left_is_an_event(data_dir: Path, how: str) -> None:
    disk = Held()
    async with pressed(data_dir, durable=disk) as site:
        disk.hold()
        first, *leaving = [await site.connect() for _ in range(6)]
        stays = await site.connect()
        await wait_in_the_gate(site, [first])
        await disk.is_waiting()
        await wait_in_the_gate(site, leaving)
        stays.send(site.get(READ, "X-Request-Id: stays"))
        for peer in leaving:
            if how == "half-close":
                peer.half_close()
            else:
                peer.leave(abruptly=how == "reset")
                await peer.gone()
        if how == "half-close":
            assert [await peer.reply() for peer in leaving] == [ENDED] * 5
        disk.free.set()
        assert (await stays.reply()).status == 200
        assert (await first.reply()).status == 200
    # The first one and the first of those that left have the same number.
    assert reads(data_dir) == {
        "read-0": 2,
        "read-1": 1,
        "read-2": 1,
        "read-3": 1,
        "read-4": 1,
        "stays": 1,
    }


async def test_a_request_that_was_not_whole_when_its_client_left_is_nothing(data_dir: Path) -> None:
    async with pressed(data_dir) as site:
        body = b'{"name": "B", "value": "b"}'
        for request in (site.get(READ)[:-1], site.post(body)[:-1]):
            peer = await site.connect()
            await peer.sent(ALIVE + request)
            assert (await peer.reply()).status == 200
            peer.leave()
            await site.empty()
    assert not reads(data_dir)
    assert len(events(data_dir, "secret.create")) == 1


@contextlib.contextmanager
def disk_busy(data_dir: Path) -> Iterator[None]:
    """Nothing is committed by others while this process has the lock of the data directory."""
    with Layout(data_dir).lock.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_reads_of_those_who_left_are_events_at_the_end_too(
    data_dir: Path, workers: int
) -> None:
    """SIGTERM while reads wait in the gate, half of them of clients that are gone: every one that
    was admitted is in the log, and who stayed has his answer.
    """
    key = await issue_key(data_dir)
    server = ServerProcess(data_dir, f"--workers={workers}")
    await server.start()
    assert server.process is not None
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    secret = {"name": "A", "value": "v"}
    async with (
        session(server.url, key) as client,
        client.post("/api/v1/secrets", json=secret) as answer,
    ):
        assert answer.status == 201
    with disk_busy(data_dir):
        peers = [Peer(*await asyncio.open_connection(host, int(port))) for _ in range(20)]
        for number, peer in enumerate(peers):
            asking = f"GET {READ} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n"
            peer.send(ALIVE + f"{asking}X-Request-Id: read-{number}\r\n\r\n".encode())
        for peer in peers:
            assert (await peer.reply()).status == 200
        for peer in peers[:5]:
            peer.leave(abruptly=True)
            await peer.gone()
        server.process.terminate()
        with contextlib.suppress(ConnectionError):
            while True:
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                await writer.wait_closed()
        # It has begun to end; now others go as well.
        for peer in peers[5:10]:
            peer.leave(abruptly=True)
            await peer.gone()
        assert server.process.returncode is None
    answers = [await peer.reply() for peer in peers[10:]]
    assert [json.loads(reply.body)["value"] for reply in answers] == ["v"] * 10
    assert await server.stop() == 0
    assert reads(data_dir) == {f"read-{number}": 1 for number in range(20)}
