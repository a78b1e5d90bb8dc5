"""The target behind a URL: a server, over HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields

import click

from .. import config
from ..api import shapes
from ..client import AsyncSecretsClient, Filters, Options, Unreachable
from ..client import Stored as Found
from ..client.options import CHANCE
from ..core import times
from ..core.drafts import Draft, KeyDraft, Precondition, Usage
from ..core.errors import InvalidInput, Unauthenticated
from ..core.keyring import Plaintext
from ..core.ports import AuditQuery
from ..core.records import SecretMetadata
from ..core.status import PASSING
from . import target
from .target import Server, Stored

# Somebody waits at the terminal: what does not come back at once is for him to judge.
_RETRIES = 2
_PATIENT = Options(first_pause=1.0, longest_pause=30.0)

_CHANGES = Filters(action="secret.create", success=True)


def client(url: str, api_key: str, insecure: bool) -> AsyncSecretsClient:
    """A client of the server of `--url`.

    Raises:
        UsageError: not such a URL, or the API key would cross a network in clear.
    """
    try:
        return AsyncSecretsClient(url, api_key, Options(retries=_RETRIES, insecure=insecure))
    except InvalidInput as error:
        named = {"url": "--url", "api_key": config.API_KEY}[error.field]
        reason = error.reason.replace("insecure=True", "--insecure")
        raise click.UsageError(f"{named} {reason}.") from None


@contextlib.asynccontextmanager
async def opened(secrets: AsyncSecretsClient, server: Server) -> AsyncIterator["RemoteTarget"]:
    """The target for the duration of a block."""
    async with secrets:
        try:
            yield RemoteTarget(secrets, server)
        except Unauthenticated:
            raise click.ClickException(
                f"The server does not accept the API key in {config.API_KEY}: "
                "it is unknown, expired or revoked."
            ) from None


class RemoteTarget:
    """The secrets of the organisation that the API key belongs to."""

    def __init__(self, secrets: AsyncSecretsClient, server: Server) -> None:
        self._secrets = secrets
        self.server: Server | None = server
        self.complete_since: str | None = None

    async def get(self, name: str) -> shapes.SecretValue:
        found = await self._secrets.read(name)
        return shapes.SecretValue(found.name, found.value, found.category, False, found.version)

    async def resolve(self, document: Plaintext, usage: Usage) -> shapes.ResolvedOut:
        return await self._secrets.resolve_json(document, *usage)

    async def read(self, names: Sequence[str]) -> dict[str, Plaintext]:
        found = await self._secrets.batch(names)
        return {name: Plaintext(value) for name, value in found.items()}

    async def changed(self) -> AsyncIterator[str | None]:
        newest = await self._secrets.audit(_CHANGES, 1)
        after = newest[0].seq if newest else 0
        yield None
        retry = 0
        while True:
            try:
                async with contextlib.aclosing(self._secrets.follow(_CHANGES, after)) as entries:
                    async for entry in entries:
                        after, retry = entry.seq, 0
                        yield str(entry.details.get("name"))
            except (Unreachable, *PASSING):
                # Whoever waits for changes waits for the server, too.
                await asyncio.sleep(_PATIENT.pause(retry, 0.0, CHANCE))
                retry += 1

    async def set(self, draft: Draft, precondition: Precondition | None) -> Stored:
        return _stored(
            await self._secrets.set(
                draft.name,
                draft.value.reveal(),
                draft.description,
                draft.category,
                draft.expires_at,
                if_match=_etags(precondition),
                if_absent=precondition is not None and precondition.absent,
            )
        )

    async def delete(self, name: str, precondition: Precondition | None) -> shapes.Message:
        await self._secrets.delete(name, if_match=_etags(precondition))
        return shapes.Message(f"Secret '{name}' deleted")

    async def metadata(self, name: str) -> Stored:
        return _stored(await self._secrets.get_metadata(name))

    async def listing(self, filters: target.Filters) -> list[SecretMetadata]:
        return await self._secrets.list(*filters)

    async def audit(self, query: AuditQuery) -> list[shapes.AuditEntry]:
        found = await self._secrets.audit(_filters(query), query.limit)
        self.complete_since = found.complete_since
        return found

    async def export(self, form: str, query: AuditQuery) -> AsyncIterator[bytes]:
        export = self._secrets.export(form, _filters(query))
        async for piece in export:
            yield piece
        self.complete_since = export.complete_since

    async def create_key(self, draft: KeyDraft) -> shapes.ApiKeyIssued:
        return await self._secrets.create_api_key(
            draft.name, draft.scopes, draft.allow, draft.expires_at
        )

    async def keys(self) -> list[shapes.ApiKeyOut]:
        return await self._secrets.list_api_keys()

    async def status(self) -> shapes.Health:
        return await self._secrets.status()

    async def revoke_key(self, key_id: str) -> shapes.Message:
        await self._secrets.revoke_api_key(key_id)
        return shapes.Message(f"API key '{key_id}' revoked")


def _stored(found: Found) -> Stored:
    plain = SecretMetadata(**{one.name: getattr(found, one.name) for one in fields(SecretMetadata)})
    return Stored(plain, found.etag, found.created)


def _etags(precondition: Precondition | None) -> str | None:
    return ", ".join(precondition.etags) or None if precondition is not None else None


def _filters(query: AuditQuery) -> Filters:
    return Filters(
        resource_type=query.resource_type,
        action=query.action,
        name=query.name,
        actor=query.actor,
        success=query.success,
        since=None if query.since is None else times.render(query.since),
        until=None if query.until is None else times.render(query.until),
    )
