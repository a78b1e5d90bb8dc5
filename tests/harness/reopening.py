"""Doing an operation from opening to closing, and what has to be true when it is opened again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from flowmason_secrets.storage.durable import Durable

from .faults import Watched
from .load import Grown
from .operations import Operation, open_on
from .signed import sign
from .truth import Found, Truth, check_closed, check_hidden, look, signing_key


async def run(operation: Operation, root: Path, disk: Watched, truth: Truth) -> None:
    """Open, operate and close."""
    service = open_on(root, disk, operation.segment)
    await operation.act(service, truth)
    await service.close()


async def check_reopened(root: Path, truth: Truth) -> Found:
    """Open with a disk that works, and hold what is there against the truth and the rules."""
    grown = Grown(root)
    grown.check()
    if root.exists():
        check_hidden(root)
    service = open_on(root, Durable())
    found = await look(service, root, truth.raw)
    truth.check(found)
    if signing_key(root).exists():
        # It is still the log that was signed, and signing goes on.
        await sign(service)
    await service.close()
    grown.check()
    check_closed(root, found, truth.receipts)
    return found


@contextlib.contextmanager
def saying(case: str) -> Iterator[None]:
    """Name the case in what is raised."""
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise
