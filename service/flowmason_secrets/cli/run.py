"""`flowmason-secrets run`."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import BinaryIO

import click

from .. import config
from ..core.errors import InvalidInput
from ..sidecar import environment, launching, supervising
from ..sidecar.environment import Plan
from ..sidecar.launching import Program
from ..sidecar.source import Found, Selection, find
from ..sidecar.supervising import Rules, Supervisor
from ..sidecar.watching import Watcher
from . import output
from .exits import sysexits
from .files import read_text
from .source import TargetSource
from .target import Place, Target
from .where import perform, target_options

_SIGNALS = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "WINCH")
_WATCH = ("none", "restart", *(f"signal:{name}" for name in _SIGNALS))


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be run, and with which variables."""

    command: tuple[str, ...]
    plan: Plan
    # Those of which each makes a variable of its own; the file of the plan may refer to others.
    alone: Selection

    @property
    def selection(self) -> Selection:
        """All that is read."""
        return Selection.of(self.plan.names, (*self.alone.names, *self.alone.patterns))

    def program(self, found: Found) -> Program:
        """Raises:
        InvalidInput: the values don't make variables.
        """
        for name in found.expired:
            output.note(f"Secret {name!r} has expired and is left out.")
        alone = filter(self.alone.wants, found.values)
        variables = self.plan.variables(found.values, alone)
        whole = environment.overlaid(config.for_children(), variables)
        masked = tuple(value.reveal() for value in found.values.values())
        return Program(list(self.command), whole, environment.shares(variables), masked)


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD ...")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only these secrets: names, or patterns with * and ?; may be given several times.",
)
@click.option("--prefix", default="", help="Put this in front of the names of variables.")
@click.option(
    "--env-file",
    type=click.File("rb"),
    metavar="TEMPLATE",
    help="Variables: lines NAME=text, with {{secrets.NAME}} for values.",
)
@click.option(
    "--watch",
    type=click.Choice(_WATCH),
    default="none",
    show_default="none",
    metavar="none|restart|signal:HUP",
    help="What to do when a value changes.",
)
@click.option(
    "--mask",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Print *** in place of values, except on terminals; auto: with --watch.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 86400),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="From SIGTERM to SIGKILL.",
)
@sysexits
@target_options()
def run(
    place: Place,
    command: tuple[str, ...],
    only: tuple[str, ...],
    prefix: str,
    env_file: BinaryIO | None,
    watch: str,
    mask: str,
    grace: float,
) -> None:
    """Run CMD with secrets in its environment.

    Without --only and --env-file it gets all that may be read. A secret NAME becomes the variable
    NAME, with _ in place of what no variable's name has, and comes before an inherited one.
    Expired secrets are left out; one that is named has to be there. The master key and the API key
    are taken out of the environment.

    Without --watch this process becomes CMD. With it, or with --mask always where the output is no
    terminal, it looks after CMD: signals are passed on, and it ends with its exit code. Else: 69 if
    secrets can't be had now, 77 if they may not be read, 78 if the wrong ones are asked for, 126
    and 127 if CMD can't be executed.
    """
    assignments = (
        () if env_file is None else environment.parse_file(read_text(env_file, "env-file"))
    )
    plan = Plan(assignments, prefix)
    everything = ("*",) if not only and env_file is None else ()
    job = Run(command, plan, Selection.of((), (*only, *everything)))
    masks = mask == "always" or (mask == "auto" and watch != "none")
    masks = masks and bool(supervising.masked_streams())
    if watch == "none" and not masks:
        program = perform(place, lambda target: _first(target, job))
        sys.stdout.flush()
        launching.become(program)
    told = watch.partition(":")[2]
    supervisor = Supervisor(Rules(masks, grace, signal.Signals[f"SIG{told}"] if told else None))
    if watch == "none":
        program = perform(place, lambda target: _first(target, job))
        code = asyncio.run(supervisor.run(_alone(program)))
    else:
        code = perform(place, lambda target: supervisor.run(_programs(target, job)))
    click.get_current_context().exit(code)


async def _first(target: Target, job: Run) -> Program:
    return job.program(await find(TargetSource(target), job.selection, listed=False))


async def _alone(program: Program) -> AsyncIterator[Program]:
    yield program


async def _programs(target: Target, job: Run) -> AsyncIterator[Program]:
    """The program with what is there now, and with what it is after each change."""
    watcher = Watcher(TargetSource(target), job.selection)
    yield job.program(await watcher.begin())
    changes = watcher.changes()
    while True:
        try:
            yield job.program(await anext(changes))
        except InvalidInput as error:
            output.note(f"What has changed can't be used, {job.command[0]} goes on: {error}")
