"""A face: routes of one style, with what is said around them."""

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp.web_request import BaseRequest

from ..core.errors import SecretsError
from ..core.keyring import Plaintext
from .answers import Answer
from .routes import Route

Found = tuple[dict[str, Route], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Face:
    """`find` gives the routes by method and the parameters of a path, `api_key` what a request
    carries, `query` its parameters, given those that its route knows; `problem` and
    `internal_error` the answers to errors of ours and to defects, given the request's id.
    """

    find: Callable[[str], Found | None]
    api_key: Callable[[BaseRequest], Plaintext | None]
    query: Callable[[str, frozenset[str]], dict[str, str]]
    problem: Callable[[SecretsError, str], Answer]
    internal_error: Callable[[str], Answer]
