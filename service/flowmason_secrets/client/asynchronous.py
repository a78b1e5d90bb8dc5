"""`AsyncSecretsClient`: the HTTP API for asynchronous callers."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import fields
from datetime import datetime
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from ..api import shapes
from ..core import template, times
from ..core.access import FULL
from ..core.errors import SecretNotFound, SecretsError
from ..core.events import Receipt
from ..core.keyring import Plaintext
from ..core.missing import MISSING, Missing
from ..core.records import SecretMetadata
from .address import address, check_api_key
from .documents import ApiKeys, Entries, Export, Filters, Reading, Stored, query
from .errors import OutcomeUnknown, UnexpectedAnswer, Unreachable
from .messages import messages
from .options import CHANCE, Options
from .transport import Answer, Effect, Request, Transport

T = TypeVar("T")
D = TypeVar("D")

_SECRETS = "/api/v1/secrets"
_AUDIT_LOG = "/api/v1/auth/audit-log"
_COMPLETE_SINCE = "Audit-Complete-Since"
_API_KEYS = "/api/v1/auth/api-keys"
_PAGE = 1000
# An export takes as long as it takes, and a stream shows every 15 seconds that it is alive.
_SILENCE = 60.0
_ALL = Filters()


class AsyncSecretsClient:
    """The secrets of the organisation that the API key belongs to. Belongs to one event loop.

        async with AsyncSecretsClient("https://secrets.example", api_key) as secrets:
            value = await secrets.get("OPENAI_API_KEY")

    `url` may be `unix:///run/secrets.sock` too. Connections are kept and shared by all calls.

    What fails on the way, or with 503, is tried again until `options` say that it is enough: reads
    always (each is an event of its own), changes only if the request did not leave, the server says
    that nothing happened, or a condition keeps it from happening twice (`if_match` with an entity
    tag, `if_absent`; revoking an API key is such too).

    All methods raise what `AsyncSecretsService` raises, and what `flowmason_secrets.client` adds:

    Raises:
        Unauthenticated, Denied: the API key is not live, or must not do this.
        LogUnavailable, Overloaded, IndexUnavailable: the server can't now.
        Unreachable, UnexpectedAnswer: there is no server, or it is another one.
        OutcomeUnknown: a change may have been made, but its answer is lost.
        Refused: anything else that the server refused.
        InvalidInput: the URL or the API key is not acceptable.
    """

    def __init__(self, url: str, api_key: str, options: Options | None = None) -> None:
        options = options or Options()
        where = address(url, insecure=options.insecure)
        self._transport = Transport(where, check_api_key(api_key), options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._transport.address.url!r}>"

    async def get(self, name: str, default: D | Missing = MISSING) -> str | D:
        """Return the value, or `default` if given and there is no such secret.

        Raises:
            SecretNotFound, SecretExpired, DecryptionFailed, SecretDamaged
        """
        try:
            return (await self.read(name)).value
        except SecretNotFound:
            if isinstance(default, Missing):
                raise
            return default

    async def read(self, name: str) -> Reading:
        """Return the value with its version, its entity tag and the receipt of this read.

        Raises:
            SecretNotFound, SecretExpired, DecryptionFailed, SecretDamaged
        """
        request = Request("GET", _secret(name))
        answer = await self._transport.send(request)
        found = self._decode(request, answer, shapes.SecretValue)
        receipt = _receipt(answer)
        if receipt is None:
            raise UnexpectedAnswer(self._transport.address.url, answer.status)
        etag = answer.headers.get("ETag", "")
        return Reading(found.name, found.value, found.category, found.version, etag, receipt)

    async def resolve(
        self, document: T, pipeline: str | None = None, stage: str | None = None
    ) -> T:
        """Return the document with values in the place of its references, as
        `AsyncSecretsService.resolve` does.

        Raises:
            UnresolvedReferences: some secrets can't be read, and none was.
            InvalidInput: it is no JSON, has more than 100 secrets, or would become too large.
        """
        found = await self.resolve_json(template.encode(document), pipeline, stage)
        filled: T = json.loads(bytes(found.document))
        return filled

    async def resolve_json(
        self, document: Plaintext, pipeline: str | None = None, stage: str | None = None
    ) -> shapes.ResolvedOut:
        """The same for JSON as text, of which all else stays as it is written; and the receipts."""
        template.parse(document)
        raw = msgspec.Raw(document.reveal().encode())
        body = msgspec.json.encode({"document": raw, "pipeline": pipeline, "stage": stage})
        request = Request("POST", f"{_SECRETS}/resolve", body=body)
        return self._decode(request, await self._transport.send(request), shapes.ResolvedOut)

    async def batch(
        self, names: Sequence[str], pipeline: str | None = None, stage: str | None = None
    ) -> dict[str, str]:
        """Return the values of up to 100 secrets by their names: all of them, or none.

        Raises:
            UnresolvedReferences: some secrets can't be read, and none was.
        """
        body = msgspec.json.encode({"names": names, "pipeline": pipeline, "stage": stage})
        request = Request("POST", f"{_SECRETS}/batch", body=body)
        found = self._decode(request, await self._transport.send(request), shapes.BatchOut)
        return {one.name: one.value for one in found.secrets}

    async def set(
        self,
        name: str,
        value: str,
        description: str = "",
        category: str = "other",
        expires_at: datetime | str | None = None,
        *,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> Stored:
        """Create the secret, or replace all of it but its creation; with `if_match` only if its
        entity tag is this one, with `if_absent` only if there is none.

        Raises:
            InvalidInput: a field is not acceptable.
            PreconditionFailed: it is not as the condition has it.
        """
        body = {
            "name": name,
            "value": value,
            "description": description,
            "category": category,
            "expires_at": times.text(expires_at, "expires_at"),
        }
        headers, effect = _condition(if_match, if_absent)
        request = Request(
            "POST", _SECRETS, body=msgspec.json.encode(body), headers=headers, effect=effect
        )
        return self._stored(request, await self._transport.send(request))

    async def delete(self, name: str, *, if_match: str | None = None) -> bool:
        """Delete a secret, with `if_match` only if its entity tag is this one. Always True: a
        missing one raises.

        Raises:
            SecretNotFound: there is none.
            PreconditionFailed: it is not as the condition has it.
        """
        headers, effect = _condition(if_match, False)
        request = Request("DELETE", _secret(name), headers=headers, effect=effect)
        self._decode(request, await self._transport.send(request), shapes.Message)
        return True

    async def get_metadata(self, name: str) -> Stored:
        """Return everything about a secret but its value.

        Raises:
            SecretNotFound: there is none.
            SecretDamaged: its metadata can't be read.
        """
        request = Request("GET", f"{_secret(name)}/metadata")
        return self._stored(request, await self._transport.send(request))

    async def exists(self, name: str) -> bool:
        """Whether there is such a secret, expired or not. Recorded only if it is not there."""
        try:
            await self.get_metadata(name)
        except SecretNotFound:
            return False
        return True

    async def list(
        self, category: str | None = None, prefix: str | None = None, expired: bool | None = None
    ) -> "list[SecretMetadata]":
        """All secrets that match, sorted by name, without their values; page by page."""
        given: dict[str, object] = {"category": category, "prefix": prefix, "expired": expired}
        found: list[SecretMetadata] = []
        cursor: str | None = ""
        while cursor is not None:
            page = given | {"limit": _PAGE, "cursor": cursor or None}
            request = Request("GET", _SECRETS, query(page))
            answer = await self._transport.send(request)
            found += self._decode(request, answer, list[SecretMetadata])
            cursor = answer.cursor
        return found

    async def audit(self, filters: Filters = _ALL, limit: int = 100) -> Entries:
        """The newest events that match, newest first; page by page."""
        found = Entries()
        cursor: str | None = ""
        while cursor is not None and len(found) < limit:
            size = min(limit - len(found), _PAGE)
            page = filters.query() | {"limit": size, "cursor": cursor or None}
            request = Request("GET", _AUDIT_LOG, query(page))
            answer = await self._transport.send(request)
            found += self._decode(request, answer, list[shapes.AuditEntry])
            found.complete_since = answer.headers.get(_COMPLETE_SINCE)
            cursor = answer.cursor
        return found

    async def follow(
        self, filters: Filters = _ALL, after: int | None = None
    ) -> AsyncGenerator[shapes.AuditEntry, None]:
        """The events that match as they come, without an end: after the event of the seq `after`,
        or from now on. Goes on by itself after the last one when the stream breaks off; nothing is
        missed or repeated. Leave it with `aclose`, as `contextlib.aclosing` does.

        Raises:
            Unauthenticated, Denied: the API key was revoked, say.
            Unreachable: the server has not come back.
        """
        last = None if after is None else str(after)
        options, retry = self._transport.options, 0
        while True:
            headers = {} if last is None else {"Last-Event-ID": last}
            asked = query(filters.query())
            request = Request("GET", f"{_AUDIT_LOG}/stream", asked, headers=headers)
            response = await self._transport.open(request, _SILENCE)
            try:
                async for message in messages(response.content):
                    # Kept before it is handed out: whoever asks for more has taken it.
                    last = message.last_id or last
                    if message.data:
                        retry = 0
                        yield msgspec.json.decode(message.data, type=shapes.AuditEntry)
            except (aiohttp.ClientError, OSError):
                # Broken off: the next turn finds out whether there is a server.
                pass
            except (ValueError, msgspec.DecodeError):
                raise UnexpectedAnswer(self._transport.address.url, response.status) from None
            finally:
                response.close()
            await asyncio.sleep(options.pause(retry, 0.0, CHANCE))
            retry += 1

    def export(self, form: str, filters: Filters = _ALL) -> Export:
        """All events that match until now, oldest first, piece by piece; `form` is `ndjson`, `csv`
        or `ocsf`.

        Raises:
            Unreachable: it broke off; what came is not everything.
        """
        asked = query({"format": form} | filters.query())
        request = Request("GET", f"{_AUDIT_LOG}/export", asked)
        return Export(lambda export: self._pour(request, export))

    async def create_api_key(
        self,
        name: str,
        scopes: Sequence[str] = (FULL,),
        allow: Sequence[str] = (),
        expires_at: datetime | str | None = None,
    ) -> shapes.ApiKeyIssued:
        """Make an API key; its `raw_key` is told this once.

        Raises:
            InvalidInput: a field is not acceptable.
        """
        body = {
            "name": name,
            "scopes": list(scopes),
            "allow": list(allow),
            "expires_at": times.text(expires_at, "expires_at"),
        }
        request = Request("POST", _API_KEYS, body=msgspec.json.encode(body), effect="change")
        return self._decode(request, await self._transport.send(request), shapes.ApiKeyIssued)

    async def list_api_keys(self) -> ApiKeys:
        """All API keys, oldest first, the revoked ones included."""
        request = Request("GET", _API_KEYS)
        return self._decode(request, await self._transport.send(request), ApiKeys)

    async def revoke_api_key(self, key_id: str) -> bool:
        """Revoke an API key: when this returns, nobody accepts it any more. Always True: one that
        is unknown or revoked already raises.

        Raises:
            ApiKeyNotFound: there is no live one of this id.
        """
        path = f"{_API_KEYS}/{quote(key_id, safe='')}"
        # Ids never come back: a second time finds nothing.
        request = Request("DELETE", path, effect="once", subject=key_id)
        self._decode(request, await self._transport.send(request), shapes.Message)
        return True

    async def whoami(self) -> shapes.WhoAmI:
        """Who the API key belongs to and what it may do."""
        request = Request("GET", "/api/v1/auth/whoami")
        return self._decode(request, await self._transport.send(request), shapes.WhoAmI)

    async def proof(self, seq: int) -> bytes:
        """The proof that an event is in the log, a C2SP tlog-proof; `seq` is that of a receipt.

        Raises:
            EventNotFound: the organisation has no such event.
            CheckpointPending: no checkpoint covers it yet.
        """
        return (await self._transport.send(Request("GET", f"/api/v1/log/proof/{seq}"))).body

    async def status(self) -> shapes.Health:
        """Whether the server can serve values, and how many secrets are under each master key."""
        request = Request("GET", "/readyz", expected=(200, 503))
        return self._decode(request, await self._transport.send(request), shapes.Health)

    async def close(self) -> None:
        """Close the connections; the next call makes new ones."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncSecretsClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _pour(self, request: Request, export: Export) -> AsyncIterator[bytes]:
        response = await self._transport.open(request, _SILENCE)
        export.complete_since = response.headers.get(_COMPLETE_SINCE)
        broken = ""
        try:
            async for piece in response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, OSError) as error:
            broken = type(error).__name__
        finally:
            response.close()
        if broken:
            raise Unreachable(self._transport.address.url, f"the answer broke off ({broken})")

    def _stored(self, request: Request, answer: Answer) -> Stored:
        found = self._decode(request, answer, SecretMetadata)
        members = {one.name: getattr(found, one.name) for one in fields(SecretMetadata)}
        etag = answer.headers.get("ETag", "")
        return Stored(**members, etag=etag, created=answer.status == 201, receipt=_receipt(answer))

    def _decode(self, request: Request, answer: Answer, shape: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Not the decoder's words: nothing of the body may be shown, it may hold a value.
            error: SecretsError = UnexpectedAnswer(self._transport.address.url, answer.status)
            if request.effect != "none":
                error = OutcomeUnknown(str(error))
        raise error


def _secret(name: str) -> str:
    return f"{_SECRETS}/{quote(name, safe='')}"


def _receipt(answer: Answer) -> Receipt | None:
    seq, event = answer.headers.get("Audit-Seq", ""), answer.headers.get("Audit-Id", "")
    return Receipt(int(seq), event) if seq.isascii() and seq.isdigit() and len(seq) < 19 else None


def _condition(if_match: str | None, if_absent: bool) -> tuple[dict[str, str], Effect]:
    """The headers of a conditional write, and whether they keep it from happening twice."""
    headers = {} if if_match is None else {"If-Match": if_match}
    if if_absent:
        headers["If-None-Match"] = "*"
    # Every version is a match for '*'.
    return headers, "once" if headers and if_match != "*" else "change"
