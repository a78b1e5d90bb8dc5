"""The OpenAPI 3.1 document, derived from the route table."""

from http import HTTPStatus
from typing import Any

import msgspec

from .. import __version__
from .routes import ROUTES, Route
from .shapes import Problem

# Any request may be answered so, before its route is known.
_ANY = (400, 408, 431, 503)

_REF = "#/components/schemas/{name}"


def document() -> bytes:
    """The whole document as JSON."""
    types = [Problem]
    for route in ROUTES:
        types += [shape for shape in (*route.answers.values(), route.body) if shape is not None]  # type: ignore[misc] # shapes are types
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = {str(shape): schema for shape, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route, schema_of)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "FlowMason Secrets",
                "version": __version__,
                "description": "Encrypted secrets with an event-sourced audit trail.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                },
            },
        }
    )


def _operation(route: Route, schema_of: dict[str, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": (route.handler.__doc__ or "").splitlines()[0],
        "parameters": _parameters(route),
        "responses": {
            str(status): _response(status, route.media, schema_of[str(shape)])
            for status, shape in route.answers.items()
        },
    }
    problem = schema_of[str(Problem)]
    for status in sorted({*route.problems, *_ANY}):
        response = _response(status, ("application/problem+json",), problem)
        known = operation["responses"].setdefault(str(status), response)
        known["content"] |= response["content"]
    if route.scopes:
        operation["security"] = [{"bearer": []}, {"header": []}]
        operation["description"] = f"Scopes: {', '.join(route.scopes)}."
    if route.body is not None:
        content = {"application/json": {"schema": schema_of[str(route.body)]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    path = [part[1:-1] for part in route.template.split("/") if part.startswith("{")]
    text = {"type": "string"}
    return [
        *({"name": name, "in": "path", "required": True, "schema": text} for name in path),
        *(
            {"name": p.name, "in": "query", "schema": p.schema, "description": p.description}
            for p in route.query
        ),
        *({"name": name, "in": "header", "schema": text} for name in route.headers),
    ]


def _response(status: int, media: tuple[str, ...], schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": HTTPStatus(status).phrase,
        "content": {content_type: {"schema": schema} for content_type in media},
    }
