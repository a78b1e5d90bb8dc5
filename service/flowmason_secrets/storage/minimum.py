"""The minimum index: which events were archived. FORMAT.md §11.1. Blocking."""

import os
from base64 import b64decode, b64encode
from dataclasses import asdict
from pathlib import Path

import orjson

from ..core.errors import LogDamaged
from ..core.minimum import Minimum
from .durable import SHARED_FILE, Durable

NOTHING_ARCHIVED = Minimum()


class MinimumFile:
    """The file `minimum` of a data directory; it is read again only when it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = NOTHING_ARCHIVED
        self._identity: tuple[int, int] | None = None

    @classmethod
    def beside(cls, events: Path) -> "MinimumFile":
        """The one of the log whose segments are in a directory."""
        return cls(events.with_name("minimum"))

    def read(self) -> Minimum:
        """What was archived until now.

        Raises:
            LogDamaged: the file is not what it should be.
        """
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return NOTHING_ARCHIVED
        identity = status.st_ino, status.st_mtime_ns
        if identity != self._identity:
            self._known, self._identity = self._read(), identity
        return self._known

    def write(self, minimum: Minimum, durable: Durable) -> None:
        """Replace it; durable when this returns."""
        shown = asdict(minimum)
        shown["edge"] = [b64encode(row).decode() for row in minimum.edge]
        draft = self._path.with_name("minimum.tmp")
        # Of one who died; whoever archives is alone.
        durable.unlink(draft)
        durable.create(draft, orjson.dumps(shown) + b"\n", SHARED_FILE, sync=True)
        durable.rename(draft, self._path)
        durable.sync_path(self._path.parent)

    def _read(self) -> Minimum:
        try:
            shown = orjson.loads(self._path.read_bytes())
            edge = tuple(b64decode(row, validate=True) for row in shown["edge"])
            found = Minimum(
                shown["minimum"], shown["complete_since"], tuple(shown["organisations"]), edge
            )
            if type(found.minimum) is not int or found.minimum < 0:
                raise ValueError("not a minimum index")
        except (ValueError, LookupError, TypeError) as error:
            raise LogDamaged(
                f"{self._path} does not say which events were archived: {error}. Put back the file "
                "from a backup: the newest event log.archive says which minimum it has."
            ) from None
        return found
