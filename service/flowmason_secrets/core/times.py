"""Points in time: floats of seconds since the epoch inside, RFC 3339 in UTC outside."""

import re
from datetime import UTC, datetime, timedelta

from .errors import InvalidInput

_RFC3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})", re.ASCII
)
_RENDERED = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z", re.ASCII)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()
# A second before the end: floats of that size don't hold microseconds.
_LAST = (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - _EPOCH).total_seconds()


def render(timestamp: float) -> str:
    """RFC 3339 in UTC with microseconds: `2026-01-31T12:00:00.000000Z`."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def of_datetime(moment: datetime, field: str) -> str:
    """RFC 3339 in UTC of a `datetime`.

    Raises:
        InvalidInput: it has no zone.
    """
    if moment.utcoffset() is None:
        raise InvalidInput(field, "must have a zone, like datetime.now(UTC) has")
    return render(_seconds(moment))


def text(moment: datetime | str | None, field: str) -> str | None:
    """A time as it may be given, as text: `parse` judges it.

    Raises:
        InvalidInput: a `datetime` that has no zone.
    """
    return of_datetime(moment, field) if isinstance(moment, datetime) else moment


def parse(text: str, field: str) -> float:
    """Seconds since the epoch of an RFC 3339 time with a zone.

    Raises:
        InvalidInput: anything else, a time without a zone above all.
    """
    if not isinstance(text, str) or not _RFC3339.fullmatch(text):
        raise InvalidInput(field, "must be an RFC 3339 time with a zone, like 2026-01-31T12:00:00Z")
    try:
        return _seconds(datetime.fromisoformat(text.upper()))
    except ValueError:
        raise InvalidInput(field, "is not a time that exists") from None


def parse_stored(text: str) -> float:
    """Like `parse`, and also a time without a zone, which FlowMason 1.0 wrote as local time.

    Raises:
        ValueError: not a time at all.
    """
    return _seconds(datetime.fromisoformat(text))


def restored(text: str) -> str:
    """A stored time as `render` writes it.

    Raises:
        ValueError: not a time at all.
    """
    moment = datetime.fromisoformat(text)
    # What `render` wrote is as it should be: most are, and rendering takes longest.
    return text if _RENDERED.fullmatch(text) else render(_seconds(moment))


def _seconds(moment: datetime) -> float:
    """What lies beyond the ends of time in UTC counts as these ends: people write "never" so."""
    if moment.tzinfo is None:
        try:
            moment = moment.astimezone()
        except (OverflowError, ValueError):
            moment = moment.replace(tzinfo=UTC)
    return min(max((moment - _EPOCH) / timedelta(seconds=1), _FIRST), _LAST)
