"""The agent: real servers, real agents, real workers."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flowmason_secrets import app
from flowmason_secrets.core.access import Peer
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.errors import Denied
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.sidecar.agent.peers import Allowed

from .harness import agent as harness
from .harness.agent import agent, command, start_workers
from .harness.server import ServerProcess, issue_key, serving, settings_for
from .test_cli_serve import Certificate

ORG = "acme"


def server_on(data_dir: Path, place: Path) -> ServerProcess:
    """A server that has the same address whenever it is started."""
    server = ServerProcess(data_dir, f"--unix-socket={place / 'server.sock'}")
    server.url = f"unix:{place / 'server.sock'}"
    return server


def events(data_dir: Path) -> list[dict[str, Any]]:
    """Every line of the log."""
    segments = sorted((data_dir / "events").glob("audit-*.ndjson"))
    return [json.loads(line) for one in segments for line in one.read_bytes().splitlines()]


async def put(data_dir: Path, name: str, value: str, **more: Any) -> None:
    """Set a secret beside a running server, as the library does."""
    service = await app.open_service(settings_for(data_dir))
    try:
        await service.set(app.local_caller(ORG), Draft(name, Plaintext(value), **more))
    finally:
        await service.close()


async def until(check: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return when it is so."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


def offline_reads(data_dir: Path) -> list[dict[str, Any]]:
    """The reads in the log that an agent delivered."""
    return [line for line in events(data_dir) if line["details"].get("offline") is True]


async def test_a_server_dies_under_twenty_workers_and_comes_back(
    data_dir: Path, tmp_path: Path
) -> None:
    api_key = await issue_key(data_dir, scopes=("full",))
    await put(data_dir, "SHARED", "first")
    server = server_on(data_dir, tmp_path)
    await server.start()
    async with agent(server.url, api_key, tmp_path / "agent") as beside:
        async with beside.client() as client, client.get("/api/v1/secrets/SHARED") as response:
            assert response.status == 200
        workers = await start_workers(beside.socket, "SHARED", 20)
        await until(lambda: len({read.pid for read in workers.reads}) == 20, 20)
        await server.kill()
        gone = time.time()
        await until(lambda: len({r.pid for r in workers.reads if r.began > gone}) == 20, 20)
        await server.start()
        back = time.time()
        await asyncio.sleep(1.0)
        await put(data_dir, "SHARED", "second")
        changed = time.time()
        await until(lambda: len({r.pid for r in workers.reads if r.began > changed}) == 20, 20)
        reads = await workers.stop()
        await until(
            lambda: len(offline_reads(data_dir)) == sum(r.offline_id is not None for r in reads)
        )
    await server.stop()

    assert {read.status for read in reads} == {200}
    offline = [read for read in reads if read.offline_id is not None]
    assert len({read.pid for read in offline}) == 20
    # Within a second after the server is back, it answers again, and nothing is outdated.
    assert all(read.began < back + 1.0 for read in offline)
    assert {read.value for read in reads if read.began < back} == {"first"}
    assert {read.value for read in reads if read.began > changed} == {"second"}

    log = events(data_dir)
    successes = [e for e in log if e["action"] == "secret.read" and e["outcome"] == "success"]
    delivered = Counter(e["details"]["read_id"] for e in offline_reads(data_dir))
    assert delivered == Counter(read.offline_id for read in offline)
    told = {e["details"].get("read_id", e["id"]): e for e in successes}
    for read in reads:
        event = told[read.offline_id or read.event_id]
        assert event["details"]["peer_pid"] == read.pid
        assert event["details"]["peer_uid"] == os.getuid()
        assert event["actor_type"] == "api_key"


async def test_what_the_socket_serves(data_dir: Path, tmp_path: Path) -> None:
    api_key = await issue_key(data_dir, scopes=("execute",))
    await put(data_dir, "A", "eh")
    async with serving(data_dir) as server, agent(server.url, api_key, tmp_path / "a") as beside:
        assert stat.S_IMODE(beside.socket.stat().st_mode) == 0o600
        async with beside.client() as client:
            async with client.get("/api/v1/secrets/A") as response:
                assert await response.json() == {
                    "name": "A",
                    "value": "eh",
                    "category": "other",
                    "is_expired": False,
                    "version": 1,
                }
                seq = int(response.headers["Audit-Seq"])
                assert events(data_dir)[seq]["id"] == response.headers["Audit-Id"]
            sent = {"document": {"x": "<{{secrets.A}}>"}, "pipeline": "nightly"}
            async with client.post("/api/v1/secrets/resolve", json=sent) as response:
                found = await response.json()
                assert found["document"] == {"x": "<eh>"}
                read = events(data_dir)[found["receipts"][0]["seq"]]
                assert read["details"]["pipeline"] == "nightly"
                assert read["details"]["peer_pid"] == os.getpid()
            for path, status in (
                ("/api/v1/secrets/NONE", 404),
                ("/api/v1/secrets", 404),
                ("/api/v1/secrets/A?x=1", 422),
            ):
                async with client.get(path) as response:
                    assert response.status == status
        for headers in ({}, {"X-FlowMason-Agent": "1"}):
            async with (
                beside.client(headers) as client,
                client.get("/api/v1/secrets/A") as response,
            ):
                assert response.status == 412
                assert (await response.json())["code"] == "agent_header_missing"


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--allow-uid={other}"], 403),
        (["--allow-gid={other}"], 403),
        (["--allow-uid={other}", "--allow-uid={uid}"], 200),
        (["--allow-uid={other}", "--allow-gid={gid}"], 200),
        (["--allow-exe=/bin/sh"], 403),
        (["--allow-exe={program}"], 200),
        (["--allow-uid={other}", "--allow-exe={program}"], 403),
    ],
)
async def test_the_kernel_says_who_is_served(
    options: list[str], status: int, data_dir: Path, tmp_path: Path
) -> None:
    ids = {
        "other": os.getuid() + 4321,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "program": os.path.realpath("/proc/self/exe"),
    }
    api_key = await issue_key(data_dir)
    await put(data_dir, "A", "eh")
    server = server_on(data_dir, tmp_path)
    arguments = [option.format_map(ids) for option in options]
    # Whoever is refused is refused before the server is asked: it isn't there.
    if status == 200:
        await server.start()
    async with agent(server.url, api_key, tmp_path / "a", *arguments) as beside:
        async with beside.client() as client, client.get("/api/v1/secrets/A") as response:
            assert response.status == status, await response.text()
            assert (b"eh" in await response.read()) == (status == 200)
        code, _ = await command("ready", f"--socket={beside.socket}", "--wait=5s")
        # The probe is a process of the same program and user.
        assert code == (0 if status == 200 else 77)
    if status == 200:
        await server.stop()


def test_a_process_that_has_ended_is_no_allowed_program(tmp_path: Path) -> None:
    program = os.path.realpath("/proc/self/exe")
    users = frozenset({os.getuid()})
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        script = (
            "import socket, sys; s = socket.socket(1); s.connect(sys.argv[1]); sys.stdin.read()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "s")], stdin=subprocess.PIPE
        )
        accepted, _ = listening.accept()
        with accepted:
            allowed = Allowed(users, programs=frozenset({program}))
            allowed.check_system()
            assert allowed.admit(accepted) == Peer(os.getuid(), child.pid)
            with pytest.raises(Denied, match="allow-exe"):
                Allowed(users, programs=frozenset({"/bin/sh"})).admit(accepted)
            child.communicate(b"\n")
            # Its id may be somebody else's from now on.
            with pytest.raises(Denied, match="allow-exe"):
                allowed.admit(accepted)


async def test_a_server_that_hangs(data_dir: Path, tmp_path: Path) -> None:
    api_key = await issue_key(data_dir)
    await put(data_dir, "A", "eh")
    async with (
        serving(data_dir) as server,
        agent(server.url, api_key, tmp_path / "a", "--timeout=0.3") as beside,
        beside.client() as client,
    ):
        async with client.get("/api/v1/secrets/A") as response:
            assert "Audit-Seq" in response.headers
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        ids = [await _offline(client) for _ in range(3)]
        # Only the first one waited.
        assert time.monotonic() - began < 1.0
        server.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(1.0)
        async with client.get("/api/v1/secrets/A") as response:
            assert "Audit-Seq" in response.headers
        await until(lambda: len(offline_reads(data_dir)) >= 3)
    assert [event["details"]["read_id"] for event in offline_reads(data_dir)] == ids


async def test_a_revoked_key_empties_the_cache(data_dir: Path, tmp_path: Path) -> None:
    await put(data_dir, "A", "eh")
    service = await app.open_service(settings_for(data_dir))
    server = server_on(data_dir, tmp_path)
    await server.start()
    try:
        local = app.local_caller(ORG)
        issued = await service.keys.issue(local, KeyDraft("agent"))
        async with agent(server.url, issued.raw.reveal(), tmp_path / "a") as beside:
            async with beside.client() as client:
                async with client.get("/api/v1/secrets/A") as response:
                    assert response.status == 200
                known = tmp_path / "a" / "known"
                await until(lambda: len(list(known.glob("*.known"))) == 1)
                await service.keys.revoke(local, issued.key.id)
                async with client.get("/api/v1/secrets/A") as response:
                    assert response.status == 401
                    assert (await response.json())["code"] == "unauthenticated"
                await until(lambda: not list(known.iterdir()))
                await server.kill()
                async with client.get("/api/v1/secrets/A") as response:
                    assert response.status == 503
            code, told = await command("ready", f"--socket={beside.socket}")
            assert code == 77, told
    finally:
        await service.close()
        await server.stop()


async def test_a_revoked_key_empties_the_cache_if_nobody_reads(
    data_dir: Path, tmp_path: Path
) -> None:
    await put(data_dir, "A", "eh")
    service = await app.open_service(settings_for(data_dir))
    local = app.local_caller(ORG)
    issued = await service.keys.issue(local, KeyDraft("agent"))
    known = tmp_path / "a" / "known"
    try:
        async with (
            serving(data_dir) as server,
            agent(server.url, issued.raw.reveal(), tmp_path / "a") as beside,
            beside.client() as client,
        ):
            async with client.get("/api/v1/secrets/A") as response:
                assert response.status == 200
            await until(lambda: len(list(known.glob("*.known"))) == 1)
            await service.keys.revoke(local, issued.key.id)
            began = time.monotonic()
            await until(lambda: not list(known.iterdir()), 20)
            print(f"emptied after {time.monotonic() - began:.1f} s")
    finally:
        await service.close()


async def test_an_agent_that_died_serves_and_delivers_what_it_had(
    data_dir: Path, tmp_path: Path
) -> None:
    api_key = await issue_key(data_dir)
    await put(data_dir, "A", "eh")
    server = server_on(data_dir, tmp_path)
    await server.start()
    state = tmp_path / "a"
    async with agent(server.url, api_key, state) as beside, beside.client() as client:
        async with client.get("/api/v1/secrets/A") as response:
            assert response.status == 200
        await until(lambda: len(list((state / "known").glob("*.known"))) == 1)
        await server.kill()
        ids = [await _offline(client) for _ in range(3)]
        await beside.end(signal.SIGKILL)
    # Half a line, as if the power had failed in the middle of a write.
    (segment,) = (state / "offline").glob("*.ndjson")
    with segment.open("ab") as file:
        file.write(b'{"number":4,"id":"01')
    async with agent(server.url, api_key, state) as beside, beside.client() as client:
        code, told = await command("ready", f"--socket={beside.socket}", "--wait=5s")
        assert code == 0, told
        ids.append(await _offline(client))
        await server.start()
        await until(lambda: len(offline_reads(data_dir)) >= 4)
        code, told = await command("quit", f"--socket={beside.socket}")
        assert code == 0, told
        assert beside.process is not None
        assert await beside.process.wait() == 0
    await server.stop()
    assert [e["details"]["read_id"] for e in offline_reads(data_dir)] == ids
    text = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert b'"eh"' not in text
    assert api_key.encode() not in text
    for path in state.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


async def _offline(client: aiohttp.ClientSession) -> str:
    async with client.get("/api/v1/secrets/A") as response:
        assert response.status == 200
        assert (await response.json())["value"] == "eh"
        return response.headers["X-FlowMason-Offline"]


async def test_the_cache_follows_changes(data_dir: Path, tmp_path: Path) -> None:
    api_key = await issue_key(data_dir)
    await put(data_dir, "A", "first")
    await put(data_dir, "B", "bee")
    server = server_on(data_dir, tmp_path)
    await server.start()
    state = tmp_path / "a"
    async with agent(server.url, api_key, state) as beside, beside.client() as client:
        for name in ("A", "B"):
            async with client.get(f"/api/v1/secrets/{name}") as response:
                assert response.status == 200
        await until(lambda: len(list((state / "known").glob("*.known"))) == 2)
        before = {path.read_bytes() for path in (state / "known").iterdir()}
        async with aiohttp.ClientSession(
            "http://x",
            connector=aiohttp.UnixConnector(str(tmp_path / "server.sock")),
            headers={"Authorization": f"Bearer {api_key}"},
        ) as direct:
            async with direct.post("/api/v1/secrets", json={"name": "A", "value": "2"}) as done:
                assert done.status == 200
            async with direct.delete("/api/v1/secrets/B") as done:
                assert done.status == 200
        own = beside.process
        assert own is not None
        # Nobody asked for it: the agent did, and the log says so.
        await until(
            lambda: any(e["details"].get("peer_pid") == own.pid for e in events(data_dir)), 3
        )

        def current() -> bool:
            found = [path.read_bytes() for path in (state / "known").iterdir()]
            return len(found) == 1 and found[0] not in before

        await until(current, 1)
        await server.kill()
        async with client.get("/api/v1/secrets/A") as response:
            assert (await response.json())["value"] == "2"
            assert "X-FlowMason-Offline" in response.headers
        async with client.get("/api/v1/secrets/B") as response:
            assert response.status == 503


async def test_exit_codes(tmp_path: Path, data_dir: Path) -> None:
    nobody = f"--socket={tmp_path / 'nobody.sock'}"
    assert (await command("ready", nobody))[0] == 69
    assert (await command("quit", nobody))[0] == 69
    assert (await command("ready", nobody, "--wait=soon"))[0] == 78
    assert (await command())[0] == 78
    assert (await command("--url=http://127.0.0.1:1"))[0] == 78
    # No server, and nothing cached.
    async with agent("http://127.0.0.1:1", "fm_live_x", tmp_path / "a") as beside:
        began = time.monotonic()
        code, told = await command("ready", f"--socket={beside.socket}", "--wait=1s")
        assert code == 69, told
        assert time.monotonic() - began >= 1.0
        other = harness.AgentProcess("http://127.0.0.1:1", "fm_live_x", tmp_path / "a")
        with pytest.raises(AssertionError, match="Another agent"):
            await other.start()
        assert other.process is not None
        assert await other.process.wait() == 78
    await issue_key(data_dir)
    async with serving(data_dir) as server, agent(server.url, "fm_live_x", tmp_path / "b") as wrong:
        code, told = await command("ready", f"--socket={wrong.socket}", "--wait=20s")
        assert code == 77, told


async def test_only_whom_the_system_trusts_it_asks(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api_key = await issue_key(data_dir)
    await put(data_dir, "S", "x")
    certificate = Certificate(tmp_path)
    files = (f"--tls-cert={certificate.path}", f"--tls-key={certificate.key}")
    async with serving(data_dir, *files) as server:

        async def read(state_dir: Path) -> tuple[int, dict[str, Any]]:
            beside = agent(server.url, api_key, state_dir)
            async with beside as running, running.client() as client:
                response = await client.get("/api/v1/secrets/S")
                return response.status, await response.json(content_type=None)

        status, told = await read(tmp_path / "a")
        assert status == 503
        assert "certificate" in told["detail"]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
        status, told = await read(tmp_path / "b")
        assert status == 200
        assert told["value"] == "x"


async def test_it_is_small_and_starts_at_once(data_dir: Path, tmp_path: Path) -> None:
    api_key = await issue_key(data_dir)
    for number in range(5):
        await put(data_dir, f"S{number}", "x" * 1000)
    async with serving(data_dir) as server:
        starts = []
        for turn in range(3):
            began = time.monotonic()
            async with agent(server.url, api_key, tmp_path / f"{turn}") as beside:
                starts.append((time.monotonic() - began, beside.busy()))
        async with agent(server.url, api_key, tmp_path / "a") as beside, beside.client() as client:

            async def read(number: int) -> None:
                async with client.get(f"/api/v1/secrets/S{number % 5}") as response:
                    assert response.status == 200

            for turn in range(20):
                await asyncio.gather(*(read(turn + number) for number in range(50)))
            resident = beside.resident()
    print(f"resident after 1,000 reads: {resident:.1f} MiB; starts (s, cpu s): {starts}")
    assert resident < 60
    # On an idle machine the first is below 0.5; the time on a processor hardly depends on others.
    assert min(busy for _, busy in starts) < 0.5
