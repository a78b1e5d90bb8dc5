"""Dispatch: from aiohttp's low-level server to the handlers."""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from ..authentication import digest
from ..core.access import Caller, Principal, Sender
from ..core.errors import SecretsError, Unauthenticated
from ..service import Service
from . import openapi, requests, vaultface
from .answers import Answer, json_answer
from .connections import Budget, Connection, Limits
from .faces import Face
from .problems import RequestError, internal_error, problem_response
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
    """The request handler of a `Server`.

    There is no `web.Application` below: its resolving and middleware cost a fourth of a bare
    request, and the routes are few.
    """

    def __init__(
        self,
        service: Service,
        budget: Budget | None = None,
        *,
        body_timeout: float = 30.0,
        behind_proxy: bool = False,
        vault: bool = False,
    ) -> None:
        self._service = service
        self._authentication = service.authentication
        self.budget = budget or Budget(Limits().request_bytes)
        self._body_timeout = body_timeout
        self._behind_proxy = behind_proxy
        self._active = 0
        self._idle: asyncio.Event | None = None
        table = RouteTable((*ROUTES, _openapi_route()))
        self._face = Face(
            table.find,
            requests.api_key,
            requests.decode_query,
            problem_response,
            internal_error,
        )
        self._vault = vaultface.FACE if vault else None
        # Unique among processes and requests, and cheap.
        stem, counter = secrets.token_hex(6), itertools.count(1)
        self._new_request_id: Callable[[], str] = lambda: f"{stem}-{next(counter):x}"

    async def __call__(self, raw: BaseRequest) -> StreamResponse:
        """Answer one request."""
        request_id: str | None = None
        self._active += 1
        call: Call | None = None
        face = self._face
        try:
            target = raw.raw_path
            if not target.startswith("/"):
                target = requests.origin_form(target)
            path, _, query = target.partition("?")
            if self._vault is not None and path.startswith(vaultface.PREFIX):
                face = self._vault
            route, params = _route(face, raw.method, path)
            decoded = face.query(query, route.known_query) if query else {}
            caller = _NOBODY
            if route.scopes:
                fingerprint, address, agent, peer, given = self._sender(raw, face)
                request_id = given or self._new_request_id()
                found = self._authentication.recall(fingerprint)
                known = found or await self._authentication.look_up(fingerprint)
                caller = Caller(*known, address, agent, request_id, peer)
            call = Call(raw, caller, params, decoded, self.budget, self._body_timeout)
            return await route.handler(self._service, call)
        except SecretsError as error:
            if isinstance(error, Unauthenticated):
                self._service.failures.note(requests.client_ip(raw, self._behind_proxy))
            return face.problem(error, request_id or self._request_id(raw))
        except ConnectionError:
            raise
        except Exception:
            request_id = request_id or self._request_id(raw)
            _log.exception("request %s failed", request_id)
            return face.internal_error(request_id)
        finally:
            self._active -= 1
            if call is not None and call.held:
                # Next its answer is written, and what isn't taken of that is counted again.
                self.budget.give(call.held)
            if self._idle is not None and not self._active:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Return when no request is being answered, or after so many seconds."""
        self._idle = asyncio.Event()
        if self._active:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    def _request_id(self, raw: BaseRequest) -> str:
        return requests.request_id(raw) or self._new_request_id()

    def _sender(self, raw: BaseRequest, face: Face) -> Sender:
        """Clients that keep a connection open tend to send the same headers again."""
        connection = raw.protocol
        assert isinstance(connection, Connection)  # noqa: S101 - `Server` makes no others
        # No variable holds the headers: tracebacks show variables.
        sender = connection.sender.get((id(face), raw.raw_headers))
        if sender is not None:
            return sender
        key = face.api_key(raw)
        if key is None:
            raise Unauthenticated
        address = requests.client_ip(raw, self._behind_proxy)
        agent, peer = requests.user_agent(raw), requests.peer(raw)
        sender = Sender(digest(key), address, agent, peer, requests.request_id(raw))
        connection.sender = {(id(face), raw.raw_headers): sender}
        return sender


def _route(face: Face, method: str, path: str) -> tuple[Route, dict[str, str]]:
    found = face.find(path)
    if found is None:
        raise RequestError(404, "no_such_route", "No such route", f"See {OPENAPI_PATH}.")
    methods, params = found
    route = methods.get(method)
    if route is None:
        allowed = ", ".join(route.method for route in methods.values())
        error = RequestError(
            405, "method_not_allowed", "Method not allowed", f"Allowed here: {allowed}."
        )
        error.headers = {"Allow": allowed}
        raise error
    return route, params
