"""Fixtures: a service, and an HTTP server over it in this process."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import RawTestServer

from flowmason_secrets import app
from flowmason_secrets.api.server import Dispatcher
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import KeyDraft
from flowmason_secrets.service import Service

from .harness.server import settings_for

Client = Callable[..., Awaitable[aiohttp.ClientSession]]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty place for a data directory."""
    return tmp_path / "secrets"


@pytest.fixture
async def service(data_dir: Path) -> AsyncIterator[Service]:
    """A service over the files store."""
    opened = await app.open_service(settings_for(data_dir))
    yield opened
    await opened.close()


@pytest.fixture
def caller() -> Caller:
    """A local process of the organisation `acme`."""
    return app.local_caller("acme", "tester")


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    """Makes HTTP clients of a server over `service`: `await client(scopes=("read",))`."""
    sessions: list[aiohttp.ClientSession] = []
    async with RawTestServer(Dispatcher(service)) as server:

        async def make(org: str = "acme", **draft: object) -> aiohttp.ClientSession:
            issued = await service.keys.issue(
                app.local_caller(org),
                KeyDraft("test", **draft),  # type: ignore[arg-type] # tests name fields
            )
            headers = {"Authorization": f"Bearer {issued.raw.reveal()}"}
            sessions.append(aiohttp.ClientSession(server.make_url("/"), headers=headers))
            return sessions[-1]

        yield make
        for opened in sessions:
            await opened.close()
