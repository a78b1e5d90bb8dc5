"""Unix sockets to listen on."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from ..storage.durable import Durable


def bind_unix(path: Path) -> socket.socket:
    """A socket with this name; nobody is listening yet.

    Raises:
        OSError: a server listens there, or it is something else than a socket.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode):
            _refuse_taken(path)
            # Of a server that is gone.
            Durable().unlink(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(os.fspath(path))
    except OSError:
        bound.close()
        raise
    return bound


def _refuse_taken(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(os.fspath(path)) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), os.fspath(path))
