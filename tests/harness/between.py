"""A peer between a client and a real server, who fails at a chosen moment of a request."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import NamedTuple
from urllib.parse import urlsplit

from flowmason_secrets.api.problems import problem_response
from flowmason_secrets.core import errors

# What happens to a request that is not simply passed on. In those that end in `after` the server
# has carried it out.
FAULTS = (
    "reset before",
    "reset after",
    "cut after",
    "silent after",
    "overloaded before",
    "unavailable before",
    "proxy's 503 after",
    "proxy's 504 after",
    "redirect before",
)


class Seen(NamedTuple):
    """One request that arrived: its first line, what was done with it, and when."""

    line: str
    fault: str
    at: float


class Between:
    """`faults` are for the next requests, one each; then all are passed on."""

    def __init__(self, upstream: str) -> None:
        parsed = urlsplit(upstream)
        self._upstream = (parsed.hostname or "", parsed.port or 0)
        self.faults: list[str] = []
        self.retry_after = "0"
        self.seen: list[Seen] = []
        self.connections = 0
        self.url = ""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await _message(reader)
                fault = self.faults.pop(0) if self.faults else "pass"
                line = request.partition(b"\r\n")[0].decode()
                self.seen.append(Seen(line, fault, time.monotonic()))
                answer = b""
                if fault == "pass" or fault.endswith("after"):
                    answer = await self._passed_on(request)
                if not await self._answered(fault, answer, writer):
                    break
        writer.close()

    async def _passed_on(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._upstream)
        writer.write(request)
        answer = await _message(reader)
        writer.close()
        return answer

    async def _answered(self, fault: str, answer: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        match fault:
            case "pass":
                writer.write(answer)
            case "reset before" | "reset after":
                _reset(writer)
                return False
            case "cut after":
                writer.write(answer[:-5])
                await writer.drain()
                return False
            case "silent after":
                await asyncio.sleep(3600)
            case "overloaded before":
                writer.write(self._problem(errors.Overloaded()))
            case "unavailable before":
                writer.write(self._problem(errors.LogUnavailable("full")))
            case "redirect before":
                writer.write(_raw("302 Found", b"", "Location: http://127.0.0.1:1/"))
            case _:
                writer.write(_raw(f"{fault[8:11]} Sorry", b"<html>"))
        await writer.drain()
        return True

    def _problem(self, error: errors.SecretsError) -> bytes:
        answer = problem_response(error, "r1")
        retry_after = f"Retry-After: {self.retry_after}"
        return _raw("503 Service Unavailable", answer._content, retry_after)


@contextlib.asynccontextmanager
async def between(upstream: str) -> AsyncIterator[Between]:
    """One of them for the duration of a block."""
    peer = Between(upstream)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(peer.talk(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    peer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield peer
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request or an answer with a Content-Length, or without a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head + await reader.readexactly(int(value))
    return head


def _raw(status: str, body: bytes, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers)
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
