"""Changes on their way: encrypted, durable before their events are. FORMAT.md §6.

One journal per process, to which a batch adds its changes with one write and one sync. It goes
when the files that were published from it are durable themselves. Blocking.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..core.records import Change, Ref, Single, singles
from . import wire
from .durable import PRIVATE_FILE, Durable

_log = logging.getLogger(__name__)

_SUFFIX = ".journal"
_JOURNAL = re.compile(r"[0-9]{12}-[0-9a-f]+\.journal")


class Journal:
    """The staged changes of this process since they were last settled."""

    def __init__(self, directory: Path, durable: Durable, stem: str, position: int) -> None:
        # The position in the name tells recovery from where on it has to look for the events.
        self.path = directory / f"{position:012d}-{stem}{_SUFFIX}"
        self._durable = durable
        self._descriptor = durable.open_append(self.path, PRIVATE_FILE)
        self.published: set[str] = set()
        self.size = 0
        try:
            durable.sync_path(directory)
        except OSError:
            os.close(self._descriptor)
            raise

    def stage(self, changes: Iterable[tuple[str, Change]]) -> None:
        """Return when the changes, each with the id of its event, are on stable storage."""
        data = b"".join([wire.encode_staged(event_id, change) for event_id, change in changes])
        self._durable.write(self._descriptor, data)
        self._durable.sync(self._descriptor)
        self.size += len(data)

    def orphaned(self) -> bool:
        """Whether another process has recovered this journal and removed it."""
        return os.fstat(self._descriptor).st_nlink == 0

    def close(self) -> None:
        """Release the descriptor; the file stays until `settle`."""
        os.close(self._descriptor)

    def settle(self) -> None:
        """Make durable what was published from this journal, then remove it. It is closed then."""
        try:
            sync_published(self.published, self._durable, self._descriptor)
            self._durable.unlink(self.path)
        finally:
            self.close()


class Leftovers:
    """All journals in the directory: of processes that died, and of some that still run."""

    def __init__(self, directory: Path, durable: Durable) -> None:
        self._durable = durable
        self._paths = [directory / name for name in sorted(os.listdir(directory))]
        self._journals = [path for path in self._paths if _JOURNAL.fullmatch(path.name)]
        starts = [int(path.name.partition("-")[0]) for path in self._journals]
        self.position = min(starts, default=0)

    def __bool__(self) -> bool:
        return bool(self._journals)

    def changes(self) -> dict[tuple[Ref, str], Single]:
        """The staged changes by resource and id of their event; what a torn write left is none."""
        found: dict[tuple[Ref, str], Single] = {}
        for path in self._journals:
            for line in _lines(path):
                try:
                    event_id, change = wire.decode_staged(line)
                except wire.Malformed:
                    _log.info("a torn staged change in %s was never committed", path.name)
                    break
                found.update({(ref, event_id): single for ref, single in singles(change)})
        return found

    def remove(self) -> None:
        """Remove the journals, and the drafts of files that never got their names."""
        for path in self._paths:
            self._durable.unlink(path)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        # Its process has settled it meanwhile, for which it needs no lock: all of it is durable.
        return []


def sync_published(paths: Collection[str], durable: Durable, since: int | None = None) -> None:
    """Return when these files, and their names in their directories, are on stable storage."""
    directories = sorted({os.path.dirname(path) for path in paths})
    durable.sync_paths([*sorted(paths), *directories], since)
