"""`flowmason-secrets rotate-key`."""

import asyncio
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec

from .. import config
from ..core.errors import ConfigurationError
from ..rotation import Rotation, Survey
from . import output
from .secret import read_hidden
from .where import json_option

if TYPE_CHECKING:
    from rich.progress import Progress

_HOW = (
    f"Rotation needs a key file that all processes share: set {config.PREFIX}KEY_FILE to it, here "
    "and for the servers. To begin one, write the present master key into it (the word 'default' "
    "if there was none), with mode 0600."
)


class Outcome(msgspec.Struct, frozen=True):
    """What a rotation did: `failed` names secrets that can't be decrypted, by organisation."""

    active_key: str
    reencrypted: int
    failed: dict[str, list[str]]
    retired: list[str]


class Request(NamedTuple):
    """What to do: use `material`, or go on with the active key; `known` are organisations."""

    material: str | None
    known: tuple[str, ...]
    retire: bool


@click.command("rotate-key")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help=f"The data directory.  [default: {config.PREFIX}DIR or {config.Settings().data_dir}]",
)
@click.option("--stdin", "from_stdin", is_flag=True, help="Read the new key instead of making one.")
@click.option("--retire", is_flag=True, help="Remove the old keys once nothing is under them.")
@click.option(
    "--org",
    "orgs",
    multiple=True,
    help="Also this organisation, if no event names it yet. Repeatable.",
)
@json_option
def rotate_key(
    data_dir: Path | None, from_stdin: bool, retire: bool, orgs: tuple[str, ...], as_json: bool
) -> None:
    """Put all secrets of all organisations under a new master key, online.

    The new key becomes the first one in the key file; servers and workers that share it need no
    restart, and no read fails. If it is interrupted, run it again: it goes on with what is left.
    """
    settings = config.from_environment()
    if data_dir is not None:
        settings = replace(settings, data_dir=data_dir)
    if settings.key_file is None:
        raise ConfigurationError(_HOW)
    if not settings.root.is_dir():
        raise ConfigurationError(f"There is no data directory {settings.root}.")
    material = None
    if from_stdin:
        material = config.check_key(read_hidden("New master key"), "The new master key")
    outcome = asyncio.run(_rotate(settings, Request(material, orgs, retire)))
    if as_json:
        output.document(outcome)
    output.note(
        f"{outcome.reencrypted} secrets re-encrypted; the active key is {outcome.active_key}."
    )
    if outcome.retired:
        output.note(f"Removed from the key file: {', '.join(outcome.retired)}.")
    if outcome.failed:
        for org, names in outcome.failed.items():
            output.note(f"Can't be decrypted, of {org}: {', '.join(names)}.")
        raise click.exceptions.Exit(1)


async def _rotate(settings: config.Settings, request: Request) -> Outcome:
    from .. import app

    service = await app.open_service(settings)
    try:
        rotation = service.rotation
        caller = app.local_caller("-")
        # Of the files alone: an index that nobody has read for a while takes longer to catch up.
        before = await rotation.survey(request.known)
        left = sum(map(len, before.left(rotation.active).values()))
        if request.material is None and left:
            output.note(
                f"{left} secrets are not under the active key yet: going on with that. "
                "Run it again for a new key."
            )
            await rotation.announce(caller)
        else:
            await rotation.use(caller, request.material or secrets.token_urlsafe(48))
        survey = await rotation.survey(request.known)
        _report(survey)
        done, failed = await _reencrypt(rotation, survey.left(rotation.active))
        retired = await rotation.retire(caller, request.known) if request.retire else []
        return Outcome(rotation.active, done, failed, retired)
    finally:
        await service.close()


async def _reencrypt(
    rotation: Rotation, left: dict[str, list[str]]
) -> tuple[int, dict[str, list[str]]]:
    from .. import app

    done = 0
    failed: dict[str, list[str]] = {}
    with _bar() as bar:
        task = bar.add_task("Re-encrypting", total=sum(map(len, left.values())))
        for org, names in left.items():
            async for progress in rotation.reencrypt(app.local_caller(org), names):
                done += progress.done
                if progress.failed:
                    failed.setdefault(org, []).extend(progress.failed)
                bar.advance(task, progress.done + len(progress.failed))
    return done, failed


def _report(survey: Survey) -> None:
    if survey.nameless:
        output.note(
            "No event names the organisations of these directories: "
            f"{', '.join(survey.nameless)}. Name them with --org."
        )
    if survey.damaged:
        output.note(f"These files are no whole secrets: {', '.join(survey.damaged)}.")


def _bar() -> "Progress":
    # Takes longer to import than the other commands take.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
