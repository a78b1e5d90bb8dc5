"""One handler per route: from the request to the use case and back."""

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import Sequence
from typing import Any, get_args
from urllib.parse import quote, urlencode

import msgspec
import orjson

from ..core import names, times
from ..core.drafts import Draft, KeyDraft
from ..core.errors import IndexUnavailable, InvalidInput
from ..core.events import Receipt
from ..core.keyring import Plaintext
from ..core.ports import AuditQuery, Group, Grouping, ListQuery
from ..service import Service
from . import requests, shapes
from .answers import Answer, json_answer
from .requests import Call

PAGE = 1000
# Of a summary: the lengths of its buckets in seconds, the default first, and how many counts it
# may have.
BUCKETS = {"day": 86400, "hour": 3600}
GROUPS: tuple[Group, ...] = get_args(Group)
COUNTS = 10_000
# How long a readiness check waits for what only the index knows.
_INDEX_SECONDS = 1.0
# "All of them" of a listing.
_UNLIMITED = 1 << 62


def _receipt(receipt: Receipt) -> dict[str, str]:
    return {"Audit-Seq": str(receipt.seq), "Audit-Id": receipt.id}


async def get_secret(service: Service, call: Call) -> Answer:
    """The value of a secret."""
    metadata, value, receipt = await service.get(call.caller, call.params["name"])
    # The hottest answer: a plain dict is encoded faster than a shape is made.
    body = orjson.dumps(
        {
            "name": metadata.name,
            "value": value.reveal(),
            "category": metadata.category,
            "is_expired": False,
            "version": metadata.version,
        }
    )
    headers = {
        "Content-Type": "application/json",
        "Cache-Control": "no-store",
        "ETag": metadata.etag,
        "Audit-Seq": str(receipt.seq),
        "Audit-Id": receipt.id,
    }
    return Answer(200, headers, body)


async def put_secret(service: Service, call: Call) -> Answer:
    """Create or update a secret."""
    sent = await requests.body(call, shapes.SecretIn)
    draft = Draft(
        sent.name, Plaintext(sent.value), sent.description, sent.category, sent.expires_at
    )
    written = await service.set(call.caller, draft, requests.precondition(call.raw))
    status = 201 if written.created else 200
    headers = {"ETag": written.metadata.etag} | _receipt(written.receipt)
    if written.created:
        headers["Location"] = f"/api/v1/secrets/{quote(written.metadata.name, safe='')}"
    return json_answer(written.metadata.shown(time.time()), status, headers)


async def delete_secret(service: Service, call: Call) -> Answer:
    """Delete a secret."""
    name = call.params["name"]
    receipt = await service.delete(call.caller, name, requests.precondition(call.raw))
    return json_answer(shapes.Message(f"Secret '{name}' deleted"), headers=_receipt(receipt))


async def get_metadata(service: Service, call: Call) -> Answer:
    """Everything about a secret but its value."""
    metadata = await service.metadata(call.caller, call.params["name"])
    document = metadata.shown(time.time())
    return json_answer(document, headers={"ETag": metadata.etag})


async def list_secrets(service: Service, call: Call) -> Answer:
    """The secrets of the organisation, without their values."""
    query, now = call.query, time.time()
    paged = "limit" in query or "cursor" in query
    limit = requests.number(query, "limit", PAGE, PAGE)
    category = query.get("category")
    if category is not None and category not in names.CATEGORIES:
        raise InvalidInput("category", f"must be one of {', '.join(names.CATEGORIES)}")
    wanted = ListQuery(
        org_id=call.caller.principal.org_id,
        now=now,
        category=category,
        prefix=query.get("prefix"),
        expired=requests.boolean(query, "expired"),
        after=_decode_cursor(query.get("cursor")),
        # One more than asked for tells whether there is a next page.
        limit=limit + 1 if paged else _UNLIMITED,
    )
    pieces: list[bytes] = []
    last, count = "", 0
    async for page in service.listing(call.caller, wanted):
        kept = page[: limit - count] if paged else page
        pieces += [msgspec.json.encode(entry.shown(now)) for entry in kept]
        last, count = (kept[-1].name if kept else last), count + len(page)
    headers = _next(call, last) if paged and count > limit else {}
    return json_answer(b"[" + b",".join(pieces) + b"]", headers=headers)


