"""Disks that get full for real: a small file system, and a limit on how large files may be."""

import errno
import os
import resource
import subprocess
from pathlib import Path
from typing import Protocol

_PAGE = 4096
# Less than the first line of a segment: neither an event nor a new segment has room.
_NO_LINE = 1000


class Disk(Protocol):
    """Where a data directory is. `pids` are the processes that are to have no room.

    `error` is what the system says when there is none. `prefix` starts a program that has none.
    """

    data_dir: Path
    error: int

    def prefix(self) -> tuple[str, ...]:
        """What comes before a program and its arguments."""

    def crowd(self, *pids: int) -> None:
        """Leave hardly any room, which is used up in the midst of something."""

    def fill(self, *pids: int) -> None:
        """Leave none."""

    def free(self, *pids: int) -> None:
        """Give back what was taken."""


class SmallFileSystem:
    """A tmpfs of its own, filled with a ballast file. Only root may mount one."""

    error = errno.ENOSPC

    def __init__(self, place: Path, size: int = 16 << 20) -> None:
        """Raises:
        PermissionError: it may not be mounted here.
        """
        self._place = place
        self._ballast = place / "ballast"
        self.data_dir = place / "secrets"
        place.mkdir()
        command = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", os.fspath(place))
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise PermissionError(getattr(error, "stderr", "") or str(error)) from error

    def prefix(self) -> tuple[str, ...]:
        return ()

    def crowd(self, *pids: int) -> None:
        self.leave(32)

    def fill(self, *pids: int) -> None:
        self.leave(0)

    def leave(self, pages: int) -> None:
        """Take all room but so many pages; each file has its own."""
        with self._ballast.open("ab") as file:
            while (found := os.statvfs(self._place).f_bavail - pages) > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), found * _PAGE)
                except OSError as error:
                    # Somebody else took a page since it was asked how many there are.
                    if error.errno != errno.ENOSPC:
                        raise
                file.seek(0, os.SEEK_END)

    def free(self, *pids: int) -> None:
        self._ballast.unlink()

    def unmount(self) -> None:
        # At once, also if a test that failed has left a process behind.
        subprocess.run(("umount", "-l", os.fspath(self._place)), check=True)


class FileSizeLimit:
    """RLIMIT_FSIZE of the processes: no file grows beyond it, and writes up to it are short."""

    error = errno.EFBIG

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.data_dir = place / "secrets"

    def prefix(self) -> tuple[str, ...]:
        # In units of 512 bytes.
        return ("sh", "-c", 'ulimit -S -f 1 && exec "$@"', "sh")

    def crowd(self, *pids: int) -> None:
        newest = max((self.data_dir / "events").iterdir())
        self.limit(newest.stat().st_size + 100, *pids)

    def fill(self, *pids: int) -> None:
        self.limit(_NO_LINE, *pids)

    def free(self, *pids: int) -> None:
        for pid in pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    def limit(self, size: int, *pids: int) -> None:
        """Nothing beyond so many bytes of a file can be written."""
        for pid in pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
