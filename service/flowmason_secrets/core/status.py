"""Which HTTP status answers which error, and what of its data: the one table, used by the API, by
its clients and by the events.
"""

from . import errors
from .events import Outcome

STATUS: dict[type[errors.SecretsError], int] = {
    errors.InvalidInput: 422,
    errors.UnresolvedReferences: 422,
    errors.Unauthenticated: 401,
    errors.Denied: 403,
    errors.SecretNotFound: 404,
    errors.ApiKeyNotFound: 404,
    errors.EventNotFound: 404,
    errors.TileNotFound: 404,
    errors.NotCosigned: 404,
    errors.SecretExpired: 410,
    errors.EventArchived: 410,
    errors.PreconditionFailed: 412,
    errors.DecryptionFailed: 500,
    errors.SecretDamaged: 500,
    errors.RotationIncomplete: 500,
    errors.ConfigurationError: 500,
    errors.AnotherLog: 500,
    errors.LogUnavailable: 503,
    errors.LogDamaged: 503,
    errors.IndexUnavailable: 503,
    errors.Overloaded: 503,
    errors.CheckpointPending: 503,
}

# What of an error's data goes over the wire, by the names of its parameters, so that a client can
# raise the same error again. `retry_after` is a header.
DATA: dict[type[errors.SecretsError], tuple[str, ...]] = {
    errors.InvalidInput: ("field", "reason"),
    errors.UnresolvedReferences: ("errors", "asked"),
    errors.SecretNotFound: ("name",),
    errors.EventNotFound: ("seq",),
    errors.EventArchived: ("minimum",),
    errors.SecretExpired: ("name", "expires_at"),
    errors.PreconditionFailed: ("name", "current"),
    errors.DecryptionFailed: ("name", "key_id", "held"),
    errors.SecretDamaged: ("name", "reason"),
    errors.LogUnavailable: ("reason",),
    errors.IndexUnavailable: ("reason",),
    errors.Overloaded: ("reason",),
}

# They pass by themselves, and say when it is worth to ask again.
PASSING = (
    errors.LogUnavailable,
    errors.Overloaded,
    errors.IndexUnavailable,
    errors.CheckpointPending,
)

_OUTCOMES: dict[int, Outcome] = {403: "denied", 404: "not_found", 410: "expired"}


def outcome_of(error: errors.SecretsError) -> Outcome:
    """How an operation ended that this error ended."""
    return _OUTCOMES.get(STATUS[type(error)], "failed")
