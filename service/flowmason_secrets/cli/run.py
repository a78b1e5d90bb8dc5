"""`flowmason-secrets run`."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from .. import config
from ..core.errors import ConfigurationError, InvalidInput, SecretsError
from ..sidecar import environment, launching, supervising
from ..sidecar.environment import Plan
from ..sidecar.launching import Program
from ..sidecar.source import Found, Selection, Source, find
from ..sidecar.supervising import Rules, Supervisor
from ..sidecar.watching import Watcher
from . import output
from .agent import state_dir_option
from .exits import sysexits
from .files import read_text
from .source import TargetSource
from .target import Place, Target
from .where import perform, target_options

_SIGNALS = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "WINCH")
_WATCH = ("none", "restart", *(f"signal:{name}" for name in _SIGNALS))


@dataclass(frozen=True, slots=True)
class Caching:
    """Whether values are kept: `auto`, `off` or `only`; and where."""

    mode: str
    state_dir: Path


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be run, and with which variables."""

    command: tuple[str, ...]
    plan: Plan
    # Those of which each makes a variable of its own; the file of the plan may refer to others.
    alone: Selection
    cache: Caching

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
@click.option(
    "--cache",
    type=click.Choice(["auto", "off", "only"]),
    default="auto",
    show_default=True,
    help="With --url, what is known of before: auto: while the server is away; only: without it.",
)
@state_dir_option
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
    cache: str,
    state_dir: Path,
) -> None:
    """Run CMD with secrets in its environment.

    Without --only and --env-file it gets all that may be read. A secret NAME becomes the variable
    NAME, with _ in place of what no variable's name has, and comes before an inherited one.
    Expired secrets are left out; one that is named has to be there. The master key and the API key
    are taken out of the environment.

    What comes from a server is kept, encrypted, in a cache: if the server can't be reached or
    fails, CMD gets the values of the last 24 hours, and these reads are recorded later. What the
    server refuses is never taken from there.

    Without --watch this process becomes CMD. With it, or with --mask always where the output is no
    terminal, it looks after CMD: signals are passed on, and it ends with its exit code. Else: 69 if
    secrets can't be had now and are not cached, 77 if they may not be read, 78 if the wrong ones
    are asked for, 126 and 127 if CMD can't be executed.
    """
    assignments = (
        () if env_file is None else environment.parse_file(read_text(env_file, "env-file"))
    )
    plan = Plan(assignments, prefix)
    everything = ("*",) if not only and env_file is None else ()
    caching = Caching(cache, config.data_dir(state_dir, "--state-dir"))
    job = Run(command, plan, Selection.of((), (*only, *everything)), caching)
    if cache == "only" and watch != "none":
        raise click.UsageError("--watch asks the server, and --cache only does not.")
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
        code = perform(place, lambda target: _watched(target, job, supervisor))
    click.get_current_context().exit(code)


async def _first(target: Target, job: Run) -> Program:
    async with _source(target, job) as source:
        return job.program(await find(source, job.selection, listed=False))


async def _watched(target: Target, job: Run, supervisor: Supervisor) -> int:
    async with _source(target, job, watching=True) as source:
        return await supervisor.run(_programs(source, job))


@contextlib.asynccontextmanager
async def _source(target: Target, job: Run, *, watching: bool = False) -> AsyncIterator[Source]:
    inner, server, cache = TargetSource(target), target.server, job.cache
    if server is None and cache.mode == "only":
        raise click.UsageError("--cache only goes with --url: it is a server's cache.")
    if server is None or cache.mode == "off":
        yield inner
        return
    # Takes longer than a short command.
    from ..sidecar import cached

    settings = cached.CacheSettings(*server, cache.state_dir, cache.mode == "only")
    async with contextlib.AsyncExitStack() as stack:
        source: Source = inner
        try:
            source = await stack.enter_async_context(
                cached.opened(settings, inner, job.selection, watching=watching)
            )
        except SecretsError:
            # Some of these are an OSError, too.
            raise
        except OSError as error:
            problem = f"{error.filename or cache.state_dir}: {error.strerror}"
            if settings.only:
                raise ConfigurationError(f"There is no cache: {problem}.") from None
            output.note(f"There is no cache, the server is asked: {problem}.")
        yield source


async def _alone(program: Program) -> AsyncIterator[Program]:
    yield program


async def _programs(source: Source, job: Run) -> AsyncIterator[Program]:
    """The program with what is there now, and with what it is after each change."""
    watcher = Watcher(source, job.selection)
    yield job.program(await watcher.begin())
    changes = watcher.changes()
    while True:
        try:
            yield job.program(await anext(changes))
        except InvalidInput as error:
            output.note(f"What has changed can't be used, {job.command[0]} goes on: {error}")
