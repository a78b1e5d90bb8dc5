"""`SecretsClient`: the HTTP API for synchronous callers. A call waits for the event loop of
`background`, in which its asynchronous twin lives.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar, cast

from .. import background
from ..api import shapes
from ..core.access import FULL
from ..core.keyring import Plaintext
from ..core.missing import MISSING, Missing
from ..core.records import SecretMetadata
from .asynchronous import AsyncSecretsClient
from .documents import ApiKeys, Entries, Filters, Reading, Stored
from .options import Options

T = TypeVar("T")
D = TypeVar("D")

_ALL = Filters()


class _Open:
    """The clients whose connections are open in the loop, until they are closed."""

    def __init__(self) -> None:
        self.clients: set[AsyncSecretsClient] = set()

    async def close(self) -> None:
        """Close all connections."""
        for client in list(self.clients):
            await client.close()


class SecretsClient:
    """The secrets of the organisation that the API key belongs to.

        with SecretsClient("https://secrets.example", api_key) as secrets:
            value = secrets.get("OPENAI_API_KEY")

    It may be used by several threads, after a fork, and inside a running event loop, which it
    blocks. See `AsyncSecretsClient` for the parameters, for what is tried again, and for what each
    method raises.
    """

    def __init__(self, url: str, api_key: str, options: Options | None = None) -> None:
        self._make: Callable[[], AsyncSecretsClient] = lambda: AsyncSecretsClient(
            url, api_key, options
        )
        self._loop = background.current()
        self._twin = self._make()

    def __repr__(self) -> str:
        return repr(self._twin).replace("AsyncSecretsClient", "SecretsClient")

    def get(self, name: str, default: D | Missing = MISSING) -> str | D:
        """Return the value, or `default` if given and there is no such secret."""
        return self._run(lambda twin: twin.get(name, default))

    def read(self, name: str) -> Reading:
        """Return the value with its version, its entity tag and the receipt of this read."""
        return self._run(lambda twin: twin.read(name))

    def resolve(self, document: T, pipeline: str | None = None, stage: str | None = None) -> T:
        """Return the document with values in the place of its references."""
        return self._run(lambda twin: twin.resolve(document, pipeline, stage))

    def resolve_json(
        self, document: Plaintext, pipeline: str | None = None, stage: str | None = None
    ) -> shapes.ResolvedOut:
        """The same for JSON as text, and the receipts."""
        return self._run(lambda twin: twin.resolve_json(document, pipeline, stage))

    def batch(
        self, names: Sequence[str], pipeline: str | None = None, stage: str | None = None
    ) -> dict[str, str]:
        """Return the values of up to 100 secrets by their names: all of them, or none."""
        return self._run(lambda twin: twin.batch(names, pipeline, stage))

    def set(
        self,
        name: str,
        value: str,
        description: str = "",
        category: str = "other",
        expires_at: datetime | str | None = None,
        *,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> Stored:
        """Create the secret, or replace all of it but its creation, on a condition or without."""
        return self._run(
            lambda twin: twin.set(
                name,
                value,
                description,
                category,
                expires_at,
                if_match=if_match,
                if_absent=if_absent,
            )
        )

    def delete(self, name: str, *, if_match: str | None = None) -> bool:
        """Delete a secret, on a condition or without; a missing one raises."""
        return self._run(lambda twin: twin.delete(name, if_match=if_match))

    def get_metadata(self, name: str) -> Stored:
        """Return everything about a secret but its value."""
        return self._run(lambda twin: twin.get_metadata(name))

    def exists(self, name: str) -> bool:
        """Whether there is such a secret, expired or not."""
        return self._run(lambda twin: twin.exists(name))

    def list(
        self, category: str | None = None, prefix: str | None = None, expired: bool | None = None
    ) -> "list[SecretMetadata]":
        """All secrets that match, sorted by name, without their values."""
        return self._run(lambda twin: twin.list(category, prefix, expired))

    def audit(self, filters: Filters = _ALL, limit: int = 100) -> Entries:
        """The newest events that match, newest first."""
        return self._run(lambda twin: twin.audit(filters, limit))

    def follow(
        self, filters: Filters = _ALL, after: int | None = None
    ) -> Iterator[shapes.AuditEntry]:
        """The events that match as they come, without an end."""
        return self._iterate(lambda twin: twin.follow(filters, after))

    def export(self, form: str, filters: Filters = _ALL) -> Iterator[bytes]:
        """All events that match until now, oldest first, piece by piece."""
        return self._iterate(lambda twin: aiter(twin.export(form, filters)))

    def create_api_key(
        self,
        name: str,
        scopes: Sequence[str] = (FULL,),
        allow: Sequence[str] = (),
        expires_at: datetime | str | None = None,
    ) -> shapes.ApiKeyIssued:
        """Make an API key; its `raw_key` is told this once."""
        return self._run(lambda twin: twin.create_api_key(name, scopes, allow, expires_at))

    def list_api_keys(self) -> ApiKeys:
        """All API keys, oldest first, the revoked ones included."""
        return self._run(lambda twin: twin.list_api_keys())

    def revoke_api_key(self, key_id: str) -> bool:
        """Revoke an API key: when this returns, nobody accepts it any more."""
        return self._run(lambda twin: twin.revoke_api_key(key_id))

    def whoami(self) -> shapes.WhoAmI:
        """Who the API key belongs to and what it may do."""
        return self._run(lambda twin: twin.whoami())

    def proof(self, seq: int) -> bytes:
        """The proof that an event is in the log, a C2SP tlog-proof."""
        return self._run(lambda twin: twin.proof(seq))

    def status(self) -> shapes.Health:
        """Whether the server can serve values, and how many secrets are under each master key."""
        return self._run(lambda twin: twin.status())

    def close(self) -> None:
        """Close the connections; the next call makes new ones."""
        loop, twin = self._current()
        loop.run(twin.close())
        loop.own(_Open).clients.discard(twin)

    def __enter__(self) -> "SecretsClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, call: Callable[[AsyncSecretsClient], Coroutine[Any, Any, T]]) -> T:
        loop, twin = self._current()
        return loop.run(call(twin))

    def _current(self) -> tuple[background.Background, AsyncSecretsClient]:
        loop = background.current()
        # After a fork there is another loop, and the connections of before are the parent's.
        if self._loop is not loop:
            self._loop, self._twin = loop, self._make()
        loop.own(_Open).clients.add(self._twin)
        return loop, self._twin

    def _iterate(self, call: Callable[[AsyncSecretsClient], AsyncIterator[T]]) -> Iterator[T]:
        loop, twin = self._current()
        pieces = cast("AsyncGenerator[T, None]", call(twin))
        try:
            while True:
                try:
                    piece = loop.run(_next(pieces))
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            loop.run(_leave(pieces))


async def _next(pieces: AsyncGenerator[T, None]) -> T:
    return await anext(pieces)


async def _leave(pieces: AsyncGenerator[Any, None]) -> None:
    await pieces.aclose()
