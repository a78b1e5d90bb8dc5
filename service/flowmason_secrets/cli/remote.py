"""The target behind a URL: a server, over HTTP."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import aiohttp
import click
import msgspec
from yarl import URL

from .. import __version__, config
from ..api import shapes
from ..core import times
from ..core.drafts import Draft, KeyDraft, Precondition, Usage
from ..core.errors import InvalidInput
from ..core.keyring import Plaintext
from ..core.ports import AuditQuery
from ..core.records import SecretMetadata
from .target import Filters, Stored

T = TypeVar("T")

_UNIX = "unix:"
_PAGE = 1000
_SECONDS = 60
# An export takes as long as it takes, but something has to come.
_STREAM = aiohttp.ClientTimeout(sock_connect=_SECONDS, sock_read=_SECONDS)

_AUDIT_LOG = "/api/v1/auth/audit-log"


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, as given by `--url`, and the API key for it."""

    url: str
    api_key: str = field(repr=False)
    base: str
    unix_socket: str | None = None


class _Answer(NamedTuple):
    status: int
    etag: str
    body: bytes
    # Where the next page begins, if there is one.
    cursor: str | None


def server(url: str, api_key: str, insecure: bool) -> Server:
    """The server of `--url`: http, https, or `unix:` and the path of a socket.

    Raises:
        UsageError: not such a URL, or the API key would cross a network in clear.
    """
    api_key = api_key.strip()
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise click.UsageError("FLOWMASON_API_KEY holds characters that no API key has.")
    if url.startswith(_UNIX):
        path = url.removeprefix(_UNIX)
        return Server(url, api_key, "http://localhost", "/" + path.lstrip("/"))
    try:
        parsed = URL(url)
    except ValueError:
        raise click.UsageError("--url is not a URL.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise click.UsageError(
            "--url must be like https://secrets.example.org or unix:/run/secrets.sock."
        )
    if parsed.user or parsed.password or parsed.query_string or parsed.fragment:
        raise click.UsageError("--url takes neither a user name, nor '?', nor '#'.")
    if parsed.scheme == "http" and not insecure and not config.is_loopback(parsed.host):
        raise click.UsageError(
            f"{url} is not encrypted: everybody on the way could read the API key and the values. "
            "Use https://, or --insecure if the network itself is safe."
        )
    return Server(url, api_key, str(parsed).rstrip("/"))


@contextlib.asynccontextmanager
async def opened(where: Server) -> AsyncIterator["RemoteTarget"]:
    """A client of the server for the duration of a block."""
    connector = None if where.unix_socket is None else aiohttp.UnixConnector(where.unix_socket)
    headers = {
        "Authorization": f"Bearer {where.api_key}",
        "User-Agent": f"flowmason-secrets/{__version__}",
    }
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout
    ) as session:
        yield RemoteTarget(session, where)


