"""What only a client can meet; everything else is in `core.errors`, as the service raises it."""

from ..core.errors import SecretsError


class Unreachable(SecretsError, ConnectionError):
    """The server can't be reached, or its answer broke off. Nothing was changed."""

    code = "unreachable"
    title = "Server unreachable"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} can't be reached: {reason}. Check the URL and the server.")
        self.url = url
        self.reason = reason


class UnexpectedAnswer(SecretsError):
    """Something answered that is not FlowMason Secrets: a proxy, say. Redirects are among it."""

    code = "unexpected_answer"
    title = "Unexpected answer"

    def __init__(self, url: str, status: int) -> None:
        answered = "" if status == 200 else f": HTTP {status}"
        super().__init__(
            f"{url} did not answer as FlowMason Secrets does{answered}. Check the URL and the "
            "server."
        )
        self.url = url
        self.status = status


class OutcomeUnknown(SecretsError):
    """A change was sent and may have been carried out, whole or not at all: its answer is lost.

    It was not repeated, or only as far as that can't carry it out twice. `reason` says what
    happened to the answer.
    """

    code = "outcome_unknown"
    title = "Outcome unknown"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The change may have been made or not: {reason} Look before you make it again; the "
            "audit log has it if it was made."
        )
        self.reason = reason


class Refused(SecretsError):
    """The server refused for a reason that has no class of its own: `problem_code` says which, and
    its log has `request_id`.
    """

    code = "refused"
    title = "Refused"

    def __init__(self, status: int, problem_code: str, detail: str, request_id: str) -> None:
        super().__init__(detail)
        self.status = status
        self.problem_code = problem_code
        self.request_id = request_id
