"""Clients of the HTTP API: `AsyncSecretsClient`, and `SecretsClient` for synchronous callers."""

from .asynchronous import AsyncSecretsClient
from .documents import Entries, Export, Filters, Reading, Stored
from .errors import OutcomeUnknown, Refused, UnexpectedAnswer, Unreachable
from .options import Options
from .synchronous import SecretsClient

__all__ = [
    "AsyncSecretsClient",
    "Entries",
    "Export",
    "Filters",
    "Options",
    "OutcomeUnknown",
    "Reading",
    "Refused",
    "SecretsClient",
    "Stored",
    "UnexpectedAnswer",
    "Unreachable",
]
