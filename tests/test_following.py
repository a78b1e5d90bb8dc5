"""Following the audit log: streams and long polls, from whatever process events come, through
crashes, and however slowly somebody reads.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from aiohttp.web_request import BaseRequest

from flowmason_secrets import app
from flowmason_secrets import following as readers
from flowmason_secrets.api import flow, trail
from flowmason_secrets.core import times
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import LogUnavailable, Overloaded
from flowmason_secrets.core.intents import Intent
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.following import Growth
from flowmason_secrets.service import Service

from .conftest import Client
from .harness.following import AUDIT, PROMPTLY, Message, fill, following, resident, shown, until
from .harness.server import ServerProcess, issue_key, serving, session, settings_for
from .harness.workers import one_each

SECRETS = "/api/v1/secrets"


async def put(client: aiohttp.ClientSession, name: str) -> int:
    """Write a secret; returns the seq of the event."""
    async with client.post(SECRETS, json={"name": name, "value": "v"}) as answer:
        assert answer.status in (200, 201), await answer.text()
        return int(answer.headers["Audit-Seq"])


async def problem(client: aiohttp.ClientSession, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, code and detail of a refusal."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.get(path, headers=sent) as answer:
        document = await answer.json(content_type="application/problem+json")
        return answer.status, document["code"], document["detail"]


def names(messages: list[Message]) -> list[str]:
    return [message.data["details"]["name"] for message in messages]


# --- what arrives ---------------------------------------------------------------------------


async def test_events_of_every_process_arrive_at_once_in_order(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    async with (
        serving(data_dir, "--workers=2") as server,
        one_each(server.url, key, 2) as (here, there),
        session(server.url, key) as asking,
        contextlib.AsyncExitStack() as stack,
    ):
        beside = await app.open_service(settings_for(data_dir))
        stack.push_async_callback(beside.close)
        caller = app.local_caller("acme", "beside")
        # The connection of the stream is busy: what is asked of this worker goes elsewhere.
        stream = await stack.enter_async_context(following(here))
        began = time.monotonic()
        for number in range(3):
            await put(there, f"there-{number}")
            await beside.set(caller, Draft(f"beside-{number}", Plaintext("v")))
            await put(asking, f"somewhere-{number}")
        messages = await stream.take(9)
        assert time.monotonic() - began < PROMPTLY + 1.0
        expected = (await shown(asking, action="secret.create"))[-9:]
        assert [message.data for message in messages] == expected
        assert [(m.id, m.event) for m in messages] == [
            (str(entry["seq"]), "secret.create") for entry in expected
        ]


async def test_a_stream_begins_now_or_where_it_is_told(client: Client) -> None:
    full = await client()
    first, second = await put(full, "A"), await put(full, "B")
    async with following(full) as stream:
        # Who is cut off before the first event must not miss any.
        assert stream.last_id == str(second)
        await put(full, "C")
        assert names(await stream.take(1)) == ["C"]
    for query, header in (
        ({"after": str(first)}, None),
        ({}, first),
        ({"after": "0"}, first),
    ):
        async with following(full, header, **query) as stream:
            assert stream.last_id == str(first)
            assert names(await stream.take(2)) == ["B", "C"]


async def test_filters(client: Client) -> None:
    full = await client()
    start = await put(full, "A")
    async with full.get(f"{SECRETS}/B") as answer:
        assert answer.status == 404
    await put(full, "B")
    await put(full, "A")
    async with full.get("/api/v1/auth/whoami") as answer:
        actor = (await answer.json())["api_key_id"]
    for query, count in (
        ({"action": "secret.read"}, 1),
        ({"name": "B"}, 2),
        ({"success": "false"}, 1),
        ({"actor": actor, "resource_type": "secret"}, 3),
    ):
        async with following(full, start, **query) as stream:
            found = await stream.take(count)
            assert [message.data for message in found] == await shown(
                full, **query, since=found[0].data["timestamp"]
            )
            with pytest.raises(TimeoutError):
                await stream.next(0.5)


async def test_a_stream_without_events_shows_that_it_is_alive(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trail, "HEARTBEAT", 0.1)
    monkeypatch.setattr(readers, "_TURN", 0.05)
    full = await client()
    async with following(full) as stream:
        with pytest.raises(TimeoutError):
            await stream.next(0.6)
        assert 2 <= stream.comments <= 6
        await put(full, "A")
        assert names(await stream.take(1)) == ["A"]


# --- who may read -----------------------------------------------------------------------------


async def test_organisations_and_limited_keys_see_their_own(client: Client) -> None:
    ours, theirs = await client(), await client("globex")
    limited = await client(allow=("APP_*",))
    begun = await put(theirs, "THEIRS")
    await put(ours, "OURS")
    async with (
        following(ours) as of_us,
        following(theirs) as of_them,
        following(limited) as of_few,
    ):
        # Where it begins says nothing of others' events.
        assert of_them.last_id == str(begun)
        assert of_few.last_id == "0"
        for number in range(3):
            await put(ours, f"OURS_{number}")
            await put(ours, f"APP_{number}")
            await put(theirs, f"THEIRS_{number}")
        pairs = [(f"OURS_{number}", f"APP_{number}") for number in range(3)]
        assert names(await of_us.take(6)) == [name for pair in pairs for name in pair]
        assert names(await of_them.take(3)) == ["THEIRS_0", "THEIRS_1", "THEIRS_2"]
        assert names(await of_few.take(3)) == ["APP_0", "APP_1", "APP_2"]
        for stream in (of_us, of_them, of_few):
            with pytest.raises(TimeoutError):
                await stream.next(0.3)


async def test_revoking_a_key_ends_its_streams_in_every_process(data_dir: Path) -> None:
    key, doomed = await issue_key(data_dir), await issue_key(data_dir)
    async with (
        serving(data_dir, "--workers=2") as server,
        one_each(server.url, doomed, 2) as doomed_ones,
        session(server.url, key) as admin,
        contextlib.AsyncExitStack() as stack,
    ):
        async with doomed_ones[0].get("/api/v1/auth/whoami") as answer:
            doomed_id = (await answer.json())["api_key_id"]
        streams = [await stack.enter_async_context(following(one)) for one in doomed_ones]
        kept = await stack.enter_async_context(following(admin))
        await put(admin, "BEFORE")
        async with admin.delete(f"/api/v1/auth/api-keys/{doomed_id}") as answer:
            assert answer.status == 200
        revoked = time.monotonic()
        ends = await asyncio.gather(*(stream.rest() for stream in streams))
        assert time.monotonic() - revoked < PROMPTLY
        await put(admin, "AFTER")
        for seen in ends:
            assert not {"AFTER", "test"} & set(names(seen))
        assert names(await kept.take(3)) == ["BEFORE", "test", "AFTER"]
        async with aiohttp.ClientSession(server.url) as again:
            refused = await problem(again, f"{AUDIT}/stream", Authorization=f"Bearer {doomed}")
            assert refused[:2] == (401, "unauthenticated")


async def test_a_key_that_expires_ends_its_stream(client: Client) -> None:
    expiring = await client(expires_at=times.render(time.time() + 1.0))
    async with following(expiring) as stream:
        assert await stream.rest(3.0) == []
    assert (await problem(expiring, f"{AUDIT}/stream"))[0] == 401


# --- crashes and ends -------------------------------------------------------------------------


async def follow_on(server: ServerProcess, key: str, seen: list[Message], until: int) -> None:
    """Follow until the connection breaks or so many events were seen; go on from the last one."""
    last = seen[-1].id if seen else "0"
    with contextlib.suppress(aiohttp.ClientError):
        async with session(server.url, key) as client, following(client, last) as stream:
            while len(seen) < until:
                message = await stream.next(10.0)
                if message is None:
                    return
                seen.append(message)


async def test_nothing_is_lost_or_repeated_when_servers_are_killed(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    beside = await app.open_service(settings_for(data_dir))
    caller = app.local_caller("acme", "beside")
    over = asyncio.Event()

    async def write_on() -> None:
        while not over.is_set():
            await beside.set(caller, Draft("A", Plaintext("v")))

    writing = asyncio.create_task(write_on())
    seen: list[Message] = []
    for _ in range(3):
        server = ServerProcess(data_dir)
        await server.start()
        reading = asyncio.create_task(follow_on(server, key, seen, 10**9))
        before = len(seen)
        async with asyncio.timeout(10.0):
            while len(seen) < before + 50:
                await asyncio.sleep(0.01)
        await server.kill()
        await reading
    over.set()
    await writing
    async with serving(data_dir) as server, session(server.url, key) as client:
        expected = await shown(client)
        await follow_on(server, key, seen, len(expected))
        assert [message.data for message in seen] == expected
    await beside.close()


async def test_a_server_that_has_to_stop_ends_streams_at_once(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    service = await app.open_service(settings_for(data_dir))
    await fill(service, 40_000)
    await service.close()
    server = ServerProcess(data_dir)
    await server.start()
    async with session(server.url, key) as client, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(never_reading(server.url, key))
        streams = [await stack.enter_async_context(following(client)) for _ in range(3)]
        last = streams[0].last_id
        poll = asyncio.create_task(poll_after(client, last, wait=60))
        await settled(server)
        assert not poll.done()
        began = time.monotonic()
        assert await server.stop() == 0
        assert time.monotonic() - began < 3.0
        # A clean end, not a broken connection: there is nothing wrong.
        assert await asyncio.gather(*(stream.rest() for stream in streams)) == [[], [], []]
        assert await poll == []


async def test_a_stream_ends_when_the_log_is_broken(client: Client, data_dir: Path) -> None:
    full = await client()
    async with following(full) as stream:
        # Nobody can lock a directory of this kind.
        (data_dir / "commit.lock").unlink()
        (data_dir / "commit.lock").mkdir()
        assert await stream.rest() == []
        assert (await problem(full, f"{AUDIT}/stream"))[:2] == (503, "log_unavailable")
        (data_dir / "commit.lock").rmdir()
    async with following(full, stream.last_id) as stream:
        await put(full, "A")
        assert names(await stream.take(1)) == ["A"]


# --- slow readers -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def never_reading(url: str, key: str) -> AsyncIterator[socket.socket]:
    """A connection on which a stream from the beginning was asked for."""
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect((host, int(port)))
        one.sendall(
            f"GET {AUDIT}/stream?after=0 HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {key}\r\n\r\n".encode()
        )
        one.setblocking(False)
        yield one


async def test_readers_who_never_read_hold_up_nobody_and_take_no_memory(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    service = await app.open_service(settings_for(data_dir))
    await fill(service, 40_000)
    await service.close()
    async with (
        serving(data_dir) as server,
        session(server.url, key) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        stream = await stack.enter_async_context(following(client))
        before = resident(server)
        for _ in range(4):
            await stack.enter_async_context(never_reading(server.url, key))
        for number in range(5):
            began = time.monotonic()
            await put(client, f"N{number}")
            assert names(await stream.take(1)) == [f"N{number}"]
            assert time.monotonic() - began < PROMPTLY
        # Each of them has 18 MiB before him.
        assert await settled(server) - before < 4 << 10


async def settled(server: ServerProcess) -> int:
    """Kibibytes of memory when they are the same for a while: the server does nothing more."""
    seen: list[int] = []
    async with asyncio.timeout(20.0):
        while len(seen) < 4 or max(seen[-4:]) - min(seen[-4:]) > 64:
            await asyncio.sleep(0.2)
            seen.append(resident(server))
    return seen[-1]


async def test_a_reader_who_takes_nothing_is_cut_off_and_can_go_on(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "PATIENCE", 0.3)
    full = await client()
    await fill(service, 20_000)
    key = full.headers["Authorization"].removeprefix("Bearer ")
    async with never_reading(str(full._base_url), key) as unread:
        await until(lambda: len(service.following._places) == 1)
        await until(lambda: not service.following._places)
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := await asyncio.get_running_loop().sock_recv(unread, 1 << 20):
                received += piece
    # It was cut off in the middle.
    assert not received.endswith(b"0\r\n\r\n")


async def test_the_end_does_not_wait_for_who_does_not_read() -> None:
    took: list[float] = []

    async def answer(raw: BaseRequest) -> web.StreamResponse:
        assert raw.transport is not None
        raw.transport.set_write_buffer_limits(0)
        raw.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sending = flow.Flow(raw, "text/plain", {})
        # Too little to wait for its reader before the end.
        await sending.pour(pieces())
        began = time.monotonic()
        try:
            return await sending.end(0.2)
        except ConnectionResetError:
            took.append(time.monotonic() - began)
            raise

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 50_000

    async with RawTestServer(answer) as server:
        async with never_reading(str(server.make_url("/")), "") as unread:
            await until(lambda: bool(took))
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := await asyncio.get_running_loop().sock_recv(unread, 1 << 16):
                    received += piece
        assert 0.1 < took[0] < PROMPTLY
        assert 0 < received.count(b"x") < 50_000


# --- places -----------------------------------------------------------------------------------


async def test_places_are_bounded_and_become_free(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READERS", 2)
    full = await client()
    last = await put(full, "A")
    async with following(full):
        async with full.get(f"{AUDIT}/stream") as dropped:
            assert dropped.status == 200
            for path in (f"{AUDIT}/stream", f"{AUDIT}/export", f"{AUDIT}?after={last}&wait=1"):
                assert (await problem(full, path))[:2] == (503, "overloaded")
            # What is there is told all the same.
            assert await poll_after(full, 0) == (await shown(full))
        # The client is gone, and soon that is noticed.
        await until(lambda: len(service.following._places) == 1, 3.0)
        async with following(full):
            pass


class CountingGate:
    """Counts what it is asked; raises the given errors first."""

    def __init__(self, *errors: Exception) -> None:
        self.asked = 0
        self._errors = list(errors)

    async def is_current(self, intent: Intent) -> bool:
        assert intent == Intent(None, ())
        self.asked += 1
        if self._errors:
            raise self._errors.pop(0)
        return True


class Position:
    """A log of which only the size is known."""

    position = 7


async def test_one_look_serves_all_who_wait_and_there_is_none_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readers, "_LOOK", 0.01)
    store, gate = Position(), CountingGate(Overloaded(), LogUnavailable("disk"))
    growth = Growth(store, gate)  # type: ignore[arg-type] # all that it needs
    # Doubt wakes everybody: each finds out what is wrong.
    assert await growth.beyond(7, 5.0)
    assert gate.asked == 2
    waiting = [asyncio.create_task(growth.beyond(7, 5.0)) for _ in range(50)]
    later = asyncio.create_task(growth.beyond(8, 0.2))
    await until(lambda: gate.asked >= 5)
    assert not any(task.done() for task in waiting)
    asked, store.position = gate.asked, 8
    assert all(await asyncio.gather(*waiting))
    assert gate.asked <= asked + 2
    assert not await later
    await until(lambda: growth._looking is None)
    asked = gate.asked
    await asyncio.sleep(0.1)
    assert gate.asked == asked


# --- long polls -------------------------------------------------------------------------------


async def poll_after(
    client: aiohttp.ClientSession, after: int | str, **query: object
) -> list[object]:
    params = {"after": str(after)} | {name: str(value) for name, value in query.items()}
    async with client.get(AUDIT, params=params) as answer:
        assert answer.status == 200, await answer.text()
        found: list[object] = await answer.json()
        return found


async def test_a_long_poll_answers_at_once_or_when_there_is_something(
    client: Client, service: Service, caller: Caller
) -> None:
    full = await client()
    first = await put(full, "A")
    last = await put(full, "B")
    everything = await shown(full)
    for wait in ({}, {"wait": 0}, {"wait": 60}):
        assert await poll_after(full, first, **wait) == everything[-1:]
    began = time.monotonic()
    assert await poll_after(full, last) == []
    assert time.monotonic() - began < 0.5
    assert await poll_after(full, last, wait=1) == []
    assert 0.9 < time.monotonic() - began < 2.5
    poll = asyncio.create_task(poll_after(full, last, wait=60, name="C"))
    await service.set(caller, Draft("other", Plaintext("v")))
    await asyncio.sleep(0.3)
    assert not poll.done()
    await service.set(caller, Draft("C", Plaintext("v")))
    async with asyncio.timeout(PROMPTLY):
        assert await poll == (await shown(full, name="C"))


async def test_pages_after_an_event_lead_to_the_next(client: Client) -> None:
    full = await client()
    for number in range(7):
        await put(full, f"N{number}")
    everything = await shown(full)
    path, found, pages = f"{AUDIT}?after=0&limit=3&wait=5&action=secret.create", [], 0
    while path:
        async with full.get(path) as answer:
            found += await answer.json()
            pages += 1
            path = str(answer.links["next"]["url"]) if "next" in answer.links else ""
    assert (found, pages) == (everything[1:], 3)


MISTAKES = {
    "?wait=5": "wait: goes with after",
    "?after=1&offset=0": "after: goes with neither",
    "?after=1&cursor=MQ": "after: goes with neither",
    "?after=1&wait=61": "wait: must be a number from 0 to 60",
    "?after=-1": "after: must be a number",
    "?after=1000": "after: this log has no such event yet",
    "/stream?after=1000": "after: this log has no such event yet",
    "/stream?after=x": "after: must be a number",
    "/stream?since=2030-01-01T00:00:00Z": "since: unknown parameter",
    "/stream?success=maybe": "success: must be true or false",
}


@pytest.mark.parametrize("query", MISTAKES)
async def test_what_can_not_be_meant_is_refused(client: Client, query: str) -> None:
    full = await client()
    await put(full, "A")
    status, code, detail = await problem(full, AUDIT + query)
    assert (status, code) == (422, "invalid_input")
    assert detail.startswith(MISTAKES[query])


async def test_a_last_event_id_that_is_none_is_refused(client: Client) -> None:
    full = await client()
    for given in ("", "x", "-1", "1e3", "9" * 30):
        status, code, _ = await problem(full, f"{AUDIT}/stream", Last_Event_ID=given)
        assert (status, code) == (422, "invalid_input"), given
