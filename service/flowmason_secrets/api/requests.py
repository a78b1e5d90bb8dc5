"""Reading a request: who it is from, its query, its body. Nothing here trusts anything."""

import asyncio
import ipaddress
import re
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import PayloadAccessError, RequestPayloadError
from aiohttp.web_request import BaseRequest

from ..core.access import Caller, Peer
from ..core.drafts import Precondition
from ..core.errors import InvalidInput, Overloaded
from ..core.keyring import Plaintext
from .connections import Budget
from .problems import RequestError, malformed

T = TypeVar("T")
C = TypeVar("C", bound=str)

# A value of 64 KiB of which JSON escapes every character, and room for the rest.
MAX_BODY = 512 << 10

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# For whom an agent asks. Nothing is decided by it: it is only recorded.
PEER_HEADER = "X-FlowMason-Peer"
_PEER = re.compile(r"uid=([0-9]{1,10});pid=([0-9]{1,10})")
_ETAG = re.compile(r'[ \t]*+(W/)?("[^"]*+"|\*)[ \t]*+(?:,|$)')


@dataclass(slots=True)
class Call:
    """One request that has been authenticated and matched to its route."""

    raw: BaseRequest
    caller: Caller
    params: dict[str, str]
    query: dict[str, str]
    budget: Budget
    body_timeout: float
    # What the answer has of the budget while it is made, in bytes.
    held: int = 0

    def hold(self, size: int) -> None:
        """The answer has grown by so many bytes.

        Raises:
            Overloaded: there is no room for them.
        """
        if not self.budget.take(size):
            raise Overloaded("Too much is waiting to be answered")
        self.held += size


def request_id(raw: BaseRequest) -> str | None:
    """The client's `X-Request-Id`, if there is one and it is harmless."""
    given = raw.headers.get("X-Request-Id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else None


def user_agent(raw: BaseRequest) -> str | None:
    """The `User-Agent`, at most 256 characters, whatever bytes it was sent as."""
    agent = raw.headers.get("User-Agent")
    if agent is None or (agent.isascii() and len(agent) <= 256):
        return agent
    return agent[:256].encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def client_ip(raw: BaseRequest, behind_proxy: bool) -> str | None:
    """The address of the client: behind a proxy the one that the proxy saw."""
    if behind_proxy:
        # Only the last entry is the proxy's own word; the others are the client's.
        forwarded = raw.headers.getall("X-Forwarded-For", [""])[-1].rpartition(",")[2].strip()
        try:
            return str(ipaddress.ip_address(forwarded))
        except ValueError:
            return raw.remote
    return raw.remote or None


def api_key(raw: BaseRequest) -> Plaintext | None:
    """The API key of a request, from `Authorization: Bearer` or else `X-API-Key`.

    Raises:
        RequestError: several, of which somebody on the way may have checked another one.
    """
    sent = raw.headers.getall("Authorization", ())
    if len(sent) > 1:
        raise malformed("There must be one Authorization header.")
    if not sent:
        given = raw.headers.get("X-API-Key")
        return Plaintext(given) if given else None
    scheme, _, key = sent[0].partition(" ")
    return Plaintext(key.strip()) if scheme.lower() == "bearer" else None


def peer(raw: BaseRequest) -> Peer | None:
    """For whom an agent asks, as it says itself.

    Raises:
        RequestError: several, or not of that form.
    """
    sent = raw.headers.getall(PEER_HEADER, None)
    if sent is None:
        return None
    found = _PEER.fullmatch(sent[0])
    if found is None or len(sent) > 1:
        raise malformed(f"{PEER_HEADER} must be like 'uid=1000;pid=4242'.")
    return Peer(int(found[1]), int(found[2]))


def origin_form(target: str) -> str:
    """The path and query of a request target in absolute form (RFC 9112 §3.2.2)."""
    _, _, rest = target.partition("://")
    return "/" + rest.partition("/")[2]


def decode_segment(segment: str) -> str:
    """A segment of the path without its percent-encoding.

    Raises:
        RequestError: it is not UTF-8.
    """
    if "%" not in segment and segment.isascii():
        return segment
    try:
        return unquote_to_bytes(segment.encode("utf-8", "surrogateescape")).decode()
    except UnicodeDecodeError:
        raise malformed("The path is not percent-encoded UTF-8.") from None


def decode_query(text: str, known: frozenset[str]) -> dict[str, str]:
    """The query parameters.

    Raises:
        RequestError, InvalidInput: not UTF-8, repeated, or one that the route doesn't have.
    """
    try:
        text.encode()
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=32)
    except (UnicodeError, ValueError):
        raise malformed("The query is not percent-encoded UTF-8.") from None
    query: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            raise InvalidInput(name[:64], f"unknown parameter; known: {', '.join(sorted(known))}")
        if name in query:
            raise InvalidInput(name, "given twice")
        query[name] = value
    return query


