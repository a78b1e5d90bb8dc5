"""The one path: what every operation does around its own step."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from .authentication import Authentication, depends_on
from .core import errors, names
from .core.access import Caller, Principal
from .core.errors import SecretsError
from .core.events import Detail, Event, Outcome, Receipt, event
from .core.intents import Intent
from .core.ports import STALE, Store
from .core.records import Change, PutSecret
from .core.status import STATUS, outcome_of
from .gate import Gate, Later, Prepare
from .masterkeys import MasterKeys

T = TypeVar("T")

# Key ids in the event of a failed decryption: it has to fit into a line.
_HELD = 16


class Attempt:
    """One run through the path: what it read and what it wants, until the gate decides.

    With `parts` it stands for several, of which each is an event: all of them are committed, or
    none. If one of them has a `refusal`, only those that have one are recorded.
    """

    __slots__ = (
        "caller",
        "change",
        "depends",
        "details",
        "later",
        "parts",
        "prepare",
        "resource",
        "version",
    )

    def __init__(self, caller: Caller, resource: tuple[str, str | None, str | None]) -> None:
        self.caller = caller
        self.resource = resource
        self.depends = depends_on(caller)
        self.version: int | None = None
        self.prepare: Prepare | None = None
        self.later: Later | None = None
        self.change: Change | None = None
        self.details: dict[str, Detail] | None = None
        self.parts: tuple[Part, ...] = ()


class Part(Attempt):
    """What an attempt at several things has of one secret: why it can't be, if it can't, and in
    the end the id of its event.
    """

    __slots__ = ("event_id", "refusal")

    def __init__(self, whole: Attempt, name: str) -> None:
        super().__init__(whole.caller, secret_resource(whole.caller, name))
        self.details = whole.details
        self.refusal: SecretsError | None = None
        self.event_id = ""


class Path:
    """request → authorise → read state → intent → gate → reply, and again if outdated by then."""

    def __init__(
        self,
        store: Store,
        gate: Gate,
        authentication: Authentication,
        master: MasterKeys,
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._gate = gate
        self._authentication = authentication
        self._master = master
        self._new_id = new_id

    async def perform(
        self,
        caller: Caller,
        action: str,
        name: str | None,
        step: Callable[[Attempt], Awaitable[T]],
    ) -> tuple[T, Receipt]:
        """The one path. What `step` read may be outdated by the time of the commit: then again.

        The receipt of an attempt with parts is the one of its last part.
        """
        while True:
            attempt = Attempt(caller, secret_resource(caller, name))
            refusal: SecretsError | None = None
            try:
                result = await step(attempt)
            except SecretsError as error:
                refusal = error
            else:
                intent = self._intent(attempt, action, None)
                verdict = await self._gate.submit(intent, attempt.prepare, attempt.later)
                if type(verdict) is Receipt:
                    return result, verdict
                if isinstance(verdict, SecretsError):
                    refusal = verdict
            if refusal is not None and await self.refuse(attempt, action, refusal):
                raise refusal
            caller = await self.renew(attempt, name)

    async def refuse(self, attempt: Attempt, action: str, refusal: SecretsError) -> bool:
        """Record a refusal; False if what it was based on is outdated."""
        verdict = await self._gate.submit(self._intent(attempt, action, refusal))
        return verdict is not STALE

    async def permit(
        self, caller: Caller, action: str, resource_type: str, check: Callable[[Principal], None]
    ) -> int:
        """Check an operation that is no event unless it is refused; see `barrier`.

        Raises:
            Denied: by `check`; recorded.
            Unauthenticated: the API key was revoked in the meantime.
        """
        while True:
            attempt = Attempt(caller, (resource_type, None, None))
            try:
                check(caller.principal)
            except errors.Denied as refusal:
                if await self.refuse(attempt, action, refusal):
                    raise
                caller = await self.renew(attempt, None)
            else:
                return await self.barrier(caller)

    async def barrier(self, caller: Caller) -> int:
        """The size of the log, in events, at some moment since this was called; the caller's API
        key was live then.

        Raises:
            Unauthenticated: it is not.
        """
        while not await self._gate.is_current(Intent(None, depends_on(caller))):
            caller = await self._authentication.renew(caller)
        return self._store.position

    async def renew(self, attempt: Attempt, name: str | None) -> Caller:
        """Forget what turned out to be outdated, and look the caller up again.

        Raises:
            Unauthenticated: his API key was revoked in the meantime.
            ConfigurationError: the master keys may have changed, and can't be read.
        """
        caller = attempt.caller
        if self._master.depends in attempt.depends:
            await self._master.reload()
        if name is not None:
            self._store.forget(caller.principal.org_id, name)
        for part in attempt.parts:
            self._store.forget(caller.principal.org_id, part.resource[2] or "")
        return await self._authentication.renew(caller)

    def _intent(self, attempt: Attempt, action: str, refusal: SecretsError | None) -> Intent:
        if attempt.parts:
            return self._joint_intent(attempt, action, refusal)
        change = attempt.change if refusal is None else None
        return Intent(self._event(attempt, action, refusal), attempt.depends, change)

    def _joint_intent(self, attempt: Attempt, action: str, refusal: SecretsError | None) -> Intent:
        """One intent for all parts: whatever any of them read has to be current."""
        # What could have been read isn't revealed either, so it is no event.
        parts = [part for part in attempt.parts if part.refusal is not None] or attempt.parts
        recorded = [self._event(part, action, part.refusal or refusal) for part in parts]
        for part, one in zip(parts, recorded, strict=True):
            part.event_id = one.id
        depends = dict.fromkeys(ref for part in (attempt, *parts) for ref in part.depends)
        return Intent(recorded[0], tuple(depends), more=tuple(recorded[1:]))

    def _event(self, attempt: Attempt, action: str, refusal: SecretsError | None) -> Event:
        details, change = attempt.details, attempt.change
        # The metadata of a new version name the event that wrote it.
        written = change.metadata.revision if isinstance(change, PutSecret) else None
        if refusal is None:
            status = 201 if details is not None and details.get("kind") == "create" else 200
            outcome: Outcome = "success"
        else:
            status, outcome = STATUS[type(refusal)], outcome_of(refusal)
            details = {**(details or {}), "error": refusal.code}
            if isinstance(refusal, errors.DecryptionFailed):
                details |= {"key_id": refusal.key_id, "held": list(refusal.held[:_HELD])}
        return event(
            written or self._new_id(),
            attempt.caller,
            action,
            outcome,
            attempt.resource,
            status,
            attempt.version,
            details,
        )


def secret_resource(caller: Caller, name: str | None) -> tuple[str, str | None, str | None]:
    """What an event about this secret is about: type, id and name."""
    org_id = caller.principal.org_id
    return ("secret", None if name is None else names.secret_id(org_id, name), name)
