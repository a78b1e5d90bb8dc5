"""The command line. Data go to stdout, everything else to stderr; exit codes 0, 1, 2."""

import logging
import sys

import click

from .. import __version__
from ..core.errors import SecretsError
from .serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flowmason-secrets")
@click.option("-v", "--verbose", count=True, help="Log more; twice for debugging.")
def cli(verbose: int) -> None:
    """Encrypted secrets with an event-sourced audit trail."""
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


cli.add_command(serve)


def main() -> None:
    """Run the command line; errors of ours end it with one line and code 1."""
    try:
        cli()
    except (SecretsError, OSError) as error:
        click.echo(f"flowmason-secrets: {error}", err=True)
        sys.exit(1)
