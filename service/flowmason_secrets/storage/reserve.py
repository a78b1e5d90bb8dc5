"""Room that is kept for when the disk is full. FORMAT.md §10. Blocking, under the commit lock."""

import contextlib
import errno
import logging
import os
from pathlib import Path

from ..core.events import Event
from ..core.ports import Space
from .durable import Durable, ShortWrite
from .published import Layout

_log = logging.getLogger(__name__)

# In bytes.
RESERVE_BYTES = 64 << 20

# How much is given back at once: whoever else fills the disk takes what is free.
_STEP = 4 << 20

# What a disk that is full may have free.
_NEXT_TO_NOTHING = 1 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT)

# What is refused while the reserve is in use. All others are refusals, make room, or take back what
# somebody may do, and operators need them.
_ORDINARY = frozenset(
    {"secret.create", "secret.read", "api_key.create", "agent.deliver", "log.resume"}
)


def ordinary(event: Event | None) -> bool:
    """Whether an event is not what the reserve is kept for."""
    return event is not None and event.outcome == "success" and event.action in _ORDINARY


class Reserve:
    """The file that takes room, of so many bytes. Only a server makes it; what has become of it is
    seen from its name, by every process.
    """

    def __init__(self, layout: Layout, durable: Durable, size: int) -> None:
        self._whole = layout.reserve
        self._used = layout.reserve_in_use
        self._used_path = os.fspath(layout.reserve_in_use)
        self._root = layout.root_path
        self._durable = durable
        self._size = size

    def in_use(self) -> bool:
        """Whether the disk was full, and there has been no room to fill the reserve since."""
        return os.access(self._used_path, os.F_OK)

    def release(self, error: OSError) -> bool:
        """Give back a part of it, if the error says that the disk is full; False if it does not, or
        if nothing is left.
        """
        if not self._is_full(error):
            return False
        with contextlib.suppress(OSError):
            for path in (self._whole, self._used):
                size = _size(path)
                if size > 0:
                    # First: the disk is full.
                    self._durable.shrink(path, max(0, size - _STEP))
                    if path == self._whole:
                        self._durable.rename(path, self._used)
                        _log.error(
                            "the disk of %s is full: what is left of the reserve is for refusals, "
                            "deletions and operators",
                            self._root,
                        )
                    return True
        return False

    def _is_full(self, error: OSError) -> bool:
        if not isinstance(error, ShortWrite):
            return error.errno in _FULL
        # It does not tell whether the disk is full or the file was not to grow.
        found = os.statvfs(self._root)
        return found.f_bavail * found.f_frsize < _NEXT_TO_NOTHING

    def has_room(self) -> bool:
        """Whether it could be filled, and something would be left."""
        found = os.statvfs(self._root)
        needed = self._size + self._size // 4 - max(_size(self._whole), _size(self._used), 0)
        inodes = found.f_favail > 0 or found.f_files == 0
        return inodes and found.f_bavail * found.f_frsize >= needed

    def refill(self) -> bool:
        """End its use, if there is room; whether it is ended."""
        try:
            if not self.has_room():
                return False
            self._durable.allocate(self._used, self._size)
            self._durable.rename(self._used, self._whole)
        except OSError as error:
            _log.warning("the reserve can't be filled again: %s", error.strerror)
            return False
        _log.info("there is room on the disk of %s again", self._root)
        return True

    def keep(self) -> None:
        """Make it as large as it is to be, if there is room; without a size, remove it."""
        if self._size == 0:
            self._durable.unlink(self._whole)
            self._durable.unlink(self._used)
        elif self.in_use():
            self.refill()
        elif _size(self._whole) < self._size and self.has_room():
            before = _size(self._whole)
            try:
                self._durable.allocate(self._whole, self._size)
            except OSError:
                if before < 0:
                    self._durable.unlink(self._whole)
                raise

    def space(self) -> Space:
        """How much room there is. In any thread."""
        found = os.statvfs(self._root)
        missing = self._size if not self.in_use() and _size(self._whole) < self._size else 0
        return Space(found.f_bavail * found.f_frsize, missing)


def _size(path: Path) -> int:
    """In bytes; -1 if there is no such file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1
