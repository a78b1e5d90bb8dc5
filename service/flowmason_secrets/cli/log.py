"""`flowmason-secrets log`: what others need to verify the log, and what is moved out of it."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import config
from ..config import Settings
from ..core import times
from ..core.errors import ConfigurationError, InvalidInput
from ..storage.durable import Durable
from ..storage.exporting import export as export_log
from ..storage.published import Layout
from ..storage.signing import SigningKey
from . import output, progress

if TYPE_CHECKING:
    from ..archiving import Archived
    from ..storage.archive import Target
    from ..storage.compression import Form


@click.group()
def log() -> None:
    """The event log: what others need to verify it, and archiving it."""


_data_dir = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    show_default=f"{config.PREFIX}DIR or {config.Settings().data_dir}",
    help="The data directory.",
)


@log.command()
@_data_dir
def key(data_dir: Path | None) -> None:
    """Print the verifier key of the log: <name>+<key id>+<public key>.

    Keep it where nobody can change it who can change the log.
    """
    settings = _settings(data_dir)
    signer = SigningKey(settings.signing_key, Durable()).load()
    if signer is None:
        raise click.ClickException(
            f"There is no signing key {settings.signing_key} yet: the first 'serve' makes it, or "
            "the first program that uses the library."
        )
    output.value(signer.verifier.encode())


@log.command()
@_data_dir
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where to: a new directory, or one of an earlier export, to which what is new is added.",
)
def export(data_dir: Path | None, out: Path) -> None:
    """Write the log as C2SP tlog-tiles: checkpoint, tiles and entry bundles.

    Any web server can serve it, and verifiers of others read it. It has the lines of all
    organisations, up to the newest checkpoint.
    """
    settings = _existing(data_dir)
    durable = Durable()
    signing_key = SigningKey(settings.signing_key, durable)
    with progress.telling("Exporting") as tell:
        done = export_log(Layout(settings.root), durable, signing_key, out, tell)
    archived = f" Events before {done.minimum} were archived." if done.minimum else ""
    output.note(f"{done.size - done.old} events added to {out}, {done.size} now.{archived}")


@log.command()
@_data_dir
@click.option(
    "--before",
    metavar="T",
    required=True,
    help="Only segments all of whose events are older than this time, like 2030-01-31T12:00:00Z.",
)
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where they go: a directory outside of the data directory.",
)
@click.option(
    "--compress",
    type=click.Choice(["zstd", "gzip"]),
    default="zstd",
    show_default=True,
    help="How they are compressed there.",
)
def archive(data_dir: Path | None, before: str, to: Path, compress: "Form") -> None:
    """Move old segments of the log to another directory, compressed.

    Servers go on meanwhile. Audit queries don't find those events any more, and say since when they
    are complete; proofs of all others hold. If it is interrupted, run it again.
    """
    from ..storage.archive import Target

    settings, time = _existing(data_dir), times.parse(before, "before")
    if to.resolve().is_relative_to(settings.root.resolve()):
        raise InvalidInput("to", "lies in the data directory")
    done = asyncio.run(_archive(settings, time, Target(to, compress)))
    if done is None:
        output.note("Nothing to archive: no signed and sealed segment has only older events.")
        return
    left = done.left
    output.note(
        f"{done.segments} segments with {done.events} events moved to {to}. The log begins with "
        f"event {left.minimum} now, and is complete since {left.complete_since}."
    )


async def _archive(settings: Settings, before: float, to: "Target") -> "Archived | None":
    from .. import app

    async with app.open_archiving(settings) as archiving:
        with progress.telling("Archiving") as tell:
            return await archiving.archive(app.local_caller("-"), before, to, tell)


def _settings(data_dir: Path | None) -> Settings:
    from .. import app

    return app.with_overrides(config.from_environment(), data_dir=data_dir)


def _existing(data_dir: Path | None) -> Settings:
    settings = _settings(data_dir)
    if not settings.root.is_dir():
        raise ConfigurationError(f"There is no data directory {settings.root}.")
    return settings
