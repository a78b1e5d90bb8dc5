"""The composition root: the only place that names a concrete store."""

import asyncio
import gc
import ipaddress
import logging
import os
import pwd
import ssl
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

from aiohttp import web

from .api.server import Dispatcher
from .config import PREFIX, Settings
from .core.access import ANY, Caller, Principal
from .core.errors import ConfigurationError
from .core.events import Ids
from .core.keyring import DEFAULT_KEY, Keyring, MasterKey
from .core.names import check_org
from .core.ports import Sources
from .index.sqlite import SqliteIndex
from .service import Service
from .storage.cache import CiphertextCache
from .storage.durable import Durable
from .storage.engine import Environment
from .storage.eventlog import SegmentLimits
from .storage.files import FilesStore, FilesTail
from .storage.published import Layout, Published

_log = logging.getLogger("flowmason_secrets")

DEFAULT_KEY_WARNING = (
    "NO MASTER KEY IS CONFIGURED: secrets are encrypted with the documented default key, which "
    f"anybody can derive who knows the organisation's name. Set {PREFIX}KEY_FILE or {PREFIX}KEY."
)


async def open_service(settings: Settings, durable: Durable | None = None) -> Service:
    """Open the data directory and recover what a crash left. Close the service after use.

    Raises:
        LogUnavailable: the data directory can't be used.
        LogDamaged: the event log contradicts itself.
    """
    keyring = await asyncio.to_thread(make_keyring, settings.master_keys)
    durable = durable or Durable()
    layout = Layout(settings.root)
    sources = Sources(time.time, Ids(time.time, os.urandom))
    environment = Environment(
        layout=layout,
        durable=durable,
        published=Published(layout, durable, keyring.oldest),
        cache=CiphertextCache(settings.cache_bytes),
        sources=sources,
        limits=SegmentLimits(settings.segment_bytes, settings.segment_age),
    )
    store = FilesStore(environment)
    index = SqliteIndex(
        FilesTail(environment), layout.index, lambda: store.position, durable.unlink
    )
    service = Service(store, index, keyring, sources, settings.queue_limit)
    try:
        await service.recover()
    except BaseException:
        await service.close()
        raise
    return service


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
        if self.unix_socket or self.tls or self.behind_proxy or _is_loopback(self.host):
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
        server = web.Server(
            dispatcher, access_log=None, keepalive_timeout=settings.keepalive_timeout
        )
        runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=10.0)
        await runner.setup()
        try:
            site = _site(runner, listen)
            await site.start()
            service.start()
            ready(_url(site, runner))
            await stop.wait()
        finally:
            await runner.cleanup()
    finally:
        await service.close()


def run(main: Coroutine[object, object, None]) -> None:
    """Run a program's main coroutine, on uvloop where the platform has it."""
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
        return web.UnixSite(runner, listen.unix_socket, ssl_context=listen.tls, backlog=1024)
    return web.TCPSite(
        runner, listen.host, listen.port, ssl_context=listen.tls, backlog=1024, reuse_address=True
    )


def _url(site: web.BaseSite, runner: web.ServerRunner) -> str:
    if isinstance(site, web.UnixSite):
        return site.name
    # The port may have been 0: ask what it became.
    host, port = runner.addresses[0][:2]
    scheme = site.name.partition(":")[0]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_keyring(master_keys: tuple[str, ...]) -> Keyring:
    """The keyring of these master keys; without any, the documented default and a warning.

    Takes tens of milliseconds for each key.
    """
    if not master_keys:
        _log.warning(DEFAULT_KEY_WARNING)
        return Keyring([DEFAULT_KEY])
    return Keyring([MasterKey.of(key) for key in master_keys])


def local_caller(org_id: str, actor: str | None = None) -> Caller:
    """A local process: it holds the master key, so it may do everything in this organisation.

    Raises:
        InvalidInput: not the name of an organisation.
    """
    who = actor or _user()
    return Caller(Principal(check_org(org_id), who[:128], "local", ANY))


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid:{os.getuid()}"


def with_overrides(settings: Settings, **changes: object) -> Settings:
    """The settings with those changes that are not None."""
    chosen = {name: value for name, value in changes.items() if value is not None}
    return replace(settings, **chosen)  # type: ignore[arg-type] # callers name fields
