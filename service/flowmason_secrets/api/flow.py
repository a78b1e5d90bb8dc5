"""Answers of unknown length, sent piece by piece to whoever reads them as fast as he can."""

import asyncio
from collections.abc import AsyncIterator, Coroutine

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

# Seconds for which a reader may take nothing while there is more for him.
PATIENCE = 30.0


class Flow:
    """One such answer. It begins with its first piece: until then, another one can be given."""

    def __init__(self, raw: BaseRequest, content_type: str, headers: dict[str, str]) -> None:
        self._raw = raw
        # Whether a piece was begun that is not the transport's yet.
        self._sending = False
        self._response = StreamResponse(
            headers={
                "Content-Type": content_type,
                "Cache-Control": "no-store",
                # nginx would keep the pieces until it has many.
                "X-Accel-Buffering": "no",
                "Server": "flowmason",
                **headers,
            }
        )

    async def pour(self, pieces: AsyncIterator[bytes]) -> None:
        """Send all pieces, each when the reader has taken most of what was before it; with an empty
        one it is only seen whether he is still there.

        Raises:
            ConnectionResetError: he went away, or took nothing for too long.
        """
        async for piece in pieces:
            check_there(self._raw)
            if piece:
                await self._patiently(self._send(piece), PATIENCE)

    async def end(self, patience: float = PATIENCE) -> StreamResponse:
        """Tell the reader that this is all; he can tell it from an answer that was cut off, as it
        is if he does not take in what is before it within so many seconds.

        Raises:
            ConnectionResetError: he went away, or was cut off.
        """
        if self._sending:
            # Nothing can follow: aiohttp can't be asked again to wait for this reader.
            self.cut()
            raise ConnectionResetError("the client does not read")
        await self._patiently(self._finish(), patience)
        return self._response

    def cut(self) -> None:
        """Close the connection in the middle of the answer, so that nobody takes it for whole."""
        if self._raw.transport is not None:
            self._raw.transport.abort()

    async def _send(self, piece: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._raw)
        self._sending = True
        await self._response.write(piece)
        self._sending = False

    async def _finish(self) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._raw)
        await self._response.write_eof()

    async def _patiently(self, step: Coroutine[object, object, None], patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                await step
        except TimeoutError:
            self.cut()
            raise ConnectionResetError("the client does not read") from None


def check_there(raw: BaseRequest) -> None:
    """Raises:
    ConnectionResetError: the client went away.
    """
    if raw.transport is None or raw.transport.is_closing():
        raise ConnectionResetError("the client went away")
