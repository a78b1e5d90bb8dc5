"""A reader of server-sent events, as the HTML standard says (§9.2.6), and logs to read."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import aiohttp
import orjson

from flowmason_secrets.core.events import Event
from flowmason_secrets.core.intents import Intent
from flowmason_secrets.service import Service

from .server import ServerProcess

AUDIT = "/api/v1/auth/audit-log"

# Seconds within which an event has to arrive, wherever it came from.
PROMPTLY = 1.0


class Message(NamedTuple):
    """One event of a stream."""

    id: str
    event: str
    data: Any


class Stream:
    """Dispatches what a response brings; `last_id` is what a new connection goes on from."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._lines = response.content
        self.last_id = ""
        self.comments = 0

    async def next(self, seconds: float = PROMPTLY) -> Message | None:
        """The next event; None at the end of the stream."""
        async with asyncio.timeout(seconds):
            return await self._next()

    async def take(self, count: int, seconds: float = PROMPTLY) -> list[Message]:
        """So many events, each within this time."""
        found = [await self.next(seconds) for _ in range(count)]
        return [message for message in found if message is not None]

    async def rest(self, seconds: float = PROMPTLY) -> list[Message]:
        """All events up to the end of the stream, which has to come within this time."""
        found = []
        async with asyncio.timeout(seconds):
            while (message := await self._next()) is not None:
                found.append(message)
        return found

    async def begun(self) -> None:
        """Return when the stream has said from where it goes on."""
        while not self.last_id:
            await self._line({})

    async def _next(self) -> Message | None:
        fields: dict[str, list[str]] = {}
        while await self._line(fields):
            pass
        if not fields:
            return None
        event = fields.get("event", ["message"])[-1]
        return Message(self.last_id, event, orjson.loads("\n".join(fields["data"])))

    async def _line(self, fields: dict[str, list[str]]) -> bool:
        """Take in a line; False if an event is complete, or the stream is over."""
        line = await self._lines.readline()
        text = line.decode().removesuffix("\n")
        if not text:
            if not line:
                fields.clear()
                return False
            if not fields.get("data"):
                fields.clear()
                return True
            return False
        name, _, value = text.partition(":")
        if not name:
            self.comments += 1
        elif name == "id":
            self.last_id = value.removeprefix(" ")
        else:
            assert name in ("event", "data"), line
            fields.setdefault(name, []).append(value.removeprefix(" "))
        return True


@contextlib.asynccontextmanager
async def following(
    client: aiohttp.ClientSession, last_id: int | str | None = None, **query: str
) -> AsyncIterator[Stream]:
    """A stream that has begun."""
    headers = {} if last_id is None else {"Last-Event-ID": str(last_id)}
    async with client.get(f"{AUDIT}/stream", headers=headers, params=query) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        stream = Stream(response)
        await stream.begun()
        yield stream


async def shown(client: aiohttp.ClientSession, **query: str) -> list[Any]:
    """What the audit endpoint shows, page after page, oldest first."""
    found: list[Any] = []
    after = "0"
    while True:
        params = {"limit": "1000", **query, "after": after}
        async with client.get(AUDIT, params=params) as answer:
            assert answer.status == 200, await answer.text()
            page = await answer.json()
        found += page
        if len(page) < 1000:
            return found
        after = str(page[-1]["seq"])


async def fill(service: Service, count: int, orgs: tuple[str, ...] = ("acme",)) -> None:
    """Write events of reads, in turn of these organisations."""
    for start in range(0, count, 5000):
        events = [
            Event(
                f"filled-{number}",
                "secret.read",
                "success",
                orgs[number % len(orgs)],
                "secret",
                "0123456789abcdef",
                f"NAME_{number % 500}",
                1,
                "key_0123456789abcdef",
                "api_key",
                "192.0.2.1",
                "an agent of some length",
                f"request-{number}",
                200,
            )
            for number in range(start, min(start + 5000, count))
        ]
        await asyncio.gather(*(service.gate.submit(Intent(event, ())) for event in events))


def resident(server: ServerProcess) -> int:
    """Kibibytes of memory that a server has."""
    assert server.process is not None
    command = ("ps", "-o", "rss=", "-p", str(server.process.pid))
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return as soon as it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
