"""Points in time: floats of seconds since the epoch inside, RFC 3339 in UTC outside."""

import re
from datetime import UTC, datetime

from .errors import InvalidInput

_RFC3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})", re.ASCII
)


def render(timestamp: float) -> str:
    """RFC 3339 in UTC with microseconds: `2026-01-31T12:00:00.000000Z`."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def parse(text: str, field: str) -> float:
    """Seconds since the epoch of an RFC 3339 time with a zone.

    Raises:
        InvalidInput: anything else, a time without a zone above all.
    """
    if not _RFC3339.fullmatch(text):
        raise InvalidInput(field, "must be an RFC 3339 time with a zone, like 2026-01-31T12:00:00Z")
    try:
        return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        raise InvalidInput(field, "is not a time that exists") from None


def parse_stored(text: str) -> float:
    """Like `parse`, and also a time without a zone, which FlowMason 1.0 wrote as local time.

    Raises:
        ValueError: not a time at all.
    """
    return datetime.fromisoformat(text).timestamp()
