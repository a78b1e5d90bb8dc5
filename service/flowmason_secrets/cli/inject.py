"""`flowmason-secrets inject`."""

import asyncio
import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from .. import config
from ..core import text
from ..core.errors import ConfigurationError, InvalidInput, SecretsError
from ..core.text import TextTemplate
from ..sidecar.injecting import Output
from ..sidecar.source import Selection, Values, find
from ..sidecar.watching import Watcher
from . import output
from .exits import UNAVAILABLE, Ended, sysexits
from .files import read_text
from .source import TargetSource
from .target import Place, Target
from .where import perform, target_options


def octal(text: str) -> int:
    """A file's mode as people write it."""
    return int(text, 8)


@dataclass(frozen=True, slots=True)
class Injection:
    """What is to be in the file, and what is run after it has changed."""

    template: TextTemplate
    file: Output
    after: str | None

    async def put(self, values: Values) -> int:
        """Write the file, if it changes; returns the exit code of what is run after that.

        Raises:
            SecretsError, OSError: it can't be written; it is as it was.
        """
        changed = await self.file.put(self.template.fill(values))
        if not changed or self.after is None:
            return 0
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", self.after), env=config.for_children()
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            # What has begun is not cut off in the middle.
            await process.wait()
            raise
        return code if code >= 0 else 128 - code


@click.command("inject")
@click.option(
    "-i",
    "--template",
    type=click.File("rb"),
    required=True,
    help="A text with {{secrets.NAME}}; '-' reads stdin.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file that gets it with the values.",
)
@click.option("--mode", type=octal, default="0400", show_default=True, help="Its mode.")
@click.option("--exec", "after", metavar="CMD", help="Run this in a shell when it has changed.")
@click.option("--once", is_flag=True, help="Write it once, and don't wait for changes.")
@sysexits
@target_options()
def inject(
    place: Place, template: BinaryIO, out: Path, mode: int, after: str | None, once: bool
) -> None:
    r"""Write a text with secrets into a file, and keep it current until SIGTERM or SIGINT.

    It is replaced as a whole, and has its mode from the start. Others than the owner and the group
    get no access: a directory or a file that is open to everybody is refused. \{{secrets.NAME}}
    means just that text; values are never read again. The exit codes are those of 'run', or of
    --exec with --once.
    """
    parsed = text.parse(read_text(template, "template"))
    injection = Injection(parsed, Output(out.absolute(), mode), after)
    try:
        injection.file.check()
        code = perform(place, lambda target: _inject(target, injection, once))
    except SecretsError:
        # Some of these are an OSError, too.
        raise
    except OSError as error:
        raise Ended(f"{out}: {error.strerror or error}.", UNAVAILABLE) from None
    click.get_current_context().exit(code)


async def _inject(target: Target, injection: Injection, once: bool) -> int:
    source, selection = TargetSource(target), Selection(injection.template.names)
    if once:
        found = await find(source, selection, listed=False)
        return await injection.put(found.values)
    task = asyncio.create_task(_keep(Watcher(source, selection), injection))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return 0


async def _keep(watcher: Watcher, injection: Injection) -> None:
    found = await watcher.begin()
    _report(await injection.put(found.values))
    async for found in watcher.changes():
        try:
            _report(await injection.put(found.values))
        except (ConfigurationError, InvalidInput, OSError) as error:
            output.note(f"The file stays as it was: {error}")


def _report(code: int) -> None:
    if code:
        output.note(f"--exec ended with exit code {code}.")
