"""Many workers, one address: started, replaced when they die, and ended together.

The supervisor has no threads and no event loop, so that it can fork at any time, and everything
imported, so that a worker is there within a moment. It never touches the data directory.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from . import forking

_log = logging.getLogger(__name__)

# Workers that answer for less than `_SHORT` seconds, or never, are replaced later and later.
_SHORT = 1.0
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0

STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})
SIGNALS = STOPPING | {signal.SIGHUP}


def places(count: int) -> Sequence[int | None]:
    """The core that each of `count` workers is bound to, None if the system is to decide. For 0
    there is one for each core that this process may use, bound to it: so each has a core of its
    own, and its caches stay warm.
    """
    if count:
        return [None] * count
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)


class Worker:
    """What a worker has of its supervisor: it is forked with `SIGNALS` blocked."""

    def __init__(self, status: int, lifeline: int) -> None:
        self._status = status
        self._lifeline = lifeline

    def ready(self) -> None:
        """Tell the supervisor that this worker answers."""
        # If there is none any more, the lifeline says so.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._status, b"r")

    def begin(self, loop: AbstractEventLoop, stop: Callable[[], None]) -> None:
        """To be called once there are handlers for `SIGNALS`; `stop` is called when the supervisor
        is dead.
        """

        def orphaned() -> None:
            loop.remove_reader(self._lifeline)
            _log.warning("the supervisor is gone: finishing what is in flight")
            stop()

        loop.add_reader(self._lifeline, orphaned)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@dataclass(slots=True)
class _Slot:
    """One of the workers, and those that take its place. Times are those of `time.monotonic`."""

    number: int
    core: int | None
    pid: int | None = None
    status: int = -1
    # Since when it answers, how many lives in a row were short, and when the next one begins.
    since: float | None = None
    short_lives: int = 0
    due: float | None = None

    @property
    def name(self) -> str:
        return f"worker {self.number} (pid {self.pid})"

    def died(self, now: float) -> float:
        """It is dead; returns after how many seconds it has to be replaced."""
        long = self.since is not None and now - self.since >= _SHORT
        self.pid, self.since = None, None
        self.short_lives = 0 if long else self.short_lives + 1
        # The first one may have had bad luck.
        delay = 0.0
        if self.short_lives > 1:
            delay = min(_FIRST_DELAY * 2.0 ** (self.short_lives - 2), _LONGEST_DELAY)
        self.due = now + delay
        return delay


class Supervisor:
    """One worker for each of `places`. `ready` is called when all of them answer for the first
    time, `release` before they have to end. Those that then take longer than `patience`, in
    seconds, are killed.
    """

    def __init__(
        self,
        places: Sequence[int | None],
        ready: Callable[[], None],
        release: Callable[[], None],
        patience: float,
    ) -> None:
        self._slots = [_Slot(number, core) for number, core in enumerate(places, 1)]
        self._ready = ready
        self._release = release
        self._patience = patience
        self._announced = False
        self._stopping = False
        # When workers that have not ended by themselves are killed.
        self._deadline: float | None = None
        self._code = 0

    def run(self) -> Worker | int:
        """Returns in each worker its `Worker`, and in the supervisor, when all have ended, the
        exit code: 0 if that is what a signal asked for and all of them did it by themselves; that
        of a worker that could not even start; else 1.
        """
        # Nobody ever writes to it: the workers read its end when this process ends, however.
        lifeline, held = os.pipe()
        forking.close_in_children(held)
        # What is there now is the workers' too: none of them looks through it again.
        gc.collect()
        gc.freeze()
        # One first: what keeps it from starting is reported once.
        self._slots[0].due = time.monotonic()
        with _Signals() as signals:
            while True:
                for slot in self._due():
                    worker = self._fork(slot, lifeline)
                    if worker is not None:
                        return worker
                if not self._running():
                    break
                self._wait(signals)
        os.close(lifeline)
        forking.close(held)
        return self._code

    def _due(self) -> Iterator[_Slot]:
        now = time.monotonic()
        return (slot for slot in self._slots if slot.due is not None and slot.due <= now)

    def _running(self) -> bool:
        return any(slot.pid is not None or slot.due is not None for slot in self._slots)

    def _fork(self, slot: _Slot, lifeline: int) -> Worker | None:
        status, its = os.pipe()
        # A signal that comes before the worker has its handlers waits for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        slot.due = None
        slot.pid = os.fork()
        if slot.pid == 0:
            os.close(status)
            if slot.core is not None:
                # It may have been taken away since: anywhere else will do.
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(0, {slot.core})
            return Worker(its, lifeline)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(its)
        forking.close_in_children(status)
        slot.status = status
        return None

    def _wait(self, signals: "_Signals") -> None:
        """Wait for whatever comes next, and handle it."""
        poll = select.poll()
        poll.register(signals.descriptor, select.POLLIN)
        slots = {slot.status: slot for slot in self._slots if slot.pid is not None}
        for descriptor in slots:
            poll.register(descriptor, select.POLLIN)
        times = [slot.due for slot in self._slots if slot.due is not None]
        if self._deadline is not None:
            times.append(self._deadline)
        # Rounded up, or it would wake up before its time.
        timeout = max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None
        for descriptor, _ in poll.poll(timeout):
            if descriptor == signals.descriptor:
                for number in signals.read():
                    self._signalled(number)
            elif os.read(descriptor, 1):
                self._now_ready(slots[descriptor])
            else:
                self._ended(slots[descriptor])
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._kill()

    def _signalled(self, number: int) -> None:
        if number in STOPPING:
            self._stop()
        else:
            self._tell(signal.Signals(number))

    def _now_ready(self, slot: _Slot) -> None:
        slot.since = time.monotonic()
        if self._announced or self._stopping:
            return
        if all(slot.since is not None for slot in self._slots):
            self._announced = True
            self._ready()
        for other in self._slots:
            if other.pid is None:
                other.due = slot.since

    def _ended(self, slot: _Slot) -> None:
        """A worker's end of its pipe is closed: it is dead."""
        assert slot.pid is not None  # noqa: S101 - only those that run have a pipe
        forking.close(slot.status)
        code = os.waitstatus_to_exitcode(os.waitpid(slot.pid, 0)[1])
        name = slot.name
        delay = slot.died(time.monotonic())
        if self._stopping:
            slot.due = None
            if code:
                _log.error("%s %s", name, _how(code))
            self._code = self._code or max(code, 1 if code else 0)
        elif self._announced:
            _log.warning("%s %s; the next one starts in %g s", name, _how(code), delay)
        else:
            # It has said why, if it could.
            if code <= 0:
                _log.error("%s %s before it was ready", name, _how(code))
            self._code = code if code > 0 else 1
            self._stop()

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._deadline = time.monotonic() + self._patience
        for slot in self._slots:
            slot.due = None
        self._release()
        self._tell(signal.SIGTERM)

    def _kill(self) -> None:
        for slot in self._slots:
            if slot.pid is not None:
                _log.error("%s did not end within %g s and is killed", slot.name, self._patience)
        self._tell(signal.SIGKILL)
        # Their pipes tell when they are gone.
        self._deadline = None

    def _tell(self, number: signal.Signals) -> None:
        for slot in self._slots:
            if slot.pid is not None:
                os.kill(slot.pid, number)


class _Signals:
    """Signals as bytes in a pipe. Whoever leaves it, a new worker too, has none of it any more."""

    def __enter__(self) -> "_Signals":
        self.descriptor, self._write = os.pipe()
        for descriptor in (self.descriptor, self._write):
            os.set_blocking(descriptor, False)
        self._handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._write)

    def read(self) -> bytes:
        """The numbers of those that came."""
        return os.read(self.descriptor, 4096)


def _ignore(number: int, frame: object) -> None:
    """The pipe has it."""


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"
