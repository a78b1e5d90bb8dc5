"""The handlers of the audit trail: asking for events, following them, exporting them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, get_args

from aiohttp.web_response import StreamResponse

from ..core import times
from ..core.errors import InvalidInput, SecretsError
from ..core.events import Entry
from ..core.ports import AuditQuery, Group, Grouping
from ..service import Service
from . import entries, paging, requests, shapes
from .answers import Answer, json_answer
from .flow import Flow, check_there
from .formats import FORMATS, rendered
from .requests import Call

# The longest that a request waits for the next event, in seconds.
LONGEST_WAIT = 60

# Seconds after which a stream without events shows that it is alive.
HEARTBEAT = 15.0

# Seconds that the reader of a stream has, at its end, for what he has not taken yet: a server that
# stops does not wait for him.
_FAREWELL = 1.0

# Of a summary: the lengths of its buckets in seconds, the default first, and how many counts it
# may have.
BUCKETS = {"day": 86400, "hour": 3600}
GROUPS: tuple[Group, ...] = get_args(Group)
COUNTS = 10_000

# The time from which on an answer has all events; before it some were archived.
COMPLETE_SINCE = "Audit-Complete-Since"

# How many events a stream holds at once for a reader: below a mebibyte.
_HELD = 100


async def get_audit_log(service: Service, call: Call) -> Answer:
    """The events of the organisation, newest first; after one of them, oldest first."""
    query = call.query
    limit = requests.number(query, "limit", 100, paging.PAGE)
    cursor = paging.decode_cursor(query.get("cursor"))
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise InvalidInput("cursor", "is not one that this service gave out")
    wanted = _query(
        call,
        before=None if cursor is None else int(cursor),
        after=requests.number(query, "after", 0, _LAST) if "after" in query else None,
        limit=limit + 1,
        offset=requests.number(query, "offset", 0, 1 << 53),
    )
    wait = requests.number(query, "wait", 0, LONGEST_WAIT)
    if wanted.after is None:
        if "wait" in query:
            raise InvalidInput("wait", "goes with after")
        found = await service.audit(call.caller, wanted)
    elif "cursor" in query or "offset" in query:
        raise InvalidInput("after", "goes with neither cursor nor offset")
    else:
        found = await _newer(service, call, wanted, wait)
    headers = await _complete_since(service)
    if len(found) > limit:
        last = found[limit - 1].line["seq"]
        link = paging.link if wanted.after is None else paging.link_after
        headers |= link(call, str(last))
    return json_answer(entries.encode_all(found[:limit]), headers=headers)


async def summarise_audit_log(service: Service, call: Call) -> Answer:
    """How many events there are, by hour or day and by action, outcome, actor or name."""
    by = requests.choice(call.query, "by", GROUPS)
    bucket = requests.choice(call.query, "bucket", tuple(BUCKETS))
    grouping = Grouping(by, BUCKETS[bucket], COUNTS)
    counts = await service.audit_summary(call.caller, _query(call), grouping)
    headers = await _complete_since(service)
    since = headers.get(COMPLETE_SINCE)
    return json_answer(shapes.audit_summary(by, bucket, counts, since), headers=headers)


async def stream_audit_log(service: Service, call: Call) -> StreamResponse:
    """The events of the organisation as they come, as server-sent events."""
    following = service.following
    wanted = _query(call, after=_resume(call), limit=_HELD)
    async with following.place():
        begun = await following.begin(call.caller, wanted)
        flow = Flow(call.raw, "text/event-stream", await _complete_since(service))
        pages = following.follow(call.caller, begun)
        await flow.pour(_messages(pages, begun.after or 0))
    return await flow.end(_FAREWELL)


async def export_audit_log(service: Service, call: Call) -> StreamResponse:
    """All events of the organisation up to now, oldest first."""
    form = FORMATS.get(call.query.get("format", "ndjson"))
    if form is None:
        raise InvalidInput("format", f"must be one of {', '.join(FORMATS)}")
    wanted = _query(call, limit=paging.PAGE)
    async with service.following.place(to_the_end=True):
        pages = service.following.export(call.caller, wanted)
        first: list[Entry] = await anext(pages, [])
        flow = Flow(call.raw, form.content_type, await _complete_since(service))
        try:
            await flow.pour(rendered(form, _again(first, pages)))
        except SecretsError as error:
            # What was sent must not pass for everything.
            flow.cut()
            raise ConnectionResetError(str(error)) from error
        return await flow.end()


# The largest number that a seq may have in a request.
_LAST = 10**18 - 1


def _query(call: Call, **more: Any) -> AuditQuery:
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
        **more,
    )


def _time(query: dict[str, str], name: str) -> float | None:
    text = query.get(name)
    return None if text is None else times.parse(text, name)


def _resume(call: Call) -> int | None:
    """After which event a stream goes on. A client that connects anew repeats the query, and says
    in the header how far it came since.
    """
    given = call.query.get("after")
    header = call.raw.headers.get("Last-Event-ID", given)
    if header is None:
        return None
    return requests.number({"after": header}, "after", 0, _LAST)


async def _complete_since(service: Service) -> dict[str, str]:
    """The header that says so, of an answer that is known by now; none if nothing was archived."""
    since = await service.complete_since()
    return {} if since is None else {COMPLETE_SINCE: since}


async def _newer(service: Service, call: Call, wanted: AuditQuery, wait: int) -> list[Entry]:
    """The next page; if it is empty, the first one that is not, for at most `wait` seconds."""
    following = service.following
    loop = asyncio.get_running_loop()
    until = loop.time() + wait
    async with following.place() if wait else contextlib.nullcontext():
        begun = await following.begin(call.caller, wanted)
        async for page in following.follow(call.caller, begun):
            if page or loop.time() >= until:
                return page
            check_there(call.raw)
    return []


async def _messages(pages: AsyncIterator[list[Entry]], after: int) -> AsyncIterator[bytes]:
    """The pages as server-sent events; an empty piece if there is nothing to say."""
    loop = asyncio.get_running_loop()
    # Without data it is no event, but a client that connects anew goes on from there.
    yield b"id: %d\n\n" % after
    spoken = loop.time()
    # Whoever may not read on, or can't now, is told so when he connects anew.
    with contextlib.suppress(SecretsError):
        async for page in pages:
            piece = b"".join([_message(entry) for entry in page])
            if not piece and loop.time() - spoken >= HEARTBEAT:
                piece = b": alive\n\n"
            if piece:
                spoken = loop.time()
            yield piece


def _message(entry: Entry) -> bytes:
    line, data = entry.line, entries.encode(entry)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (line["seq"], line["action"].encode(), data)


async def _again(
    first: list[Entry], rest: AsyncIterator[list[Entry]]
) -> AsyncIterator[list[Entry]]:
    if first:
        yield first
    async for page in rest:
        yield page
