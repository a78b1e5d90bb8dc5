"""Dispatch: from aiohttp's low-level server to the handlers."""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from ..core.access import Caller, Principal
from ..core.errors import SecretsError, Unauthenticated
from ..service import Service
from . import openapi, requests
from .answers import Answer, json_answer
from .problems import RequestError, internal_error, malformed, problem_response
from .requests import Call
from .routes import ROUTES, Route, RouteTable

_log = logging.getLogger(__name__)

OPENAPI_PATH = "/api/v1/openapi.json"

# Public routes ask nobody who he is.
_NOBODY = Caller(Principal("", "", "nobody", frozenset()))


def _openapi_route() -> Route:
    body = openapi.document()

    async def get_openapi(service: Service, call: Call) -> Answer:
        return json_answer(body)

    return Route("GET", OPENAPI_PATH, get_openapi, (), {})


class Dispatcher:
    """The request handler of a `web.Server`.

    There is no `web.Application` below: its resolving and middleware cost a fourth of a bare
    request, and the routes are few.
    """

    def __init__(
        self, service: Service, *, body_timeout: float = 30.0, behind_proxy: bool = False
    ) -> None:
        self._service = service
        self._body_timeout = body_timeout
        self._behind_proxy = behind_proxy
        self._active = 0
        self._idle: asyncio.Event | None = None
        self._table = RouteTable((*ROUTES, _openapi_route()))
        # Unique among processes and requests, and cheap.
        stem, counter = secrets.token_hex(6), itertools.count(1)
        self._new_request_id: Callable[[], str] = lambda: f"{stem}-{next(counter):x}"

    async def __call__(self, raw: BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        request_id = requests.request_id(raw) or self._new_request_id()
        self._active += 1
        try:
            target = raw.raw_path
            if not target.startswith("/"):
                target = requests.origin_form(target)
            path, _, query = target.partition("?")
            route, params = self._route(raw.method, path)
            decoded = requests.decode_query(query, route.known_query) if query else {}
            caller = await self._caller(raw, request_id) if route.scopes else _NOBODY
            call = Call(raw, caller, params, decoded, self._body_timeout)
            return await route.handler(self._service, call)
        except SecretsError as error:
            if isinstance(error, Unauthenticated):
                self._service.failures.note(requests.client_ip(raw, self._behind_proxy))
            return problem_response(error, request_id)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("request %s failed", request_id)
            return internal_error(request_id)
        finally:
            self._active -= 1
            if self._idle is not None and not self._active:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Return when no request is being answered, or after so many seconds."""
        self._idle = asyncio.Event()
        if self._active:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    def _route(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        found = self._table.find(path)
        if found is None:
            raise RequestError(404, "no_such_route", "No such route", f"See {OPENAPI_PATH}.")
        methods, params = found
        route = methods.get(method)
        if route is None:
            allowed = ", ".join(methods)
            error = RequestError(
                405, "method_not_allowed", "Method not allowed", f"Allowed here: {allowed}."
            )
            error.headers = {"Allow": allowed}
            raise error
        return route, params

    async def _caller(self, raw: BaseRequest, request_id: str) -> Caller:
        key = requests.api_key(raw)
        if key is None:
            raise Unauthenticated
        authentication = self._service.authentication
        known = authentication.recall(key) or await authentication.authenticate(key)
        address = requests.client_ip(raw, self._behind_proxy)
        return Caller(*known, address, requests.user_agent(raw), request_id)


class Protocol(RequestHandler):
    """aiohttp's protocol, but what is not HTTP is answered and logged without a word of it: it may
    hold keys and values, and anybody can send it.
    """

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what the parser refused; then the connection is closed."""
        request_id = secrets.token_hex(8)
        _log.info("request %s is not HTTP: %s", request_id, type(exc).__name__)
        answer = problem_response(malformed("The request is not HTTP/1.1."), request_id)
        answer.force_close()
        return answer


class Server(web.Server):
    """aiohttp's low-level server with our protocol."""

    def __call__(self) -> Protocol:
        """The protocol of a new connection."""
        return Protocol(self, loop=self._loop, **self._kwargs)


def make_server(dispatcher: Dispatcher, keepalive_timeout: float = 75.0) -> Server:
    """A server that answers with `dispatcher`; the timeout in seconds."""
    return Server(
        dispatcher,
        access_log=None,
        keepalive_timeout=keepalive_timeout,
        # Bodies are small, and what unpacks to gigabytes needs no unpacking.
        auto_decompress=False,
    )
