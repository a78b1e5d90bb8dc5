"""The agent as a process of its own, and workers that read through its socket."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import aiohttp

from .interfaces import environment

HEADER = {"X-FlowMason-Agent": "true"}

# Forks so many workers, which read one secret over and over until SIGTERM, and print a line for
# each read: their process id, when it began, the status, the value, and the event of the read.
_WORKERS = """
import json, os, signal, socket, sys, time
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ended = []
def stop(*_):
    ended.append(1)
signal.signal(signal.SIGTERM, stop)
request = (
    f"GET /api/v1/secrets/{name} HTTP/1.1\\r\\nHost: x\\r\\nX-FlowMason-Agent: true\\r\\n\\r\\n"
).encode()
def read(connection):
    connection.sendall(request)
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    lines = head.decode().split("\\r\\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(fields["content-length"]):
        body += connection.recv(65536)
    return int(lines[0].split()[1]), fields, json.loads(body)
children = []
for _ in range(count):
    child = os.fork()
    if not child:
        break
    children.append(child)
else:
    while not ended:
        signal.pause()
    for child in children:
        os.kill(child, signal.SIGTERM)
    for child in children:
        os.waitpid(child, 0)
    sys.exit()
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
while not ended:
    began = time.time()
    status, fields, body = read(connection)
    line = [os.getpid(), began, status, body.get("value"), fields.get("audit-id"),
            fields.get("x-flowmason-offline")]
    os.write(1, json.dumps(line).encode() + b"\\n")
    time.sleep(0.02)
os._exit(0)
"""


class WorkerRead(NamedTuple):
    """A read of one worker."""

    pid: int
    began: float
    status: int
    value: str | None
    event_id: str | None
    offline_id: str | None


class Workers:
    """Processes that read one secret until they are stopped."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._reads: list[WorkerRead] = []
        self._reader = asyncio.create_task(self._collect())

    @property
    def reads(self) -> list[WorkerRead]:
        """All reads until now."""
        return list(self._reads)

    async def stop(self) -> list[WorkerRead]:
        """End them; all reads that they made."""
        self._process.terminate()
        await self._reader
        assert await self._process.wait() == 0
        return self._reads

    async def _collect(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self._reads.append(WorkerRead(*json.loads(line)))


async def start_workers(socket: Path, name: str, count: int) -> Workers:
    """So many of them."""
    arguments = (sys.executable, "-c", _WORKERS, str(socket), name, str(count))
    return Workers(await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE))


class AgentProcess:
    """`flowmason-secrets agent`."""

    def __init__(self, url: str, api_key: str, state_dir: Path, *arguments: str) -> None:
        self.socket = state_dir / "agent.sock"
        self.state_dir = state_dir
        self._arguments = (f"--url={url}", f"--state-dir={state_dir}", *arguments)
        self._api_key = api_key
        self.process: asyncio.subprocess.Process | None = None
        self.output = b""

    async def start(self) -> None:
        """Return when it listens."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowmason_secrets", "agent", *self._arguments),
            env=environment({"FLOWMASON_API_KEY": self._api_key}),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        self.output = await self.process.stdout.readline()
        assert b"is ready on" in self.output, self.output

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal; returns the exit code."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        assert self.process.stdout is not None
        self.output += await self.process.stdout.read()
        return await self.process.wait()

    def resident(self) -> float:
        """Its memory in MiB."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    def busy(self) -> float:
        """Seconds of a processor that it has used."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def client(self, headers: dict[str, str] | None = None) -> aiohttp.ClientSession:
        """A local process of this one's user."""
        return aiohttp.ClientSession(
            "http://agent",
            connector=aiohttp.UnixConnector(str(self.socket)),
            headers=HEADER if headers is None else headers,
        )


@contextlib.asynccontextmanager
async def agent(
    url: str, api_key: str, state_dir: Path, *arguments: str
) -> AsyncIterator[AgentProcess]:
    """An agent for the duration of a block."""
    started = AgentProcess(url, api_key, state_dir, *arguments)
    await started.start()
    try:
        yield started
    finally:
        await started.end()


async def command(*arguments: str) -> tuple[int, str]:
    """Run `flowmason-secrets agent ...` to its end; its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowmason_secrets", "agent", *arguments),
        env=environment({}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()
