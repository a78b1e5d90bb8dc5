"""What a client may cost, whatever it sends or leaves unread: memory, time and connections."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from flowmason_secrets.api.connections import Limits
from flowmason_secrets.api.framing import MAX_HEAD
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.keyring import Plaintext

from .harness.pressed import ENDED, PATIENCE, Pressed, pressed
from .harness.server import ServerProcess, issue_key, session
from .test_cli_serve import Certificate
from .test_gate import Held

READ = "/api/v1/secrets/A"
ALIVE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
# Short, for those who exceed it; long enough for those who don't.
SOON = 0.5


def lines(size: int) -> str:
    """Header lines of so many bytes together, none of them too long for itself."""
    line = f"X-Filling: {'x' * 4000}"
    whole, rest = divmod(size, len(line) + 2)
    return "\r\n".join([line] * whole + ([f"X: {'x' * (rest - 5)}"] if rest > 5 else []))


# --- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 20, 5000, 700])
async def test_a_head_has_at_most_so_many_bytes(data_dir: Path, piece: int) -> None:
    """However it is cut."""
    async with pressed(data_dir) as site:
        bare = len(site.get(READ, "X: "))
        for size, status in ((MAX_HEAD - bare, 200), (MAX_HEAD * 4, 431)):
            peer = await site.connect()
            # The end is missing, so that only its size can be the reason.
            sent = site.get(READ, lines(size))[: None if status == 200 else -2]
            for begin in range(0, len(sent), piece):
                await peer.sent(sent[begin : begin + piece])
            reply = await peer.reply()
            assert reply.status == status
            if status == 431:
                assert reply.code == "head_too_large"
                assert await peer.reply() == ENDED


async def test_a_head_that_is_too_large_waits_for_those_before(data_dir: Path) -> None:
    async with pressed(data_dir) as site:
        peer = await site.connect()
        peer.send(ALIVE + site.get(READ) + site.get(READ, lines(3 * MAX_HEAD))[:-2])
        assert [(await peer.reply()).status for _ in range(4)] == [200, 200, 431, 0]


async def test_what_is_no_head_yet_is_bounded(data_dir: Path) -> None:
    async with pressed(data_dir) as site:
        peer = await site.connect()
        peer.send(b"\r\n" * MAX_HEAD)
        assert (await peer.reply()).status == 431
        assert await peer.reply() == ENDED


async def test_trailers_are_bounded_like_heads(data_dir: Path) -> None:
    async with pressed(data_dir) as site:
        peer = await site.connect()
        peer.send(site.head("POST", "/api/v1/secrets", "Transfer-Encoding: chunked"))
        peer.send(b"1\r\n{\r\n0\r\n" + lines(3 * MAX_HEAD).encode())
        reply = await peer.reply()
        assert (reply.status, reply.code) == (431, "head_too_large")
        assert await peer.reply() == ENDED


async def test_a_body_in_the_smallest_chunks_has_no_such_bound(data_dir: Path) -> None:
    body = b'{"name": "SMALL", "value": "%s"}' % (b"x" * MAX_HEAD)
    chunks = b"".join(b"1;x=%s\r\n%c\r\n" % (b"y" * 9, byte) for byte in body) + b"0\r\n\r\n"
    async with pressed(data_dir) as site:
        peer = await site.connect()
        peer.send(site.head("POST", "/api/v1/secrets", "Transfer-Encoding: chunked"))
        for begin in range(0, len(chunks), 997):
            await peer.sent(chunks[begin : begin + 997])
        assert (await peer.reply()).status == 201
        peer.send(site.get(READ))
        assert (await peer.reply()).status == 200


# --- time -------------------------------------------------------------------------------------


async def trickle(peer_send: Callable[[bytes], None]) -> None:
    while True:
        peer_send(b"A: b\r\n")
        await asyncio.sleep(SOON / 20)


@pytest.mark.parametrize(
    ("beginning", "trickling", "status"),
    [
        (b"", False, 0),
        (b"\r\n", False, 408),
        (b"GET /heal", False, 408),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", False, 408),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", True, 408),
        (ALIVE + b"G", False, 408),
    ],
    ids=ascii,
)
async def test_a_head_has_to_arrive_in_time(
    data_dir: Path, beginning: bytes, trickling: bool, status: int
) -> None:
    async with pressed(data_dir, Limits(head_timeout=SOON)) as site:
        peer = await site.connect()
        began = asyncio.get_running_loop().time()
        # In two pieces, as slow senders do.
        for piece in (beginning[:-1], beginning[-1:]):
            await peer.sent(piece)
            if beginning.startswith(ALIVE) and piece == beginning[:-1]:
                assert (await peer.reply()).status == 200
        sending = asyncio.create_task(trickle(peer.send)) if trickling else None
        reply = await peer.reply()
        took = asyncio.get_running_loop().time() - began
        if sending is not None:
            sending.cancel()
        assert reply.status == status
        assert not status or reply.code == "request_timeout"
        assert await peer.reply() == ENDED
        assert SOON / 2 < took < SOON * 6
        await site.empty()


@pytest.mark.parametrize("chunked", [False, True])
async def test_between_requests_there_is_more_time(data_dir: Path, chunked: bool) -> None:
    """Only a request that has begun must go on."""
    body = b'{"name": "B", "value": "b"}'
    async with pressed(data_dir, Limits(head_timeout=SOON)) as site:
        peer, silent = await site.connect(), await site.connect()
        if chunked:
            peer.send(site.head("POST", "/api/v1/secrets", "Transfer-Encoding: chunked"))
            await peer.sent(b"%x\r\n%s\r\n" % (len(body), body))
            await asyncio.sleep(SOON / 10)
            # The end of the body on its own.
            peer.send(b"0\r\n\r\n")
        else:
            peer.send(site.post(body))
        assert (await peer.reply()).status == 201
        for _ in range(2):
            assert await silent.reply() == ENDED
            silent = await site.connect()
        peer.send(site.get(READ))
        assert (await peer.reply()).status == 200


async def test_a_tls_handshake_that_never_comes(data_dir: Path, tmp_path: Path) -> None:
    certificate = Certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.path, certificate.key)
    limits = Limits(connections=2, head_timeout=SOON)
    async with pressed(data_dir, limits, tls=context) as site:
        silent = [await site.connect() for _ in range(4)]
        # Two have to go before the others have their turn.
        assert [await peer.reply() for peer in silent] == [ENDED] * 4
        await site.empty()


# --- connections ------------------------------------------------------------------------------


async def test_beyond_the_limit_connections_wait(data_dir: Path) -> None:
    """Those that are being answered are not disturbed."""
    disk = Held()
    async with pressed(data_dir, Limits(connections=3), disk) as site:
        disk.hold()
        busy = [await site.connect() for _ in range(3)]
        for peer in busy:
            peer.send(site.get(READ))
        await disk.is_waiting()
        waiting = [await site.connect() for _ in range(5)]
        for peer in waiting:
            peer.send(ALIVE)
        answers = [asyncio.create_task(peer.reply()) for peer in waiting]
        # Longer than it takes until idle ones are closed.
        done, _ = await asyncio.wait(answers, timeout=2.5)
        assert not done
        assert site.connections == 3
        disk.free.set()
        assert [(await peer.reply()).status for peer in busy] == [200] * 3
        for peer in busy:
            peer.leave()
        for answer, peer in zip(answers, waiting, strict=True):
            assert (await answer).status == 200
            peer.leave()


@pytest.mark.parametrize("beginning", [b"", b"GET ", ALIVE], ids=ascii)
async def test_connections_without_a_request_make_room(data_dir: Path, beginning: bytes) -> None:
    """Whoever keeps them open locks nobody out."""
    async with pressed(data_dir, Limits(connections=10)) as site:
        idle = [await site.connect() for _ in range(10)]
        for peer in idle:
            peer.send(beginning)
            if beginning == ALIVE:
                assert (await peer.reply()).status == 200
        for _ in range(20):
            peer = await site.connect()
            peer.send(site.get(READ))
            async with asyncio.timeout(5):
                assert (await peer.reply()).status == 200
            assert site.connections <= 10


async def test_connections_fit_into_the_open_files(data_dir: Path) -> None:
    """A process that may open few files has fewer connections, and all goes on."""
    server = ServerProcess(data_dir)
    server.program = ("sh", "-c", 'ulimit -n 200; exec "$0" "$@"', *server.program)
    key = await issue_key(data_dir)
    await server.start()
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    idle = [socket.create_connection((host, int(port)), PATIENCE) for _ in range(300)]
    try:
        async with session(server.url, key) as client:
            for number in range(3):
                sent = {"name": f"N{number}", "value": "x"}
                async with client.post("/api/v1/secrets", json=sent) as answer:
                    assert answer.status == 201
    finally:
        for one in idle:
            one.close()
        code = await server.stop()
    assert code == 0
    assert b"can't accept" not in b"".join(server.output)


# --- bodies and what waits ---------------------------------------------------------------------


async def test_bodies_in_flight_are_bounded_together(data_dir: Path) -> None:
    body = b'{"name": "B", "value": "%s"}' % (b"x" * 60_000)
    async with pressed(data_dir, Limits(request_bytes=250_000)) as site:
        slow = [await site.connect() for _ in range(4)]
        for peer in slow:
            await peer.sent(site.post(body[:-1], len(body)))
        async with asyncio.timeout(PATIENCE):
            while site.budget.held < 4 * len(body):
                await asyncio.sleep(0.01)
        refused, small = await site.connect(), await site.connect()
        refused.send(site.post(body))
        reply = await refused.reply()
        assert (reply.status, reply.code) == (503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert await refused.reply() == ENDED
        # What costs little is served, and so are those who were there.
        small.send(site.get(READ))
        assert (await small.reply()).status == 200
        for peer in slow:
            peer.send(body[-1:])
            assert (await peer.reply()).status in (200, 201)
        assert site.budget.held == 0
        again = await site.connect()
        again.send(site.post(body))
        assert (await again.reply()).status == 200


@pytest.mark.parametrize("leaving", [False, True])
async def test_requests_that_wait_in_line_are_bounded(data_dir: Path, leaving: bool) -> None:
    """One connection that asks without waiting for answers; and those that leave are not forgotten
    before their requests are done.
    """
    disk = Held()
    async with pressed(data_dir, Limits(request_bytes=100_000), disk) as site:
        disk.hold()
        peers = [await site.connect() for _ in range(3)]
        for peer in peers:
            peer.send(site.get(READ, lines(10_000)) * 8)
        await disk.is_waiting()
        async with asyncio.timeout(PATIENCE):
            while site.budget.held < 80_000:
                await asyncio.sleep(0.01)
        assert site.budget.held <= 100_000
        if leaving:
            for peer in peers:
                peer.leave(abruptly=True)
            async with asyncio.timeout(PATIENCE):
                while any(one.connected for one in site.server.connections):
                    await asyncio.sleep(0.01)
            # Others were refused.
            assert site.connections >= 1
            assert site.budget.held >= 80_000
        disk.free.set()
        if not leaving:
            statuses = []
            for peer in peers:
                replies = 0
                while replies < 8 and (reply := await peer.reply()) != ENDED:
                    statuses.append(reply.status)
                    replies += 1
            assert set(statuses) == {200, 503}
            for peer in peers:
                peer.leave()
        await site.empty()


async def test_a_client_may_go_on_asking_ahead(data_dir: Path) -> None:
    """What was answered is not held, although something always waits."""
    async with pressed(data_dir, Limits(request_bytes=60_000)) as site:
        peer = await site.connect()
        request = site.get(READ, lines(6000))
        peer.send(request * 2)
        for _ in range(100):
            peer.send(request)
            assert (await peer.reply()).status == 200
        assert [(await peer.reply()).status for _ in range(2)] == [200, 200]


# --- answers ----------------------------------------------------------------------------------


async def fill(site: Pressed, caller: Caller, count: int) -> None:
    """So many secrets whose metadata are four kilobytes each."""
    drafts = [Draft(f"S{n:04}", Plaintext("x"), "\N{SNOWMAN}" * 1024) for n in range(count)]
    await asyncio.gather(*(site.service.set(caller, draft) for draft in drafts))


async def test_who_does_not_read_is_cut_off(data_dir: Path, caller: Caller) -> None:
    limits = Limits(write_timeout=SOON)
    async with pressed(data_dir, limits) as site:
        await fill(site, caller, 800)
        deaf = [await site.connect(receive=4096) for _ in range(3)]
        began = asyncio.get_running_loop().time()
        for peer in deaf:
            peer.send(site.get("/api/v1/secrets") * 5)
        await site.empty()
        assert asyncio.get_running_loop().time() - began > SOON / 2
        other = await site.connect()
        other.send(site.get(READ))
        assert (await other.reply()).status == 200


async def test_a_connection_that_ends_does_not_wait_for_its_reader(
    data_dir: Path, caller: Caller
) -> None:
    """Closing waits until everything is sent: only so long."""
    async with pressed(data_dir, Limits(write_timeout=SOON)) as site:
        await fill(site, caller, 800)
        peer = await site.connect(receive=4096)
        peer.send(site.get("/api/v1/secrets", "Connection: close"))
        async with asyncio.timeout(PATIENCE):
            while not site.budget.held:
                await asyncio.sleep(0.01)
        await site.empty()


async def test_who_reads_slowly_gets_everything(data_dir: Path, caller: Caller) -> None:
    async with pressed(data_dir, Limits(write_timeout=SOON)) as site:
        await fill(site, caller, 800)
        loop = asyncio.get_running_loop()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            slow.setblocking(False)
            await loop.sock_connect(slow, ("127.0.0.1", site.port))
            await loop.sock_sendall(slow, site.get("/api/v1/secrets", "Connection: close"))
            began, received = loop.time(), bytearray()
            while data := await loop.sock_recv(slow, 65536):
                received += data
                # Three times as long as without any progress.
                await asyncio.sleep(SOON * 3 * 65536 / 3_000_000)
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        assert len(body) > 2_500_000
        assert loop.time() - began > SOON


async def test_answers_that_are_made_and_not_taken_are_bounded(
    data_dir: Path, caller: Caller
) -> None:
    async with pressed(data_dir, Limits(request_bytes=7_000_000)) as site:
        await fill(site, caller, 800)
        deaf = [await site.connect(receive=4096) for _ in range(12)]
        for peer in deaf:
            peer.send(site.get("/api/v1/secrets"))
        other, most = await site.connect(), 0
        async with asyncio.timeout(PATIENCE):
            # Two fit. More of them come, and are refused, while others are answered.
            while site.budget.held < 4_000_000:
                await asyncio.sleep(0)
                most = max(most, site.budget.held)
        for _ in range(100):
            other.send(site.get(READ))
            assert (await other.reply()).status == 200
            most = max(most, site.budget.held)
        assert most <= 7_000_000
        reading = await site.connect()
        reading.send(site.get("/api/v1/secrets"))
        reply = await reading.reply()
        assert (reply.status, reply.code) == (503, "overloaded")
