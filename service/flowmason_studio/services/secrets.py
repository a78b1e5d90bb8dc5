"""The documented import path of FlowMason Secrets."""

from flowmason_secrets.blocking import (
    SecretsService,
    get_secrets_service,
    resolve,
    resolve_async,
)
from flowmason_secrets.core.errors import (
    ApiKeyNotFound,
    ConfigurationError,
    DecryptionFailed,
    Denied,
    IndexUnavailable,
    InvalidInput,
    LogDamaged,
    LogUnavailable,
    Overloaded,
    PreconditionFailed,
    RotationIncomplete,
    SecretDamaged,
    SecretExpired,
    SecretNotFound,
    SecretsError,
    Unauthenticated,
    Unresolved,
    UnresolvedReferences,
)
from flowmason_secrets.core.records import SecretMetadata
from flowmason_secrets.library import AsyncSecretsService

__all__ = [
    "ApiKeyNotFound",
    "AsyncSecretsService",
    "ConfigurationError",
    "DecryptionFailed",
    "Denied",
    "IndexUnavailable",
    "InvalidInput",
    "LogDamaged",
    "LogUnavailable",
    "Overloaded",
    "PreconditionFailed",
    "RotationIncomplete",
    "SecretDamaged",
    "SecretExpired",
    "SecretMetadata",
    "SecretNotFound",
    "SecretsError",
    "SecretsService",
    "Unauthenticated",
    "Unresolved",
    "UnresolvedReferences",
    "get_secrets_service",
    "resolve",
    "resolve_async",
]
