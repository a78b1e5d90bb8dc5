"""A server with several workers: who they are, and how it looks from outside while they die."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp

from .load import Known, Seen, find_out, read_once, write_once
from .server import ServerProcess

# Seconds within which what has to happen by itself has happened.
SOON = 20.0


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run, oldest first."""
    return sorted(child for child, state, parent in _processes() if parent == pid and state != "Z")


def alive(*pids: int) -> list[int]:
    """Those of the processes that still run."""
    return [pid for pid, state, _ in _processes() if pid in pids and state != "Z"]


async def kill(pid: int) -> None:
    """SIGKILL; return when it is dead and has let go of its connections."""
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(SOON):
        while alive(pid):
            await asyncio.sleep(0.01)


def _processes() -> list[tuple[int, str, int]]:
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(
            ("ps", "-A", "-o", "pid=,state=,ppid="), capture_output=True, text=True, check=True
        ).stdout
        return [(int(a), b[0], int(c)) for a, b, c in map(str.split, listed.splitlines())]
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name, in parentheses, may hold anything.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found.append((int(path.parent.name), state, int(parent)))
    return found


def workers(server: ServerProcess) -> list[int]:
    """The workers of a server that runs."""
    assert server.process is not None
    return children(server.process.pid)


async def replaced(server: ServerProcess, before: list[int], count: int) -> list[int]:
    """Return the workers as soon as there are `count` of which none is of those before."""
    async with asyncio.timeout(SOON):
        while len(now := workers(server)) != count or set(now) & set(before):
            await asyncio.sleep(0.01)
    return now


@contextlib.asynccontextmanager
async def one_each(url: str, key: str, count: int) -> AsyncIterator[list[aiohttp.ClientSession]]:
    """A client of each worker: it has one connection, which stays. The same order every time."""
    found: dict[str, aiohttp.ClientSession] = {}

    async def connect() -> None:
        client = aiohttp.ClientSession(
            url,
            headers={"Authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(limit=1),
        )
        await stack.enter_async_context(client)
        async with client.get("/no-such-route") as response:
            # The ids that a process makes have the same beginning.
            stem = (await response.json())["request_id"].partition("-")[0]
        found.setdefault(stem, client)

    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(SOON):
            while len(found) < count:
                await asyncio.gather(*(connect() for _ in range(8)))
        yield [client for _, client in sorted(found.items())]


class Prober:
    """Asks over fresh connections, again and again, until it is cancelled."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self.answered = 0
        # Connections that were accepted by a worker that died then.
        self.cut_off = 0
        # The longest time without an answer, in seconds.
        self.longest = 0.0

    async def run(self) -> None:
        """Raises:
        ConnectionRefusedError: nobody was listening.
        """
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            try:
                answer = await self._ask()
            except (ConnectionResetError, BrokenPipeError):
                answer = b""
            if not answer:
                self.cut_off += 1
                continue
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            self.answered += 1
            now = loop.time()
            self.longest, last = max(self.longest, now - last), now
            await asyncio.sleep(0.01)

    async def _ask(self) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return await reader.read()
        finally:
            writer.close()


class Load:
    """Clients that go on, over another connection, when theirs is cut off."""

    def __init__(self, writers: int, readers: int, random: Random) -> None:
        self.known = {f"W{number}-{n}": Known() for number in range(writers) for n in range(2)}
        self.seen = Seen()
        self.unanswered = 0
        self._writers = writers
        self._readers = readers
        self._random = random

    @contextlib.asynccontextmanager
    async def on(self, client: aiohttp.ClientSession) -> AsyncIterator[None]:
        """Put this load on a server; afterwards all that was asked is answered, or cut off."""
        over = asyncio.Event()
        works = [self._write(client, number, over) for number in range(self._writers)]
        works += [self._read(client, over) for _ in range(self._readers)]
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def _write(self, client: aiohttp.ClientSession, number: int, over: asyncio.Event) -> None:
        random = Random(self._random.random())
        while not over.is_set():
            try:
                for n in range(2):
                    secret = self.known[f"W{number}-{n}"]
                    if secret.pending:
                        await find_out(client, f"W{number}-{n}", secret, self.seen)
                await write_once(client, number, self.known, self.seen, random)
            except (aiohttp.ClientError, ConnectionError):
                self.unanswered += 1

    async def _read(self, client: aiohttp.ClientSession, over: asyncio.Event) -> None:
        random = Random(self._random.random())
        names = list(self.known)
        while not over.is_set():
            try:
                await read_once(client, random.choice(names), self.seen)
            except (aiohttp.ClientError, ConnectionError):
                self.unanswered += 1
