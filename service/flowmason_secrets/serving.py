"""Listening: from the settings to a server that answers, and to its orderly end."""

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from .api.accepting import Acceptor
from .api.connections import Budget, Limits, Server
from .api.server import Dispatcher
from .api.unixsocket import bind_unix
from .app import open_service
from .config import Settings, is_loopback
from .core.errors import ConfigurationError
from .service import Service

if sys.platform != "win32":
    import uvloop

_log = logging.getLogger(__name__)

# Seconds that requests in flight get to finish once the server has to stop, and answers to be read
# after that. By `PATIENCE` a server has ended, unless something hangs.
DRAIN = 10.0
PATIENCE = 2 * DRAIN + 5.0

# Descriptors that a process needs beside those of its connections.
_OWN_FILES = 128


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the server listens: a TCP address, or a unix socket instead."""

    host: str
    port: int
    unix_socket: Path | None = None
    tls: ssl.SSLContext | None = None
    behind_proxy: bool = False

    def check(self) -> None:
        """Raises:
        ConfigurationError: API keys and values would cross a network in clear.
        """
        if self.unix_socket or self.tls or self.behind_proxy or is_loopback(self.host):
            return
        raise ConfigurationError(
            f"{self.host} is reachable from other machines, and without TLS everybody on the way "
            "could read values and API keys. Give --tls-cert and --tls-key, or --behind-proxy if "
            "somebody else ends TLS, or listen on 127.0.0.1."
        )


class Address:
    """The sockets of a `Listen`, bound. Processes that are forked from this one share them: each
    connection goes to one that has time to accept it.

    Nobody is listening yet, so that clients are refused until there is a server.

    Raises:
        ConfigurationError: see `Listen.check`.
        OSError: the address can't be had.
    """

    def __init__(self, listen: Listen) -> None:
        listen.check()
        self.listen = listen
        if listen.unix_socket is not None:
            self.sockets = [bind_unix(listen.unix_socket)]
        else:
            self.sockets = _bind_tcp(listen.host, listen.port)

    @property
    def url(self) -> str:
        """As `--url` takes it."""
        if self.listen.unix_socket is not None:
            return f"unix:{self.listen.unix_socket.absolute()}"
        # The port may have been 0: ask what it became.
        host, port = self.sockets[0].getsockname()[:2]
        scheme = "https" if self.listen.tls else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def close(self) -> None:
        """This process lets go of it; others that share it keep it."""
        for one in self.sockets:
            one.close()


@dataclass(frozen=True, slots=True)
class Orders:
    """What a server is told while it runs: to stop, and to read its key file again."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Event = field(default_factory=asyncio.Event)


async def serve(
    settings: Settings, address: Address, ready: Callable[[], None], orders: Orders
) -> None:
    """Serve HTTP until it is to stop, then finish what is in flight. `ready` is called once.

    Raises:
        LogUnavailable, LogDamaged: the data directory can't be used.
        ConfigurationError: the key that signs the log can't be used.
        OSError: the address can't be listened on.
    """
    listen = address.listen
    service = await open_service(settings, signs=True)
    try:
        limits = _limits(settings)
        budget = Budget(limits.request_bytes)
        dispatcher = Dispatcher(
            service,
            budget,
            body_timeout=settings.body_timeout,
            behind_proxy=listen.behind_proxy,
            vault=settings.vault_compat,
        )
        server = Server(dispatcher, limits, budget, knows_list=settings.vault_compat)
        acceptor = Acceptor(address.sockets, server, listen.tls)
        try:
            acceptor.start()
            reason = await service.ready()
            if reason is not None:
                _log.warning("values and changes are refused until this is over: %s", reason)
            service.start()
            await service.space.start()
            ready()
            await _obey(orders, service)
        finally:
            await acceptor.stop()
            service.following.end()
            # What has arrived already is answered.
            await asyncio.sleep(0)
            # aiohttp's own end discards bodies that are still arriving.
            await dispatcher.drain(DRAIN)
            server.pre_shutdown()
            await server.shutdown(DRAIN)
    finally:
        await service.close()


def _limits(settings: Settings) -> Limits:
    return Limits(
        connections=_descriptors(settings.connections),
        request_bytes=settings.request_bytes,
        head_timeout=settings.head_timeout,
        write_timeout=settings.write_timeout,
        keepalive_timeout=settings.keepalive_timeout,
    )


def _descriptors(connections: int) -> int:
    """How many of so many connections this process may have open, beside its own files."""
    needed = connections + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    # macOS has a lower limit yet, and tells nobody.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft < needed:
        _log.info("only %d open files are allowed: fewer connections than set", soft)
    return max(1, min(connections, soft - _OWN_FILES))


async def _obey(orders: Orders, service: Service) -> None:
    """Return when the server is to stop."""
    reloading = asyncio.create_task(_reload_keys(orders.reload, service))
    await orders.stop.wait()
    reloading.cancel()
    await asyncio.wait([reloading])


async def _reload_keys(wanted: asyncio.Event, service: Service) -> None:
    while True:
        await wanted.wait()
        wanted.clear()
        try:
            await service.reload_keys()
            _log.info("the master keys were read again")
        except ConfigurationError as error:
            _log.error("the master keys held stay: %s", error)


def run(main: Coroutine[object, object, None]) -> None:
    """Run a server's main coroutine, on uvloop where the platform has it."""
    # What is there now stays. Of what requests leave behind, nearly all goes by counting
    # references: looking for cycles at the default rate costs a tenth of a read.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    if sys.platform == "win32":
        asyncio.run(main)
    else:
        uvloop.run(main)


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of the host, all with the same port."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as failed:
        for family, _, _, _, place in dict.fromkeys(found):
            taken = bound[0].getsockname()[1] if bound else port
            try:
                one = failed.enter_context(socket.socket(family, socket.SOCK_STREAM))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((place[0], taken, *place[2:]))
                bound.append(one)
            except OSError as error:
                # A name may stand for an IPv6 address too, where there is no IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not bound:
            raise missing
        failed.pop_all()
    return bound
