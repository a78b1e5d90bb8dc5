"""Who is at the other end of a unix socket: the kernel says so, and nobody can lie to it."""

import os
import select
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Protocol

from ...core.access import Peer
from ...core.errors import ConfigurationError, Denied

# Linux 6.5: a descriptor for the very process that connected. Python has no name for it yet.
_SO_PEERPIDFD = 77
_CREDENTIALS = struct.Struct("iII")


class Socket(Protocol):
    """As much of a socket as is asked here."""

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes:
        """The value of an option."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Which local processes are served: those of one of these users or groups (their effective
    ids) and, if `programs` names any, only while they execute one of these files.
    """

    users: frozenset[int]
    groups: frozenset[int] = frozenset()
    programs: frozenset[str] = frozenset()

    def check_system(self) -> None:
        """Raises:
        ConfigurationError: this system doesn't say what would have to be known.
        """
        if not sys.platform.startswith("linux"):
            raise ConfigurationError("The agent needs Linux: SO_PEERCRED says who connects.")
        if self.programs:
            one, other = socket.socketpair()
            with one, other:
                try:
                    os.close(_pidfd(one))
                except OSError:
                    raise ConfigurationError(
                        "--allow-exe needs Linux 6.5: before, another process could have got the "
                        "process id of the one that connected."
                    ) from None

    def admit(self, connected: Socket) -> Peer:
        """Who connected.

        Raises:
            Denied: he may not.
        """
        pid, uid, gid = _CREDENTIALS.unpack(
            connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid not in self.users and gid not in self.groups:
            raise Denied(
                f"The agent does not serve the user {uid} with the group {gid}: see its "
                "--allow-uid and --allow-gid."
            )
        if self.programs and _program(connected, pid) not in self.programs:
            raise Denied(f"The agent does not serve the program of process {pid}: see --allow-exe.")
        return Peer(uid, pid)


def _program(connected: Socket, pid: int) -> str | None:
    """The file that the process executes; None if it is gone, or may not be looked at."""
    try:
        process = _pidfd(connected)
    except OSError:
        return None
    try:
        program = os.readlink(f"/proc/{pid}/exe")
        # It is readable once the process has ended: only then could the id be somebody else's.
        ended, _, _ = select.select([process], [], [], 0)
        return None if ended else program
    except OSError:
        return None
    finally:
        os.close(process)


def _pidfd(connected: Socket) -> int:
    size = struct.calcsize("i")
    found: int = struct.unpack("i", connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, size))[0]
    return found
