"""What clients may cost: memory, connections and time, whatever they send or leave unread."""

import asyncio
import logging
import secrets
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_server import Server as _Server

from ..core.access import Sender
from ..core.errors import Overloaded, SecretsError
from .framing import MAX_HEAD, Framing
from .problems import RequestError, malformed, problem_response

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Lines of a head, each of which costs more than its bytes.
_LINES = 64
# A request that arrives in one piece of so many bytes isn't counted: it costs no more than the
# connection itself.
_SMALL = 4 << 10
# Bytes of a body that aiohttp reads ahead.
_AHEAD = 32 << 10
# Who takes fewer bytes of an answer than this within the write timeout doesn't read.
_PROGRESS = 64 << 10
_NO_MEMORY = "Too much is waiting to be answered"
# Seconds after which an idle connection may be closed to make room.
_SPARE = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one process. Sizes in bytes, durations in seconds.

    `request_bytes` is for what was received of requests and isn't answered, and for answers that
    aren't taken; `head_timeout` also for the first byte of a new connection.
    """

    connections: int = 10_000
    request_bytes: int = 64 << 20
    head_timeout: float = 10.0
    write_timeout: float = 30.0
    keepalive_timeout: float = 75.0


class Budget:
    """Bytes that may be held at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def take(self, size: int) -> bool:
        """Whether there was room for so many more; then they are held."""
        if self.held + size > self._limit:
            return False
        self.held += size
        return True

    def give(self, size: int) -> None:
        """So many are held no longer."""
        self.held -= size


