"""The only place that writes, syncs, renames or unlinks: faults are injected here and nowhere else.

All of it goes through `os`, which the tests replace. Blocking: called in worker threads only.
"""

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import filesystems

StrPath = str | Path

PRIVATE_DIR = 0o700
PRIVATE_FILE = 0o600
SHARED_FILE = 0o640


_PIECE = 1 << 20

# Files that are being written at once.
_TOGETHER = 32


class ShortWrite(OSError):
    """The system took only a part of what was to be written."""


class LinkedFile(OSError):
    """The file has a second name, a snapshot's perhaps, and is not to be written in place."""


class Durable:
    """Steps on the file system. Each one either happened whole or raised OSError.

    A `write` that raised may have left a part of its bytes behind.
    """

    # From so many files on, the whole file system is synced in place of each.
    many = 256

    def make_directory(self, path: StrPath, mode: int = PRIVATE_DIR) -> None:
        """Create a directory with its parents if it is not there; its own mode is `mode`."""
        if os.path.isdir(path):
            return
        os.makedirs(path, mode=mode, exist_ok=True)
        os.chmod(path, mode)

    def restrict(self, path: Path, mode: int = PRIVATE_DIR) -> None:
        """Take from a directory's mode what goes beyond `mode`."""
        current = stat.S_IMODE(os.stat(path).st_mode)
        if current & ~mode:
            os.chmod(path, current & mode)

    def open_append(self, path: Path, mode: int) -> int:
        """A descriptor that appends to `path`; a file it creates has exactly `mode`."""
        return self._open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, mode)

    def open_existing(self, path: Path) -> int:
        """A descriptor that reads, and appends to, a file that must be there."""
        return os.open(path, os.O_APPEND | os.O_RDWR | os.O_CLOEXEC)

    def open_slot(self, path: Path) -> int:
        """A descriptor for `put_slot` and for locking."""
        return self._open(path, os.O_CREAT | os.O_RDWR, PRIVATE_FILE)

    def write(self, descriptor: int, data: bytes) -> None:
        """One `write()` of everything.

        Raises:
            ShortWrite: only a part was taken.
        """
        _check_whole(os.write(descriptor, data), data)

    def put_slot(self, descriptor: int, data: bytes) -> None:
        """Overwrite the first bytes of a file that holds nothing but them."""
        _check_whole(os.pwrite(descriptor, data, 0), data)

    def sync(self, descriptor: int) -> None:
        """Return when what was written to the file is on stable storage."""
        # macOS has no fdatasync.
        if sys.platform == "darwin":
            os.fsync(descriptor)
        else:
            os.fdatasync(descriptor)

    def sync_path(self, path: StrPath) -> None:
        """Like `sync`, of a file or the names in a directory; one that is gone needs no sync."""
        self.sync_paths([path])

    def sync_paths(self, paths: Sequence[StrPath], since: int | None = None) -> None:
        """Like `sync_path`, of each of them in order. Nothing is known if it raises.

        `since` is a descriptor that was open before any of them was written: with it many are
        synced at once, where that can be.
        """
        if since is not None and len(paths) >= self.many:
            paths = self._sync_at_once(paths, since)
        for start in range(0, len(paths), _TOGETHER):
            descriptors: list[int] = []
            try:
                for path in paths[start : start + _TOGETHER]:
                    with contextlib.suppress(FileNotFoundError):
                        descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._sync_opened(descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _sync_at_once(self, paths: Sequence[StrPath], descriptor: int) -> Sequence[StrPath]:
        """Sync those on the file system of this descriptor, if that can be; returns the others."""
        device = os.fstat(descriptor).st_dev
        if not filesystems.can_be_synced(device):
            return paths
        elsewhere: list[StrPath] = []
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_dev != device:
                    elsewhere.append(path)
        filesystems.syncfs(descriptor)
        # A file whose data went to the disk before may still be in the disk's own cache, which
        # nobody but `fsync` is bound to empty.
        os.fsync(descriptor)
        return elsewhere

    def _sync_opened(self, descriptors: list[int]) -> None:
        modes = [os.fstat(descriptor).st_mode for descriptor in descriptors]
        if len(descriptors) > 1 and sys.platform == "linux":
            # Linux starts to write a file whose pages are not wanted. Whoever syncs them one by one
            # waits for each, which takes twice as long, and as much of the processor.
            for descriptor, mode in zip(descriptors, modes, strict=True):
                if stat.S_ISREG(mode):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for descriptor, mode in zip(descriptors, modes, strict=True):
            if stat.S_ISDIR(mode):
                # New names alone are no data: fdatasync may leave them where they are.
                os.fsync(descriptor)
            else:
                self.sync(descriptor)

    def create(self, path: Path, data: bytes, mode: int, *, sync: bool) -> None:
        """Write a new file. If it can't be written whole, nothing is left of it."""
        descriptor = self._open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        try:
            try:
                self.write(descriptor, data)
                if sync:
                    self.sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise

    def put(self, path: str, data: bytes, mode: int) -> None:
        """Make a file hold `data`, followed by newlines up to the size that it had before.

        Not atomic, and not synced: only for what a journal holds as well.
        """
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, mode)
        try:
            status = os.fstat(descriptor)
            if status.st_nlink != 1:
                raise LinkedFile(path)
            if stat.S_IMODE(status.st_mode) != mode:
                os.fchmod(descriptor, mode)
            # Never shorter than before, so that one write does all. In place, because renaming
            # over a file makes ext4 allocate and write it at once: twenty times the cost.
            self.put_slot(descriptor, data.ljust(status.st_size, b"\n"))
        finally:
            os.close(descriptor)

    def place(self, path: str, data: bytes, mode: int) -> None:
        """Like `put`, also where the directory is missing or the file has a second name."""
        try:
            self.put(path, data, mode)
        except LinkedFile:
            self.unlink(path)
            self.put(path, data, mode)
        except FileNotFoundError:
            self.make_directory(os.path.dirname(path))
            self.put(path, data, mode)

    def allocate(self, path: StrPath, size: int) -> None:
        """Make a file take the room of `size` bytes, if it takes less; it holds nothing."""
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            before = os.fstat(descriptor).st_size
            try:
                if sys.platform == "darwin":
                    # macOS has no posix_fallocate.
                    for place in range(before, size, _PIECE):
                        self.write(descriptor, bytes(min(_PIECE, size - place)))
                else:
                    os.posix_fallocate(descriptor, 0, size)
                self.sync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def shrink(self, path: StrPath, size: int) -> None:
        """Give back what a file takes beyond `size` bytes. Not synced."""
        os.truncate(path, size)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its name, in place of what had that name before."""
        os.replace(source, target)

    def give(self, path: Path, user: int, group: int) -> None:
        """Make a file somebody's; nothing happens if it is his already."""
        status = os.stat(path)
        if (status.st_uid, status.st_gid) != (user, group):
            os.chown(path, user, group)

    def unlink(self, path: StrPath) -> None:
        """Remove a name; one that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def _open(self, path: Path, flags: int, mode: int) -> int:
        descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
        if os.fstat(descriptor).st_size == 0:
            # The umask may have taken bits from the mode, or nobody has set it yet.
            os.fchmod(descriptor, mode)
        return descriptor


class StateDirectory(Durable):
    """What the directory of a sidecar needs besides, which several processes share. Data
    directories have none of it, and the tables of failures are about those.
    """

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Wait for the lock that this file is, and hold it for the duration of a block."""
        descriptor = self.open_slot(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def remove_directory(self, path: StrPath) -> None:
        """Remove an empty directory; one that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)


def _check_whole(written: int, data: bytes) -> None:
    if written != len(data):
        raise ShortWrite(f"wrote {written} of {len(data)} bytes, no room for the rest")
