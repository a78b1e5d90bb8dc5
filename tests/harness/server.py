"""The server as a process of its own, as users run it."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp.test_utils import BaseTestServer
from aiohttp.web_runner import ServerRunner

from flowmason_secrets import app
from flowmason_secrets.api.connections import Budget, Limits, Server
from flowmason_secrets.api.server import Dispatcher
from flowmason_secrets.config import Settings
from flowmason_secrets.core.drafts import KeyDraft
from flowmason_secrets.core.keyring import DEFAULT_KEY_ID, MasterKey
from flowmason_secrets.service import Service

MASTER_KEY = "a master key for tests, 32 characters or more"

# Disks of tests are small, and there are many of them.
SMALL = {"FLOWMASON_SECRETS_RESERVE_BYTES": "0", "FLOWMASON_SECRETS_FREE_SPACE_WARNING": "0"}


class Inside(BaseTestServer):
    """The server in the process of the test, for a service that the test has opened."""

    def __init__(self, service: Service, *, vault: bool = False) -> None:
        super().__init__()
        self._service = service
        self._vault = vault

    async def _make_runner(self, **_: object) -> ServerRunner:
        limits = Limits()
        budget = Budget(limits.request_bytes)
        dispatcher = Dispatcher(self._service, budget, vault=self._vault)
        return ServerRunner(Server(dispatcher, limits, budget, knows_list=self._vault))


async def issue_key(data_dir: Path, org: str = "acme", **draft: object) -> str:
    """A new API key, made the way the command line makes it; works beside a running server."""
    service = await app.open_service(settings_for(data_dir))
    try:
        issued = await service.keys.issue(
            app.local_caller(org),
            KeyDraft("test", **draft),  # type: ignore[arg-type] # tests name fields
        )
        return issued.raw.reveal()
    finally:
        await service.close()


def settings_for(data_dir: Path, **changes: object) -> Settings:
    """Settings for a data directory of a test."""
    return app.with_overrides(Settings(), master_keys=(MASTER_KEY,), data_dir=data_dir, **changes)


def key_ids(*materials: str) -> tuple[str, ...]:
    """What a keyring of these master keys holds; without any, the documented default key."""
    return tuple(MasterKey.of(material).key_id for material in materials) or (DEFAULT_KEY_ID,)


class ServerProcess:
    """`flowmason-secrets serve` on a free port."""

    program: tuple[str, ...] = (sys.executable, "-m", "flowmason_secrets")

    def __init__(self, data_dir: Path, *arguments: str, **environment: str) -> None:
        self._data_dir = data_dir
        self._arguments = arguments
        self._environment = environment
        self.process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.output: list[bytes] = []

    async def start(self) -> None:
        """Return when it says that it is ready."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("FLOWMASON_SECRETS_")
        }
        environment |= {"FLOWMASON_SECRETS_KEY": MASTER_KEY, **SMALL, **self._environment}
        self.process = await asyncio.create_subprocess_exec(
            *self.program,
            "serve",
            "--port=0",
            f"--data-dir={self._data_dir}",
            *self._arguments,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.output.append(line)
            if b"ready on " in line:
                self.url = line.decode().strip().rpartition(" ")[2]
                return
        raise AssertionError(b"".join(self.output).decode())

    async def kill(self) -> None:
        """SIGKILL: the process has no chance to do anything."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        self.output.append(await self.process.stdout.read())
        return await self.process.wait()


@contextlib.asynccontextmanager
async def serving(
    data_dir: Path, *arguments: str, **environment: str
) -> AsyncIterator[ServerProcess]:
    """A server process for the duration of a block."""
    server = ServerProcess(data_dir, *arguments, **environment)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def session(url: str, api_key: str) -> aiohttp.ClientSession:
    """A client that sends this API key."""
    return aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {api_key}"})
