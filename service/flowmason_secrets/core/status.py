"""Which HTTP status answers which error: the one table, used by the API and by the events."""

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

_OUTCOMES: dict[int, Outcome] = {403: "denied", 404: "not_found", 410: "expired"}


def outcome_of(error: errors.SecretsError) -> Outcome:
    """How an operation ended that this error ended."""
    return _OUTCOMES.get(STATUS[type(error)], "failed")
