"""`flowmason-secrets log key`: what others need to verify the log."""

from pathlib import Path

import click

from .. import config
from ..storage.durable import Durable
from ..storage.signing import SigningKey
from . import output


@click.group()
def log() -> None:
    """The event log: what others need to verify it."""


@log.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    show_default=f"{config.PREFIX}DIR or {config.Settings().data_dir}",
    help="The data directory.",
)
def key(data_dir: Path | None) -> None:
    """Print the verifier key of the log: <name>+<key id>+<public key>.

    Keep it where nobody can change it who can change the log.
    """
    from .. import app

    settings = app.with_overrides(config.from_environment(), data_dir=data_dir)
    signer = SigningKey(settings.signing_key, Durable()).load()
    if signer is None:
        raise click.ClickException(
            f"There is no signing key {settings.signing_key} yet: the first 'serve' makes it, or "
            "the first program that uses the library."
        )
    output.value(signer.verifier.encode())
