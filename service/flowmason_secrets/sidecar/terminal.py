"""Whose turn it is on the terminal: a program in a process group of its own can read from it, and
gets its Ctrl-C, only while this group is in the foreground.
"""

import contextlib
import os
import signal


class Terminal:
    """The controlling terminal of this process, if it has one."""

    def __init__(self) -> None:
        self._own = os.getpgrp()
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
        # In a pipeline, another program of our group may be the one that needs the terminal.
        self.wanted = os.isatty(0) and os.isatty(1)

    def give(self, group: int) -> bool:
        """Put a group in the foreground if ours is there; returns whether it is there now."""
        return self._move(self._own, group)

    def take(self, group: int) -> None:
        """Put our group in the foreground again, if that group is there."""
        self._move(group, self._own)

    def close(self) -> None:
        """Leave the terminal alone from now on."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _move(self, source: int, target: int) -> bool:
        if self._descriptor is None:
            return False
        # From the background, it would stop us.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            if os.tcgetpgrp(self._descriptor) == source:
                os.tcsetpgrp(self._descriptor, target)
            return os.tcgetpgrp(self._descriptor) == target
        except OSError:
            # It was hung up, or the group is gone.
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
