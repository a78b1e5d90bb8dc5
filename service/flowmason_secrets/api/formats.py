"""The formats of an export, page by page."""

import csv
import io
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import orjson

from ..core.events import Entry
from . import ocsf

COLUMNS = (
    *("seq", "time", "id", "action", "outcome", "org_id", "resource_type", "resource_id", "name"),
    *("version", "actor", "actor_type", "client_ip", "user_agent", "request_id", "status"),
    "details",
)

# Spreadsheets take a cell that begins so for a formula, and names come from anywhere.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class Format(NamedTuple):
    """How a page is written; `head` comes before the first."""

    content_type: str
    render: Callable[[Sequence[Entry]], bytes]
    head: bytes = b""


def _lines(page: Sequence[Entry]) -> bytes:
    """The lines as they are in the log, byte by byte."""
    return b"".join([entry.raw + b"\n" for entry in page])


def _activities(page: Sequence[Entry]) -> bytes:
    return b"".join([orjson.dumps(ocsf.activity(entry.line)) + b"\n" for entry in page])


def _rows(page: Sequence[Entry]) -> bytes:
    return _csv([[_cell(entry.line.get(name)) for name in COLUMNS] for entry in page])


def _csv(rows: Sequence[Sequence[str]]) -> bytes:
    """RFC 4180: lines end with CR LF."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return f"'{text}" if text.startswith(_FORMULA) else text


FORMATS = {
    "ndjson": Format("application/x-ndjson", _lines),
    "csv": Format("text/csv; charset=utf-8; header=present", _rows, _csv([COLUMNS])),
    "ocsf": Format("application/x-ndjson", _activities),
}


async def rendered(form: Format, pages: AsyncIterator[list[Entry]]) -> AsyncIterator[bytes]:
    """The pieces of an export."""
    if form.head:
        yield form.head
    async for page in pages:
        yield form.render(page)
