"""API keys: who a request comes from, and the failures of those who have none."""

import asyncio
import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable

from .core.access import Caller, Principal
from .core.errors import SecretsError, Unauthenticated
from .core.events import Event
from .core.intents import Intent
from .core.keyring import Plaintext
from .core.ports import Clock, Store
from .core.records import Ref
from .gate import Gate

_log = logging.getLogger(__name__)

# API keys whose principals are kept in memory, and addresses whose failures are counted apart.
KEPT_KEYS = 10_000
COUNTED_ADDRESSES = 1000
FLUSH_SECONDS = 60.0


class Authentication:
    """Finds the principal of an API key. Belongs to one event loop."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[str, tuple[Principal, int]] = {}

    async def authenticate(self, api_key: Plaintext) -> tuple[Principal, int]:
        """The principal of a live API key, and the size of the log when it was looked up.

        Only the gate knows whether the key is live still: make the intent depend on it.

        Raises:
            Unauthenticated: unknown, expired or revoked.
        """
        found = digest(api_key)
        return self.recall(found) or await self.look_up(found)

    def recall(self, digest: str) -> tuple[Principal, int] | None:
        """The same as far as it is in memory; None for a key that has to be looked up."""
        known = self._known.get(digest)
        if known is not None:
            expires_at = known[0].expires_at
            if expires_at is not None and expires_at <= self._clock():
                return None
        return known

    async def renew(self, caller: Caller) -> Caller:
        """The same caller, looked up again because his key may have changed.

        Raises:
            Unauthenticated: the key was revoked in the meantime, or has expired.
        """
        digest = caller.principal.digest
        if digest is None:
            return caller
        self._known.pop(digest, None)
        principal, as_of = await self.look_up(digest)
        return caller._replace(principal=principal, as_of=as_of)

    async def look_up(self, digest: str) -> tuple[Principal, int]:
        """The same, from the store.

        Raises:
            Unauthenticated: unknown, expired or revoked.
        """
        as_of = self._store.position
        key = await self._store.load_api_key(digest)
        if key is None or not key.is_live(self._clock()):
            raise Unauthenticated
        if len(self._known) >= KEPT_KEYS:
            self._known.pop(next(iter(self._known)))
        known = self._known[digest] = (key.principal(), as_of)
        return known


def digest(api_key: Plaintext) -> str:
    """What is kept of an API key: its SHA-256, in hex."""
    return hashlib.sha256(api_key.reveal().encode("utf-8", "surrogateescape")).hexdigest()


def depends_on(caller: Caller) -> tuple[tuple[Ref, int], ...]:
    """What every intent of this caller depends on: that his API key has not changed."""
    principal = caller.principal
    if principal.digest is None:
        return ()
    return (((principal.org_id, principal.actor), caller.as_of),)


class Failures:
    """Counts failed authentications: one event for each address and minute."""

    def __init__(self, gate: Gate, new_id: Callable[[], str]) -> None:
        self._gate = gate
        self._new_id = new_id
        self._counts: Counter[str | None] = Counter()
        self._flusher: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def note(self, client_ip: str | None) -> None:
        """One more failure from this address."""
        # Past the bound, addresses share one count: memory and log stay bounded.
        if client_ip not in self._counts and len(self._counts) >= COUNTED_ADDRESSES:
            client_ip = None
        self._counts[client_ip] += 1
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_later())

    async def flush(self) -> None:
        """Write the events of what was counted so far; a count that can't be written is kept.

        Raises:
            LogUnavailable: some could not be written.
        """
        for client_ip in list(self._counts):
            count = self._counts.pop(client_ip, 0)
            event = Event(
                id=self._new_id(),
                action="auth.failed",
                outcome="denied",
                org_id=None,
                resource_type="api_key",
                resource_id=None,
                client_ip=client_ip,
                status=401,
                details={"error": Unauthenticated.code, "count": count},
            )
            try:
                await self._gate.submit(Intent(event, ()))
            except SecretsError:
                self._counts[client_ip] += count
                raise

    async def close(self) -> None:
        """Stop the timer and write what was counted."""
        self._closing.set()
        if self._flusher is not None:
            await self._flusher
        await self.flush()

    async def _flush_later(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), FLUSH_SECONDS)
            await self.flush()
        except SecretsError as error:
            # Tried again with the next failure, or at the end.
            _log.warning("failed authentications could not be recorded: %s", error)
        finally:
            self._flusher = None
