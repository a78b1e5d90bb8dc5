"""A file system as a whole. Linux knows how to sync one; elsewhere files are synced one by one."""

import os
import sys
from pathlib import Path

# Those that keep what `syncfs` promises on a disk of their own. Others hand it on, or only a part
# of it: FUSE, the network, overlays.
_KINDS = frozenset({"ext4", "xfs"})

# Before Linux 5.8 it kept quiet about files that could not be written: kernel commit 735e4ae5be28.
_TELLS_ERRORS = (5, 8)

_MOUNTS = Path("/proc/self/mountinfo")


def can_be_synced(device: int) -> bool:
    """Whether `syncfs` is as good as syncing each file on this device (`st_dev`)."""
    if sys.platform != "linux" or _kernel() < _TELLS_ERRORS:
        return False
    return _kind(device) in _KINDS


def syncfs(descriptor: int) -> None:
    """Return when all that anybody has written to a file system is on stable storage: syncfs(2).

    Raises:
        OSError: or something could not be, since the descriptor was opened.
    """
    # Not for everybody: importing it takes milliseconds, of which an agent has few to start.
    import ctypes

    if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _kernel() -> tuple[int, ...]:
    numbers = os.uname().release.split("-")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdecimal())


def _kind(device: int) -> str | None:
    """What kind of file system it is; None for one that is not mounted as such, or if nobody says.

    The format is that of proc_pid_mountinfo(5).
    """
    place = f"{os.major(device)}:{os.minor(device)}"
    try:
        # Names of directories may be any bytes; what is looked for here is ASCII.
        mounts = _MOUNTS.read_text("ascii", "replace")
    except FileNotFoundError:
        return None
    for line in mounts.rstrip("\n").split("\n"):
        fields = line.split(" ")
        if fields[2] == place:
            # Of the optional fields before the dash there are any number.
            return fields[fields.index("-") + 1]
    return None
