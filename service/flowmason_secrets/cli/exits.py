"""Exit codes of commands that stand in for another program, after sysexits(3): that program's own
must be told apart from ours.
"""

import functools
from collections.abc import Callable

import click

from ..core.errors import (
    ConfigurationError,
    DecryptionFailed,
    Denied,
    InvalidInput,
    SecretExpired,
    SecretNotFound,
    SecretsError,
    Unauthenticated,
    UnresolvedReferences,
)
from ..sidecar.launching import NotStarted

UNAVAILABLE, DENIED, CONFIGURATION = 69, 77, 78

_DENIED = (Denied, Unauthenticated)
_CONFIGURATION = (
    ConfigurationError,
    DecryptionFailed,
    InvalidInput,
    SecretExpired,
    SecretNotFound,
    UnresolvedReferences,
)


class Ended(click.ClickException):
    """Ends the program with this code and one line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc] # click takes it from the instance


def sysexits(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these codes: 69 if secrets can't be had now, 77 if they may not, 78 if it is
    asked for the wrong ones; 126 and 127 if the program can't be executed.
    """

    @functools.wraps(command)
    def wrapped(*arguments: object, **options: object) -> None:
        try:
            command(*arguments, **options)
        except NotStarted as error:
            raise Ended(f"{error}.", error.exit_code) from None
        except SecretsError as error:
            raise Ended(str(error), code_of(error)) from None
        except click.ClickException as error:
            # What the target says instead has the names that the command line has for things.
            if not isinstance(error.__context__, SecretsError) or error.exit_code != 1:
                raise
            raise Ended(error.message, code_of(error.__context__)) from None

    return wrapped


def code_of(error: SecretsError) -> int:
    """The exit code for an error."""
    if isinstance(error, UnresolvedReferences):
        refused = {one.code for one in error.errors} <= {one.code for one in _DENIED}
        return DENIED if refused else CONFIGURATION
    if isinstance(error, _DENIED):
        return DENIED
    return CONFIGURATION if isinstance(error, _CONFIGURATION) else UNAVAILABLE
