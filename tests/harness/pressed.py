"""A server within limits, in this process: what it holds can be looked at, and its disk be held."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from flowmason_secrets import app
from flowmason_secrets.api.accepting import Acceptor
from flowmason_secrets.api.connections import Budget, Limits, Server
from flowmason_secrets.api.server import Dispatcher
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.service import Service
from flowmason_secrets.serving import Address, Listen
from flowmason_secrets.storage.durable import Durable

from .server import settings_for

# Nothing here takes longer, in seconds, unless it hangs.
PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, or the end of the connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["code"])


ENDED = Reply(0, {}, b"")


class Peer:
    """A client that sends the bytes it is told to, and reads when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        """It goes out as the system takes it."""
        self._writer.write(data)

    async def sent(self, data: bytes) -> None:
        """Return when the system has taken it, or the server is gone."""
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def reply(self) -> Reply:
        """The next answer; `ENDED` if the server closes instead."""
        async with asyncio.timeout(PATIENCE):
            try:
                head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")[:-2]
                headers = {name.lower(): value for name, value in (x.split(": ", 1) for x in lines)}
                body = await self._reader.readexactly(int(headers.get("content-length", "0")))
            except (asyncio.IncompleteReadError, ConnectionError):
                return ENDED
            return Reply(int(first.split()[1]), headers, body)

    def leave(self, *, abruptly: bool = False) -> None:
        """Close; abruptly: with a reset."""
        if abruptly:
            self._writer.transport.abort()
        else:
            self._writer.close()

    def half_close(self) -> None:
        """Say that nothing more comes."""
        self._writer.write_eof()

    async def gone(self) -> None:
        """Return when it is closed on this side."""
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class Pressed:
    """The server, and clients of it."""

    def __init__(self, service: Service, server: Server, budget: Budget, port: int) -> None:
        self.service = service
        self.server = server
        self.budget = budget
        self.port = port
        self.key = ""
        self._peers: list[Peer] = []

    async def connect(self, receive: int | None = None) -> Peer:
        """A new client; `receive` is how many bytes its system takes for it."""
        one = socket.socket()
        one.setblocking(False)
        if receive is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", self.port))
        # asyncio would read ahead; the smaller the limit the less.
        ahead = 1 << 20 if receive is None else 1024
        peer = Peer(*await asyncio.open_connection(sock=one, limit=ahead))
        self._peers.append(peer)
        return peer

    def get(self, path: str, *headers: str) -> bytes:
        """A request with the API key."""
        return self.head("GET", path, *headers)

    def post(self, body: bytes, size: int | None = None) -> bytes:
        """A write with this body, of which more may follow."""
        length = f"Content-Length: {len(body) if size is None else size}"
        return self.head("POST", "/api/v1/secrets", length) + body

    def head(self, method: str, path: str, *headers: str) -> bytes:
        """The head of a request with the API key."""
        lines = (
            f"{method} {path} HTTP/1.1",
            "Host: x",
            f"X-API-Key: {self.key}",
            "Content-Type: application/json",
            *headers,
        )
        return "\r\n".join((*lines, "", "")).encode()

    @property
    def connections(self) -> int:
        """How many there are, as the server counts them."""
        return len(self.server._open)

    async def empty(self) -> None:
        """Return when there are none, and nothing is held for them."""
        async with asyncio.timeout(PATIENCE):
            while self.connections or self.budget.held:
                await asyncio.sleep(0.01)

    def leave(self) -> None:
        """All clients go."""
        for peer in self._peers:
            peer.leave(abruptly=True)


@contextlib.asynccontextmanager
async def pressed(
    data_dir: Path,
    limits: Limits | None = None,
    durable: Durable | None = None,
    *,
    tls: ssl.SSLContext | None = None,
    **settings: object,
) -> AsyncIterator[Pressed]:
    """A server with the secret `A`; afterwards it must hold nothing for clients that are gone."""
    limits = limits or Limits()
    chosen = settings_for(data_dir, **settings)
    service = await app.open_service(chosen, durable)
    budget = Budget(limits.request_bytes)
    vault = chosen.vault_compat
    dispatcher = Dispatcher(service, budget, body_timeout=PATIENCE, vault=vault)
    server = Server(dispatcher, limits, budget, knows_list=vault)
    address = Address(Listen("127.0.0.1", 0))
    acceptor = Acceptor(address.sockets, server, tls)
    site = Pressed(service, server, budget, address.sockets[0].getsockname()[1])
    try:
        caller = app.local_caller("acme", "tester")
        site.key = (await service.keys.issue(caller, KeyDraft("test"))).raw.reveal()
        await service.set(caller, Draft("A", Plaintext("the value")))
        acceptor.start()
        yield site
        site.leave()
        await site.empty()
    finally:
        site.leave()
        await acceptor.stop()
        server.pre_shutdown()
        await server.shutdown(1.0)
        await service.close()