class _SameTask:
    """An event loop in which a connection answers its requests in the task of its own.

    aiohttp starts a task for each, so that no context variable is handed on from one to the next.
    There are none here, and a twentieth of a read goes into those tasks.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.time = loop.time
        self.create_future = loop.create_future

    def create_task(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """What can be awaited instead."""
        return work

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


class Connection(RequestHandler):
    """aiohttp's protocol within the limits: it counts what arrives and what isn't taken.

    What is not HTTP is answered and logged without a word of it: it may hold keys and values, and
    anybody can send it.
    """

    def __init__(self, server: "Server", loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type] # aiohttp checks for it
            keepalive_timeout=server.limits.keepalive_timeout,
            max_headers=_LINES,
            read_bufsize=_AHEAD,
            # Bodies are small, and what unpacks to gigabytes needs no unpacking.
            auto_decompress=False,
        )
        self._server = server
        self._wire: asyncio.Transport | None = None
        # The body of the newest request; bytes since then that brought neither body nor request.
        self._body: StreamReader = EMPTY_PAYLOAD
        self._stray = 0
        # Whether nothing is half there.
        self._whole = True
        self._refused = False
        self._framing = Framing() if server.knows_list else None
        # Of the last request, by its face and its headers: what they say of who sent it. A dict,
        # because several clients may share a connection of a proxy: it compares keyed hashes
        # first, so how long it takes says nothing of another one's API key.
        self.sender: dict[object, Sender] = {}
        # What it has of the budget: received and not answered; not taken.
        self._held = 0
        self._unread = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open, after the TLS handshake."""
        super().connection_made(transport)
        if sys.version_info < (3, 12):
            # From then on, tasks begin at once and cost little.
            self._loop = cast(asyncio.AbstractEventLoop, _SameTask(self._loop))
        self._wire = self.transport
        assert self._wire is not None  # noqa: S101 - aiohttp has just set it
        # So that `pause_writing` is called whenever the system doesn't take all of an answer.
        self._wire.set_write_buffer_limits(high=1, low=0)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is closed; a request that is being answered goes on, and keeps what it holds."""
        task = self._task_handler
        self._wire = None
        self._head_arrived()
        self._reader_went_on()
        super().connection_lost(exc)
        if task is None or task.done():
            self._left()
        else:
            task.add_done_callback(lambda _: self._left())

    def _left(self) -> None:
        self._server.budget.give(self._held)
        self._held = 0
        self._server.forget(self)

    @property
    def idle_since(self) -> float | None:
        """Since when it waits for a request, in the time of the loop; None if it has one."""
        if self._waiter is None or self._waiter.done():
            return None
        return self._next_keepalive_close_time - self._keepalive_timeout

    # --- what arrives

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._framing is not None:
            data = self._framing.translated(data)
        messages = self._messages
        if not self._whole or messages or len(data) > _SMALL:
            self._count(data)
            return
        super().data_received(data)
        if messages and (body := messages[-1][1]).is_eof():
            # A whole request in one piece, as nearly all are.
            self._body = body
            if self._head_timer is not None:
                self._head_arrived()
        else:
            self._note(len(data), bool(messages))

    def _count(self, data: bytes) -> None:
        if self._refused:
            return
        # After the answer, the rest of a body is discarded as it comes.
        discarded = not (self._request_in_progress or self._messages or self._body.is_eof())
        if not discarded:
            if not self._server.budget.take(len(data)):
                self._refuse(Overloaded(_NO_MEMORY))
                return
            self._held += len(data)
        for begin in range(0, len(data) or 1, MAX_HEAD):
            ended, size, count = self._body.is_eof(), self._body.total_bytes, self._request_count
            piece = data[begin : begin + MAX_HEAD]
            super().data_received(piece)
            moved = self._body.total_bytes != size or self._body.is_eof() != ended
            self._note(len(piece), self._request_count != count, moved=moved)
            if self._refused:
                return

    def _note(self, size: int, new: bool, *, moved: bool = False) -> None:
        """So many bytes were parsed; there are new requests, or the newest one's body moved on."""
        if new and self._messages:
            self._body = self._messages[-1][1]
            self._head_arrived()
        self._stray = 0 if new or moved else self._stray + size
        ended = self._body.is_eof()
        self._whole = ended and not self._stray
        if self._stray > MAX_HEAD:
            self._refuse(_head_too_large())
        elif ended and self._stray and self._head_timer is None:
            self._expect_head()

    def _expect_head(self) -> None:
        timeout = self._server.limits.head_timeout
        self._head_timer = self._loop.call_later(timeout, self._head_is_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._stray:
            self._refuse(_head_too_late(self._server.limits.head_timeout))
        else:
            self.force_close()

    def _refuse(self, error: SecretsError) -> None:
        """Answer with this error, discard what else comes, and close."""
        self._refused = True
        self._head_arrived()
        if self._body.is_eof():
            if not self._close and not self._force_close:
                self._messages.append((_ErrInfo(0, error, ""), EMPTY_PAYLOAD))
                if self._waiter is not None and not self._waiter.done():
                    self._waiter.set_result(None)
        else:
            # Who reads the body answers with it; the connection ends there, as the body does not.
            self._lingering_time = 0.0
            self._body.set_exception(error)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """The answer to what the parser refused, or we; then the connection is closed."""
        request_id = secrets.token_hex(8)
        if isinstance(exc, SecretsError):
            error = exc
        else:
            _log.info("request %s is not HTTP: %s", request_id, type(exc).__name__)
            error = malformed("The request is not HTTP/1.1.")
        answer = problem_response(error, request_id)
        answer.force_close()
        return answer

    # --- what is answered

    def finish_response(
        self, request: BaseRequest, resp: StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[StreamResponse, bool]]:
        """Send an answer."""
        sending = super().finish_response(request, resp, start_time)
        return self._release_after(sending) if self._held else sending

    async def _release_after(
        self, sending: Coroutine[Any, Any, tuple[StreamResponse, bool]]
    ) -> tuple[StreamResponse, bool]:
        try:
            return await sending
        finally:
            # Its share: requests that came behind it keep theirs.
            waiting = len(self._messages)
            given = self._held - self._held * waiting // (waiting + 1)
            self._held -= given
            self._server.budget.give(given)

    def pause_writing(self) -> None:
        """The system takes no more: the client doesn't read as fast as it is answered."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The system has taken everything."""
        super().resume_writing()
        self._reader_went_on()

    def _watch_reader(self) -> None:
        wire = self._wire
        if wire is None:
            return
        size = wire.get_write_buffer_size()
        if not self._server.budget.take(size):
            wire.abort()
            return
        self._unread = size
        timeout = self._server.limits.write_timeout
        self._write_timer = self._loop.call_later(timeout, self._check_reader)

    def _reader_went_on(self) -> None:
        self._server.budget.give(self._unread)
        self._unread = 0
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_reader(self) -> None:
        wire, before = self._wire, self._unread
        if wire is None:
            return
        if wire.get_write_buffer_size() > before - _PROGRESS:
            # Closing would wait for him.
            wire.abort()
            return
        self._reader_went_on()
        self._watch_reader()


class Server(_Server):
    """aiohttp's low-level server within limits."""

    def __init__(
        self,
        handler: Callable[[BaseRequest], Coroutine[Any, Any, StreamResponse]],
        limits: Limits,
        budget: Budget,
        *,
        knows_list: bool = False,
    ) -> None:
        super().__init__(handler)
        # Whether clients may send the method LIST; handlers see it as `framing.LIST`.
        self.knows_list = knows_list
        self.limits = limits
        self.budget = budget
        self._open: set[Connection] = set()
        # Called when a connection has ended.
        self.on_room: Callable[[], None] | None = None

    def __call__(self) -> Connection:
        """The protocol of a new connection. It counts from here on, before any TLS handshake."""
        connection = Connection(self, self._loop)
        self._open.add(connection)
        return connection

    def forget(self, connection: Connection) -> None:
        """It has ended, or never began."""
        self._open.discard(connection)
        if self.on_room is not None:
            self.on_room()

    @property
    def is_full(self) -> bool:
        """Whether there are as many connections as may be."""
        return len(self._open) >= self.limits.connections

    def make_room(self) -> None:
        """Close some of the connections that wait for a request, those that wait longest."""
        now = self._loop.time()
        idle = [
            (since, number, connection)
            for number, connection in enumerate(self._open)
            if (since := connection.idle_since) is not None and now - since > _SPARE
        ]
        idle.sort()
        for _, _, connection in idle[: max(1, len(self._open) // 16)]:
            connection.force_close()


def _head_too_large() -> RequestError:
    detail = f"The head of a request has at most {MAX_HEAD} bytes."
    return RequestError(431, "head_too_large", "Head too large", detail)


def _head_too_late(seconds: float) -> RequestError:
    detail = f"The head of the request did not arrive within {seconds:g} seconds."
    return RequestError(408, "request_timeout", "Request timeout", detail)
