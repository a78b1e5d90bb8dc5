"""A process that takes part in histories: `python -m tests.harness.driver library DATA_DIR`, or
`commands`. One plan a line comes in, the operations of it go out as one line.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from flowmason_secrets.blocking import SecretsService
from flowmason_secrets.core import keyring
from flowmason_secrets.library import AsyncSecretsService

from .histories import Plan, take_part
from .interfaces import ORG, BlockingLibrary, CommandLine, Interface, Library, environment
from .linearise import Operation


async def _main(interfaces: Sequence[Interface]) -> None:
    # Commands that run in this process have its stdout to themselves.
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        out.write(b"ready\n")
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            plan = msgspec.json.decode(line, type=Plan)
            out.write(msgspec.json.encode(await take_part(plan, interfaces)) + b"\n")


async def _library(data_dir: Path) -> None:
    blocking = SecretsService(ORG, storage_path=data_dir)
    async with AsyncSecretsService(ORG, storage_path=data_dir) as secrets:
        await _main([Library(secrets), BlockingLibrary(blocking)])
    blocking.close()


async def _commands(data_dir: Path) -> None:
    # Every command derives its keys anew, which takes longer than all else that it does.
    keyring._pbkdf2 = cache(keyring._pbkdf2)
    await _main([CommandLine(data_dir)])


class Driver:
    """Such a process, seen from outside."""

    def __init__(self, kind: str, data_dir: Path, variables: dict[str, str]) -> None:
        self._kind = kind
        self._data_dir = data_dir
        self._environment = environment(variables)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Return when it is ready."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, self._kind, str(self._data_dir)),
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert await self._line() == b"ready\n"

    async def take_part(self, plan: Plan) -> list[Operation]:
        """What its clients did."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(plan) + b"\n")
        return msgspec.json.decode(await self._line(), type=list[Operation])

    async def stop(self) -> None:
        """Let it close the data directory."""
        assert self._process is not None
        await self._process.communicate(b"")

    async def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, f"the {self._kind} process has ended"
        return line


if __name__ == "__main__":
    _, kind, place = sys.argv
    asyncio.run({"library": _library, "commands": _commands}[kind](Path(place)))
