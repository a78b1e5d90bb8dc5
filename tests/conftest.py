"""Fixtures: a service, and an HTTP server over it in this process."""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from flowmason_secrets import app
from flowmason_secrets.core import keyring
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import KeyDraft
from flowmason_secrets.service import Service

from .harness.operations import Beginnings
from .harness.server import Inside, settings_for
from .harness.swift import derived_once
from .harness.tally import TALLIES

Client = Callable[..., Awaitable[aiohttp.ClientSession]]


# Where files are kept in memory: for tables of failures, in which what is durable is made up.
MEMORY = Path("/dev/shm")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases the tables had."""
    for tally in TALLIES:
        for line in tally.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def quick_keys() -> Iterator[None]:
    """No process of tests derives a key twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyring, "_pbkdf2", derived_once)
        yield


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, in memory where the system has one."""
    parent = MEMORY if MEMORY.is_dir() else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as place:
        yield Path(place)


@pytest.fixture(scope="session")
def beginnings(tmp_path_factory: pytest.TempPathFactory) -> Beginnings:
    """The data directories that the operations of the tables begin with."""
    return Beginnings(tmp_path_factory.mktemp("beginnings"))


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
    async with Inside(service) as server:

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
