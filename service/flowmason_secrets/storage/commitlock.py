"""The commit lock of a data directory, and the hint in its file. FORMAT.md §7. Blocking."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from .. import forking
from ..core.errors import LogUnavailable
from .durable import Durable
from .published import Layout


class CommitLock:
    """Whoever holds it is alone, of all processes, in writing to the data directory.

    `prepare` is called whenever the file is about to be opened.
    """

    def __init__(
        self, layout: Layout, durable: Durable, prepare: Callable[[], None] | None = None
    ) -> None:
        self._path = layout.lock
        self._durable = durable
        self._prepare = prepare
        self._descriptor: int | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Wait for it, and hold it for the duration of a block.

        Raises:
            LogUnavailable: it can't be opened.
        """
        descriptor = self._acquire()
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    @property
    def published(self) -> int:
        """All changes among so many events are published. While it is held."""
        assert self._descriptor is not None  # noqa: S101 - it is held
        return int.from_bytes(os.pread(self._descriptor, 8, 0), "little")

    @published.setter
    def published(self, position: int) -> None:
        assert self._descriptor is not None  # noqa: S101 - it is held
        if self.published != position:
            self._durable.put_slot(self._descriptor, position.to_bytes(8, "little"))

    def close(self) -> None:
        """Release the descriptor."""
        if self._descriptor is not None:
            forking.close(self._descriptor)
            self._descriptor = None

    def _acquire(self) -> int:
        try:
            while True:
                if self._descriptor is None:
                    if self._prepare is not None:
                        self._prepare()
                    self._descriptor = self._durable.open_slot(self._path)
                    forking.close_in_children(self._descriptor)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                # Somebody may have removed the file: a lock on it would exclude nobody.
                if os.fstat(self._descriptor).st_nlink:
                    return self._descriptor
                self.close()
        except OSError as error:
            raise LogUnavailable.of(error) from error
