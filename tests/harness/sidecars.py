"""What sidecars' tests share: secrets that are set beside them, and a source of them."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from flowmason_secrets import app
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import SecretsError, Unresolved, UnresolvedReferences
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import AuditQuery
from flowmason_secrets.sidecar.source import Listed, Selection, Values

from .server import settings_for


async def store(data_dir: Path, secrets: Mapping[str, str], expires_at: str | None = None) -> None:
    """Set these secrets, as another process on the data directory would."""
    service = await app.open_service(settings_for(data_dir))
    try:
        caller = app.local_caller("acme")
        drafts = [
            Draft(name, Plaintext(value), expires_at=expires_at) for name, value in secrets.items()
        ]
        await asyncio.gather(*(service.set(caller, draft, None) for draft in drafts))
    finally:
        await service.close()


async def reads(data_dir: Path, at_least: int = 0) -> list[str]:
    """The names of secrets whose values were read, oldest first, as the log has it; waits until
    there are so many.
    """
    service = await app.open_service(settings_for(data_dir))
    try:
        query = AuditQuery("acme", action="secret.read", success=True, limit=10_000)
        while True:
            found = await service.audit(app.local_caller("acme"), query)
            if len(found) >= at_least:
                return [str(entry.line["name"]) for entry in reversed(found)]
            await asyncio.sleep(0.05)
    finally:
        await service.close()


class Changing:
    """A source whose secrets are changed by a test."""

    def __init__(self, **secrets: str) -> None:
        self.secrets = {name: (value, 1) for name, value in secrets.items()}
        self.problem: SecretsError | None = None
        self.reads = 0
        self._notices: asyncio.Queue[None] = asyncio.Queue()

    def set(self, name: str, value: str) -> None:
        """Another version, and a notice of it."""
        self.secrets[name] = (value, self.secrets.get(name, ("", 0))[1] + 1)
        self.notice()

    def notice(self) -> None:
        """Say that something may have changed."""
        self._notices.put_nowait(None)

    async def listed(self) -> Sequence[Listed]:
        return [Listed(name, str(version), False) for name, (_, version) in self.secrets.items()]

    async def read(self, names: Sequence[str]) -> Values:
        self.reads += 1
        if self.problem is not None:
            raise self.problem
        missing = [Unresolved(n, "secret_not_found") for n in names if n not in self.secrets]
        if missing:
            raise UnresolvedReferences(missing, len(names))
        return {name: Plaintext(self.secrets[name][0]) for name in names}

    async def notices(self, selection: Selection) -> AsyncIterator[None]:
        yield
        while True:
            await self._notices.get()
            yield