class RemoteTarget:
    """The secrets of the organisation that the API key belongs to."""

    def __init__(self, session: aiohttp.ClientSession, where: Server) -> None:
        self._session = session
        self._where = where
        self.complete_since: str | None = None

    async def get(self, name: str) -> shapes.SecretValue:
        return self._decode(await self._send("GET", _secret(name)), shapes.SecretValue)

    async def resolve(self, document: Plaintext, usage: Usage) -> shapes.ResolvedOut:
        body = {"document": msgspec.Raw(document.reveal().encode())} | usage._asdict()
        answer = await self._send("POST", "/api/v1/secrets/resolve", body=body)
        return self._decode(answer, shapes.ResolvedOut)

    async def set(self, draft: Draft, precondition: Precondition | None) -> Stored:
        body = {
            "name": draft.name,
            "value": draft.value.reveal(),
            "description": draft.description,
            "category": draft.category,
            "expires_at": draft.expires_at,
        }
        answer = await self._send(
            "POST", "/api/v1/secrets", body=body, headers=_conditions(precondition)
        )
        return self._stored(answer)

    async def delete(self, name: str, precondition: Precondition | None) -> shapes.Message:
        answer = await self._send("DELETE", _secret(name), headers=_conditions(precondition))
        return self._decode(answer, shapes.Message)

    async def metadata(self, name: str) -> Stored:
        return self._stored(await self._send("GET", f"{_secret(name)}/metadata"))

    async def listing(self, filters: Filters) -> list[SecretMetadata]:
        answer = await self._send("GET", "/api/v1/secrets", query=_query(filters._asdict()))
        return self._decode(answer, list[SecretMetadata])

    async def audit(self, query: AuditQuery) -> list[shapes.AuditEntry]:
        given = _filters(query)
        found: list[shapes.AuditEntry] = []
        cursor: str | None = None
        while len(found) < query.limit:
            limit = min(query.limit - len(found), _PAGE)
            page = _query(given | {"limit": limit, "cursor": cursor})
            answer = await self._send("GET", _AUDIT_LOG, query=page)
            found += self._decode(answer, list[shapes.AuditEntry])
            cursor = answer.cursor
            if cursor is None:
                break
        return found

    async def export(self, form: str, query: AuditQuery) -> AsyncIterator[bytes]:
        given = _query({"format": form} | _filters(query))
        async with self._request("GET", f"{_AUDIT_LOG}/export", params=given, timeout=_STREAM) as (
            response
        ):
            if response.status != 200:
                raise self._refusal(_Answer(response.status, "", await response.read(), None))
            async for piece in response.content.iter_any():
                yield piece

    async def create_key(self, draft: KeyDraft) -> shapes.ApiKeyIssued:
        body = {
            "name": draft.name,
            "scopes": draft.scopes,
            "allow": draft.allow,
            "expires_at": draft.expires_at,
        }
        answer = await self._send("POST", "/api/v1/auth/api-keys", body=body)
        return self._decode(answer, shapes.ApiKeyIssued)

    async def keys(self) -> list[shapes.ApiKeyOut]:
        answer = await self._send("GET", "/api/v1/auth/api-keys")
        return self._decode(answer, list[shapes.ApiKeyOut])

    async def status(self) -> shapes.Health:
        answer = await self._send("GET", "/readyz", expected=(200, 503))
        return self._decode(answer, shapes.Health)

    async def revoke_key(self, key_id: str) -> shapes.Message:
        answer = await self._send("DELETE", f"/api/v1/auth/api-keys/{quote(key_id, safe='')}")
        return self._decode(answer, shapes.Message)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: object = None,
        headers: dict[str, str] | None = None,
        expected: tuple[int, ...] = (200, 201),
    ) -> _Answer:
        """Raises:
        InvalidInput, ClickException: the server refused, or there is none.
        """
        headers = dict(headers or {})
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(body)
        async with self._request(
            method, path, params=query, data=data, headers=headers
        ) as response:
            link = response.links.get("next")
            answer = _Answer(
                response.status,
                response.headers.get("ETag", ""),
                await response.read(),
                None if link is None else URL(str(link["url"])).query.get("cursor"),
            )
        if answer.status not in expected:
            raise self._refusal(answer)
        return answer

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, **more: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Raises:
        ClickException: the server can't be reached, or the answer broke off.
        """
        try:
            # A redirect could lead the API key to somebody else, or to plain HTTP.
            async with self._session.request(
                method,
                URL(self._where.base + path, encoded=True),
                allow_redirects=False,
                **more,
            ) as response:
                self.complete_since = response.headers.get("Audit-Complete-Since")
                yield response
        except TimeoutError:
            raise self._failure(f"did not answer within {_SECONDS} seconds") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(f"can't be reached: {error}") from None

    def _refusal(self, answer: _Answer) -> Exception:
        if answer.status == 401:
            return click.ClickException(
                "The server does not accept the API key in FLOWMASON_API_KEY: "
                "it is unknown, expired or revoked."
            )
        try:
            problem = msgspec.json.decode(answer.body, type=shapes.Problem)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self._failure(f"answered HTTP {answer.status}, not as FlowMason Secrets does")
        if problem.code == InvalidInput.code and problem.field is not None:
            return InvalidInput(problem.field, problem.detail.removeprefix(f"{problem.field}: "))
        return click.ClickException(problem.detail)

    def _stored(self, answer: _Answer) -> Stored:
        metadata = self._decode(answer, SecretMetadata)
        return Stored(metadata, answer.etag, answer.status == 201)

    def _decode(self, answer: _Answer, shape: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Not the decoder's words: nothing of the body may be shown, it may hold a value.
            raise self._failure("did not answer as FlowMason Secrets does") from None

    def _failure(self, what: str) -> click.ClickException:
        return click.ClickException(f"{self._where.url} {what}. Check --url and the server.")


def _secret(name: str) -> str:
    return f"/api/v1/secrets/{quote(name, safe='')}"


def _conditions(precondition: Precondition | None) -> dict[str, str]:
    if precondition is None:
        return {}
    if precondition.absent:
        return {"If-None-Match": "*"}
    return {"If-Match": ", ".join(precondition.etags)}


def _filters(query: AuditQuery) -> dict[str, object]:
    return {
        "resource_type": query.resource_type,
        "action": query.action,
        "name": query.name,
        "actor": query.actor,
        "success": query.success,
        "since": None if query.since is None else times.render(query.since),
        "until": None if query.until is None else times.render(query.until),
    }


def _query(given: dict[str, object]) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    }
