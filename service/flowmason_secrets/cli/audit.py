"""`flowmason-secrets audit`."""

import click

from ..api.shapes import AuditEntry
from ..core import times
from ..core.ports import AuditQuery
from . import output
from .target import OrganisationEntry, Place
from .where import json_option, perform, target_options


@click.command()
@click.option("--resource-type", help="Only events about such resources: secret, api_key.")
@click.option("--action", help="Only this action, like secret.read.")
@click.option("--name", help="Only events about the resource of this name.")
@click.option("--actor", help="Only events of this API key id or user.")
@click.option("--success/--failed", default=None, help="Only successes, or only the others.")
@click.option("--since", metavar="T", help="Only from this time on, like 2030-01-31T12:00:00Z.")
@click.option("--until", metavar="T", help="Only before this time.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many."
)
@json_option
@target_options(all_organisations=True)
def audit(
    place: Place,
    resource_type: str | None,
    action: str | None,
    name: str | None,
    actor: str | None,
    success: bool | None,
    since: str | None,
    until: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show what happened, newest first.

    On a data directory without --org: the events of all organisations, and the log's own.
    """
    query = AuditQuery(
        org_id=None,
        resource_type=resource_type,
        action=action,
        name=name,
        actor=actor,
        success=success,
        since=None if since is None else times.parse(since, "since"),
        until=None if until is None else times.parse(until, "until"),
        limit=limit,
    )
    found = perform(place, lambda target: target.audit(query))
    if as_json:
        output.document(found)
    elif not found:
        output.note("No events.")
    else:
        rows = [_row(entry) for entry in found]
        output.table(_HEADER[: len(rows[0])], rows)


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
