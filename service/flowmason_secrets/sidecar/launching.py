"""Becoming a program, or starting one."""

import errno
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from .environment import Environment

T = TypeVar("T")

NOT_FOUND, NOT_EXECUTABLE = 127, 126

# Python ignores these two, and whoever is ignored stays so in the program.
_RESTORED = (signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True, slots=True)
class Program:
    """A command with the environment that it gets, of which `shares` says what takes the room; and
    the values that are not to be seen in its output where that is masked.
    """

    command: list[str]
    environment: Environment = field(repr=False)
    shares: str
    masked: tuple[str, ...] = field(default=(), repr=False)


class NotStarted(Exception):
    """The program could not be started. `exit_code` is what a shell would end with."""

    def __init__(self, program: Program, error: OSError) -> None:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        large = f": {program.shares}" if error.errno == errno.E2BIG else ""
        reason = os.strerror(error.errno or errno.ENOENT)
        super().__init__(f"{program.command[0]!r} can't be executed: {reason}{large}")
        self.exit_code = NOT_FOUND if missing else NOT_EXECUTABLE


def become(program: Program) -> NoReturn:
    """Be this program from now on, in this process.

    Raises:
        NotStarted: that is not possible.
    """
    for number in _RESTORED:
        signal.signal(number, signal.SIG_DFL)
    command, environment = program.command, program.environment
    _first(program, lambda path: os.execve(path, command, environment))  # noqa: S606 - as it says
    raise AssertionError("execve returned")


def start(program: Program, streams: Mapping[int, int]) -> int:
    """Start a program in a process group of its own and return its pid, which names the group too.
    `streams` has the descriptors that it gets, by their numbers there.

    Raises:
        NotStarted: that is not possible.
    """
    actions = [(os.POSIX_SPAWN_DUP2, ours, there) for there, ours in streams.items()]
    return _first(
        program,
        lambda path: os.posix_spawn(
            path,
            program.command,
            program.environment,
            file_actions=actions,
            setpgroup=0,
            setsigdef=_RESTORED,
        ),
    )


def _first(program: Program, run: Callable[[bytes], T]) -> T:
    """Run the first program of this name in the PATH of the program's own environment."""
    problem: OSError = FileNotFoundError(errno.ENOENT, "")
    for path in _candidates(program.command[0], program.environment):
        try:
            return run(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            problem = error
            if error.errno != errno.EACCES:
                break
    raise NotStarted(program, problem) from None


def _candidates(command: str, environment: Environment) -> list[bytes]:
    name = os.fsencode(command)
    if b"/" in name:
        return [name]
    path = environment.get(b"PATH", os.fsencode(os.defpath))
    # An empty entry is the working directory.
    return [os.path.join(directory or b".", name) for directory in path.split(b":")]
