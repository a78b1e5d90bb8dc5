"""Errors as RFC 9457 problems."""

import msgspec

from ..core import errors
from ..core.errors import SecretsError
from ..core.status import DATA, PASSING, STATUS
from .answers import Answer
from .shapes import Problem


class RequestError(SecretsError):
    """The request itself is not acceptable; the members say which status answers it."""

    def __init__(self, status: int, code: str, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.problem_code = code
        self.problem_title = title
        self.headers: dict[str, str] = {}


def malformed(detail: str) -> RequestError:
    """400: the request can't be understood."""
    return RequestError(400, "malformed_request", "Malformed request", detail)


def problem_response(error: SecretsError, request_id: str) -> Answer:
    """The answer to an error of ours."""
    headers = {"X-Request-Id": request_id, "Cache-Control": "no-store"}
    if isinstance(error, RequestError):
        status, code, title = error.status, error.problem_code, error.problem_title
        headers |= error.headers
    else:
        status, code, title = STATUS[type(error)], error.code, error.title
    data = {member: getattr(error, member) for member in DATA.get(type(error), ())}
    problem = Problem(code, title, status, str(error), request_id, **data)
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="flowmason-secrets"'
    return _response(problem, headers | retry_after(error))


def retry_after(error: SecretsError) -> dict[str, str]:
    """The header that says when it is worth to ask again; none if it is not."""
    return {"Retry-After": str(error.retry_after)} if isinstance(error, PASSING) else {}


def internal_error(request_id: str) -> Answer:
    """The answer to a defect: nothing of it is told, the log has it under the request's id."""
    detail = "An unexpected error; the server's log has it under this request_id."
    problem = Problem(SecretsError.code, SecretsError.title, 500, detail, request_id)
    return _response(problem, {"X-Request-Id": request_id})


def _response(problem: Problem, headers: dict[str, str]) -> Answer:
    headers["Content-Type"] = "application/problem+json"
    return Answer(problem.status, headers, msgspec.json.encode(problem))
