"""Dispatch: from aiohttp's low-level server to the handlers."""

import itertools
import logging
import secrets

from aiohttp import web
from aiohttp.web_request import BaseRequest

from ..core.access import Caller, Principal
from ..core.errors import SecretsError, Unauthenticated
from ..service import Service
from . import openapi, requests
from .problems import RequestError, internal_error, problem_response
from .requests import Call
from .routes import ROUTES, Route, RouteTable

_log = logging.getLogger(__name__)

OPENAPI_PATH = "/api/v1/openapi.json"

# Public routes ask nobody who he is.
_NOBODY = Caller(Principal("", "", "nobody", frozenset()))


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
        self._table = RouteTable(ROUTES)
        self._openapi = openapi.document()
        # Unique among processes and requests, and cheap.
        stem, counter = secrets.token_hex(6), itertools.count(1)
        self._new_request_id = lambda: f"{stem}-{next(counter):x}"

    async def __call__(self, raw: BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        request_id = requests.request_id(raw, self._new_request_id)
        try:
            return await self._answer(raw, request_id)
        except SecretsError as error:
            return problem_response(error, request_id)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("request %s failed", request_id)
            return internal_error(request_id)

    async def _answer(self, raw: BaseRequest, request_id: str) -> web.StreamResponse:
        path, _, query = raw.raw_path.partition("?")
        route, params = self._route(raw.method, path)
        if route is None:
            return web.Response(
                body=self._openapi,
                headers={"Content-Type": "application/json", "Server": "flowmason"},
            )
        decoded = requests.decode_query(query, route.known_query) if query else {}
        caller = await self._caller(raw, request_id) if route.scopes else _NOBODY
        call = Call(raw, caller, params, decoded, self._body_timeout)
        return await route.handler(self._service, call)

    def _route(self, method: str, path: str) -> tuple[Route | None, dict[str, str]]:
        found = self._table.find(path)
        if found is None:
            if path == OPENAPI_PATH and method == "GET":
                return None, {}
            raise RequestError(404, "no_such_route", "No such route", f"See {OPENAPI_PATH}.")
        methods, params = found
        route = methods.get(method)
        if route is None:
            error = RequestError(
                405, "method_not_allowed", "Method not allowed", f"Here: {', '.join(methods)}."
            )
            error.headers = {"Allow": ", ".join(methods)}
            raise error
        return route, params

    async def _caller(self, raw: BaseRequest, request_id: str) -> Caller:
        address = requests.client_ip(raw, self._behind_proxy)
        key = requests.api_key(raw)
        try:
            if not key:
                raise Unauthenticated
            principal, as_of = await self._service.authentication.authenticate(key)
        except Unauthenticated:
            self._service.failures.note(address)
            raise
        return Caller(principal, as_of, address, requests.user_agent(raw), request_id)
