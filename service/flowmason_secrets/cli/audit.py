"""`flowmason-secrets audit`: showing and exporting events."""

import functools
from collections.abc import AsyncIterator
from pathlib import Path

import click

from ..api.formats import FORMATS
from ..api.shapes import AuditEntry
from ..core import times
from ..core.ports import AuditQuery
from . import output
from .target import OrganisationEntry, Place, Target
from .where import Command, json_option, perform, target_options


class _Showing(click.Group):
    """A group that shows events where no command of it is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or not (args[0] in self.commands or args[0] in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Showing)
def audit() -> None:
    """Show or export what happened. Without a command: show."""


_FILTERS = (
    click.option("--resource-type", help="Only events about such resources: secret, api_key."),
    click.option("--action", help="Only this action, like secret.read."),
    click.option("--name", help="Only events about the resource of this name."),
    click.option("--actor", help="Only events of this API key id or user."),
    click.option("--success/--failed", default=None, help="Only successes, or only the others."),
    click.option("--since", metavar="T", help="Only from this time on, like 2030-01-31T12:00:00Z."),
    click.option("--until", metavar="T", help="Only before this time."),
)


def _filtered(command: Command) -> Command:
    """Give a command the filters and, as its second argument, the query that they make."""

    @functools.wraps(command)
    def wrapped(
        place: Place,
        resource_type: str | None,
        action: str | None,
        name: str | None,
        actor: str | None,
        success: bool | None,
        since: str | None,
        until: str | None,
        **rest: object,
    ) -> None:
        query = AuditQuery(
            org_id=None,
            resource_type=resource_type,
            action=action,
            name=name,
            actor=actor,
            success=success,
            since=None if since is None else times.parse(since, "since"),
            until=None if until is None else times.parse(until, "until"),
        )
        command(place, query, **rest)

    for option in reversed(_FILTERS):
        wrapped = option(wrapped)
    return wrapped


@audit.command()
@target_options(all_organisations=True)
@_filtered
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many."
)
@json_option
def show(place: Place, query: AuditQuery, limit: int, as_json: bool) -> None:
    """Show what happened, newest first.

    On a data directory without --org: the events of all organisations, and the log's own.
    """

    async def work(target: Target) -> list[AuditEntry]:
        found = await target.audit(query._replace(limit=limit))
        _note_archived(target, query)
        return found

    found = perform(place, work)
    if as_json:
        output.document(found)
    elif not found:
        output.note("No events.")
    else:
        rows = [_row(entry) for entry in found]
        output.table(_HEADER[: len(rows[0])], rows)


@audit.command()
@target_options(all_organisations=True)
@_filtered
@click.option(
    "--format",
    "form",
    type=click.Choice([*FORMATS]),
    default="ndjson",
    show_default=True,
    help="The lines of the log as they are, CSV, or OCSF API Activity as one JSON object a line.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file instead of stdout: it appears whole, or not at all.",
)
def export(place: Place, query: AuditQuery, form: str, out: Path | None) -> None:
    """Export everything that happened until now, oldest first.

    On a data directory without --org: the events of all organisations, and the log's own.
    """

    async def work(target: Target) -> None:
        pieces = target.export(form, query)
        if out is None:
            await _print(pieces)
        else:
            # Takes a while to import, and no other command needs it.
            from .files import write_whole

            await write_whole(out, pieces)
        _note_archived(target, query)

    perform(place, work)


def _note_archived(target: Target, query: AuditQuery) -> None:
    since = target.complete_since
    if since is not None and (query.since is None or query.since < times.parse_stored(since)):
        output.note(f"Older events were archived; this is complete since {since}.")


async def _print(pieces: AsyncIterator[bytes]) -> None:
    async for piece in pieces:
        click.echo(piece, nl=False)


_HEADER = ("Seq", "Time", "Action", "Result", "Type", "Name", "Actor", "Address", "Organisation")


def _row(entry: AuditEntry) -> tuple[str | None, ...]:
    name = entry.details.get("name") or entry.resource_id
    row = (
        str(entry.seq),
        entry.timestamp,
        entry.action,
        "success" if entry.success else entry.error_message,
        entry.resource_type,
        None if name is None else str(name),
        entry.api_key_id or entry.user_id,
        entry.ip_address,
    )
    return (*row, entry.org_id) if isinstance(entry, OrganisationEntry) else row
