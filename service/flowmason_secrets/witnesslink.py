"""The way to a witness over HTTP."""

import aiohttp

from .core.note import Verifier
from .core.ports import Reply
from .core.witness import MAX_ANSWER, Witness

# Seconds that a witness has for its answer.
TIMEOUT = 10.0


class HttpWitness:
    """See `WitnessLink`. Belongs to one event loop."""

    def __init__(self, witness: Witness) -> None:
        self._url = f"{witness.url.rstrip('/')}/add-checkpoint"
        self._verifier = witness.verifier
        self._session: aiohttp.ClientSession | None = None

    @property
    def verifier(self) -> Verifier:
        """See `WitnessLink.verifier`."""
        return self._verifier

    async def add_checkpoint(self, body: bytes) -> Reply:
        """See `WitnessLink.add_checkpoint`."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT)
            self._session = aiohttp.ClientSession(
                timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
            )
        try:
            # A redirected POST may arrive as something else.
            async with self._session.post(self._url, data=body, allow_redirects=False) as answer:
                content = await _content(answer)
                return Reply(answer.status, answer.content_type, content)
        except TimeoutError:
            raise TimeoutError(f"it has not answered within {TIMEOUT:g} seconds") from None
        except aiohttp.ClientError as error:
            # The text of many of them has the URL, which may hold a password.
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise ConnectionError(f"it can't be reached ({reason})") from None

    async def close(self) -> None:
        """See `WitnessLink.close`."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _content(answer: aiohttp.ClientResponse) -> bytes:
    """The body as far as it may be one: what is longer fails as an answer."""
    content = b""
    while len(content) <= MAX_ANSWER and (piece := await answer.content.readany()):
        content += piece
    return content
