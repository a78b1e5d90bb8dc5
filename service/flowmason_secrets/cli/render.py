"""`flowmason-secrets render`."""

from typing import BinaryIO

import click

from ..core.drafts import Usage
from . import output
from .files import read_text
from .target import Place
from .where import perform, target_options


@click.command("render")
@click.argument("document", type=click.File("rb"), metavar="PIPELINE.json")
@click.option("--pipeline", metavar="NAME", help="Name of the pipeline, for the event log.")
@click.option("--stage", metavar="NAME", help="Name of the stage, for the event log.")
@target_options()
def render(place: Place, document: BinaryIO, pipeline: str | None, stage: str | None) -> None:
    r"""Print a JSON file with values in the place of {{secrets.NAME}}.

    All references are replaced, or none: then every secret that can't be read is named. Everything
    else stays as it is written: other braces, numbers, the keys of objects. \{{secrets.NAME}} means
    just that text; in JSON, the backslash is written twice. '-' reads stdin.
    """
    text = read_text(document, "document")
    usage = Usage(pipeline, stage)
    found = perform(place, lambda target: target.resolve(text, usage))
    output.json_text(bytes(found.document))
