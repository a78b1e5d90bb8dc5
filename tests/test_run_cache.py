"""`run --cache`: real servers that go away, and programs that start all the same."""

import asyncio
import json
import signal
import socket
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flowmason_secrets.cli.exits import CONFIGURATION, DENIED, UNAVAILABLE

from .harness.server import ServerProcess, issue_key
from .harness.sidecars import store
from .test_cli import Ended, environment, local, run

PRINTS = ("--", sys.executable, "-c", "import os; print(os.environ.get('A'))")


@dataclass
class Worker:
    """A machine with an API key for a server that comes and goes."""

    data_dir: Path
    place: Path
    api_key: str
    server: ServerProcess = field(init=False)

    def __post_init__(self) -> None:
        self.server = ServerProcess(self.data_dir, f"--unix-socket={self.place / 'server.sock'}")
        self.server.url = f"unix:{self.place / 'server.sock'}"

    @property
    def state(self) -> Path:
        """Where its cache is."""
        return self.place / "state"

    def command(self, *arguments: str, url: str = "") -> Sequence[str]:
        """The arguments of a run."""
        where = ("--url", url or self.server.url, "--state-dir", str(self.state))
        return ("run", *where, *arguments, *(() if "--" in arguments else PRINTS))

    async def run(self, *arguments: str, url: str = "") -> Ended:
        """Start a program, which prints the secret A."""
        variables = {"FLOWMASON_API_KEY": self.api_key}
        return await run(*self.command(*arguments, url=url), variables=variables)

    def known(self) -> list[Path]:
        """The files of the cache."""
        return sorted(self.state.glob("run/*/known/*"))

    def queued(self) -> list[dict[str, Any]]:
        """The reads that wait for their delivery."""
        files = self.state.glob("run/*/offline/*/*.ndjson")
        lines = [json.loads(line) for one in files for line in one.read_bytes().splitlines()]
        return [line for line in lines if "id" in line]

    def offline(self) -> list[dict[str, Any]]:
        """The offline reads in the log."""
        segments = sorted((self.data_dir / "events").glob("audit-*.ndjson"))
        log = [json.loads(line) for one in segments for line in one.read_bytes().splitlines()]
        return [event for event in log if event["details"].get("offline") is True]


@pytest.fixture
async def worker(data_dir: Path, tmp_path: Path) -> Worker:
    """One with the secrets A and B, whose server was not started yet."""
    await store(data_dir, {"A": "s3cret-value", "B": "be"})
    return Worker(data_dir, tmp_path, await issue_key(data_dir, scopes=("full",)))


async def test_workers_start_while_the_server_is_down(worker: Worker) -> None:
    await worker.server.start()
    first = await worker.run()
    assert (first.code, first.out, first.err) == (0, "s3cret-value\n", "")
    for path in worker.known():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"s3cret" not in path.read_bytes()
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(worker.known()) == 3
    await worker.server.kill()

    # Several at once, and in different ways.
    downs = await asyncio.gather(
        worker.run(), worker.run("--only", "A"), worker.run("--only", "?"), worker.run()
    )
    for down in downs:
        assert (down.code, down.out) == (0, "s3cret-value\n"), down
        assert "from the cache" in down.err
    # Durable before the program began, and told by the process that it became.
    queued = worker.queued()
    assert Counter(read["name"] for read in queued) == {"A": 4, "B": 3}
    assert len({read["pid"] for read in queued}) == 4
    assert worker.offline() == []

    await worker.server.start()
    # Two at once must not deliver anything twice.
    ups = await asyncio.gather(worker.run(), worker.run())
    await worker.run()
    await worker.server.stop()
    assert {(up.code, up.out, up.err) for up in ups} == {(0, "s3cret-value\n", "")}
    delivered = Counter(event["details"]["read_id"] for event in worker.offline())
    assert delivered == Counter(read["id"] for read in queued)
    assert worker.queued() == []
    assert list(worker.state.glob("run/*/offline/*")) == []


async def test_what_is_refused_is_not_in_the_cache(worker: Worker) -> None:
    await worker.server.start()
    assert (await worker.run()).out == "s3cret-value\n"
    await local(worker.data_dir).run("delete", "A")
    (await worker.run("--only", "A")).failed(CONFIGURATION, "secret_not_found")
    await worker.server.stop()
    # Nor later: it is known that it is gone.
    down, without = await asyncio.gather(
        worker.run("--only", "A"), worker.run("--only", "A", "--cache", "only")
    )
    down.failed(UNAVAILABLE, "can't be reached")
    without.failed(UNAVAILABLE, "cache")
    assert worker.queued() == []


