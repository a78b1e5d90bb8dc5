"""A program with secrets, restarted or told when they change.

It has a process group of its own. Signals that come to us are passed on, each once; what it ends
with, we end with.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from . import launching
from .launching import Program
from .masking import Masker
from .piping import Pump
from .terminal import Terminal

_log = logging.getLogger(__name__)

# What a terminal would send to all of a group; and what only the program itself can make sense of.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_TO_GROUP = (*_ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
_TO_PROGRAM = (signal.SIGUSR1, signal.SIGUSR2)
# Seconds between two looks whether a group, of which not all are our children, is gone.
_LOOK = 0.02


@dataclass(frozen=True, slots=True)
class Rules:
    """How it is looked after. `grace`, in seconds, is what it has from SIGTERM to SIGKILL;
    `on_change` is the signal that tells it of a change, None to restart it.
    """

    masks: bool
    grace: float = 10.0
    on_change: signal.Signals | None = None


class _Death(NamedTuple):
    """The program's end; the code is as `os.waitstatus_to_exitcode` has it."""

    code: int


class _Stop(NamedTuple):
    """The program was stopped by a signal, and can be continued."""

    number: int


def masked_streams() -> tuple[int, ...]:
    """Those of stdout and stderr that are no terminals."""
    return tuple(number for number in (1, 2) if not os.isatty(number))


class Supervisor:
    """Runs a program, and the same one with other secrets after it. Belongs to one event loop."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._terminal = Terminal()
        self._events: asyncio.Queue[int | Program] = asyncio.Queue()
        self._pid = 0
        self._pumps: list[Pump] = []
        # What comes after the one that runs, once that has ended.
        self._next: Program | None = None
        self._ending = False
        # When whatever is left of the group is killed, in the time of the loop.
        self._deadline: float | None = None

    async def run(self, programs: AsyncIterator[Program]) -> int:
        """Run the first one until it ends by itself, or because a signal was passed on; the others
        are what it is to be after a change. Returns the exit code: its own, or 128 and the number
        of the signal that ended it.

        Nothing is kept of a program that runs but what its masker needs.

        Raises:
            NotStarted: it can't be executed.
            SecretsError: as `programs` has it, for the first one.
        """
        self._next = await anext(programs)
        with _Signals(self._events.put_nowait):
            self._start()
            watcher = asyncio.create_task(self._watch(programs))
            try:
                while True:
                    code = await self._live()
                    if self._next is not None or self._ending:
                        await self._clear()
                    if self._next is None:
                        return code if code >= 0 else 128 - code
                    self._start()
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
                self._terminal.close()

    def _start(self) -> None:
        program, self._next, self._deadline = self._next, None, None
        assert program is not None  # noqa: S101 - whoever calls this has seen it
        masked = masked_streams() if self._rules.masks else ()
        pumps = {number: Pump(number, Masker(program.masked)) for number in masked}
        sys.stdout.flush()
        streams = {number: pump.entrance for number, pump in pumps.items()}
        self._pid = launching.start(program, streams)
        self._pumps = list(pumps.values())
        for pump in self._pumps:
            pump.begin()
        if self._terminal.wanted and self._terminal.give(self._pid):
            # It may have been faster, and wait for its turn.
            self._tell(signal.SIGCONT)

    async def _live(self) -> int:
        """Handle whatever comes until the program is dead; returns its code."""
        while (code := self._handle(await self._event())) is None:
            pass
        self._terminal.take(self._pid)
        await self._drain()
        return code

    def _handle(self, event: "int | Program | _Death | _Stop") -> int | None:
        match event:
            case _Death(code):
                return code
            case _Stop(number):
                self._stopped(number)
            case Program():
                self._changed(event)
            case int():
                self._signalled(event)
        return None

    async def _event(self) -> "int | Program | _Death | _Stop":
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    event = await self._events.get()
            except TimeoutError:
                _log.warning("it did not end within %g s and is killed", self._rules.grace)
                self._deadline = None
                self._tell(signal.SIGKILL)
                continue
            if event != signal.SIGCHLD:
                return event
            status = self._bury()
            if status is not None:
                if os.WIFSTOPPED(status):
                    return _Stop(os.WSTOPSIG(status))
                return _Death(os.waitstatus_to_exitcode(status))

    def _signalled(self, number: int) -> None:
        if number in _TO_PROGRAM:
            os.kill(self._pid, number)
            return
        if number == signal.SIGCONT:
            self._terminal.give(self._pid)
        self._tell(number)
        if number == signal.SIGTERM:
            self._ending, self._next = True, None
            self._end()

    def _changed(self, program: Program) -> None:
        if self._ending:
            return
        if self._rules.on_change is not None:
            os.kill(self._pid, self._rules.on_change)
            return
        if self._next is None:
            _log.warning("secrets have changed: restarting %s", program.command[0])
            self._tell(signal.SIGTERM)
            self._end()
        self._next = program

    def _end(self) -> None:
        """It was told to end."""
        # One that is stopped would not hear of it.
        self._tell(signal.SIGCONT)
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._rules.grace

    async def _drain(self) -> None:
        """Return when all that it printed has been taken, or when we are not to wait for that."""
        waits = {asyncio.create_task(self._taken()), asyncio.create_task(self._told_to_end())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.wait(waits)

    async def _taken(self) -> None:
        for pump in self._pumps:
            await pump.finish()

    async def _told_to_end(self) -> None:
        while True:
            event = await self._events.get()
            if isinstance(event, Program):
                self._next = self._next and event
            elif event in _ENDING:
                self._next = None
                return

    def _stopped(self, number: int) -> None:
        """Stop with it, as if we were one; unless all it needs is the terminal, which is ours."""
        reads = number in (signal.SIGTTIN, signal.SIGTTOU)
        if (reads and self._terminal.give(self._pid)) or self._deadline is not None:
            self._tell(signal.SIGCONT)
            return
        if number == signal.SIGSTOP:
            # No terminal sends it: it is about this one, and whoever sent it will continue it.
            return
        self._terminal.take(self._pid)
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The whole job, or the shell would take it for a running one. Without a shell that could
        # continue it, the system ignores this.
        os.killpg(0, signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)

    async def _clear(self) -> None:
        """Wait until nothing is left of the group, and kill it at the deadline."""
        loop = asyncio.get_running_loop()
        while self._tell(0):
            self._bury()
            if self._deadline is not None and loop.time() >= self._deadline:
                self._tell(signal.SIGKILL)
            await asyncio.sleep(_LOOK)

    def _bury(self) -> int | None:
        """Ask what has become of our children; returns the program's status if it is another one.

        Not of the program alone: the first process of a container is also given what the dead
        leave behind.
        """
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
                if pid in (0, self._pid):
                    return status if pid else None
        return None

    def _tell(self, number: int) -> bool:
        """Send a signal to the group; False if there is nobody left."""
        try:
            os.killpg(self._pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            # macOS says so when there are only zombies left.
            return False
        return True

    async def _watch(self, programs: AsyncIterator[Program]) -> None:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                self._events.put_nowait(await anext(programs))


class _Signals:
    """Signals as events, for the duration of a block. Those that are ignored stay so, also in the
    program.
    """

    def __init__(self, put: Callable[[int], None]) -> None:
        self._put = put
        self._numbers = [
            number
            for number in (*_TO_GROUP, *_TO_PROGRAM, signal.SIGCHLD)
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN
        ]

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            loop.add_signal_handler(number, self._put, number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            with contextlib.suppress(RuntimeError):
                loop.remove_signal_handler(number)
