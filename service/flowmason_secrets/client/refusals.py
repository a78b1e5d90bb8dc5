"""From an answer to the exception that the service raised."""

from collections.abc import Mapping

import msgspec

from ..api.shapes import Problem
from ..core import errors
from ..core.errors import SecretsError
from ..core.status import DATA, PASSING, STATUS
from .errors import Refused

_KINDS = {kind.code: kind for kind in STATUS}
# The only member that may be missing: then there is no such secret.
_MAY_BE_NONE = "current"


def refusal(body: bytes, headers: Mapping[str, str], subject: str) -> SecretsError | None:
    """The error of a problem document (RFC 9457), or None if it is none; `subject` is the id that
    was asked for.
    """
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    kind = _KINDS.get(problem.code)
    error = None if kind is None else _same(kind, problem, subject)
    if error is None:
        return Refused(problem.status, problem.code, problem.detail, problem.request_id)
    if isinstance(error, PASSING):
        error.retry_after = int(retry_after(headers) or 0)
    return error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of `Retry-After` (RFC 9110 §10.2.3), if that is how it is given."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _same(kind: type[SecretsError], problem: Problem, subject: str) -> SecretsError | None:
    if kind is errors.ApiKeyNotFound:
        return errors.ApiKeyNotFound(subject)
    if kind in _BARE:
        return kind()
    if kind not in DATA:
        return kind(problem.detail) if kind in _TOLD else None
    data = {member: getattr(problem, member) for member in DATA[kind]}
    if any(value is None for member, value in data.items() if member != _MAY_BE_NONE):
        return None
    return kind(**data)


# Those that are nothing but their text, and those that always say the same.
_TOLD = (errors.Denied, errors.LogDamaged, errors.AnotherLog, errors.ConfigurationError)
_BARE = (
    errors.Unauthenticated,
    errors.TileNotFound,
    errors.NotCosigned,
    errors.CheckpointPending,
)
