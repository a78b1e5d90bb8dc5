"""One handler per route: from the request to the use case and back."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import orjson

from ..core import names, times
from ..core.access import Peer
from ..core.drafts import Delivery, Draft, KeyDraft, OfflineRead, Usage
from ..core.errors import IndexUnavailable, InvalidInput, TileNotFound
from ..core.events import Receipt
from ..core.keyring import Plaintext
from ..core.merkle import Unverified
from ..core.ports import ListQuery
from ..core.template import MAX_SECRETS
from ..core.tiles import parse_path
from ..service import Service
from . import deliveries, paging, requests, shapes
from .answers import Answer, json_answer
from .requests import Call

# How long a readiness check waits for what only the index knows.
_INDEX_SECONDS = 1.0
# "All of them" of a listing.
_UNLIMITED = 1 << 62
# What an event takes until it is committed, as far as one request makes many.
_EVENT_BYTES = 1024

_TEXT = {"Content-Type": "text/plain; charset=utf-8"}
_NEVER_KEPT = {"Cache-Control": "no-store"}


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


async def resolve_references(service: Service, call: Call) -> Answer:
    """Put values in the place of the references in a JSON document: all of them, or none."""
    sent = await requests.body(call, shapes.ResolveIn)
    try:
        document = Plaintext(bytes(sent.document).decode())
    except UnicodeDecodeError:
        raise requests.not_json() from None
    # One event for each secret, however short the reference to it is.
    call.hold(_EVENT_BYTES * MAX_SECRETS)
    usage = Usage(sent.pipeline, sent.stage)
    resolved = await service.references.resolve(call.caller, document, usage)
    call.hold(len(resolved.document.reveal()))
    return json_answer(shapes.resolved_out(resolved))


async def read_batch(service: Service, call: Call) -> Answer:
    """The values of several secrets: all of them, or none."""
    sent = await requests.body(call, shapes.BatchIn)
    call.hold(_EVENT_BYTES * len(sent.names))
    usage = Usage(sent.pipeline, sent.stage)
    found = await service.references.read(call.caller, sent.names, usage)
    call.hold(sum(len(one.value.reveal()) for one in found))
    return json_answer(shapes.batch_out(found))


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
    limit = requests.number(query, "limit", paging.PAGE, paging.PAGE)
    category = query.get("category")
    if category is not None and category not in names.CATEGORIES:
        raise InvalidInput("category", f"must be one of {', '.join(names.CATEGORIES)}")
    wanted = ListQuery(
        org_id=call.caller.principal.org_id,
        now=now,
        category=category,
        prefix=query.get("prefix"),
        expired=requests.boolean(query, "expired"),
        after=paging.decode_cursor(query.get("cursor")),
        # One more than asked for tells whether there is a next page.
        limit=limit + 1 if paged else _UNLIMITED,
    )
    pieces: list[bytes] = []
    last, count = "", 0
    async for page in service.listing(call.caller, wanted):
        kept = page[: limit - count] if paged else page
        added = [msgspec.json.encode(entry.shown(now)) for entry in kept]
        call.hold(sum(map(len, added)))
        pieces += added
        last, count = (kept[-1].name if kept else last), count + len(page)
    headers = paging.link(call, last) if paged and count > limit else {}
    return json_answer(b"[" + b",".join(pieces) + b"]", headers=headers)


async def record_offline(service: Service, call: Call) -> Answer:
    """Record reads that an agent served while the server could not be reached: each once."""
    sent = await requests.body(call, deliveries.OfflineIn)
    call.hold(_EVENT_BYTES * len(sent.reads))
    reads = tuple(
        OfflineRead(one.number, one.id, one.time, one.name, one.version, Peer(one.uid, one.pid))
        for one in sent.reads
    )
    delivery = Delivery(Plaintext(sent.ticket), reads)
    return json_answer(deliveries.OfflineOut(await service.offline.record(call.caller, delivery)))


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


async def get_checkpoint(service: Service, call: Call) -> Answer:
    """The newest signed checkpoint of the log, or the newest cosigned one: C2SP tlog-checkpoint."""
    note = await service.trail.checkpoint(call.caller, cosigned=_cosigned(call))
    return Answer(200, _TEXT | _NEVER_KEPT, note)


async def get_proof(service: Service, call: Call) -> Answer:
    """The proof that an event is in the log: C2SP tlog-proof. Waits if the event is new."""
    seq = call.params["seq"]
    if not (seq.isascii() and seq.isdigit() and len(seq) < 19):
        raise InvalidInput("seq", "must be a number, as in the header Audit-Seq")
    proof = await service.trail.proof(call.caller, int(seq), cosigned=_cosigned(call))
    return Answer(200, _TEXT | _NEVER_KEPT, proof)


def _cosigned(call: Call) -> bool:
    return requests.boolean(call.query, "cosigned") or False


async def get_tile(service: Service, call: Call) -> Answer:
    """A tile of the hashes of the log: C2SP tlog-tiles."""
    level, number = call.params["level"], call.params["number"]
    try:
        tile = parse_path(f"tile/{level}/{number}")
    except Unverified:
        raise TileNotFound from None
    # A tile never changes.
    headers = {
        "Content-Type": "application/octet-stream",
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    return Answer(200, headers, await service.trail.tile(call.caller, tile))


async def healthz(service: Service, call: Call) -> Answer:
    """The process is alive."""
    return json_answer(shapes.Health("alive"))


async def readyz(service: Service, call: Call) -> Answer:
    """Values can be served; if not, why; and what may soon prevent it. How many secrets are under
    each master key, or how far the index is that knows it. How it stands with the witnesses.
    """
    reason = await service.ready()
    if reason is not None:
        return json_answer(shapes.Health("unavailable", reason), 503, {"Retry-After": "1"})
    warnings = await service.space.warnings()
    keys = None
    # Values can be read without the index, and it may take a minute to be built.
    if service.building is None:
        with contextlib.suppress(TimeoutError, IndexUnavailable):
            async with asyncio.timeout(_INDEX_SECONDS):
                keys = shapes.key_counts(await service.key_usage())
    building = None if keys is not None else service.building
    index = None if building is None else shapes.IndexBuilding(*building)
    witnesses = shapes.witnesses_out(await service.trail.witnesses())
    return json_answer(shapes.ready(warnings, keys, index, witnesses))
