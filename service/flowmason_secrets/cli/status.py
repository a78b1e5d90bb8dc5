"""`flowmason-secrets status`."""

import click

from ..api.shapes import Health
from . import output
from .target import Place
from .where import json_option, perform, target_options


@click.command()
@json_option
@target_options(organisation=False)
def status(place: Place, as_json: bool) -> None:
    """Tell whether values can be served, how many secrets are under each master key, and how it
    stands with the witnesses of the log.

    The active key encrypts, those that are held only decrypt, and what is under a missing one can't
    be read. Exit code 1 if values can't be served.
    """
    found = perform(place, lambda target: target.status())
    if as_json:
        output.document(found)
    else:
        _show(found)
    if found.status == "unavailable":
        raise click.exceptions.Exit(1)


def _show(found: Health) -> None:
    output.note(found.status if found.reason is None else f"{found.status}: {found.reason}")
    for warning in found.warnings or ():
        output.note(warning)
    if found.index is not None:
        built = f"{found.index.indexed:,} of {found.index.events:,} events"
        output.note(f"The index is being built: {built}.")
    if found.keys is not None:
        rows = [(key.key_id, str(key.secrets), key.state) for key in found.keys]
        output.table(("Master key", "Secrets", "State"), rows)
    if found.witnesses is not None:
        shown = [
            (one.name, str(one.size), one.cosigned_at or "", one.error or "")
            for one in found.witnesses
        ]
        output.table(("Witness", "Cosigned", "At", "Error"), shown)
