"""`SecretsService`: the library for synchronous callers. A call waits for the event loop of
`background`: for as long as the commit takes.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from . import background
from .app import open_service
from .background import Background
from .config import Settings
from .core.missing import MISSING, Missing
from .core.records import SecretMetadata
from .library import AsyncSecretsService
from .service import Service

T = TypeVar("T")
D = TypeVar("D")


class _Shelf:
    """What is open in the event loop: one service for each data directory and its settings, however
    many callers there are.
    """

    def __init__(self) -> None:
        self._opening = asyncio.Lock()
        self._services: dict[Settings, Service] = {}
        self._users: WeakKeyDictionary[object, Settings] = WeakKeyDictionary()

    async def open(self, user: object, settings: Settings) -> Service:
        """The service of these settings, which `user` shares from now on.

        Raises:
            LogUnavailable, LogDamaged: the data directory can't be used.
        """
        async with self._opening:
            self._users[user] = settings
            if settings not in self._services:
                self._services[settings] = await open_service(settings, signs=True)
            return self._services[settings]

    async def leave(self, user: object) -> None:
        """Close what nobody uses without this one."""
        async with self._opening:
            settings = self._users.pop(user, None)
            if settings is not None and settings not in self._users.values():
                service = self._services.pop(settings, None)
                if service is not None:
                    await service.close()

    async def close(self) -> None:
        """Release every data directory, so that nothing stays staged for the next process."""
        services, self._services = self._services, {}
        for service in services.values():
            await service.close()


class _Shared(AsyncSecretsService):
    """The twin of a `SecretsService`: it shares what is open in the loop."""

    def __init__(self, loop: Background, parameters: tuple[Any, ...]) -> None:
        super().__init__(*parameters)
        self._parameters = parameters
        self.loop = loop

    def moved(self, loop: Background) -> "_Shared":
        """The same for another loop."""
        return _Shared(loop, self._parameters)

    async def _open(self) -> Service:
        return await self.loop.own(_Shelf).open(self, self._settings)

    async def close(self) -> None:
        """See `SecretsService.close`."""
        await self.loop.own(_Shelf).leave(self)


class SecretsService:
    """The secrets of one organisation in a data directory.

        secrets = SecretsService(org_id="my-org")
        secrets.set(name="OPENAI_API_KEY", value="sk-...", category="api_key")
        value = secrets.get("OPENAI_API_KEY")

    Every access is an event in the log that the server writes too; both may run at once. See
    `AsyncSecretsService` for the parameters, and for what each method raises.
    """

    def __init__(
        self,
        org_id: str,
        master_key: str | None = None,
        storage_path: str | Path | None = None,
        actor: str | None = None,
    ) -> None:
        self.org_id = org_id
        self._twin = _Shared(background.current(), (org_id, master_key, storage_path, actor))

    def __repr__(self) -> str:
        return f"<SecretsService of {self.org_id!r}>"

    def set(
        self,
        name: str,
        value: str,
        description: str = "",
        category: str = "other",
        expires_at: datetime | str | None = None,
        actor: str | None = None,
    ) -> SecretMetadata:
        """Create the secret, or replace all of it but its creation."""
        return self._run(
            lambda twin: twin.set(name, value, description, category, expires_at, actor)
        )

    def get(self, name: str, default: D | Missing = MISSING, actor: str | None = None) -> str | D:
        """Return the value, or `default` if given and there is no such secret."""
        return self._run(lambda twin: twin.get(name, default, actor))

    def resolve(
        self,
        document: T,
        pipeline: str | None = None,
        stage: str | None = None,
        actor: str | None = None,
    ) -> T:
        """The document with values in the place of the references `{{secrets.NAME}}`: of all of
        them, or it raises.
        """
        return self._run(lambda twin: twin.resolve(document, pipeline, stage, actor))

    def get_metadata(self, name: str, actor: str | None = None) -> SecretMetadata:
        """Return everything about a secret but its value."""
        return self._run(lambda twin: twin.get_metadata(name, actor))

    def exists(self, name: str) -> bool:
        """Whether there is such a secret, expired or not."""
        return self._run(lambda twin: twin.exists(name))

    def list(self) -> "list[SecretMetadata]":
        """All secrets, sorted by name, without their values."""
        return self._run(lambda twin: twin.list())

    def delete(self, name: str, actor: str | None = None) -> bool:
        """Delete a secret; a missing one raises."""
        return self._run(lambda twin: twin.delete(name, actor))

    def rotate_key(self, new_master_key: str, actor: str | None = None) -> int:
        """Put all secrets under another master key; returns how many were re-encrypted."""
        return self._run(lambda twin: twin.rotate_key(new_master_key, actor))

    def close(self) -> None:
        """Release the data directory, unless others of this process use it; the next call opens
        it again.
        """
        self._run(lambda twin: twin.close())

    def _run(self, call: Callable[[AsyncSecretsService], Coroutine[Any, Any, T]]) -> T:
        return self.start(call).result()

    def start(self, call: Callable[[AsyncSecretsService], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a call of the asynchronous twin, in the thread where the service is."""
        twin = self._twin
        # After a fork there is another loop, to which the twin of before does not belong.
        if twin.loop is not background.current():
            twin = self._twin = twin.moved(background.current())
        return twin.loop.start(call(twin))


_services: dict[str, SecretsService] = {}
_services_lock = threading.Lock()


def get_secrets_service(org_id: str) -> SecretsService:
    """The service of an organisation with the settings of the environment: one per process."""
    with _services_lock:
        if org_id not in _services:
            _services[org_id] = SecretsService(org_id)
        return _services[org_id]


def resolve(document: T, org_id: str, pipeline: str | None = None, stage: str | None = None) -> T:
    """The document with values in the place of the references `{{secrets.NAME}}`, with the settings
    of the environment. See `AsyncSecretsService.resolve`, also for what it raises.
    """
    return get_secrets_service(org_id).resolve(document, pipeline, stage)


async def resolve_async(
    document: T, org_id: str, pipeline: str | None = None, stage: str | None = None
) -> T:
    """The same for asynchronous callers, in any event loop, which it does not block."""
    service = get_secrets_service(org_id)
    return await asyncio.wrap_future(
        service.start(lambda twin: twin.resolve(document, pipeline, stage))
    )
