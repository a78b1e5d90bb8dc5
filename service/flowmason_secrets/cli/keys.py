"""`flowmason-secrets keys create`, `list`, `revoke`: API keys."""

import click

from ..core.access import FULL, SCOPES
from ..core.drafts import KeyDraft
from . import output
from .target import Place
from .where import json_option, perform, target_options


@click.group()
def keys() -> None:
    """API keys: create, list, revoke."""


@keys.command("create")
@click.option("--name", required=True, help="What it is for; shown in lists and events.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    default=(FULL,),
    show_default=True,
    help="What it may do. Repeatable.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="PATTERN",
    help="Only secrets of such names; '*' and '?' are wildcards. Repeatable.",
)
@click.option("--expires-at", metavar="T", help="When it expires, like 2030-01-31T12:00:00Z.")
@json_option
@target_options(creates=True)
def create(
    place: Place,
    name: str,
    scopes: tuple[str, ...],
    allow: tuple[str, ...],
    expires_at: str | None,
    as_json: bool,
) -> None:
    """Create an API key and print it: this once, it is kept nowhere."""
    draft = KeyDraft(name, scopes, allow, expires_at)
    issued = perform(place, lambda target: target.create_key(draft))
    output.note(f"Created API key {issued.api_key.id}; it can't be shown again.")
    if as_json:
        output.document(issued)
    else:
        output.value(issued.raw_key)


@keys.command("list")
@json_option
@target_options()
def list_keys(place: Place, as_json: bool) -> None:
    """List the API keys, without the keys themselves."""
    found = perform(place, lambda target: target.keys())
    if as_json:
        output.document(found)
        return
    if not found:
        output.note("No API keys.")
        return
    rows = [
        (
            key.id,
            key.name,
            ",".join(key.scopes),
            " ".join(key.allow) or "*",
            output.moment(key.created_at),
            output.moment(key.expires_at),
            "revoked" if key.revoked_at else "live" if key.is_active else "expired",
        )
        for key in found
    ]
    output.table(("Id", "Name", "Scopes", "Allow", "Created", "Expires", "State"), rows)


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@json_option
@target_options()
def revoke(place: Place, key_id: str, as_json: bool) -> None:
    """Revoke the API key ID: from then on nobody accepts it."""
    message = perform(place, lambda target: target.revoke_key(key_id))
    if as_json:
        output.document(message)
    else:
        output.note(f"{message.message}.")
