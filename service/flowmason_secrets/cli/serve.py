"""`flowmason-secrets serve`."""

import asyncio
import errno
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import config
from ..core.errors import ConfigurationError

if TYPE_CHECKING:
    from ..serving import Address
    from ..supervisor import Worker

_DEFAULTS = config.Settings()

_ADDRESS_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EADDRINUSE,
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
        errno.ENOENT,
        errno.ENOTDIR,
    }
)


class _ServeCommand(click.Command):
    """Its help lists the environment variables."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        described = []
        for variable, (field, purpose) in config.VARIABLES.items():
            default = getattr(_DEFAULTS, field)
            number = f"{default:g}" if isinstance(default, float) else default
            number = str(default).lower() if isinstance(default, bool) else number
            shown = f"  [default: {number}]" if default != () else ""
            described.append((config.PREFIX + variable, purpose + shown))
        with formatter.section("Environment; options come first"):
            formatter.write_dl(described)


@click.command(cls=_ServeCommand)
@click.option("--host", show_default=_DEFAULTS.host, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    show_default=str(_DEFAULTS.port),
    help="TCP port; 0 takes a free one.",
)
@click.option(
    "--unix-socket", type=click.Path(path_type=Path), help="Listen on this socket instead of TCP."
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--behind-proxy", is_flag=True, help="Somebody else ends TLS and names the client.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    show_default=str(_DEFAULTS.data_dir),
    help="The data directory.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, config.MOST["workers"]),
    show_default=str(_DEFAULTS.workers),
    help="How many processes serve; 0 is one for each core, bound to it.",
)
@click.option(
    "--witness",
    multiple=True,
    metavar="URL",
    help="Let this witness cosign the log (C2SP tlog-witness); may be given several times.",
)
@click.option(
    "--witness-key",
    multiple=True,
    metavar="VKEY",
    help="The verifier key of each witness, in the same order.",
)
@click.option(
    "--vault-compat",
    is_flag=True,
    default=None,
    help="Serve clients of HashiCorp Vault under /v1, too: KV version 2, mounted at secret/.",
)
@click.option("--production", is_flag=True, help="Refuse to start without a strong master key.")
def serve(
    host: str | None,
    port: int | None,
    unix_socket: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    behind_proxy: bool,
    data_dir: Path | None,
    workers: int | None,
    witness: tuple[str, ...],
    witness_key: tuple[str, ...],
    vault_compat: bool | None,
    production: bool,
) -> None:
    """Serve the HTTP API until SIGTERM or SIGINT; what is in flight is finished then.

    SIGHUP reads the key file again.
    """
    # The other commands start twice as fast without the server.
    from .. import app, serving

    settings = app.with_overrides(
        config.from_environment(),
        host=host,
        port=port,
        data_dir=data_dir,
        workers=workers,
        witnesses=witness or None,
        witness_keys=witness_key or None,
        vault_compat=vault_compat,
    )
    config.witnesses(settings)
    if production:
        config.check_production(settings)
    listen = serving.Listen(
        settings.host, settings.port, unix_socket, _tls(tls_cert, tls_key), behind_proxy
    )
    try:
        code = _run(settings, serving.Address(listen))
    except OSError as error:
        reason = _why_not_there(error)
        if reason is None:
            raise
        place = unix_socket or f"{settings.host} port {settings.port}"
        raise click.ClickException(
            f"Can't listen on {place}: {reason}. Choose another with "
            f"{'--unix-socket' if unix_socket else '--host and --port'}."
        ) from None
    click.get_current_context().exit(code)


def _run(settings: config.Settings, address: "Address") -> int:
    """Serve, in this process or in its workers; returns the exit code."""
    from .. import serving, supervisor

    def announce() -> None:
        click.echo(f"flowmason-secrets is ready on {address.url}")

    places = supervisor.places(settings.workers)
    if len(places) == 1:
        serving.run(_serve(settings, address, announce, None))
        return 0
    role = supervisor.Supervisor(places, announce, address.close, serving.PATIENCE).run()
    if isinstance(role, int):
        return role
    serving.run(_serve(settings, address, role.ready, role))
    return 0


async def _serve(
    settings: config.Settings,
    address: "Address",
    ready: Callable[[], None],
    worker: "Worker | None",
) -> None:
    from .. import serving, supervisor

    orders = serving.Orders()
    loop = asyncio.get_running_loop()
    for number in supervisor.STOPPING:
        loop.add_signal_handler(number, orders.stop.set)
    loop.add_signal_handler(signal.SIGHUP, orders.reload.set)
    if worker is not None:
        worker.begin(loop, orders.stop.set)
    await serving.serve(settings, address, ready, orders)


def _why_not_there(error: OSError) -> str | None:
    """Why the address can't be listened on; None if the error is about something else."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error.strerror or error)
    return os.strerror(error.errno) if error.errno in _ADDRESS_ERRORS else None


def _tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigurationError("--tls-cert and --tls-key go together.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # The empty password makes an encrypted key an error instead of a question.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise click.ClickException(
            f"{cert} and {key} can't be used for TLS: {reason}. Both must be PEM files that belong "
            "together, the key without a password."
        ) from None
    return context
