"""Listening: from the settings to a server that answers, and to its orderly end."""

import asyncio
import errno
import gc
import os
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from .api.server import Dispatcher, make_server
from .app import open_service
from .config import Settings, is_loopback
from .core.errors import ConfigurationError

# Seconds that requests in flight get to finish once the server has to stop.
DRAIN = 10.0


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


async def serve(
    settings: Settings, listen: Listen, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Serve HTTP until `stop` is set, then finish what is in flight. `ready` gets the URL.

    Raises:
        ConfigurationError: see `Listen.check`.
        LogUnavailable, LogDamaged: the data directory can't be used.
        OSError: the address can't be listened on.
    """
    listen.check()
    service = await open_service(settings)
    try:
        dispatcher = Dispatcher(
            service, body_timeout=settings.body_timeout, behind_proxy=listen.behind_proxy
        )
        server = make_server(dispatcher, settings.keepalive_timeout)
        runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=DRAIN)
        await runner.setup()
        try:
            site = _site(runner, listen)
            await site.start()
            service.start()
            ready(_url(site, runner))
            await stop.wait()
            await site.stop()
            # aiohttp's own end discards bodies that are still arriving.
            await dispatcher.drain(DRAIN)
        finally:
            await runner.cleanup()
    finally:
        await service.close()


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
        import uvloop

        uvloop.run(main)


def _site(runner: web.ServerRunner, listen: Listen) -> web.BaseSite:
    if listen.unix_socket is not None:
        _refuse_taken(listen.unix_socket)
        return web.UnixSite(runner, listen.unix_socket, ssl_context=listen.tls, backlog=1024)
    return web.TCPSite(
        runner, listen.host, listen.port, ssl_context=listen.tls, backlog=1024, reuse_address=True
    )


def _refuse_taken(path: Path) -> None:
    """asyncio removes a socket that is there; that of a server which still runs has to stay."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(os.fspath(path)) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), os.fspath(path))


def _url(site: web.BaseSite, runner: web.ServerRunner) -> str:
    if isinstance(site, web.UnixSite):
        return site.name
    # The port may have been 0: ask what it became.
    host, port = runner.addresses[0][:2]
    scheme = site.name.partition(":")[0]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
