"""The agent's process: from its options to a socket that answers, and to its orderly end."""

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...api import shapes
from ...api.accepting import Acceptor
from ...api.connections import Budget, Limits, Server
from ...api.unixsocket import bind_unix
from ...client import AsyncSecretsClient, Options
from ...client.address import address
from ...core.errors import SecretsError
from ...core.events import Ids
from ...core.keyring import Plaintext
from ...core.ports import Sources
from ...storage.durable import Durable
from . import certificates
from .background import Changes, Deliveries
from .http import Routes
from .lastknown import LastKnown
from .peers import Allowed
from .queue import OfflineQueue
from .serving import Secrets
from .upstream import Upstream

_log = logging.getLogger(__name__)

# Seconds that requests in flight get in the end, and the delivery of what is queued.
_DRAIN = 5.0
_DELIVER = 5.0
# Seconds between looks whether the server is there, as long as it does not serve; and whether it
# accepts the API key again.
_LOOK = 0.4
_REFUSED = 5.0
# Workers of one machine, and what they may have on the way, in bytes.
_CONNECTIONS = 1024
_REQUEST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent is told. `max_age` and `timeout` are in seconds; `group` is the one that may
    connect, beside the agent's own user.
    """

    url: str
    api_key: Plaintext
    socket: Path
    state_dir: Path
    allowed: Allowed
    group: int | None = None
    max_age: float = 86400.0
    timeout: float = 2.0
    insecure: bool = False


@dataclass(slots=True)
class Agent:
    """A running agent."""

    cache: LastKnown
    secrets: Secrets
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def status(self) -> shapes.Health:
        """Ready means: values can be read, from the server or from the cache."""
        state = self.secrets.state
        if state == "denied":
            return shapes.Health("denied", "the server does not accept the agent's API key")
        if state == "serving" or len(self.cache):
            return shapes.Health("ready")
        if state == "unknown":
            return shapes.Health("unavailable", "the server was not asked yet")
        return shapes.Health(
            "unavailable", "the server can't be reached, and nothing is in the cache"
        )


async def serve(settings: AgentSettings, ready: Callable[[], None], stop: asyncio.Event) -> None:
    """Serve the socket until it is to stop, then finish what is in flight. `ready` is called once.

    Raises:
        ConfigurationError: not on this system, or another agent has the directory.
        InvalidInput: the URL is not acceptable.
        OSError: the socket or the directory can't be had.
    """
    settings.allowed.check_system()
    where = address(settings.url, insecure=settings.insecure)
    if where.base.startswith("https:"):
        certificates.load()
    options = Options(
        timeout=settings.timeout,
        connect_timeout=min(1.0, settings.timeout),
        deadline=settings.timeout,
        retries=0,
        insecure=settings.insecure,
    )
    cache = LastKnown(settings.state_dir / "known", settings.api_key, time.time, settings.max_age)
    sources = Sources(time.time, Ids(time.time, os.urandom))
    # Ids of its own: it works in another thread.
    queue = OfflineQueue(settings.state_dir / "offline", Ids(time.time, os.urandom))
    upstream = Upstream(where, settings.api_key, options)
    client = AsyncSecretsClient(settings.url, settings.api_key.reveal(), options)
    secrets = Secrets(upstream, cache, queue, sources)
    deliveries = Deliveries(upstream, queue, secrets, random.random)
    agent = Agent(cache, secrets, stop)
    try:
        cache.load()
        async with _listening(settings, agent):
            ready()
            loops = (
                asyncio.create_task(deliveries.run()),
                asyncio.create_task(Changes(client, cache, secrets, random.random).run()),
                asyncio.create_task(_find_out(secrets)),
            )
            await _until(stop, loops)
        with contextlib.suppress(SecretsError, OSError, TimeoutError):
            # What can't be delivered now is kept for the next start.
            async with asyncio.timeout(_DELIVER):
                await deliveries.flush()
    finally:
        await secrets.close()
        queue.close()
        await client.close()
        await upstream.close()


@contextlib.asynccontextmanager
async def _listening(settings: AgentSettings, agent: Agent) -> AsyncIterator[None]:
    limits = Limits(connections=_CONNECTIONS, request_bytes=_REQUEST_BYTES)
    budget = Budget(limits.request_bytes)
    routes = Routes(agent.secrets, settings.allowed, agent, budget)
    server = Server(routes, limits, budget)
    acceptor = Acceptor([_bind(settings)], server, None)
    acceptor.start()
    try:
        yield
    finally:
        await acceptor.stop()
        await routes.drain(_DRAIN)
        server.pre_shutdown()
        await server.shutdown(_DRAIN)
        Durable().unlink(settings.socket)


def _bind(settings: AgentSettings) -> socket.socket:
    # Nobody is listening yet, but nobody else may connect in between either.
    before = os.umask(0o177 if settings.group is None else 0o117)
    try:
        bound = bind_unix(settings.socket)
    finally:
        os.umask(before)
    if settings.group is not None:
        Durable().give(settings.socket, os.geteuid(), settings.group)
    return bound


async def _until(stop: asyncio.Event, loops: Sequence[asyncio.Task[None]]) -> None:
    """Return when the agent is to stop; an error of what never ends ends it, too."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait((stopping, *loops), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopping, *loops):
            task.cancel()
        await asyncio.wait((stopping, *loops))


async def _find_out(secrets: Secrets) -> None:
    """Learn how it stands with the server while nobody reads from it."""
    while True:
        if secrets.state != "serving":
            await secrets.check()
        pause = _REFUSED if secrets.state == "denied" else _LOOK
        await asyncio.sleep(pause * (1 + random.random() / 2))
