"""Events on the wire, as JSON."""

from collections.abc import Iterable

import msgspec

from ..core.events import Entry
from . import shapes

try:
    from ._speedups import shown
except ImportError:

    def shown(line: bytes, /) -> bytes | None:
        """As `_speedups.shown`, which may leave any line to its caller: all of them here."""
        return None


def encode(entry: Entry) -> bytes:
    """One event: a `shapes.AuditEntry`."""
    return shown(entry.raw) or msgspec.json.encode(shapes.audit_out(entry.line))


def encode_all(entries: Iterable[Entry]) -> bytes:
    """An array of events."""
    return b"[%b]" % b",".join(map(encode, entries))
