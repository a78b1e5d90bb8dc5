"""Where a server is."""

from typing import NamedTuple

from yarl import URL

from .. import config
from ..core.errors import InvalidInput
from ..core.keyring import Plaintext

_UNIX = "unix:"


class Address(NamedTuple):
    """A server: its URL as it was given, and what paths are put behind."""

    url: str
    base: str
    unix_socket: str | None = None


def address(url: str, *, insecure: bool = False) -> Address:
    """The server of a URL: http, https, or `unix:` and the path of a socket.

    Raises:
        InvalidInput: not such a URL, or the API key would cross a network in clear.
    """
    if url.startswith(_UNIX):
        path = url.removeprefix(_UNIX).lstrip("/")
        return Address(url, "http://localhost", f"/{path}")
    try:
        parsed = URL(url)
    except ValueError:
        raise InvalidInput("url", "is not a URL") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidInput(
            "url", "must be like https://secrets.example.org or unix:/run/secrets.sock"
        )
    if parsed.user or parsed.password or parsed.query_string or parsed.fragment:
        raise InvalidInput("url", "takes neither a user name, nor '?', nor '#'")
    if parsed.scheme == "http" and not insecure and not config.is_loopback(parsed.host):
        raise InvalidInput(
            "url",
            f"{url} is not encrypted: everybody on the way could read the API key and the values. "
            "Use https://, or insecure=True if the network itself is safe",
        )
    return Address(url, str(parsed).rstrip("/"))


def check_api_key(text: str) -> Plaintext:
    """An API key as it goes into a header.

    Raises:
        InvalidInput: it holds characters that no API key has.
    """
    text = text.strip()
    if not (text and text.isascii() and text.isprintable()) or " " in text:
        raise InvalidInput("api_key", "holds characters that no API key has, or none at all")
    return Plaintext(text)
