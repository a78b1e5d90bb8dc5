"""`flowmason-secrets serve`."""

import asyncio
import signal
import ssl
from pathlib import Path

import click

from .. import app, config
from ..core.errors import ConfigurationError


@click.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="TCP port.  [default: 8700]")
@click.option("--unix-socket", type=click.Path(path_type=Path), help="Listen here instead.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Private key, PEM.")
@click.option("--behind-proxy", is_flag=True, help="Somebody else ends TLS and names the client.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The data directory.")
@click.option("--production", is_flag=True, help="Refuse to start without a strong master key.")
def serve(
    host: str | None,
    port: int | None,
    unix_socket: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    behind_proxy: bool,
    data_dir: Path | None,
    production: bool,
) -> None:
    """Serve the HTTP API until SIGTERM or SIGINT; what is in flight is finished then."""
    settings = app.with_overrides(
        config.from_environment(), host=host, port=port, data_dir=data_dir
    )
    if production:
        config.check_production(settings)
    listen = app.Listen(
        settings.host, settings.port, unix_socket, _tls(tls_cert, tls_key), behind_proxy
    )
    app.run(_serve(settings, listen))


async def _serve(settings: config.Settings, listen: app.Listen) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await app.serve(settings, listen, _announce, stop)


def _announce(url: str) -> None:
    click.echo(f"flowmason-secrets is ready on {url}")


def _tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigurationError("--tls-cert and --tls-key go together.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    return context
