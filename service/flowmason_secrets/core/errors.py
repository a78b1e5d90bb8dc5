"""The one tree of errors. Every member carries a stable code and its data, never a value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

# Characters of a name that a message about many names shows.
_SHOWN = 64


class SecretsError(Exception):
    """Anything this product refuses or fails to do.

    `code` is stable and meant for machines; `str(error)` says what to do and is safe to show.
    """

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"


class InvalidInput(SecretsError, ValueError):
    """A field that the caller sent is not acceptable."""

    code = "invalid_input"
    title = "Invalid input"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Unauthenticated(SecretsError):
    """No API key, or one that is unknown, expired or revoked; which of these is not told."""

    code = "unauthenticated"
    title = "Unauthenticated"

    def __init__(self) -> None:
        super().__init__(
            "A live API key is needed: send 'Authorization: Bearer <api-key>' or 'X-API-Key'."
        )


class Denied(SecretsError, PermissionError):
    """The API key is live, but its scopes or its allowed names don't cover this."""

    code = "denied"
    title = "Not allowed"


class SecretNotFound(SecretsError, LookupError):
    """The organisation has no secret of this name."""

    code = "secret_not_found"
    title = "Secret not found"

    def __init__(self, name: str) -> None:
        super().__init__(f"Secret {name!r} not found.")
        self.name = name


class SecretExpired(SecretsError):
    """The secret is past its expiry and its value is no longer handed out."""

    code = "secret_expired"
    title = "Secret expired"

    def __init__(self, name: str, expires_at: str) -> None:
        super().__init__(f"Secret {name!r} has expired at {expires_at}. Set it again to renew it.")
        self.name = name
        self.expires_at = expires_at


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A secret that could not be read, and the code of the error that says why."""

    name: str
    code: str


class UnresolvedReferences(SecretsError):
    """Some of several secrets that were asked for together can't be read, so none was revealed.

    `errors` lists each of them.
    """

    code = "unresolved_references"
    title = "Unresolved references"

    def __init__(self, errors: Sequence[Unresolved], asked: int) -> None:
        # As many names as there are, but not as long as somebody likes.
        shown = ", ".join(f"{one.name[:_SHOWN]!r} ({one.code})" for one in errors)
        super().__init__(
            f"{len(errors)} of {asked} secrets can't be read, so none was revealed: {shown}."
        )
        self.errors = tuple(errors)
        self.asked = asked


class DecryptionFailed(SecretsError):
    """The secret is under a key that this process does not hold, or its token is not authentic."""

    code = "decryption_failed"
    title = "Decryption failed"

    def __init__(self, name: str, key_id: str, held: Sequence[str]) -> None:
        problem = f"Secret {name!r} needs the master key {key_id}; held here: {', '.join(held)}."
        if key_id in held:
            problem = (
                f"Secret {name!r} can't be decrypted with the master key {key_id}, the one of "
                f"{', '.join(held)} that it should be under: it was written with another one "
                "(FlowMason 1.0 does not say which), or its file was changed."
            )
        super().__init__(
            f"{problem} Configure the key that it was written with; nothing on disk was changed."
        )
        self.name = name
        self.key_id = key_id
        self.held = tuple(held)


class SecretDamaged(SecretsError):
    """The files of this secret are incomplete or don't belong together."""

    code = "secret_damaged"
    title = "Secret damaged"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"The stored files of secret {name!r} are damaged ({reason}). "
            "Set it again or delete it; other secrets are not affected."
        )
        self.name = name
        self.reason = reason


class RotationIncomplete(SecretsError):
    """Some secrets could not be put under the active master key; `done` is how many could."""

    code = "rotation_incomplete"
    title = "Rotation incomplete"

    def __init__(self, failed: Sequence[str], done: int) -> None:
        shown = ", ".join(repr(name) for name in failed[:10])
        super().__init__(
            f"{done} secrets are under the new master key now; {len(failed)} can't be decrypted "
            f"and stay as they are: {shown}{', …' if len(failed) > 10 else ''}. "
            "Add the key that they were written with, or set or delete them; then go on."
        )
        self.failed = tuple(failed)
        self.done = done