def number(query: dict[str, str], name: str, default: int, most: int) -> int:
    """A query parameter that counts something, from 0 or, for a limit, from 1.

    Raises:
        InvalidInput: not a number, or out of range.
    """
    text = query.get(name)
    if text is None:
        return default
    least = 1 if name == "limit" else 0
    if not (text.isascii() and text.isdigit() and len(text) < 19 and least <= int(text) <= most):
        raise InvalidInput(name, f"must be a number from {least} to {most}")
    return int(text)


def choice(query: dict[str, str], name: str, options: tuple[C, ...]) -> C:
    """One of the options, without the parameter the first one.

    Raises:
        InvalidInput: something else.
    """
    text = query.get(name, options[0])
    for option in options:
        if text == option:
            return option
    raise InvalidInput(name, f"must be one of {', '.join(options)}")


def boolean(query: dict[str, str], name: str) -> bool | None:
    """Raises:
    InvalidInput: neither `true` nor `false`.
    """
    text = query.get(name)
    if text not in (None, "true", "false"):
        raise InvalidInput(name, "must be true or false")
    return None if text is None else text == "true"


def precondition(raw: BaseRequest) -> Precondition | None:
    """What `If-None-Match` and `If-Match` ask for (RFC 9110 §13.1).

    Raises:
        RequestError: something else than `If-None-Match: *` or entity tags in `If-Match`.
    """
    absent, match = raw.headers.getall("If-None-Match", []), raw.headers.getall("If-Match", [])
    if absent and match:
        raise malformed("If-Match and If-None-Match can't be combined.")
    if absent:
        if [value.strip() for value in absent] != ["*"]:
            raise malformed("If-None-Match must be '*' in a write.")
        return Precondition(absent=True)
    if match:
        return Precondition(etags=_strong(",".join(match)))
    return None


def _strong(text: str) -> tuple[str, ...]:
    """The entity tags that may match: weak ones never do (RFC 9110 §13.1.1).

    Raises:
        RequestError: something else than entity tags.
    """
    etags: list[str] = []
    place = 0
    while place < len(text) or not place:
        found = _ETAG.match(text, place)
        if found is None:
            raise malformed("If-Match must hold entity tags in double quotes, or '*'.")
        if not found[1]:
            etags.append(found[2])
        place = found.end()
    return tuple(etags)


async def body(call: Call, shape: type[T]) -> T:
    """The JSON body of a request.

    Raises:
        RequestError: 408, 413, 415, or 400 when it is not JSON.
        InvalidInput: JSON, but not of this shape.
    """
    content_type = call.raw.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(
            415,
            "unsupported_media_type",
            "Unsupported media type",
            "Send 'Content-Type: application/json'.",
        )
    return await document(call, shape)


async def document(call: Call, shape: type[T]) -> T:
    """The same, whatever type the client says it has.

    Raises:
        RequestError: 408, 413, 415, or 400 when it is not JSON.
        InvalidInput: JSON, but not of this shape.
    """
    if call.raw.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RequestError(
            415,
            "unsupported_media_type",
            "Unsupported media type",
            "Send the body without Content-Encoding.",
        )
    try:
        # No variable holds the body: tracebacks show variables.
        return msgspec.json.decode(await _read(call), type=shape)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise not_json() from None


def not_json() -> RequestError:
    """400: the body is no JSON text."""
    return malformed("The body is not JSON in UTF-8.")


async def _read(call: Call) -> bytes:
    too_large = RequestError(
        413, "body_too_large", "Body too large", f"A body has at most {MAX_BODY} bytes."
    )
    if (call.raw.content_length or 0) > MAX_BODY:
        raise too_large
    _continue(call.raw)
    body = bytearray()
    try:
        async with asyncio.timeout(call.body_timeout):
            while len(body) <= MAX_BODY and not call.raw.content.at_eof():
                body += await call.raw.content.readany()
        if len(body) <= MAX_BODY:
            return bytes(body)
        raise too_large
    except TimeoutError:
        raise RequestError(
            408,
            "request_timeout",
            "Request timeout",
            f"The body did not arrive within {call.body_timeout:g} seconds.",
        ) from None
    except (PayloadAccessError, RequestPayloadError, HttpProcessingError):
        raise malformed("The body ended early, or is not framed as HTTP says.") from None
    finally:
        body.clear()


def _continue(raw: BaseRequest) -> None:
    """Tell a client who waits for it that his body is wanted (RFC 9110 §10.1.1)."""
    if raw.headers.get("Expect", "").lower() == "100-continue" and raw.transport is not None:
        raw.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _invalid(error: msgspec.ValidationError) -> InvalidInput:
    reason, _, place = str(error).partition(" - at `$")
    field_name = place.rstrip("`").removeprefix(".").partition(".")[0].partition("[")[0]
    if not field_name:
        quoted = re.search(r"field `([^`]*)`", reason)
        field_name = quoted[1] if quoted else "body"
    return InvalidInput(field_name, reason)
