"""The minimum index of a log, and what else is known of what was archived. FORMAT.md §11.1."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Minimum:
    """What is left of a log whose first `minimum` events were archived: all events from the time
    `complete_since` on. `organisations` are those that the archived ones name, and `edge` has the
    hashes of the last tile of each level, if it is not full, of the tree of them.
    """

    minimum: int = 0
    complete_since: str | None = None
    organisations: tuple[str, ...] = ()
    edge: tuple[bytes, ...] = ()
