"""The route table: dispatch, documentation and tests all follow from it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from ..core.access import FULL, READ, SCOPES
from ..service import Service
from . import handlers, shapes
from .requests import Call, decode_segment

Handler = Callable[[Service, Call], Awaitable[web.Response]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter; `schema` is its JSON Schema."""

    name: str
    schema: dict[str, object]
    description: str


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `scopes` is empty where no API key is needed; `answers` has the success
    shapes by status, `problems` the statuses of errors.
    """

    method: str
    template: str
    handler: Handler
    scopes: tuple[str, ...]
    answers: dict[int, type | object]
    problems: tuple[int, ...] = ()
    body: type | None = None
    query: tuple[Parameter, ...] = ()
    headers: tuple[str, ...] = ()

    @property
    def known_query(self) -> frozenset[str]:
        """The names of its query parameters."""
        return frozenset(parameter.name for parameter in self.query)


_TEXT: dict[str, object] = {"type": "string"}
_FLAG: dict[str, object] = {"type": "boolean"}
_TIME: dict[str, object] = {"type": "string", "format": "date-time"}
_PAGE = (
    Parameter(
        "limit",
        {"type": "integer", "minimum": 1, "maximum": handlers.PAGE},
        "At most this many; the Link header leads to the next page.",
    ),
    Parameter("cursor", _TEXT, "From the Link header of the page before."),
)
_LISTING = (
    Parameter(
        "category",
        {"type": "string", "enum": ["api_key", "token", "credential", "other"]},
        "Only secrets of this category.",
    ),
    Parameter("prefix", _TEXT, "Only names that begin so."),
    Parameter("expired", _FLAG, "Only expired ones, or only others."),
    *_PAGE,
)
_AUDIT = (
    Parameter("resource_type", _TEXT, "Only events about such resources: secret, api_key."),
    Parameter("action", _TEXT, "Only this action, like secret.read."),
    Parameter("name", _TEXT, "Only events about the resource of this name."),
    Parameter("actor", _TEXT, "Only events of this API key id or user."),
    Parameter("success", _FLAG, "Only successes, or only refusals and failures."),
    Parameter("since", _TIME, "Only events from this time on."),
    Parameter("until", _TIME, "Only events before this time."),
    Parameter("offset", {"type": "integer", "minimum": 0}, "Leave out so many of the newest."),
    *_PAGE,
)
_WRITE = ("If-Match", "If-None-Match")

ROUTES: tuple[Route, ...] = (
    Route(
        "GET",
        "/api/v1/secrets",
        handlers.list_secrets,
        SCOPES,
        {200: list[shapes.SecretMetadata]},
        (400, 401, 422, 503),
        query=_LISTING,
    ),
    Route(
        "POST",
        "/api/v1/secrets",
        handlers.put_secret,
        (FULL,),
        {201: shapes.SecretMetadata, 200: shapes.SecretMetadata},
        (400, 401, 403, 408, 412, 413, 415, 422, 503),
        body=shapes.SecretIn,
        headers=_WRITE,
    ),
    Route(
        "GET",
        "/api/v1/secrets/{name}",
        handlers.get_secret,
        (FULL,),
        {200: shapes.SecretValue},
        (400, 401, 403, 404, 410, 422, 500, 503),
    ),
    Route(
        "DELETE",
        "/api/v1/secrets/{name}",
        handlers.delete_secret,
        (FULL,),
        {200: shapes.Message},
        (400, 401, 403, 404, 412, 422, 503),
        headers=_WRITE,
    ),
    Route(
        "GET",
        "/api/v1/secrets/{name}/metadata",
        handlers.get_metadata,
        SCOPES,
        {200: shapes.SecretMetadata},
        (400, 401, 403, 404, 422, 500, 503),
    ),
    Route(
        "GET",
        "/api/v1/auth/audit-log",
        handlers.get_audit_log,
        (FULL, READ),
        {200: list[shapes.AuditEntry]},
        (400, 401, 403, 422, 503),
        query=_AUDIT,
    ),
    Route(
        "POST",
        "/api/v1/auth/api-keys",
        handlers.create_api_key,
        (FULL,),
        {201: shapes.ApiKeyIssued},
        (400, 401, 403, 408, 413, 415, 422, 503),
        body=shapes.ApiKeyIn,
    ),
    Route(
        "GET",
        "/api/v1/auth/api-keys",
        handlers.list_api_keys,
        (FULL,),
        {200: list[shapes.ApiKeyOut]},
        (400, 401, 403, 422, 503),
    ),
    Route(
        "DELETE",
        "/api/v1/auth/api-keys/{id}",
        handlers.revoke_api_key,
        (FULL,),
        {200: shapes.Message},
        (400, 401, 403, 404, 422, 503),
    ),
    Route(
        "GET",
        "/api/v1/auth/whoami",
        handlers.whoami,
        SCOPES,
        {200: shapes.WhoAmI},
        (400, 401, 422, 503),
    ),
    Route("GET", "/healthz", handlers.healthz, (), {200: shapes.Health}, (400, 422)),
    Route(
        "GET",
        "/readyz",
        handlers.readyz,
        (),
        {200: shapes.Health, 503: shapes.Health},
        (400, 422),
    ),
)


class RouteTable:
    """Finds the route of a path. Routes differ in their fixed segments, so a dict finds them."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        # Segments with None for parameters → their names, and the routes by method.
        self._paths: dict[tuple[str | None, ...], tuple[tuple[str, ...], dict[str, Route]]] = {}
        for route in routes:
            segments = route.template.split("/")[1:]
            shape = tuple(None if part.startswith("{") else part for part in segments)
            parameters = tuple(part[1:-1] for part in segments if part.startswith("{"))
            self._paths.setdefault(shape, (parameters, {}))[1][route.method] = route

    def find(self, path: str) -> tuple[dict[str, Route], dict[str, str]] | None:
        """The routes by method and the parameters of a percent-encoded path, or None.

        Raises:
            RequestError: a parameter is not UTF-8.
        """
        segments = path.split("/")[1:]
        for shape, (names, methods) in self._paths.items():
            if len(shape) == len(segments) and all(
                part is None or part == given for part, given in zip(shape, segments, strict=True)
            ):
                values = [
                    decode_segment(given)
                    for part, given in zip(shape, segments, strict=True)
                    if part is None
                ]
                return methods, dict(zip(names, values, strict=True))
        return None
