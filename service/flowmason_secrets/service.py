"""The use cases: authorise → read state → intent → gate → reply."""

from collections.abc import AsyncIterator
from typing import TypeVar

from .attempts import Attempt, Path, secret_resource
from .authentication import Authentication, Failures
from .core import access, errors, names, times
from .core.access import ANY, FULL, READ, Caller
from .core.drafts import Draft, Precondition, Revealed, Written
from .core.errors import SecretsError
from .core.events import Entry, Event, Receipt
from .core.intents import Intent
from .core.keyring import KeyUsage
from .core.ports import AuditQuery, Backend, Building, Count, Grouping, ListQuery, Sources
from .core.records import (
    DropSecret,
    Metadata,
    PutSecret,
    SecretRecord,
)
from .following import Following
from .gate import QUEUE_LIMIT, Gate
from .keys import ApiKeys
from .masterkeys import MasterKeys
from .offline import OfflineReads
from .reading import Reading, Sealed
from .references import References
from .rotation import Rotation
from .signer import LogSigner
from .space import WARN_BELOW, SpaceWatch
from .trail import Trail

T = TypeVar("T")

_FULL = frozenset({FULL})
_FULL_OR_READ = frozenset({FULL, READ})


class Service:
    """All that can be done with secrets and API keys. Belongs to one event loop."""

    def __init__(
        self,
        backend: Backend,
        master: MasterKeys,
        sources: Sources,
        queue_limit: int = QUEUE_LIMIT,
        warn_below: int = WARN_BELOW,
    ) -> None:
        store, index = backend.store, backend.index
        self._store = store
        self._index = index
        self._master = master
        self._clock, self._new_id = sources
        self.gate = Gate(store, queue_limit)
        self.signer = LogSigner(backend, self.gate, sources)
        self.authentication = Authentication(store, sources.clock)
        self.failures = Failures(self.gate, sources.new_id)
        self._path = Path(store, self.gate, self.authentication, master, sources.new_id)
        self._reading = Reading(store, master, sources.clock)
        self.references = References(self._path, self._reading)
        self.offline = OfflineReads(backend, self.gate, self._path, sources.new_id)
        self.keys = ApiKeys(store, self._path, sources.clock)
        self.following = Following((store, index), self.gate, self._path, sources.clock)
        self.rotation = Rotation((store, index), self.gate, self._path, master, sources.new_id)
        self.trail = Trail(backend, self._path)
        self.space = SpaceWatch(backend, self.gate, sources, warn_below)

    async def get(self, caller: Caller, name: str) -> Revealed:
        """Return the current value and the receipt of this read.

        The read is durable in the event log before this returns.

        Raises:
            SecretNotFound, SecretExpired, Denied: recorded in the log as well.
            DecryptionFailed: the secret is under a key that this process does not hold; recorded.
            SecretDamaged: its files are incomplete; recorded.
            LogUnavailable: the event could not be written, so the value was not revealed.
        """
        names.check_any_name(name)

        async def step(attempt: Attempt) -> tuple[Metadata, Sealed]:
            _permit(attempt.caller, name)
            record = await self._reading.read(attempt, name)
            sealed = await self._reading.sealed(attempt, record)
            # All of a batch are decrypted one after the other, which takes half the time: the
            # processor has the code of the ciphers at hand. What can't fail has time until the
            # event is durable.
            if sealed.proven:
                attempt.later = sealed.open_again
            else:
                attempt.prepare = sealed.open
            return record.metadata, sealed

        (metadata, sealed), receipt = await self._path.perform(caller, "secret.read", name, step)
        return Revealed(metadata, sealed.value, receipt)

    async def set(
        self, caller: Caller, draft: Draft, precondition: Precondition | None = None
    ) -> Written:
        """Create the secret, or replace all of it but its creation.

        Raises:
            InvalidInput: nothing was recorded.
            Denied, PreconditionFailed: recorded; nothing was changed.
            LogUnavailable: not acknowledged: it happened whole or not at all.
        """
        expiry = draft.check()
        name = draft.name

        async def step(attempt: Attempt) -> tuple[Metadata, bool]:
            _permit(attempt.caller, name)
            current = await self._reading.find(attempt, name)
            if precondition is not None:
                precondition.check(name, current)
            org_id = attempt.caller.principal.org_id
            attempt.depends += (self._master.depends,)
            key_id, token = await self._master.encrypt(org_id, draft.value)
            metadata = self._next(attempt.caller, draft, expiry, current, key_id)
            attempt.change = PutSecret(org_id, metadata, token)
            attempt.version = metadata.version
            attempt.details = {"kind": "create" if current is None else "update"}
            attempt.details["category"] = metadata.category
            return metadata, current is None

        async with self._reading.lock(caller, name):
            (metadata, created), receipt = await self._path.perform(
                caller, "secret.create", name, step
            )
        return Written(metadata, created, receipt)

    async def delete(
        self, caller: Caller, name: str, precondition: Precondition | None = None
    ) -> Receipt:
        """Delete a secret, also an expired, a damaged or an undecryptable one.

        Raises:
            SecretNotFound, Denied, PreconditionFailed: recorded in the log as well.
            LogUnavailable: not acknowledged: it happened whole or not at all.
        """
        names.check_any_name(name)

        async def step(attempt: Attempt) -> None:
            _permit(attempt.caller, name)
            record = await self._reading.find(attempt, name)
            if precondition is not None:
                precondition.check(name, record)
            if record is None:
                raise errors.SecretNotFound(name)
            attempt.version = record.metadata.version
            attempt.change = DropSecret(attempt.caller.principal.org_id, name)

        async with self._reading.lock(caller, name):
            _, receipt = await self._path.perform(caller, "secret.delete", name, step)
        return receipt

    async def metadata(self, caller: Caller, name: str) -> Metadata:
        """Return what is known of a secret but its value. No event, unless it is refused.

        Raises:
            SecretNotFound, SecretDamaged, Denied: recorded in the log.
        """
        names.check_any_name(name)
        while True:
            attempt = Attempt(caller, secret_resource(caller, name))
            try:
                _permit(caller, name, ANY)
                record = await self._reading.read(attempt, name)
                if record.metadata.version == 0:
                    raise errors.SecretDamaged(name, record.damage or "unreadable metadata")
            except SecretsError as refusal:
                if await self._path.refuse(attempt, "secret.metadata", refusal):
                    raise
            else:
                if await self.gate.is_current(Intent(None, attempt.depends)):
                    return record.metadata
            caller = await self._path.renew(attempt, name)

    async def listing(self, caller: Caller, query: ListQuery) -> AsyncIterator[list[Metadata]]:
        """Metadata sorted by name, in pages of at most 1,000 until `query.limit` are there.

        Raises:
            LogUnavailable: not even the state of the log can be read.
        """
        position = await self._path.barrier(caller)
        left = query.limit
        while left > 0:
            page = query._replace(limit=min(left, 1000), allow=caller.principal.allow)
            found = await self._index.listing(page, position)
            yield found
            if len(found) < page.limit:
                return
            left -= len(found)
            query = query._replace(after=found[-1].name)

    async def audit(self, caller: Caller, query: AuditQuery) -> list[Entry]:
        """Matching events of the caller's organisation, newest first; all that had happened before
        this was called are taken into account.

        Raises:
            Denied: recorded in the log.
        """
        position = await self._audit_position(caller)
        return await self._index.audit(query._replace(allow=caller.principal.allow), position)

    async def complete_since(self) -> str | None:
        """The time from which on the newest answer has all events; None if that is the beginning:
        nothing was archived.

        Raises:
            LogDamaged: it can't be found out.
        """
        return (await self._index.minimum(answered=True)).complete_since

    async def audit_summary(
        self, caller: Caller, query: AuditQuery, grouping: Grouping
    ) -> list[Count]:
        """How many of the events that `audit` would give there are, by their time and a field.

        Raises:
            Denied: recorded in the log.
            InvalidInput: there are more counts than `grouping.most`.
        """
        position = await self._audit_position(caller)
        query = query._replace(allow=caller.principal.allow)
        return await self._index.summary(query, grouping, position)

    async def whoami(self, caller: Caller) -> access.Principal:
        """The principal, whose API key is live at this moment.

        Raises:
            Unauthenticated: it was revoked in the meantime.
        """
        await self._path.barrier(caller)
        return caller.principal

    async def recover(self) -> None:
        """Catch up with the log, publishing what a crash left unpublished.

        Raises:
            LogUnavailable, LogDamaged: the data directory can't be used.
            ConfigurationError: the master keys can't be read.
        """
        await self.gate.is_current(Intent(None, ()))
        await self.reload_keys()

    async def reload_keys(self) -> None:
        """Read the master keys anew.

        Raises:
            ConfigurationError: they can't be read; those that are held stay.
        """
        await self._master.reload()

    @property
    def building(self) -> Building | None:
        """How far the index is, while it is being built."""
        return self._index.building

    def start(self) -> None:
        """Let the projections follow the log in the background."""
        self._index.start()

    async def ready(self) -> str | None:
        """Why values can't be served now, or None. After a failure it tries the log again."""
        try:
            await self.gate.is_current(Intent(None, ()))
            await self._store.probe()
            if self.gate.unavailable is not None:
                resumed = Event(self._new_id(), "log.resume", "success", None, "log", None)
                await self.gate.submit(Intent(resumed, ()))
        except SecretsError as error:
            return str(error)
        return None

    async def key_usage(self) -> list[KeyUsage]:
        """How many secrets are under each master key, the ones that are held first.

        Raises:
            LogUnavailable, IndexUnavailable: it can't be found out now.
        """
        if not await self.gate.is_current(Intent(None, (self._master.depends,))):
            # Keys that others have retired are not held any more.
            await self._master.refresh()
        counts = await self._index.key_counts(self._store.position)
        keyring = self._master.keyring
        return [
            KeyUsage(key_id, counts.get(key_id, 0), keyring.state(key_id))
            for key_id in dict.fromkeys((*keyring.held, *sorted(counts)))
        ]

    async def close(self) -> None:
        """Finish what is under way and release everything."""
        try:
            await self.space.close()
            await self.failures.close()
        finally:
            await self.gate.drain()
            await self.signer.close()
            self.trail.close()
            await self._index.close()
            await self._store.close()

    async def _audit_position(self, caller: Caller) -> int:
        return await self._path.permit(
            caller, "audit.read", "audit_log", lambda who: who.require(_FULL_OR_READ)
        )

    def _next(
        self,
        caller: Caller,
        draft: Draft,
        expiry: float | None,
        current: SecretRecord | None,
        key_id: str,
    ) -> Metadata:
        now = times.render(self._clock())
        before = None if current is None else current.metadata
        known = before is not None and before.version > 0
        return Metadata(
            id=names.secret_id(caller.principal.org_id, draft.name),
            name=draft.name,
            description=draft.description,
            category=draft.category,
            created_at=before.created_at if before is not None and known else now,
            updated_at=now,
            created_by=before.created_by
            if before is not None and known
            else caller.principal.actor,
            expires_at=None if expiry is None else times.render(expiry),
            version=1 if before is None else before.version + 1,
            revision=self._new_id(),
            key_id=key_id,
            expiry=expiry,
        )


def _permit(caller: Caller, name: str, scopes: frozenset[str] = _FULL) -> None:
    principal = caller.principal
    principal.require(scopes)
    if principal.allow:
        principal.require_name(name)
