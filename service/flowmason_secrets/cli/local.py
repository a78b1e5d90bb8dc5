"""The target on this machine: the service itself, over the data directory."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from .. import app
from ..api import paging, shapes
from ..api.formats import FORMATS, rendered
from ..config import Settings
from ..core.drafts import Draft, KeyDraft, Precondition, Usage
from ..core.keyring import Plaintext
from ..core.ports import AuditQuery, ListQuery
from ..core.records import SecretMetadata
from ..service import Service
from . import progress
from .target import Filters, OrganisationEntry, Server, Stored

# Seconds between two looks at what may have changed, more or less.
_LOOK = 1.0
# "All of them" of a listing.
_UNLIMITED = 1 << 62


class LocalTarget:
    """The secrets of an organisation in a data directory. Without one: only `audit`, of all."""

    def __init__(self, service: Service, org_id: str | None) -> None:
        self._service = service
        self._org_id = org_id
        # The stand-in is recorded nowhere: an audit query of a local caller is never refused.
        self._caller = app.local_caller("-" if org_id is None else org_id)
        self.server: Server | None = None
        self.complete_since: str | None = None

    async def get(self, name: str) -> shapes.SecretValue:
        metadata, value, _ = await self._service.get(self._caller, name)
        return shapes.SecretValue(
            metadata.name, value.reveal(), metadata.category, False, metadata.version
        )

    async def resolve(self, document: Plaintext, usage: Usage) -> shapes.ResolvedOut:
        resolved = await self._service.references.resolve(self._caller, document, usage)
        return shapes.resolved_out(resolved)

    async def read(self, names: Sequence[str]) -> dict[str, Plaintext]:
        found = await self._service.references.read(self._caller, names, Usage())
        return {one.metadata.name: one.value for one in found}

    async def changed(self) -> AsyncIterator[str | None]:
        while True:
            yield None
            # Many of us don't look all at once.
            await asyncio.sleep(_LOOK * random.uniform(0.75, 1.25))

    async def set(self, draft: Draft, precondition: Precondition | None) -> Stored:
        metadata, created, _ = await self._service.set(self._caller, draft, precondition)
        return Stored(metadata.shown(time.time()), metadata.etag, created)

    async def delete(self, name: str, precondition: Precondition | None) -> shapes.Message:
        await self._service.delete(self._caller, name, precondition)
        return shapes.Message(f"Secret '{name}' deleted")

    async def metadata(self, name: str) -> Stored:
        metadata = await self._service.metadata(self._caller, name)
        return Stored(metadata.shown(time.time()), metadata.etag)

    async def listing(self, filters: Filters) -> list[SecretMetadata]:
        now = time.time()
        query = ListQuery(
            self._caller.principal.org_id,
            now,
            filters.category,
            filters.prefix,
            filters.expired,
            limit=_UNLIMITED,
        )
        pages = self._service.listing(self._caller, query)
        return [entry.shown(now) async for page in pages for entry in page]

    async def audit(self, query: AuditQuery) -> list[shapes.AuditEntry]:
        query = query._replace(org_id=self._org_id)
        found = await self._service.audit(self._caller, query)
        self.complete_since = await self._service.complete_since()
        if self._org_id is not None:
            return [shapes.audit_out(entry.line) for entry in found]
        return [
            OrganisationEntry(
                **msgspec.structs.asdict(shapes.audit_out(entry.line)), org_id=entry.line["org_id"]
            )
            for entry in found
        ]

    async def export(self, form: str, query: AuditQuery) -> AsyncIterator[bytes]:
        query = query._replace(org_id=self._org_id, limit=paging.PAGE)
        pages = self._service.following.export(self._caller, query)
        async for piece in rendered(FORMATS[form], pages):
            yield piece
        self.complete_since = await self._service.complete_since()

    async def create_key(self, draft: KeyDraft) -> shapes.ApiKeyIssued:
        issued = await self._service.keys.issue(self._caller, draft)
        return shapes.ApiKeyIssued(shapes.api_key_out(issued.key, time.time()), issued.raw.reveal())

    async def keys(self) -> list[shapes.ApiKeyOut]:
        now = time.time()
        return [shapes.api_key_out(key, now) for key in await self._service.keys.all(self._caller)]

    async def status(self) -> shapes.Health:
        reason = await self._service.ready()
        if reason is not None:
            return shapes.Health("unavailable", reason)
        keys = shapes.key_counts(await self._service.key_usage())
        witnesses = shapes.witnesses_out(await self._service.trail.witnesses())
        warnings = await self._service.space.warnings()
        return shapes.ready(warnings, keys, None, witnesses)

    async def revoke_key(self, key_id: str) -> shapes.Message:
        await self._service.keys.revoke(self._caller, key_id)
        return shapes.Message(f"API key '{key_id}' revoked")


@contextlib.asynccontextmanager
async def opened(settings: Settings, org_id: str | None) -> AsyncIterator[LocalTarget]:
    """The data directory for the duration of a block, beside whatever else works on it.

    Raises:
        LogUnavailable, LogDamaged: the data directory can't be used.
    """
    service = await app.open_service(settings)
    watcher = asyncio.create_task(progress.watch(lambda: service.building))
    try:
        yield LocalTarget(service, org_id)
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        await service.close()
