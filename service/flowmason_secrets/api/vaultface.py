"""The face of a Vault: HashiCorp Vault's KV version 2, as its clients rely on it."""

from urllib.parse import parse_qsl

import msgspec
from aiohttp.web_request import BaseRequest

from ..core import errors
from ..core.access import FULL, SCOPES
from ..core.errors import SecretsError
from ..core.keyring import Plaintext
from ..core.status import STATUS
from . import framing, requests, vault
from .answers import Answer, json_answer
from .faces import Face, Found
from .problems import RequestError, malformed, retry_after
from .routes import Handler, Route

PREFIX = "/v1/"

_TOKENS = ("X-Vault-Token", "Authorization")
_DENIED = "permission denied"
_MISMATCH = "check-and-set parameter did not match the current version"


class VaultError(msgspec.Struct, frozen=True):
    """An error as Vault words it."""

    errors: list[str]


def _written(template: str, handler: Handler) -> tuple[Route, Route]:
    """Vault takes PUT for POST."""
    post, put = (Route(method, template, handler, (FULL,), {}) for method in ("POST", "PUT"))
    return post, put


# A template ends with what every one of its paths begins with, or is one of them.
ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/secret/data/{path}", vault.read, (FULL,), {}),
    *_written("/v1/secret/data/{path}", vault.write),
    Route("DELETE", "/v1/secret/data/{path}", vault.delete, (FULL,), {}),
    *_written("/v1/secret/delete/{path}", vault.delete_versions),
    *_written("/v1/secret/destroy/{path}", vault.delete_versions),
    *_written("/v1/secret/undelete/{path}", vault.undelete),
    Route("GET", "/v1/secret/metadata/{path}", vault.metadata, SCOPES, {}),
    Route("LIST", "/v1/secret/metadata/{path}", vault.names_below, SCOPES, {}),
    *_written("/v1/secret/metadata/{path}", vault.describe),
    Route("DELETE", "/v1/secret/metadata/{path}", vault.delete, (FULL,), {}),
    Route("GET", "/v1/secret/metadata", vault.metadata, SCOPES, {}),
    Route("LIST", "/v1/secret/metadata", vault.names_below, SCOPES, {}),
    Route("GET", "/v1/auth/token/lookup-self", vault.lookup_self, SCOPES, {}),
    Route("GET", "/v1/sys/internal/ui/mounts/secret", vault.mount, SCOPES, {}),
    Route("GET", "/v1/sys/internal/ui/mounts/secret/{path}", vault.mount, SCOPES, {}),
    Route("GET", "/v1/sys/health", vault.health, (), {}),
    Route("HEAD", "/v1/sys/health", vault.health, (), {}),
)


def _table() -> tuple[dict[str, dict[str, Route]], dict[str, dict[str, Route]]]:
    """Routes by method, by their path, and by what their paths begin with."""
    fixed: dict[str, dict[str, Route]] = {}
    open_ended: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        head, opening, _ = route.template.partition("{")
        method = framing.LIST if route.method == "LIST" else route.method
        (open_ended if opening else fixed).setdefault(head, {})[method] = route
    return fixed, open_ended


_FIXED, _OPEN_ENDED = _table()


def find(path: str) -> Found | None:
    """The routes by method and the parameters of a percent-encoded path, or None.

    Raises:
        RequestError: the path is not UTF-8.
    """
    if path in _FIXED:
        return _FIXED[path], {"path": ""}
    for head, methods in _OPEN_ENDED.items():
        if path.startswith(head):
            return methods, {"path": requests.decode_segment(path[len(head) :])}
    return None


def api_key(raw: BaseRequest) -> Plaintext | None:
    """The API key of a request, from `X-Vault-Token` or else `Authorization: Bearer`.

    Raises:
        RequestError: several, of which somebody on the way may have checked another one.
    """
    # No variable holds it: tracebacks show variables.
    if sum(len(raw.headers.getall(name, ())) for name in _TOKENS) > 1:
        raise malformed("There must be one token, in X-Vault-Token or in Authorization.")
    if "X-Vault-Token" in raw.headers:
        return Plaintext(raw.headers["X-Vault-Token"])
    return requests.api_key(raw)


def query(text: str, known: frozenset[str]) -> dict[str, str]:
    """The query parameters; of several with one name the first, as Vault has it.

    Raises:
        RequestError: not UTF-8.
    """
    try:
        text.encode()
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=32)
    except (UnicodeError, ValueError):
        raise malformed("The query is not percent-encoded UTF-8.") from None
    return dict(reversed(pairs))


def problem(error: SecretsError, request_id: str) -> Answer:
    """The answer to an error of ours."""
    status, texts = _worded(error)
    headers = {"X-Request-Id": request_id} | retry_after(error)
    if isinstance(error, RequestError):
        headers |= error.headers
    return json_answer(VaultError(texts), status, headers)


def _worded(error: SecretsError) -> tuple[int, list[str]]:
    """Status and texts as Vault's clients know them."""
    match error:
        # hvac's `is_authenticated` knows no 401, and where there is nothing that may be had, Vault
        # says the same: 404 makes operators of Kubernetes delete what they have.
        case errors.Unauthenticated() | RequestError(status=404):
            return 403, [_DENIED]
        case errors.Denied():
            return 403, [_DENIED, str(error)]
        case RequestError(status=405):
            return 405, ["unsupported operation"]
        case RequestError():
            return error.status, [str(error)]
        case errors.SecretNotFound() | errors.SecretExpired():
            return 404, []
        # Vault's own clients send a 412 again.
        case errors.PreconditionFailed():
            return 400, [_MISMATCH]
        case errors.InvalidInput():
            return 400, [str(error)]
    return STATUS[type(error)], [str(error)]


def internal_error(request_id: str) -> Answer:
    """The answer to a defect: nothing of it is told, the log has it under the request's id."""
    texts = [f"internal error; the server's log has it under {request_id}"]
    return json_answer(VaultError(texts), 500, {"X-Request-Id": request_id})


FACE = Face(find, api_key, query, problem, internal_error)
