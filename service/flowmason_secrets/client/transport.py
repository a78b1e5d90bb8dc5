"""Requests over HTTP: one connection pool, attempts, and what may be tried again."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal, NamedTuple, TypeVar

import aiohttp
from yarl import URL

from .. import __version__, config
from ..core.errors import LogUnavailable, SecretsError
from ..core.keyring import Plaintext
from ..core.status import PASSING
from .address import Address
from .errors import OutcomeUnknown, Refused, UnexpectedAnswer, Unreachable
from .options import CHANCE, Options
from .refusals import refusal, retry_after

T = TypeVar("T")

# What carrying a request out twice would do: nothing; nothing, because the second time is refused;
# or another change.
Effect = Literal["none", "once", "change"]

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Request:
    """One operation. `subject` is the id of what it is about; `body` is JSON."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    effect: Effect = "none"
    subject: str = ""
    expected: tuple[int, ...] = (200, 201)


class Answer(NamedTuple):
    """A whole answer. Its `repr` has no body: that may hold a value."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    # Where the next page begins, if there is one.
    cursor: str | None

    def __repr__(self) -> str:
        return f"<Answer {self.status}>"


class _Failure(NamedTuple):
    """How an attempt failed: whether its request may have been carried out all the same, and
    whether another one may do better.
    """

    error: SecretsError
    carried_out: bool
    passing: bool
    retry_after: float = 0.0


class _Broken(Exception):
    """Not one of aiohttp's errors, which make it repeat some requests by itself, DELETE too."""


Take = Callable[[aiohttp.ClientResponse], Awaitable[T]]


class Transport:
    """The connections to one server. Belongs to one event loop."""

    def __init__(self, address: Address, api_key: Plaintext, options: Options) -> None:
        self.address = address
        self._api_key = api_key
        self.options = options
        self._session: aiohttp.ClientSession | None = None

    async def send(self, request: Request) -> Answer:
        """The whole answer to a request.

        Raises:
            SecretsError: as `open`.
        """
        return await self._persist(request, self._whole, None)

    async def open(self, request: Request, silence: float) -> aiohttp.ClientResponse:
        """The beginning of an answer that takes as long as it takes, in which nothing may come for
        at most so many seconds. The caller closes it.

        Raises:
            Unreachable, UnexpectedAnswer: there is no server, or it is another one.
            OutcomeUnknown: a change may have been carried out.
            SecretsError: what the server refused with.
        """
        return await self._persist(request, self._begun, silence)

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _persist(self, request: Request, take: Take[T], silence: float | None) -> T:
        clock = asyncio.get_running_loop().time
        until = clock() + self.options.deadline
        # Whether an earlier attempt may have been carried out.
        lost, retry = False, 0
        while True:
            timeout = self._timeout(until - clock(), silence)
            outcome = await self._attempt(request, take, timeout)
            if not isinstance(outcome, _Failure):
                return outcome
            pause = self.options.pause(retry, outcome.retry_after, CHANCE)
            again = outcome.passing and not (outcome.carried_out and request.effect == "change")
            if not again or retry == self.options.retries or clock() + pause >= until:
                raise _verdict(request, outcome, lost)
            lost = lost or outcome.carried_out
            retry += 1
            await asyncio.sleep(pause)

    def _timeout(self, left: float, silence: float | None) -> aiohttp.ClientTimeout:
        connect = self.options.connect_timeout
        if silence is not None:
            return aiohttp.ClientTimeout(sock_connect=connect, sock_read=silence)
        return aiohttp.ClientTimeout(total=min(self.options.timeout, left), sock_connect=connect)

    async def _attempt(
        self, request: Request, take: Take[T], timeout: aiohttp.ClientTimeout
    ) -> T | _Failure:
        # Failures are returned, not raised: a traceback would have aiohttp's frames, which hold
        # the API key and the body.
        attempt = SimpleNamespace(sent=False)
        try:
            response = await self._opened().request(
                request.method,
                URL(self.address.base + request.path, encoded=True),
                params=request.query,
                data=request.body,
                headers=_JSON | dict(request.headers) if request.body else request.headers,
                timeout=timeout,
                # A redirect could lead the API key to somebody else, or to plain HTTP.
                allow_redirects=False,
                trace_request_ctx=attempt,
            )
            try:
                if response.status in request.expected:
                    return await take(response)
                return self._refused(request, response, await response.read())
            except BaseException:
                response.close()
                raise
        except (_Broken, aiohttp.ClientError, OSError, TimeoutError) as error:
            return self._broken(error, attempt.sent)

    async def _whole(self, response: aiohttp.ClientResponse) -> Answer:
        link = response.links.get("next")
        cursor = None if link is None else URL(str(link["url"])).query.get("cursor")
        return Answer(response.status, response.headers, await response.read(), cursor)

    async def _begun(self, response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
        return response

    def _refused(self, request: Request, response: aiohttp.ClientResponse, body: bytes) -> _Failure:
        status, headers = response.status, response.headers
        error = refusal(body, headers, request.subject) if status >= 400 else None
        if error is None:
            error = UnexpectedAnswer(self.address.url, status)
        others = isinstance(error, (Refused, UnexpectedAnswer))
        # A proxy's refusal may come while a server behind it goes on, and the log may have an event
        # of which that could not be learnt. All else says that nothing was changed.
        carried_out = isinstance(error, LogUnavailable) or (others and status >= 500)
        passing = status == 503 and (others or isinstance(error, PASSING))
        return _Failure(error, carried_out, passing, retry_after(headers) or 0.0)

    def _broken(self, error: Exception, sent: bool) -> _Failure:
        if isinstance(error, _Broken) and error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment] # one of those above
        failure = Unreachable(self.address.url, _told(error, sent))
        # A certificate does not get better by itself.
        passing = not isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, aiohttp.InvalidURL))
        return _Failure(failure, sent, passing)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_request_headers_sent.append(_note_sent)
            self._session = aiohttp.ClientSession(
                connector=self._connector(),
                headers={
                    "Authorization": f"Bearer {self._api_key.reveal()}",
                    "User-Agent": f"flowmason-secrets/{__version__}",
                },
                # Not `trust_env`: it would send what ~/.netrc has in place of the API key.
                proxy=self._proxy(),
                trace_configs=[trace],
                middlewares=[_once],
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _connector(self) -> aiohttp.BaseConnector:
        limit = self.options.connections
        if self.address.unix_socket is not None:
            return aiohttp.UnixConnector(self.address.unix_socket, limit=limit)
        ca_file = self.options.ca_file
        trusted = True if ca_file is None else ssl.create_default_context(cafile=ca_file)
        return aiohttp.TCPConnector(limit=limit, ssl=trusted)

    def _proxy(self) -> str | None:
        if self.address.unix_socket is not None or not self.options.environment_proxies:
            return None
        return config.proxy_for(self.address.base)


def _verdict(request: Request, last: _Failure, lost: bool) -> SecretsError:
    """What is raised in the end."""
    if request.effect == "none" or not (lost or last.carried_out):
        return last.error
    if not lost and isinstance(last.error, PASSING):
        # The service's own word for just that.
        return last.error
    return OutcomeUnknown(str(last.error))


async def _note_sent(session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
    # Told before the first byte leaves: without it, nothing was carried out.
    context.trace_request_ctx.sent = True


async def _once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _Broken from error


def _told(error: BaseException, sent: bool) -> str:
    """What went wrong, without a byte of an answer: that could be a value."""
    if not sent:
        return str(error) or "it did not accept a connection in time"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection before it answered"
    return f"the answer broke off ({type(error).__name__})"
