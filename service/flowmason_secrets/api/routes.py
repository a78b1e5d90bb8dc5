"""The route table: dispatch, documentation and tests all follow from it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp.web_response import StreamResponse

from ..core.access import EXECUTE, FULL, READ, SCOPES
from ..core.records import SecretMetadata
from ..service import Service
from . import deliveries, handlers, paging, shapes, trail
from .formats import FORMATS
from .requests import PEER_HEADER, Call, decode_segment

Handler = Callable[[Service, Call], Awaitable[StreamResponse]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter; `schema` is its JSON Schema."""

    name: str
    schema: dict[str, object]
    description: str


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `scopes` is empty where no API key is needed; `answers` has the success
    shapes by status, `problems` the statuses of errors. `media` are the content types of a success.
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
    media: tuple[str, ...] = ("application/json",)

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
        {"type": "integer", "minimum": 1, "maximum": paging.PAGE},
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
_EVENTS = (
    Parameter("resource_type", _TEXT, "Only events about such resources: secret, api_key."),
    Parameter("action", _TEXT, "Only this action, like secret.read."),
    Parameter("name", _TEXT, "Only events about the resource of this name."),
    Parameter("actor", _TEXT, "Only events of this API key id or user."),
    Parameter("success", _FLAG, "Only successes, or only refusals and failures."),
)
_PERIOD = (
    Parameter("since", _TIME, "Only events from this time on."),
    Parameter("until", _TIME, "Only events before this time."),
)
_AFTER: dict[str, object] = {"type": "integer", "minimum": 0}
_AUDIT = (
    *_EVENTS,
    *_PERIOD,
    Parameter("after", _AFTER, "Only events after the one of this seq, the oldest first."),
    Parameter(
        "wait",
        {"type": "integer", "minimum": 0, "maximum": trail.LONGEST_WAIT},
        "With after: if there are none yet, wait so many seconds for one.",
    ),
    Parameter("offset", {"type": "integer", "minimum": 0}, "Leave out so many of the newest."),
    *_PAGE,
)
_STREAM = (
    *_EVENTS,
    Parameter("after", _AFTER, "Begin after the event of this seq, as with Last-Event-ID."),
)
_EXPORT = (
    Parameter(
        "format",
        {"type": "string", "enum": [*FORMATS], "default": "ndjson"},
        "The lines of the log as they are, CSV, or OCSF API Activity as one JSON object a line.",
    ),
    *_EVENTS,
    *_PERIOD,
)
_SUMMARY = (
    *_EVENTS,
    *_PERIOD,
    Parameter(
        "by",
        {"type": "string", "enum": list(trail.GROUPS), "default": trail.GROUPS[0]},
        "What is counted for each value of its own.",
    ),
    Parameter(
        "bucket",
        {"type": "string", "enum": list(trail.BUCKETS), "default": next(iter(trail.BUCKETS))},
        f"The length of time that each count is for, in UTC. At most {trail.COUNTS:,} counts.",
    ),
)
_COSIGNED = (
    Parameter("cosigned", _FLAG, "With the newest checkpoint that a witness has cosigned."),
)
_PEER = (PEER_HEADER,)
_WRITE = ("If-Match", "If-None-Match")

