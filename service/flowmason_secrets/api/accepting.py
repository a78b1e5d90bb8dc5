"""Taking connections from the listening sockets, as long as there is room for them."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence

from .connections import Connection, Server

_log = logging.getLogger(__name__)

_BACKLOG = 1024
# Bytes on their way that the system keeps for a connection, in each direction; Linux doubles it.
_SYSTEM_BUFFER = 128 << 10
# Seconds after which it is tried again when there is no room.
_RETRY = 1.0


class Acceptor:
    """Others wait in the backlog when `server` is full, or are taken by another process that shares
    the sockets; idle connections are closed for them.

    asyncio's own way accepts without a limit, and lets a TLS handshake take a minute.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], server: Server, tls: ssl.SSLContext | None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._server = server
        self._tls = tls
        self._opening: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Listen."""
        for listening in self._sockets:
            listening.setblocking(False)
            # Connections inherit it. Left to itself the system takes megabytes for each.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEM_BUFFER)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SYSTEM_BUFFER)
            listening.listen(_BACKLOG)
        self._resume()

    async def stop(self) -> None:
        """Nobody is accepted any more."""
        self._pause()
        self._server.on_room = None
        if self._retry is not None:
            self._retry.cancel()
        for listening in self._sockets:
            listening.close()
        for task in self._opening:
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)

    def _resume(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._server.on_room = None
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _pause(self) -> None:
        for listening in self._sockets:
            self._loop.remove_reader(listening)

    def _pause_for_a_while(self) -> None:
        self._pause()
        # Another socket may have been readable in the same turn.
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.call_later(_RETRY, self._resume)

    def _accept(self, listening: socket.socket) -> None:
        """Take one connection: of many that come at once each process has its share."""
        if self._server.is_full:
            self._pause_for_a_while()
            self._server.on_room = self._resume
            self._server.make_room()
            return
        try:
            accepted, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors or no memory: it would be readable again and again.
            _log.error("can't accept connections: %s", error.strerror)
            self._pause_for_a_while()
            return
        accepted.setblocking(False)
        task = self._loop.create_task(self._open(self._server(), accepted))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: Connection, accepted: socket.socket) -> None:
        timeout = self._server.limits.head_timeout if self._tls else None
        opened = False
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self._tls, ssl_handshake_timeout=timeout
            )
            opened = True
        except OSError as error:
            _log.debug("a connection failed before its first request: %s", type(error).__name__)
        finally:
            if not opened:
                self._server.forget(connection)
