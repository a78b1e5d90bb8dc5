"""`AsyncSecretsService`: the library for asynchronous callers."""

import asyncio
import json
import logging
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from . import app, config
from .core import names, template, times
from .core.access import Caller
from .core.drafts import Draft, Usage
from .core.errors import SecretNotFound
from .core.keyring import Plaintext
from .core.missing import MISSING, Missing
from .core.ports import ListQuery
from .core.records import SecretMetadata
from .service import Service

D = TypeVar("D")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_EVERYTHING = 1 << 62

_TELL_OTHERS = (
    f"Only this process knows the new master key. Set {config.PREFIX}KEY to it wherever these "
    f"secrets are used, and {config.PREFIX}OLD_KEYS to the old one until all of them are under the "
    "new one. "
    f"With {config.PREFIX}KEY_FILE there is nothing to change."
)


class AsyncSecretsService:
    """The secrets of one organisation in a data directory. Belongs to one event loop.

    Every access is an event in the log that the server writes too; both may run at once.

        async with AsyncSecretsService(org_id="my-org") as secrets:
            await secrets.set("OPENAI_API_KEY", "sk-...", category="api_key")

    `master_key` and `storage_path` (the data directory) take the place of the environment's.
    `actor` is whom the events name; by default it is the user that runs this process.

    Raises:
        ConfigurationError: the environment contradicts itself.
        InvalidInput: not the name of an organisation.
    """

    def __init__(
        self,
        org_id: str,
        master_key: str | None = None,
        storage_path: str | Path | None = None,
        actor: str | None = None,
    ) -> None:
        self.org_id = names.check_org(org_id)
        self._actor = actor
        self._settings = app.with_overrides(
            config.from_environment(master_key=master_key),
            data_dir=None if storage_path is None else config.data_dir(storage_path),
        )
        self._service: Service | None = None
        self._opening = asyncio.Lock()

    async def set(
        self,
        name: str,
        value: str,
        description: str = "",
        category: str = "other",
        expires_at: datetime | str | None = None,
        actor: str | None = None,
    ) -> SecretMetadata:
        """Create the secret, or replace all of it but its creation.

        Raises:
            InvalidInput: a field is not acceptable, an `expires_at` without a zone above all.
            LogUnavailable: not acknowledged: it happened whole or not at all.
        """
        draft = Draft(
            name, Plaintext(value), description, category, times.text(expires_at, "expires_at")
        )
        written = await (await self._open()).set(self._caller(actor), draft)
        return written.metadata.shown(time.time())

    async def get(
        self, name: str, default: D | Missing = MISSING, actor: str | None = None
    ) -> str | D:
        """Return the value; the read is durable in the event log before this returns.

        Raises:
            SecretNotFound: there is none, and no `default` to return instead.
            SecretExpired: it is past its expiry, whatever the default.
            DecryptionFailed, SecretDamaged: it can't be read.
            LogUnavailable: the event could not be written, so the value is not returned.
        """
        service = await self._open()
        try:
            return (await service.get(self._caller(actor), name)).value.reveal()
        except SecretNotFound:
            if isinstance(default, Missing):
                raise
            return default

    async def resolve(
        self,
        document: T,
        pipeline: str | None = None,
        stage: str | None = None,
        actor: str | None = None,
    ) -> T:
        """The document with values in the place of the references `{{secrets.NAME}}` in its
        strings, keys excepted. `\\{{secrets.NAME}}` becomes `{{secrets.NAME}}`, and two backslashes
        in front of a reference one. Values are never resolved again.

        A document is what `json.dumps` takes, at most 512 KiB of it. `pipeline` and `stage` are
        for the events of the reads, one for each secret.

        Raises:
            UnresolvedReferences: some secrets can't be read, and none was: its `errors` say which,
                and the code of the error that each would raise alone.
            InvalidInput: it is no JSON, has more than 100 secrets, or would become too large.
            LogUnavailable: the events could not be written, so nothing is returned.
        """
        service = await self._open()
        usage = Usage(pipeline, stage)
        resolved = await service.references.resolve(
            self._caller(actor), template.encode(document), usage
        )
        filled: T = json.loads(resolved.document.reveal())
        return filled

    async def get_metadata(self, name: str, actor: str | None = None) -> SecretMetadata:
        """Return everything about a secret but its value.

        Raises:
            SecretNotFound: there is none.
            SecretDamaged: its metadata can't be read.
        """
        metadata = await (await self._open()).metadata(self._caller(actor), name)
        return metadata.shown(time.time())

    async def exists(self, name: str) -> bool:
        """Whether there is such a secret, expired or not. Recorded only if it is not there."""
        try:
            await self.get_metadata(name)
        except SecretNotFound:
            return False
        return True

    async def list(self) -> "list[SecretMetadata]":
        """All secrets, sorted by name, without their values."""
        query = ListQuery(self.org_id, time.time(), limit=_EVERYTHING)
        pages = (await self._open()).listing(self._caller(None), query)
        return [metadata.shown(time.time()) async for page in pages for metadata in page]

    async def delete(self, name: str, actor: str | None = None) -> bool:
        """Delete a secret. Always True: a missing one raises.

        Raises:
            SecretNotFound: there is none.
            LogUnavailable: not acknowledged: it happened whole or not at all.
        """
        await (await self._open()).delete(self._caller(actor), name)
        return True

    async def rotate_key(self, new_master_key: str, actor: str | None = None) -> int:
        """Make a master key the one that encrypts, and put all secrets of the organisation under
        it; returns how many were re-encrypted. Versions and times stay as they are.

        In a key file it is the first key from now on, for every process that has this file. If the
        key came from the environment or from `master_key`, only this process knows the new one,
        and a warning tells what to change.

        Raises:
            ConfigurationError: not a master key, or the key file can't be read.
            OSError: the key file can't be written; nothing was changed.
            RotationIncomplete: some can't be decrypted; all others are under the new key.
            LogUnavailable: some are not under the new key yet: call it again.
        """
        material = config.check_key(new_master_key, "The new master key")
        rotation = (await self._open()).rotation
        caller = self._caller(actor)
        if not rotation.shared:
            _log.warning(_TELL_OTHERS)
        await rotation.use(caller, material)
        return await rotation.finish(caller)

    async def close(self) -> None:
        """Release the data directory; the next operation opens it again."""
        service, self._service = self._service, None
        if service is not None:
            await service.close()

    async def __aenter__(self) -> "AsyncSecretsService":
        await self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _open(self) -> Service:
        async with self._opening:
            if self._service is None:
                self._service = await app.open_service(self._settings, signs=True)
            return self._service

    def _caller(self, actor: str | None) -> Caller:
        return app.local_caller(self.org_id, actor or self._actor)
