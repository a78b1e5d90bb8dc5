"""`flowmason-secrets set`, `get`, `list`, `delete`, `metadata`."""

import re
import sys

import click

from ..core import names
from ..core.drafts import Draft, Precondition
from ..core.errors import InvalidInput
from ..core.keyring import Plaintext
from . import output
from .target import Filters, Place, Stored, Target
from .where import json_option, perform, target_options

_ETAG = re.compile(r'(?:W/)?"?([!#-~]+?)"?')

_category = click.option(
    "--category", type=click.Choice(names.CATEGORIES), help="What kind of secret it is."
)
_if_match = click.option(
    "--if-match", metavar="ETAG", help="Only if it is at this version; '*': only if it exists."
)


@click.command("set")
@click.argument("name")
@click.argument("surplus", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option("--description", default="", help="What it is for.")
@click.option(
    "--category",
    type=click.Choice(names.CATEGORIES),
    default="other",
    show_default=True,
    help="What kind of secret it is.",
)
@click.option("--expires-at", metavar="T", help="When it expires, like 2030-01-31T12:00:00Z.")
@_if_match
@click.option("--if-none-match", is_flag=True, help="Only if it does not exist yet.")
@json_option
@target_options(creates=True)
def set_secret(
    place: Place,
    name: str,
    surplus: tuple[str, ...],
    description: str,
    category: str,
    expires_at: str | None,
    if_match: str | None,
    if_none_match: bool,
    as_json: bool,
) -> None:
    """Create the secret NAME, or replace all of it.

    The value is read from stdin, less one newline at its end; on a terminal it is asked for.
    """
    if surplus:
        raise click.UsageError(
            "A value is not accepted as an argument, where every process could read it: "
            "pipe it to stdin, or type it at the prompt."
        )
    precondition = _precondition(if_match, if_none_match)
    names.check_new_name(name)
    draft = Draft(name, Plaintext(read_hidden("Value")), description, category, expires_at)
    stored = perform(place, lambda target: target.set(draft, precondition))
    done = "Created" if stored.created else "Updated"
    output.note(f"{done} '{name}': version {stored.metadata.version}, ETag {_bare(stored.etag)}.")
    if as_json:
        output.document(stored.metadata)


@click.command("get")
@click.argument("name")
@json_option
@target_options()
def get_secret(place: Place, name: str, as_json: bool) -> None:
    """Print the value of the secret NAME, and a newline."""
    found = perform(place, lambda target: target.get(name))
    if as_json:
        output.document(found)
    else:
        output.value(found.value)


@click.command("list")
@_category
@click.option("--prefix", help="Only names that begin so.")
@click.option("--expired/--not-expired", default=None, help="Only expired ones, or only others.")
@json_option
@target_options()
def list_secrets(
    place: Place, category: str | None, prefix: str | None, expired: bool | None, as_json: bool
) -> None:
    """List the secrets, without their values."""
    filters = Filters(category, prefix, expired)
    found = perform(place, lambda target: target.listing(filters))
    if as_json:
        output.document(found)
        return
    if not found:
        output.note("No secrets.")
        return
    rows = [
        (
            entry.name,
            entry.category,
            str(entry.version),
            output.moment(entry.updated_at),
            _expiry(entry.expires_at, entry.is_expired),
            entry.description,
        )
        for entry in found
    ]
    output.table(("Name", "Category", "Version", "Updated", "Expires", "Description"), rows)


@click.command("delete")
@click.argument("name")
@_if_match
@json_option
@target_options()
def delete_secret(place: Place, name: str, if_match: str | None, as_json: bool) -> None:
    """Delete the secret NAME. Its events stay."""
    precondition = _precondition(if_match, False)
    message = perform(place, lambda target: target.delete(name, precondition))
    if as_json:
        output.document(message)
    else:
        output.note(f"{message.message}.")


@click.command("metadata")
@click.argument("name")
@json_option
@target_options()
def metadata(place: Place, name: str, as_json: bool) -> None:
    """Show everything about the secret NAME but its value."""

    async def work(target: Target) -> Stored:
        return await target.metadata(name)

    entry, etag, _ = perform(place, work)
    if as_json:
        output.document(entry)
        return
    rows = [
        ("name", entry.name),
        ("id", entry.id),
        ("description", entry.description),
        ("category", entry.category),
        ("version", str(entry.version)),
        ("etag", _bare(etag)),
        ("created", entry.created_at),
        ("created by", entry.created_by),
        ("updated", entry.updated_at),
        ("expires", _expiry(entry.expires_at, entry.is_expired)),
    ]
    output.table(("", ""), rows)


def read_hidden(title: str) -> str:
    """What `title` names: from stdin, less one newline, or typed at a prompt that shows nothing.

    Raises:
        UsageError: nothing can be read.
        InvalidInput: not text in UTF-8, or too long.
    """
    field = title.lower()
    if sys.stdin is None:
        raise click.UsageError(f"stdin is closed: pipe the {field} to it.")
    if sys.stdin.isatty():
        typed = click.prompt(title, hide_input=True, confirmation_prompt="Once more", err=True)
        data = str(typed).encode("utf-8", "surrogateescape")
    else:
        # One more than allowed and a newline: an endless stdin must not fill the memory.
        data = sys.stdin.buffer.read(names.MAX_VALUE_BYTES + 2)
        if not data:
            raise click.UsageError(
                "stdin is empty, as after a failed command in a pipe. "
                "For an empty value, pipe a single newline."
            )
        data = data.removesuffix(b"\n")
    if len(data) > names.MAX_VALUE_BYTES:
        raise InvalidInput(field, f"has more than {names.MAX_VALUE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidInput(field, "is not UTF-8; encode binary data, as base64 say") from None


def _precondition(if_match: str | None, if_none_match: bool) -> Precondition | None:
    if if_none_match:
        if if_match is not None:
            raise click.UsageError("--if-match and --if-none-match exclude each other.")
        return Precondition(absent=True)
    if if_match is None:
        return None
    if if_match == "*":
        return Precondition(etags=("*",))
    # With its quotes as HTTP has it, or without, as shells like it.
    found = _ETAG.fullmatch(if_match)
    if found is None:
        raise click.UsageError("--if-match takes an ETag as 'metadata' shows it, like 3-1f00ba5e.")
    return Precondition(etags=(f'"{found[1]}"',))


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _expiry(expires_at: str | None, is_expired: bool) -> str | None:
    shown = output.moment(expires_at)
    return f"{shown} (expired)" if is_expired else shown