async def test_a_key_that_was_revoked_empties_the_cache(worker: Worker) -> None:
    await worker.server.start()
    assert (await worker.run()).out == "s3cret-value\n"
    assert len(worker.known()) == 3
    listed = await local(worker.data_dir).run("keys", "list", "--json")
    await local(worker.data_dir).run("keys", "revoke", listed.json[0]["id"])
    ended = await worker.run("--only", "A")
    assert (ended.code, ended.out) == (DENIED, "")
    assert "expired or revoked" in ended.err
    assert worker.known() == []
    await worker.server.stop()


async def test_only_never_connects_and_refusals_are_final(worker: Worker) -> None:
    await worker.server.start()
    assert (await worker.run()).out == "s3cret-value\n"
    await worker.server.stop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        every, one, missing = await asyncio.gather(
            worker.run("--cache", "only", url=url),
            worker.run("--cache", "only", "--only", "A", url=url),
            worker.run("--cache", "only", "--only", "C", url=url),
        )
        assert (every.code, every.out) == (one.code, one.out) == (0, "s3cret-value\n")
        missing.failed(UNAVAILABLE)
        with pytest.raises(BlockingIOError):
            listening.accept()
        assert len(worker.queued()) == 3
        # Only those failures count as away, one that hangs among them.
        starts = {500: True, 503: True, 403: False, 404: False, 410: False}
        hanging, *ended = await asyncio.gather(
            worker.run(url=url), *(answered(worker, status) for status in starts)
        )
        assert hanging.out == "s3cret-value\n"
        listening.accept()[0].close()
    for ran, started in zip(ended, starts.values(), strict=True):
        assert (ran.out, ran.code == 0) == (("s3cret-value\n", True) if started else ("", False)), (
            ran
        )
    # Each of those that began had two secrets.
    assert len(worker.queued()) == 3 + 3 * 2


async def answered(worker: Worker, status: int) -> Ended:
    """A run whose server answers everything with this status."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await worker.run(url=f"http://127.0.0.1:{port}")


async def test_without_a_cache(worker: Worker) -> None:
    await worker.server.start()
    assert (await worker.run("--cache", "off")).out == "s3cret-value\n"
    assert not worker.state.exists()
    # A place that can't be used is no reason not to start.
    worker.state.write_text("a file")
    ended, without = await asyncio.gather(worker.run(), worker.run("--cache", "only"))
    assert (ended.code, ended.out) == (0, "s3cret-value\n")
    assert "There is no cache" in ended.err
    without.failed(CONFIGURATION, "There is no cache")
    await worker.server.stop()
    worker.state.unlink()
    (await worker.run("--cache", "off")).failed(UNAVAILABLE)
    assert not worker.state.exists()
    (await worker.run()).failed(UNAVAILABLE, "can't be reached")


async def test_a_cache_is_a_servers(worker: Worker) -> None:
    place = local(worker.data_dir)
    ended = await run("run", *place.options, "--cache=only", *PRINTS, variables=place.variables)
    assert ended.code == 2
    assert "--url" in ended.err
    ended = await worker.run("--cache=only", "--watch=restart")
    assert ended.code == 2


async def test_with_watch_it_starts_and_follows_later(worker: Worker) -> None:
    await worker.server.start()
    assert (await worker.run()).out == "s3cret-value\n"
    await worker.server.stop()
    script = "import os, time; print(os.environ['A'][::-1], flush=True); time.sleep(60)"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowmason_secrets"),
        *worker.command("--watch", "restart", "--", sys.executable, "-c", script),
        env=environment({"FLOWMASON_API_KEY": worker.api_key}),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"eulav-terc3s\n"
    assert len(worker.queued()) == 2
    await store(worker.data_dir, {"A": "another"})
    await worker.server.start()
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"rehtona\n"
        while len(worker.offline()) < 2:
            await asyncio.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 128 + signal.SIGTERM
    await worker.server.stop()
    assert list(worker.state.glob("run/*/offline/*")) == []