ROUTES: tuple[Route, ...] = (
    Route(
        "GET",
        "/api/v1/secrets",
        handlers.list_secrets,
        SCOPES,
        {200: list[SecretMetadata]},
        (400, 401, 422, 503),
        query=_LISTING,
    ),
    Route(
        "POST",
        "/api/v1/secrets",
        handlers.put_secret,
        (FULL,),
        {201: SecretMetadata, 200: SecretMetadata},
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
        headers=_PEER,
    ),
    Route(
        "POST",
        "/api/v1/secrets/resolve",
        handlers.resolve_references,
        (FULL, EXECUTE),
        {200: shapes.ResolvedOut},
        (400, 401, 403, 408, 413, 415, 422, 503),
        body=shapes.ResolveIn,
        headers=_PEER,
    ),
    Route(
        "POST",
        "/api/v1/secrets/batch",
        handlers.read_batch,
        (FULL, EXECUTE),
        {200: shapes.BatchOut},
        (400, 401, 403, 408, 413, 415, 422, 503),
        body=shapes.BatchIn,
        headers=_PEER,
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
        {200: SecretMetadata},
        (400, 401, 403, 404, 422, 500, 503),
    ),
    Route(
        "GET",
        "/api/v1/auth/audit-log",
        trail.get_audit_log,
        (FULL, READ),
        {200: list[shapes.AuditEntry]},
        (400, 401, 403, 410, 422, 503),
        query=_AUDIT,
    ),
    Route(
        "GET",
        "/api/v1/auth/audit-log/stream",
        trail.stream_audit_log,
        (FULL, READ),
        {200: str},
        (400, 401, 403, 410, 422, 503),
        query=_STREAM,
        headers=("Last-Event-ID",),
        media=("text/event-stream",),
    ),
    Route(
        "GET",
        "/api/v1/auth/audit-log/export",
        trail.export_audit_log,
        (FULL, READ),
        {200: str},
        (400, 401, 403, 422, 503),
        query=_EXPORT,
        media=("application/x-ndjson", "text/csv"),
    ),
    Route(
        "GET",
        "/api/v1/auth/audit-log/summary",
        trail.summarise_audit_log,
        (FULL, READ),
        {200: shapes.AuditSummary},
        (400, 401, 403, 422, 503),
        query=_SUMMARY,
    ),
    Route(
        "POST",
        "/api/v1/auth/audit-log/offline",
        handlers.record_offline,
        (FULL, EXECUTE),
        {200: deliveries.OfflineOut},
        (400, 401, 403, 408, 413, 415, 422, 503),
        body=deliveries.OfflineIn,
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
    Route(
        "GET",
        "/api/v1/log/checkpoint",
        handlers.get_checkpoint,
        SCOPES,
        {200: str},
        (400, 401, 404, 422, 503),
        query=_COSIGNED,
        media=("text/plain",),
    ),
    Route(
        "GET",
        "/api/v1/log/proof/{seq}",
        handlers.get_proof,
        (FULL, READ),
        {200: str},
        (400, 401, 403, 404, 410, 422, 503),
        query=_COSIGNED,
        media=("text/plain",),
    ),
    Route(
        "GET",
        "/api/v1/log/tile/{level}/{number}",
        handlers.get_tile,
        SCOPES,
        {200: str},
        (400, 401, 404, 422, 503),
        media=("application/octet-stream",),
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
    """Finds the routes of a path: by its fixed part before a last parameter, or segment by
    segment where a parameter is in the middle. Of two parameters, the second takes the rest of the
    path with its slashes. A path that is fixed for one method may be one with a parameter for
    another: so a secret can have the name of an operation on secrets.
    """

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._fixed: dict[str, dict[str, Route]] = {}
        self._last: dict[str, tuple[str, dict[str, Route]]] = {}
        self._middle: dict[tuple[str, str], tuple[str, dict[str, Route]]] = {}
        self._rest: dict[str, tuple[tuple[str, str], dict[str, Route]]] = {}
        for route in routes:
            head, opening, rest = route.template.partition("{")
            parameter, _, tail = rest.partition("}")
            if not opening:
                self._fixed.setdefault(head, {})[route.method] = route
            elif tail.startswith("/{"):
                self._rest.setdefault(head, ((parameter, tail[2:-1]), {}))[1][route.method] = route
            elif not tail:
                self._last.setdefault(head, (parameter, {}))[1][route.method] = route
            else:
                self._middle.setdefault((head, tail), (parameter, {}))[1][route.method] = route

    def find(self, path: str) -> tuple[dict[str, Route], dict[str, str]] | None:
        """The routes by method and the parameters of a percent-encoded path, or None.

        Raises:
            RequestError: a parameter is not UTF-8.
        """
        cut = path.rfind("/") + 1
        last = self._last.get(path[:cut])
        fixed = self._fixed.get(path)
        if last is not None:
            methods = last[1] if fixed is None else last[1] | fixed
            return methods, {last[0]: decode_segment(path[cut:])}
        if fixed is not None:
            return fixed, {}
        before = path.rfind("/", 0, cut - 1) + 1
        middle = self._middle.get((path[:before], path[cut - 1 :]))
        if middle is not None:
            return middle[1], {middle[0]: decode_segment(path[before : cut - 1])}
        for head, (names, methods) in self._rest.items():
            if path.startswith(head):
                parts = path[len(head) :].partition("/")[::2]
                return methods, dict(zip(names, map(decode_segment, parts), strict=True))
        return None
