"""Answers: head and body in one write."""

import time
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

import msgspec
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

_JSON = "application/json"

_STATUS = {int(status): f"{int(status)} {status.phrase}" for status in HTTPStatus}
_line = ": ".join


class Answer(StreamResponse):
    """A whole response whose body is at hand.

    aiohttp's own `Response` keeps its headers changeable until they are sent; a tenth of a read
    goes into that. This one is composed once and written at once.
    """

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        # Not `super().__init__`: it makes the changeable headers that are never used here.
        self._state = {}
        self._status = status
        lines = [*map(_line, headers.items()), ""]
        # RFC 9110 §5.5: a line break in a value would begin a header of somebody else's choice.
        together = "".join(lines)
        if "\n" in together or "\r" in together:
            raise ValueError("a header value has a line break")
        self._head = "\r\n".join(lines)
        self._content = body

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Send everything.

        Raises:
            ConnectionResetError: the client went away.
        """
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client went away")
        keep_alive, version, status = self._keep_alive, request.version, self._status
        if keep_alive is None:
            keep_alive = self._keep_alive = request.keep_alive
        # The parser knows the usual version by this very object.
        modern = version is HttpVersion11 or version > HttpVersion11
        connection = ""
        if keep_alive is not modern:
            connection = f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n"
        # RFC 9110 §8.6: a 204 has no length.
        length = "" if status == 204 else f"Content-Length: {len(self._content)}\r\n"
        head = (
            f"HTTP/1.{'1' if modern else '0'} {_STATUS[status]}\r\n"
            f"{self._head}{connection}{length}{_tail(int(time.time()))}"
        )
        body = b"" if request.method == "HEAD" else self._content
        transport.write(head.encode("latin-1") + body)
        self._eof_sent = True
        if transport.get_write_buffer_size():
            # A client that asks and does not read waits for himself.
            await request.writer.drain()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to send."""


def json_answer(
    document: object, status: int = 200, headers: dict[str, str] | None = None
) -> Answer:
    """A JSON answer that nobody keeps; bytes are taken as JSON already."""
    body = document if isinstance(document, bytes) else msgspec.json.encode(document)
    every = {"Content-Type": _JSON, "Cache-Control": "no-store"}
    return Answer(status, every | (headers or {}), body)


@lru_cache(maxsize=1)
def _tail(now: int) -> str:
    """The last headers and the end of the head; made once a second."""
    # RFC 9110 §6.6.1.
    return f"Date: {formatdate(now, usegmt=True)}\r\nServer: flowmason\r\n\r\n"