class PreconditionFailed(SecretsError):
    """A conditional write met another version than the one it asked for; nothing was changed."""

    code = "precondition_failed"
    title = "Precondition failed"

    def __init__(self, name: str, current: str | None) -> None:
        found = "does not exist" if current is None else f"is at version {current}"
        super().__init__(f"Secret {name!r} {found}; nothing was changed.")
        self.name = name
        self.current = current


class ApiKeyNotFound(SecretsError, LookupError):
    """The organisation has no live API key of this id."""

    code = "api_key_not_found"
    title = "API key not found"

    def __init__(self, key_id: str) -> None:
        # The id is not repeated: people send the key itself by mistake.
        super().__init__("There is no live API key of this id: unknown, or already revoked.")
        self.key_id = key_id


class EventNotFound(SecretsError, LookupError):
    """The log has no event of this seq that the caller may see."""

    code = "event_not_found"
    title = "Event not found"

    def __init__(self, seq: int) -> None:
        super().__init__(f"There is no event {seq} of this organisation.")
        self.seq = seq


class EventArchived(SecretsError, LookupError):
    """What was asked for begins with events that were archived; `minimum` is the first one left."""

    code = "event_archived"
    title = "Event archived"

    def __init__(self, minimum: int) -> None:
        super().__init__(
            f"The events before {minimum} were archived. Ask the archive for them, or go on here "
            f"after {minimum - 1}."
        )
        self.minimum = minimum


class TileNotFound(SecretsError, LookupError):
    """The newest checkpoint covers no such tile."""

    code = "tile_not_found"
    title = "Tile not found"

    def __init__(self) -> None:
        super().__init__(
            "The newest checkpoint covers no such tile. The path is <level>/<number>, as C2SP "
            "tlog-tiles has it."
        )


class NotCosigned(SecretsError, LookupError):
    """No witness has cosigned the log yet."""

    code = "not_cosigned"
    title = "Not cosigned"

    def __init__(self) -> None:
        super().__init__(
            "No witness has cosigned the log yet. Is one set? The readiness check tells how it "
            "stands with each."
        )


class CheckpointPending(SecretsError):
    """No checkpoint covers the event yet. `retry_after` is in seconds."""

    code = "checkpoint_pending"
    title = "Checkpoint pending"

    def __init__(self, retry_after: int = 1) -> None:
        super().__init__("No signed checkpoint covers this yet; ask again shortly.")
        self.retry_after = retry_after


class LogUnavailable(SecretsError):
    """The event log can't be written, so nothing is revealed and nothing is changed.

    `retry_after` is in seconds.
    """

    code = "log_unavailable"
    title = "Event log unavailable"

    def __init__(self, reason: str, retry_after: int = 1) -> None:
        super().__init__(
            f"The event log can't be written ({reason}), so no value is handed out and nothing is "
            "changed. Make room on the disk of the data directory, or repair what else is wrong "
            "with it, and try again: a running server goes on by itself."
        )
        self.reason = reason
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: OSError) -> "LogUnavailable":
        """What the system says."""
        return cls(error.strerror or str(error) or type(error).__name__)


class Overloaded(SecretsError):
    """More is asked for at once than there is room for. `retry_after` is in seconds."""

    code = "overloaded"
    title = "Overloaded"

    def __init__(
        self, reason: str = "Too many operations are waiting to be committed", retry_after: int = 1
    ) -> None:
        super().__init__(f"{reason}; try again shortly.")
        self.reason = reason
        self.retry_after = retry_after


class IndexUnavailable(SecretsError):
    """The projections can't be brought up to date. `retry_after` is in seconds."""

    code = "index_unavailable"
    title = "Index unavailable"

    def __init__(self, reason: str, retry_after: int = 1) -> None:
        super().__init__(
            f"Lists and audit queries can't be answered now: the index can't be written ({reason})."
        )
        self.reason = reason
        self.retry_after = retry_after


class LogDamaged(SecretsError):
    """The event log contradicts itself; nothing is written to it until somebody has looked."""

    code = "log_damaged"
    title = "Event log damaged"


class AnotherLog(SecretsError):
    """A directory that was to be added to holds something else; nothing was changed there."""

    code = "another_log"
    title = "Another log"


class ConfigurationError(SecretsError):
    """The settings contradict each other or are not safe."""

    code = "configuration"
    title = "Configuration error"
