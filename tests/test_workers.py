"""`serve --workers`: several processes that behave as one, whichever of them die."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest

from flowmason_secrets import supervisor
from flowmason_secrets.core.keyring import MasterKey
from flowmason_secrets.storage.published import Layout

from .harness.load import SECRETS, Grown, check_acknowledged, check_pairs, check_receipts
from .harness.server import MASTER_KEY, ServerProcess, issue_key, serving, session
from .harness.workers import SOON, Load, Prober, alive, kill, one_each, replaced, workers
from .test_cli import run
from .test_cli_serve import Certificate, accepts

# How many times workers are killed under load; more for a longer run.
KILLS = int(os.environ.get("WORKER_KILLS", "50"))
_KILLS_A_CHECK = 10


@contextlib.asynccontextmanager
async def at_work(data_dir: Path, count: int = 2) -> AsyncIterator[tuple[ServerProcess, str]]:
    """A server with so many workers and an API key."""
    key = await issue_key(data_dir)
    async with serving(data_dir, f"--workers={count}") as server:
        yield server, key


# --- kill -9 of random workers --------------------------------------------------------------


async def test_kill_9_of_random_workers_under_load(data_dir: Path) -> None:
    random = Random(50)
    key = await issue_key(data_dir)
    load, grown = Load(12, 12, random), Grown(data_dir)
    at_once = 0
    # Small segments, so that it also happens while one begins.
    async with serving(data_dir, "--workers=2", FLOWMASON_SECRETS_SEGMENT_BYTES="200000") as server:
        prober = Prober(server.url)
        probing = asyncio.create_task(prober.run())
        for number in range(KILLS):
            if number % _KILLS_A_CHECK == 0:
                stack = contextlib.AsyncExitStack()
                client = await stack.enter_async_context(session(server.url, key))
                # A deletion that is sent again finds nothing to delete.
                client._retry_connection = False
                await check_acknowledged(client, load.known, load.seen, data_dir)
                check_pairs(data_dir)
                await stack.enter_async_context(load.on(client))
            await asyncio.sleep(random.uniform(0.3, 1.5))
            assert not probing.done(), probing.exception()
            while not (there := workers(server)):
                await asyncio.sleep(0.01)
            # Sometimes all of them at once.
            doomed = there if random.random() < 0.1 else [random.choice(there)]
            at_once += doomed == there
            for pid in doomed:
                os.kill(pid, signal.SIGKILL)
            grown.check()
            if number % _KILLS_A_CHECK == _KILLS_A_CHECK - 1 or number == KILLS - 1:
                await stack.aclose()
        await replaced(server, doomed, 2)
        probing.cancel()
        async with session(server.url, key) as client:
            await check_acknowledged(client, load.known, load.seen, data_dir)
            check_pairs(data_dir)
        grown.check()
    assert server.process is not None
    assert server.process.returncode == 0
    assert b"Traceback" not in b"".join(server.output)
    assert list((data_dir / "staged").iterdir()) == []
    check_pairs(data_dir)
    check_receipts(load.seen, data_dir)
    changes = sum(action != "secret.read" for _, _, action, _ in load.seen.receipts)
    segments = len(list((data_dir / "events").iterdir()))
    print(
        f"{KILLS} kills, {at_once} of all workers: {changes} changes and {load.seen.reads} reads "
        f"acknowledged, {load.unanswered} cut off; {segments=}; {prober.answered} fresh "
        f"connections answered, {prober.cut_off} cut off, longest gap {prober.longest:.2f} s"
    )
    assert prober.longest < 1.0
    # It was a load, and the kills came in the middle of it.
    assert changes > 40 * KILLS
    assert load.seen.reads > 40 * KILLS
    assert load.unanswered > 2 * KILLS
    assert segments > 5


# --- one truth ------------------------------------------------------------------------------


async def test_what_one_worker_wrote_another_one_reads(data_dir: Path) -> None:
    async with at_work(data_dir) as (server, key), one_each(server.url, key, 2) as both:
        for turn in range(60):
            writer, reader = both[turn % 2], both[1 - turn % 2]
            name = f"S{turn % 3}"
            async with writer.post(SECRETS, json={"name": name, "value": f"{turn}"}) as response:
                assert response.status in (200, 201)
                written = int(response.headers["Audit-Seq"])
            async with reader.get(f"{SECRETS}/{name}") as response:
                assert (await response.json())["value"] == f"{turn}"
                assert int(response.headers["Audit-Seq"]) == written + 1
            async with reader.get(SECRETS) as response:
                assert name in [entry["name"] for entry in await response.json()]
            async with reader.get("/api/v1/auth/audit-log?limit=1") as response:
                (newest,) = await response.json()
                assert (newest["action"], newest["seq"]) == ("secret.read", written + 1)
            if turn % 5 == 4:
                async with reader.delete(f"{SECRETS}/{name}") as response:
                    assert response.status == 200
                async with writer.get(f"{SECRETS}/{name}") as response:
                    assert response.status == 404


async def test_a_revoked_key_is_refused_by_every_worker_at_once(data_dir: Path) -> None:
    async with at_work(data_dir, 3) as (server, key), one_each(server.url, key, 3) as all_of:
        async with all_of[0].post(SECRETS, json={"name": "A", "value": "1"}) as response:
            assert response.status == 201
        for turn in range(9):
            revoker = all_of[turn % 3]
            document = {"name": "short-lived", "scopes": ["full"]}
            async with revoker.post("/api/v1/auth/api-keys", json=document) as response:
                issued = await response.json()
            headers = {"Authorization": f"Bearer {issued['raw_key']}"}
            for client in all_of:
                async with client.get(f"{SECRETS}/A", headers=headers) as response:
                    assert response.status == 200
            async with revoker.delete(
                f"/api/v1/auth/api-keys/{issued['api_key']['id']}"
            ) as response:
                assert response.status == 200
            for client in all_of:
                async with client.get(f"{SECRETS}/A", headers=headers) as response:
                    assert response.status == 401


# --- replaced -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
async def test_a_worker_that_ends_is_replaced(data_dir: Path, number: signal.Signals) -> None:
    async with at_work(data_dir) as (server, key):
        before = workers(server)
        for pid in before:
            there = workers(server)
            os.kill(pid, number)
            await replaced(server, [pid], 2)
            assert set(workers(server)) > set(there) - {pid}
        async with one_each(server.url, key, 2) as both:
            for client in both:
                async with client.post(SECRETS, json={"name": "A", "value": "1"}) as response:
                    assert response.status in (200, 201)
    said = b"".join(server.output).decode()
    how = "ended with exit code 0" if number is signal.SIGTERM else f"was killed by {number.name}"
    for place, pid in enumerate(before, 1):
        assert f"worker {place} (pid {pid}) {how}; the next one starts in 0 s" in said
    assert server.process is not None
    assert server.process.returncode == 0


async def test_a_worker_that_keeps_dying_is_started_less_and_less_often(data_dir: Path) -> None:
    async with at_work(data_dir) as (server, key):
        moved = data_dir.with_name("moved")
        data_dir.rename(moved)
        data_dir.write_text("in its place")
        first, other = workers(server)
        os.kill(first, signal.SIGKILL)
        await asyncio.sleep(2.5)
        # The one that could not know of it is still there.
        assert other in workers(server)
        data_dir.unlink()
        moved.rename(data_dir)
        async with asyncio.timeout(SOON):
            while len(workers(server)) < 2:
                await asyncio.sleep(0.01)
        async with one_each(server.url, key, 2) as both:
            for client in both:
                async with client.get(SECRETS) as response:
                    assert response.status == 200
    said = b"".join(server.output).decode().splitlines()
    assert any("killed by SIGKILL; the next one starts in 0 s" in line for line in said)
    delays = [line.rpartition(" starts in ")[2] for line in said if "with exit code 1" in line]
    # Each of them said why.
    assert sum("can't be written" in line for line in said) == len(delays)
    if delays[0] == "0 s":
        # The one that was killed had lived for long.
        del delays[0]
    assert delays == ["0.1 s", "0.2 s", "0.4 s", "0.8 s", "1.6 s"][: len(delays)]
    assert len(delays) > 2


# --- the start ------------------------------------------------------------------------------


async def test_it_is_ready_when_all_workers_are(data_dir: Path) -> None:
    async with at_work(data_dir, 3) as (server, key):
        assert len(workers(server)) == 3
        async with one_each(server.url, key, 3):
            pass
    assert b"".join(server.output).count(b"ready on") == 1


async def test_as_many_as_cores(data_dir: Path) -> None:
    async with serving(data_dir, FLOWMASON_SECRETS_WORKERS="0") as server:
        places = supervisor.places(0)
        # Alone, a worker needs no supervisor.
        process = server.process
        assert process is not None
        there = workers(server) or [process.pid]
        if sys.platform == "linux":
            # Each has a core, all of it, and its successor has it again.
            assert sorted(map(os.sched_getaffinity, there), key=min) == [{core} for core in places]
        else:
            assert len(there) == len(places)
    async with serving(data_dir, "--workers=1", FLOWMASON_SECRETS_WORKERS="2") as server:
        assert workers(server) == []


async def test_what_keeps_one_server_from_starting_keeps_all(
    data_dir: Path, tmp_path: Path
) -> None:
    no_directory = tmp_path / "file"
    no_directory.write_text("a file")
    open_to_all = tmp_path / "open"
    open_to_all.write_text("a master key that everybody can read, alas")
    open_to_all.chmod(0o644)
    damaged = tmp_path / "damaged"
    await issue_key(damaged)
    (segment,) = (damaged / "events").iterdir()
    segment.write_bytes(segment.read_bytes()[600:])
    async with serving(data_dir) as server:
        port = server.url.rpartition(":")[2]
        cases: list[tuple[int, dict[str, str], list[str]]] = [
            (1, {"KEY": MASTER_KEY}, [f"--data-dir={no_directory}"]),
            (1, {"KEY": MASTER_KEY}, [f"--data-dir={damaged}"]),
            (2, {"KEY_FILE": str(open_to_all)}, [f"--data-dir={data_dir}"]),
            (1, {"KEY": MASTER_KEY}, [f"--data-dir={data_dir}", f"--port={port}"]),
        ]
        for code, said, options in cases:
            variables = {f"FLOWMASON_SECRETS_{name}": text for name, text in said.items()}
            alone, together = await asyncio.gather(
                *(
                    run("serve", "--port=0", *options, f"--workers={count}", variables=variables)
                    for count in (1, 2)
                )
            )
            alone.failed(code)
            assert together == alone


# --- the end --------------------------------------------------------------------------------


def write_request(key: str, name: str) -> bytes:
    """A request, before which `/healthz` is asked on the same connection."""
    body = json.dumps({"name": name, "value": "1"})
    return (
        "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        "POST /api/v1/secrets HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"X-API-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_what_is_in_flight_is_finished(data_dir: Path, number: signal.Signals) -> None:
    """Also when it is the supervisor that is killed."""
    async with at_work(data_dir) as (server, key):
        port = int(server.url.rpartition(":")[2])
        there = workers(server)
        assert server.process is not None
        with Layout(data_dir).lock.open("rb") as lock:
            # Nothing is committed while this process has the lock of the data directory.
            fcntl.flock(lock, fcntl.LOCK_EX)
            streams = []
            for turn in range(24):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(write_request(key, f"S{turn}"))
                # The answer to the first request says that a worker has the second one too.
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
                streams.append((reader, writer))
            server.process.send_signal(number)
            while await accepts(port):
                pass
            if number is not signal.SIGKILL:
                assert workers(server) == there
        for reader, writer in streams:
            assert b" 201 Created" in await reader.read()
            writer.close()
        server.output.append(await server.process.stdout.read() if server.process.stdout else b"")
        code = await server.process.wait()
        assert code == (-number if number is signal.SIGKILL else 0)
        if number is signal.SIGKILL:
            # Without a supervisor nobody has waited until they had ended.
            async with asyncio.timeout(SOON):
                while alive(*there):
                    await asyncio.sleep(0.01)
        assert alive(*there) == []
        gone = b"".join(server.output).count(b"the supervisor is gone")
        assert gone == (2 if number is signal.SIGKILL else 0)
    listed = await run("list", "--org=acme", f"--data-dir={data_dir}", "--json")
    assert [entry["name"] for entry in listed.json] == sorted(f"S{turn}" for turn in range(24))


class Impatient(ServerProcess):
    """It kills workers that don't end within a second."""

    program = (
        sys.executable,
        "-c",
        "from flowmason_secrets import cli, serving; serving.PATIENCE = 1.0; cli.main()",
    )


