"""Pages: where one ends, and the link to the next."""

import base64
import binascii
from urllib.parse import urlencode

from ..core.errors import InvalidInput
from .requests import Call

# The longest page.
PAGE = 1000


def link(call: Call, cursor: str) -> dict[str, str]:
    """The `Link` header (RFC 8288) to the page after the entry that `cursor` names."""
    encoded = base64.urlsafe_b64encode(cursor.encode()).decode().rstrip("=")
    return _link(call, {"cursor": encoded})


def link_after(call: Call, seq: str) -> dict[str, str]:
    """The `Link` header to the page of the events after one."""
    return _link(call, {"after": seq})


def decode_cursor(text: str | None) -> str | None:
    """Which entry a cursor names.

    Raises:
        InvalidInput: it is not one of ours.
    """
    if text is None:
        return None
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidInput("cursor", "is not one that this service gave out") from None


def _link(call: Call, place: dict[str, str]) -> dict[str, str]:
    rest = {name: value for name, value in call.query.items() if name != "offset"}
    path = call.raw.raw_path.partition("?")[0]
    return {"Link": f'<{path}?{urlencode(rest | place)}>; rel="next"'}
