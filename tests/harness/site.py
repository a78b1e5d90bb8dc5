"""At least four processes on one data directory, of which histories are recorded."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
from msgspec.structs import replace

from .driver import Driver
from .histories import Plan, secret_names, take_part
from .interfaces import ORG, Http, Program
from .linearise import Operation
from .server import MASTER_KEY, ServerProcess, issue_key, session

_ROOT = Path(__file__).parents[2]

# Every third history has an API key that is revoked while it is used; in every fortieth, the
# installed program itself takes part.
_WITH_KEY = 3
_WITH_PROGRAM = 40

# How many calls each client makes.
_CALLS = 6


class Site:
    """Two servers, a process with the library, and one with the command line."""

    def __init__(
        self,
        clients: Sequence[aiohttp.ClientSession],
        library: Driver,
        commands: Driver,
        program: Program,
    ) -> None:
        self._clients = clients
        self._library = library
        self._commands = commands
        self._program = program

    async def record(self, number: int) -> list[Operation]:
        """One history: what all processes did at once with a few secrets that were absent."""
        keys = dict([await self._key()]) if number % _WITH_KEY == 0 else {}
        with_program = number % _WITH_PROGRAM == 0
        # A process takes long to start, and the others should not be done by then.
        calls = _CALLS * 4 if with_program else _CALLS
        plan = Plan(number, secret_names(number, 2 + number % 2), 3, calls, next(iter(keys), None))
        # In turn the one server, the other, the command line, or both servers at once.
        revoker = number // _WITH_KEY % 4 if keys else None

        def part(place: int, clients: int, calls: int) -> Plan:
            revoke_after = calls // 2 if revoker == place or (revoker == 3 and place < 2) else None
            return replace(plan, clients=clients, calls=calls, revoke_after=revoke_after)

        parts = [
            take_part(part(place, 3, calls), [Http(f"server {place}", client, keys)])
            for place, client in enumerate(self._clients)
        ]
        parts.append(self._commands.take_part(part(2, 1, 2)))
        parts.append(self._library.take_part(plan))
        if with_program:
            parts.append(take_part(replace(plan, clients=2, calls=1), [self._program]))
        return [one for part in await asyncio.gather(*parts) for one in part]

    async def _key(self) -> tuple[str, str]:
        """A new API key: its id, and the key itself."""
        body = {"name": "to be revoked"}
        async with self._clients[0].post("/api/v1/auth/api-keys", json=body) as response:
            assert response.status == 201, await response.text()
            issued = await response.json()
            return issued["api_key"]["id"], issued["raw_key"]


@contextlib.asynccontextmanager
async def processes(data_dir: Path, without: str | None = None) -> AsyncIterator[Site]:
    """The site for the duration of a block; its servers without that part of their gate."""
    variables = {"FLOWMASON_SECRETS_KEY": MASTER_KEY, "PYTHONPATH": str(_ROOT)}
    key = await issue_key(data_dir, ORG)
    library, commands = (
        Driver(kind, data_dir, os.environ | variables) for kind in ("library", "commands")
    )
    servers = [ServerProcess(data_dir, PYTHONPATH=str(_ROOT)) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            if without is not None:
                server.program = ("tests.harness.broken_gate", without)
            await server.start()
            stack.push_async_callback(server.stop)
        for driver in (library, commands):
            await driver.start()
            stack.push_async_callback(driver.stop)
        clients = [await stack.enter_async_context(session(server.url, key)) for server in servers]
        yield Site(clients, library, commands, Program(data_dir))
