"""What makes tests quick, and tables the same in every run: no threads, no key derived twice."""

import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from flowmason_secrets import signer, trail
from flowmason_secrets.core import keyring
from flowmason_secrets.index import sqlite
from flowmason_secrets.storage import files

# Most of what a small test takes.
derived_once = functools.cache(keyring._pbkdf2)


class Inline(Executor):
    """Takes the place of a thread pool: does at once what it is given."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do it now."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def swiftly(patch: pytest.MonkeyPatch) -> None:
    """Let services that are opened from now on do all in the thread of their loop, and settle
    their journals as soon as they can.
    """
    patch.setattr(files, "ThreadPoolExecutor", Inline)
    patch.setattr(sqlite, "ThreadPoolExecutor", Inline)
    patch.setattr(signer, "ThreadPoolExecutor", Inline)
    patch.setattr(trail, "ThreadPoolExecutor", Inline)
    patch.setattr(files, "SETTLE_AFTER", 0.0)
