"""At least four processes on one data directory, of which histories are recorded."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from random import Random

import aiohttp
from msgspec.structs import replace

from .driver import Driver
from .histories import Plan, take_part
from .interfaces import ORG, Http, Program
from .linearise import Operation
from .server import MASTER_KEY, ServerProcess, issue_key, session
from .workers import one_each, workers

_ROOT = Path(__file__).parents[2]

WORKERS = 2

# How many clients each process has, the command line aside, and how many calls each one makes.
_CLIENTS = 3
_CALLS = 5

# Every third history has an API key that is revoked while it is used; in every fiftieth, the
# installed program itself takes part, and the master key is changed meanwhile.
_WITH_KEY = 3
_WITH_PROGRAM = 50

# In every fourth one, processes are stopped for moments anywhere. In seconds, at most:
_WITH_PAUSES = 4
_PAUSE = 0.05


class Site:
    """A server with two workers, a process with the library, and one with the command line.

    `clients` are those of each worker; `hasty` is of any, for requests that may be given up.
    """

    def __init__(
        self,
        clients: Sequence[Sequence[aiohttp.ClientSession]],
        hasty: aiohttp.ClientSession,
        drivers: tuple[Driver, Driver],
        program: Program,
        pids: Sequence[int],
    ) -> None:
        self._clients = clients
        self._hasty = hasty
        self._library, self._commands = drivers
        self._program = program
        self._pids = pids

    async def record(self, number: int) -> list[Operation]:
        """One history: what all processes did at once with a few secrets that were absent."""
        async with contextlib.AsyncExitStack() as stack:
            if number % _WITH_PAUSES == 0:
                await stack.enter_async_context(_meanwhile(self._pause(Random(number))))
            if number % _WITH_PROGRAM == 0:
                return await self._with_program(number)
            return await self._round(number)

    async def _with_program(self, number: int) -> list[Operation]:
        """The program takes part. As it takes long to start, the others go on until it is done."""
        retire = ["--retire"] * (number // _WITH_PROGRAM % 2)
        plan = Plan(f"{number} program", _secrets(number), 2, 2)
        rotation = asyncio.create_task(self._program.rotate(*retire))
        part = asyncio.create_task(take_part(plan, [self._program]))
        history = await self._round(number)
        for again in itertools.count(1):
            if rotation.done() and part.done():
                break
            history += await self._round(number, again)
        await rotation
        return history + await part

    async def _round(self, number: int, again: int = 0) -> list[Operation]:
        keys = dict([await self._key()]) if number % _WITH_KEY == 0 and not again else {}
        # In turn the one worker revokes it, the other, the command line, or both workers at once.
        revoker = number // _WITH_KEY % 4 if keys else None
        key = next(iter(keys), None)
        plan = Plan(f"{number} {again}", _secrets(number), _CLIENTS, _CALLS, key)
        hasty = Http("any worker", self._hasty, keys)
        parts = []
        for place, clients in enumerate(self._clients):
            https = [Http(f"worker {place + 1}", client, keys, hasty) for client in clients]
            revoke_after = _CALLS // 2 if revoker in (place, 3) else None
            parts.append(take_part(replace(plan, revoke_after=revoke_after), https))
        revoke_after = 1 if revoker == 2 else None
        commands = replace(plan, clients=1, calls=2, revoke_after=revoke_after)
        parts.append(self._commands.take_part(commands))
        parts.append(self._library.take_part(plan))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
        return [one for task in tasks for one in task.result()]

    async def _key(self) -> tuple[str, str]:
        """A new API key: its id, and the key itself."""
        body = {"name": "to be revoked"}
        async with self._hasty.post("/api/v1/auth/api-keys", json=body) as response:
            assert response.status == 201, await response.text()
            issued = await response.json()
            return issued["api_key"]["id"], issued["raw_key"]

    async def _pause(self, random: Random) -> None:
        """Stop one process after the other, each for a moment, until this is cancelled."""
        while True:
            await asyncio.sleep(random.random() * _PAUSE)
            pid = random.choice(self._pids)
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(random.random() * _PAUSE)
            finally:
                os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _secrets(number: int) -> tuple[str, ...]:
    """The secrets of a history, which no other one has."""
    return tuple(f"h{number}.{place}" for place in range(2 + number % 2))


@contextlib.asynccontextmanager
async def processes(data_dir: Path, without: str | None = None) -> AsyncIterator[Site]:
    """The site for the duration of a block; its workers without that part of their gate."""
    key_file = data_dir.with_name("master.key")
    key_file.touch(0o600)
    key_file.write_text(f"{MASTER_KEY}\n")
    variables = {
        "FLOWMASON_SECRETS_KEY": "",
        "FLOWMASON_SECRETS_KEY_FILE": str(key_file),
        "PYTHONPATH": str(_ROOT),
    }
    key = await issue_key(data_dir, ORG)
    server = ServerProcess(data_dir, f"--workers={WORKERS}", **variables)
    if without is not None:
        server.program = (sys.executable, "-m", "tests.harness.broken_gate", without)
    drivers = (Driver("library", data_dir, variables), Driver("commands", data_dir, variables))
    async with contextlib.AsyncExitStack() as stack:
        for process in (server, *drivers):
            await process.start()
            stack.push_async_callback(process.stop)
        every = [
            await stack.enter_async_context(one_each(server.url, key, WORKERS))
            for _ in range(_CLIENTS)
        ]
        yield Site(
            [*zip(*every, strict=True)],
            await stack.enter_async_context(session(server.url, key)),
            drivers,
            Program(data_dir, variables),
            [*workers(server), *(driver.pid for driver in drivers)],
        )
