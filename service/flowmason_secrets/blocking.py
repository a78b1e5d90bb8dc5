"""`SecretsService`: the library for synchronous callers.

One event loop in a thread of its own serves all instances of a process. A call waits for it, so
it works in plain code, in several threads, and inside a running event loop, which it blocks for
as long as the commit takes.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 - registers its end first
import os
import threading
from collections.abc import Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from .core.records import SecretMetadata
from .library import MISSING, AsyncSecretsService, Missing

T = TypeVar("T")
D = TypeVar("D")


class _Loop:
    """The event loop of this process, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.opened: list[AsyncSecretsService] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs in the loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                name = "flowmason-secrets"
                threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Release every data directory, so that nothing stays staged for the next process."""
        for opened in self.opened:
            self.run(opened.close())
        self.opened.clear()


_current = _Loop()


def _forget() -> None:
    # Threads don't survive a fork, and locks on shared descriptors would not exclude the parent:
    # the child begins anew.
    global _current
    _current = _Loop()


os.register_at_fork(after_in_child=_forget)
# The public `atexit` comes too late: executors take no more work by then. concurrent.futures
# registers its own end in the same place, and these run in reverse order.
threading._register_atexit(lambda: _current.close())  # type: ignore[attr-defined]


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
        self._parameters = (org_id, master_key, storage_path, actor)
        self._loop: _Loop | None = None
        self._twin = AsyncSecretsService(*self._parameters)

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
        call = self._service().set(name, value, description, category, expires_at, actor)
        return _current.run(call)

    def get(self, name: str, default: D | Missing = MISSING, actor: str | None = None) -> str | D:
        """Return the value, or `default` if given and there is no such secret."""
        return _current.run(self._service().get(name, default, actor))

    def get_metadata(self, name: str, actor: str | None = None) -> SecretMetadata:
        """Return everything about a secret but its value."""
        return _current.run(self._service().get_metadata(name, actor))

    def exists(self, name: str) -> bool:
        """Whether there is such a secret, expired or not."""
        return _current.run(self._service().exists(name))

    def list(self) -> "list[SecretMetadata]":
        """All secrets, sorted by name, without their values."""
        return _current.run(self._service().list())

    def delete(self, name: str, actor: str | None = None) -> bool:
        """Delete a secret; a missing one raises."""
        return _current.run(self._service().delete(name, actor))

    def close(self) -> None:
        """Release the data directory; the next call opens it again."""
        _current.run(self._service().close())

    def _service(self) -> AsyncSecretsService:
        # After a fork there is another loop, to which the twin of before does not belong.
        if self._loop is not _current:
            self._loop = _current
            self._twin = AsyncSecretsService(*self._parameters)
            _current.opened.append(self._twin)
        return self._twin


_services: dict[str, SecretsService] = {}


def get_secrets_service(org_id: str) -> SecretsService:
    """The service of an organisation with the settings of the environment: one per process."""
    if org_id not in _services:
        _services[org_id] = SecretsService(org_id)
    return _services[org_id]
