"""Disks that fail: a system call fails, or the power goes off before it.

All of them are the real `Durable` on real files. It is watched from two sides: every public method
of it is a step, and every function of `os` that it calls meanwhile is a system call of that step.
Both are found by looking at `Durable`, so a new one is watched without anybody remembering.
"""

import errno
import functools
import inspect
import itertools
import os
import threading
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flowmason_secrets.storage import durable, filesystems
from flowmason_secrets.storage.durable import Durable, ShortWrite

STEPS = tuple(
    name
    for name, method in vars(Durable).items()
    if inspect.isfunction(method) and not name.startswith("_")
)

FUNCTIONS = (types.BuiltinFunctionType, types.FunctionType)
# Functions of `os` that neither change the disk nor wait for it.
PASSIVE = frozenset({"close", "fspath", "fstat", "posix_fadvise", "stat"})
WRITES = frozenset({"pwrite", "write"})
SYNCS = frozenset({"fdatasync", "fsync", "syncfs"})

# From so few files on a file system is synced as a whole here: several secrets, but not one.
MANY = 6


class PowerOff(BaseException):
    """The machine stops here: nothing may catch it, as nothing can."""


def no_space() -> OSError:
    """The disk is full."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error() -> OSError:
    """The disk is broken."""
    return OSError(errno.EIO, os.strerror(errno.EIO))


def short_write() -> OSError:
    """The system took only a part."""
    return ShortWrite("wrote 1 of 2 bytes")


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: its place among those of its disk, the steps that take it, from the outermost,
    and the function of `os`.
    """

    number: int
    steps: tuple[str, ...]
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.number}. {self.name} of {' of '.join(reversed(self.steps))}"

    @property
    def size(self) -> int:
        """How many bytes it writes; 0 for one that writes none."""
        return len(self.arguments[1]) if self.name in WRITES else 0

    def do(self) -> Any:
        """Do it, as if nobody watched."""
        return self.function(*self.arguments, **self.options)

    def do_part(self, begin: int, end: int) -> int:
        """Write these of its bytes to where they belong, if those before are there."""
        descriptor, data, *offset = self.arguments
        written: int = self.function(descriptor, data[begin:end], *[at + begin for at in offset])
        return written

    def do_half(self) -> int:
        """Write half of its bytes; returns how many, also 0 if it writes none."""
        return self.do_part(0, self.size // 2) if self.size else 0


class Medium:
    """What a disk writes to: the files themselves, and nothing else."""

    def perform(self, call: Call) -> Any:
        """Do the call."""
        return call.do()


class Watched(Durable):
    """Knows its steps and its system calls, and calls `before` and `perform` for each of them."""

    many = MANY

    def __init__(self, medium: Medium | None = None) -> None:
        self._medium = medium or Medium()
        self.steps: list[str] = []
        self.calls: list[Call] = []
        self.numbers = itertools.count()

    def before(self, kind: str) -> None:
        """Called before each step."""

    def perform(self, call: Call) -> Any:
        """Do the call; what this raises is what the call raises."""
        return self._medium.perform(call)


class _Running(threading.local):
    """The steps that this thread is in, from the outermost."""

    def __init__(self) -> None:
        self.steps: list[tuple[Watched, str]] = []


_running = _Running()


def _watch(kind: str) -> Callable[..., Any]:
    method = getattr(Durable, kind)

    @functools.wraps(method)
    def step(self: Watched, *arguments: Any, **options: Any) -> Any:
        self.steps.append(kind)
        self.before(kind)
        _running.steps.append((self, kind))
        try:
            return method(self, *arguments, **options)
        finally:
            _running.steps.pop()

    return step


for _kind in STEPS:
    setattr(Watched, _kind, _watch(_kind))


class _System:
    """What `durable` knows as this module."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not isinstance(found, FUNCTIONS) or name in PASSIVE:
            return found
        return functools.partial(_call, name, found)


class _FileSystems(_System):
    """Any of them can be synced as a whole, wherever the tests run."""

    def can_be_synced(self, device: int) -> bool:
        return True


def _call(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not _running.steps:
        return function(*arguments, **options)
    disk = _running.steps[-1][0]
    steps = tuple(kind for _, kind in _running.steps)
    call = Call(next(disk.numbers), steps, name, function, arguments, options)
    disk.calls.append(call)
    return disk.perform(call)


vars(durable).update(os=_System(os), filesystems=_FileSystems(filesystems))


class Faulty(Watched):
    """Steps of some kinds fail at their first system call while it is `broken`.

    A write that fails leaves half of its bytes behind, as writes do.
    """

    def __init__(self, kinds: Collection[str], error: Callable[[], OSError]) -> None:
        super().__init__()
        self._kinds = frozenset(kinds)
        self._error = error
        self.broken = False
        self.failed = 0

    def perform(self, call: Call) -> Any:
        if not self.broken or self._kinds.isdisjoint(call.steps):
            return super().perform(call)
        self.failed += 1
        call.do_half()
        raise self._error()


class Failing(Watched):
    """One system call fails, and with `lasting` every later one too until it is repaired."""

    def __init__(self, at: int, fault: Callable[[Call], Any], *, lasting: bool) -> None:
        super().__init__()
        self._at = at
        self._fault = fault
        self.lasting = lasting
        self.failed = 0
        self.broken = True

    def perform(self, call: Call) -> Any:
        hit = call.number >= self._at if self.lasting else call.number == self._at
        if not self.broken or not hit:
            return super().perform(call)
        self.failed += 1
        return self._fault(call)


class Stopping(Watched):
    """Calls `moment` with a description before the first system call, after each of them, and in
    the middle of each that writes. Nothing else happens meanwhile.
    """

    def __init__(self, moment: Callable[[str], None], medium: Medium | None = None) -> None:
        super().__init__(medium)
        self._moment = moment
        self._lock = threading.Lock()

    def perform(self, call: Call) -> Any:
        with self._lock:
            if call.number == 0:
                self._moment(f"before {call}")
            size = call.size
            if not size:
                result = super().perform(call)
            else:
                result = 0
                for cut in sorted({1, size // 2, size - 1}):
                    result += call.do_part(result, cut)
                    self._moment(f"{result} of {size} bytes into {call}")
                result += call.do_part(result, size)
            self._moment(f"after {call}")
            return result


class Unplugged(Watched):
    """The power goes off before a system call, or in the middle of it if it writes, and stays off:
    no later call happens either.
    """

    def __init__(self, medium: Medium | None = None) -> None:
        super().__init__(medium)
        self._off_at: int | None = None
        self.off = threading.Event()
        self.on_off: Callable[[], object] = lambda: None

    def arm(self, calls: int) -> None:
        """Let so many more system calls happen."""
        self._off_at = len(self.calls) + calls

    def perform(self, call: Call) -> Any:
        if self._off_at is None or call.number < self._off_at:
            return super().perform(call)
        # Only the write that the power goes off in leaves a part; later ones never begin.
        if not self.off.is_set():
            call.do_half()
            self.off.set()
            self.on_off()
        raise PowerOff