async def get_audit_log(service: Service, call: Call) -> Answer:
    """The events of the organisation, newest first."""
    query = call.query
    limit = requests.number(query, "limit", 100, PAGE)
    cursor = _decode_cursor(query.get("cursor"))
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise InvalidInput("cursor", "is not one that this service gave out")
    wanted = _audit_query(call)._replace(
        before=None if cursor is None else int(cursor),
        limit=limit + 1,
        offset=requests.number(query, "offset", 0, 1 << 53),
    )
    lines = await service.audit(call.caller, wanted)
    headers = _next(call, str(lines[limit - 1]["seq"])) if len(lines) > limit else {}
    return json_answer([shapes.audit_out(line) for line in lines[:limit]], headers=headers)


async def summarise_audit_log(service: Service, call: Call) -> Answer:
    """How many events there are, by hour or day and by action, outcome, actor or name."""
    by = requests.choice(call.query, "by", GROUPS)
    bucket = requests.choice(call.query, "bucket", tuple(BUCKETS))
    grouping = Grouping(by, BUCKETS[bucket], COUNTS)
    counts = await service.audit_summary(call.caller, _audit_query(call), grouping)
    return json_answer(shapes.audit_summary(by, bucket, counts))


async def create_api_key(service: Service, call: Call) -> Answer:
    """Create an API key; the raw key is told this once."""
    sent = await requests.body(call, shapes.ApiKeyIn)
    draft = KeyDraft(sent.name, tuple(sent.scopes), tuple(sent.allow), sent.expires_at)
    issued = await service.keys.issue(call.caller, draft)
    key = shapes.api_key_out(issued.key, time.time())
    document = shapes.ApiKeyIssued(key, issued.raw.reveal())
    return json_answer(document, 201, _receipt(issued.receipt))


async def list_api_keys(service: Service, call: Call) -> Answer:
    """The API keys of the organisation, without the keys themselves."""
    keys: Sequence[Any] = await service.keys.all(call.caller)
    now = time.time()
    return json_answer([shapes.api_key_out(key, now) for key in keys])


async def revoke_api_key(service: Service, call: Call) -> Answer:
    """Revoke an API key: when this has answered, no process accepts it any more."""
    key_id = call.params["id"]
    receipt = await service.keys.revoke(call.caller, key_id)
    return json_answer(shapes.Message(f"API key '{key_id}' revoked"), headers=_receipt(receipt))


async def whoami(service: Service, call: Call) -> Answer:
    """Who the API key belongs to and what it may do."""
    principal = await service.whoami(call.caller)
    expires_at = None if principal.expires_at is None else times.render(principal.expires_at)
    scopes, allow = sorted(principal.scopes), list(principal.allow)
    return json_answer(shapes.WhoAmI(principal.org_id, principal.actor, scopes, allow, expires_at))


async def healthz(service: Service, call: Call) -> Answer:
    """The process is alive."""
    return json_answer(shapes.Health("alive"))


async def readyz(service: Service, call: Call) -> Answer:
    """Values can be served; if not, why. And how many secrets are under each master key, or how far
    the index is that knows it.
    """
    reason = await service.ready()
    if reason is not None:
        return json_answer(shapes.Health("unavailable", reason), 503, {"Retry-After": "1"})
    keys = None
    # Values can be read without the index, and it may take a minute to be built.
    if service.building is None:
        with contextlib.suppress(TimeoutError, IndexUnavailable):
            async with asyncio.timeout(_INDEX_SECONDS):
                keys = shapes.key_counts(await service.key_usage())
    building = None if keys is not None else service.building
    index = None if building is None else shapes.IndexBuilding(*building)
    return json_answer(shapes.Health("ready", keys=keys, index=index))


def _audit_query(call: Call) -> AuditQuery:
    """What the filters ask for, in the caller's organisation."""
    query = call.query
    return AuditQuery(
        org_id=call.caller.principal.org_id,
        resource_type=query.get("resource_type"),
        action=query.get("action"),
        name=query.get("name"),
        actor=query.get("actor"),
        success=requests.boolean(query, "success"),
        since=_time(query, "since"),
        until=_time(query, "until"),
    )


def _time(query: dict[str, str], name: str) -> float | None:
    text = query.get(name)
    return None if text is None else times.parse(text, name)


def _next(call: Call, cursor: str) -> dict[str, str]:
    """The `Link` header (RFC 8288) to the page after the entry that `cursor` names."""
    encoded = base64.urlsafe_b64encode(cursor.encode()).decode().rstrip("=")
    rest = {name: value for name, value in call.query.items() if name != "offset"}
    path = call.raw.raw_path.partition("?")[0]
    return {"Link": f'<{path}?{urlencode(rest | {"cursor": encoded})}>; rel="next"'}


def _decode_cursor(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidInput("cursor", "is not one that this service gave out") from None
