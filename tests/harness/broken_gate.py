"""The program with a part of its gate taken out: `python -m tests.harness.broken_gate PART serve`.

For tests of tests: what they are to find has to be found here.
"""

import sys
from collections.abc import Callable, Sequence

from flowmason_secrets import attempts, cli
from flowmason_secrets.authentication import Authentication
from flowmason_secrets.core import intents
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.events import Recorded
from flowmason_secrets.core.intents import Admission, Changes, Intent
from flowmason_secrets.core.records import Ref
from flowmason_secrets.storage import engine


def _version_check() -> None:
    """Every intent passes for current, whatever happened since it was read."""

    def admit(batch: Sequence[Intent], changes: Changes, position: int) -> Admission:
        return intents.admit([intent._replace(depends=()) for intent in batch], changes, position)

    _replace(engine, "admit", admit)


def _invalidation() -> None:
    """Changes of other processes are not noted, and what they replaced stays in the cache."""

    def changed(event: Recorded) -> list[Ref]:
        return []

    _replace(engine, "changed", changed)


def _revocation() -> None:
    """A key that was found live once passes for live."""

    def depends_on(caller: Caller) -> tuple[tuple[Ref, int], ...]:
        return ()

    async def renew(self: Authentication, caller: Caller) -> Caller:
        return caller

    _replace(attempts, "depends_on", depends_on)
    _replace(Authentication, "renew", renew)


def _replace(owner: object, name: str, function: Callable[..., object]) -> None:
    """What is not there any more has another name by now: then nothing would be broken."""
    assert callable(getattr(owner, name))
    setattr(owner, name, function)


PARTS: dict[str, Callable[[], None]] = {
    "version check": _version_check,
    "cache invalidation": _invalidation,
    "revocation": _revocation,
}


if __name__ == "__main__":
    PARTS[sys.argv.pop(1)]()
    cli.main()