async def test_a_worker_that_does_not_end_is_killed(data_dir: Path) -> None:
    server = Impatient(data_dir, "--workers=2")
    await server.start()
    hung, _ = workers(server)
    os.kill(hung, signal.SIGSTOP)
    assert await server.stop() == 1
    said = b"".join(server.output).decode()
    assert f"worker 1 (pid {hung}) did not end within 1 s and is killed" in said


async def test_a_supervisor_that_is_told_to_stop_while_it_starts(data_dir: Path) -> None:
    await issue_key(data_dir)
    server = ServerProcess(data_dir, "--workers=2")
    with Layout(data_dir).lock.open("rb") as lock:
        # Its workers can't get ready.
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = asyncio.create_task(server.start())
        async with asyncio.timeout(SOON):
            while server.process is None or not workers(server):
                await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
    with pytest.raises(AssertionError):
        await starting
    assert await server.process.wait() == 0
    assert b"".join(server.output) == b""


# --- where it listens -----------------------------------------------------------------------


async def test_workers_share_every_kind_of_address(data_dir: Path, tmp_path: Path) -> None:
    certificate = Certificate(tmp_path)
    place = tmp_path / "socket"
    kinds = {
        "unix:": [f"--unix-socket={place}"],
        "https://127.0.0.1:": [
            f"--tls-cert={certificate.path}",
            f"--tls-key={certificate.key}",
        ],
        "http://127.0.0.1:": ["--host=localhost"],
    }
    for scheme, options in kinds.items():
        async with serving(data_dir, "--workers=2", *options) as server:
            assert server.url.startswith((scheme, "http://[::1]:"))
            there = workers(server)
            for pid in there:
                await check_alive(server.url, certificate)
                await kill(pid)
            await check_alive(server.url, certificate)
            await replaced(server, there, 2)
        with pytest.raises(aiohttp.ClientConnectorError):
            await check_alive(server.url, certificate)


async def check_alive(url: str, certificate: Certificate) -> None:
    """It answers on a new connection."""
    connector: aiohttp.BaseConnector
    if url.startswith("unix:"):
        connector = aiohttp.UnixConnector(url.removeprefix("unix:"))
        url = "http://localhost"
    else:
        trust = ssl.create_default_context(cafile=certificate.path)
        connector = aiohttp.TCPConnector(ssl=trust)
    async with (
        aiohttp.ClientSession(url, connector=connector) as client,
        client.get("/healthz") as response,
    ):
        assert response.status == 200


async def test_a_used_unix_socket_is_left_alone(data_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "socket"
    variables = {"FLOWMASON_API_KEY": await issue_key(data_dir), "FLOWMASON_SECRETS_KEY": "k"}
    async with serving(data_dir, "--workers=2", f"--unix-socket={place}") as server:
        other = [f"--data-dir={tmp_path / 'other'}", f"--unix-socket={place}"]
        ended = await run("serve", "--workers=2", *other, variables=variables)
        ended.failed(1, str(place), "in use", "--unix-socket")
        assert (await run("list", "--url", server.url, variables=variables)).code == 0
    # Nobody removed it, and nobody is there any more: the next one may have it.
    async with serving(data_dir, f"--unix-socket={place}") as server:
        assert (await run("list", "--url", server.url, variables=variables)).code == 0


# --- the master keys ------------------------------------------------------------------------


def key_id_on_disk(data_dir: Path, name: str) -> str:
    """Under which master key a secret is."""
    for path in data_dir.glob("*/*.meta"):
        metadata = json.loads(path.read_bytes())
        if metadata["name"] == name:
            return str(metadata["key_id"])
    raise AssertionError(name)


async def write(client: aiohttp.ClientSession, name: str) -> None:
    async with client.post(SECRETS, json={"name": name, "value": "1"}) as response:
        assert response.status in (200, 201)


@pytest.mark.parametrize("count", [1, 2])
async def test_sighup_reads_the_key_file_again(data_dir: Path, tmp_path: Path, count: int) -> None:
    newer = "a newer master key, of 32 characters or more"
    key = await issue_key(data_dir)
    key_file = tmp_path / "master.keys"
    key_file.write_text(f"{MASTER_KEY}\n")
    key_file.chmod(0o600)
    options = (f"--workers={count}",)
    variables = {"FLOWMASON_SECRETS_KEY": "", "FLOWMASON_SECRETS_KEY_FILE": str(key_file)}
    async with serving(data_dir, *options, **variables) as server:
        assert server.process is not None
        async with one_each(server.url, key, count) as clients:
            for number, client in enumerate(clients):
                await write(client, f"S{number}")
                assert key_id_on_disk(data_dir, f"S{number}") == MasterKey.of(MASTER_KEY).key_id
            key_file.write_text("")
            server.process.send_signal(signal.SIGHUP)
            for number, client in enumerate(clients):
                # The keys held stay.
                await write(client, f"S{number}")
                assert key_id_on_disk(data_dir, f"S{number}") == MasterKey.of(MASTER_KEY).key_id
            key_file.write_text(f"{newer}\n{MASTER_KEY}\n")
            server.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(SOON):
                for number, client in enumerate(clients):
                    while key_id_on_disk(data_dir, f"S{number}") != MasterKey.of(newer).key_id:
                        await write(client, f"S{number}")
            there = workers(server)
            for pid in there:
                os.kill(pid, signal.SIGKILL)
            await replaced(server, there, count if count > 1 else 0)
        async with one_each(server.url, key, count) as clients:
            for number, client in enumerate(clients):
                await write(client, f"T{number}")
                assert key_id_on_disk(data_dir, f"T{number}") == MasterKey.of(newer).key_id
    said = b"".join(server.output).decode()
    assert said.count("the master keys held stay") == count
    assert "holds no key" in said
