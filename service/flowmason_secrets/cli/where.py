"""The options that say where a command works: `--org` and `--data-dir` here, or `--url`."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click

from .. import config
from ..core.errors import ConfigurationError
from ..core.keyring import Plaintext
from ..core.names import check_org
from .target import Place, Server, Target

T = TypeVar("T")
Command = Callable[..., None]


def target_options(
    *, creates: bool = False, all_organisations: bool = False, organisation: bool = True
) -> Callable[[Command], Command]:
    """Give a command the options and, as its first argument, the place that they name.

    `creates`: it may be the first command ever in a data directory. `all_organisations`: on a data
    directory, it works without `--org` too; with `organisation` False there is no such option.
    """

    def decorate(command: Command) -> Command:
        @click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help=f"The data directory.  [default: {config.PREFIX}DIR or "
            f"{config.Settings().data_dir}]",
        )
        @click.option("--url", help=f"A server instead; its API key comes from {config.API_KEY}.")
        @click.option("--insecure", is_flag=True, help="Send the API key over plain HTTP.")
        @functools.wraps(command)
        def wrapped(
            data_dir: Path | None,
            url: str | None,
            insecure: bool,
            org: str | None = None,
            **rest: object,
        ) -> None:
            if url is not None:
                if org is not None or data_dir is not None:
                    raise click.UsageError(
                        "--url goes with neither --org nor --data-dir: on a server, the API key "
                        "says which organisation it is."
                    )
                command(_server(url, insecure), **rest)
                return
            if insecure:
                raise click.UsageError("--insecure goes with --url.")
            if org is None and organisation and not all_organisations:
                raise click.UsageError(
                    "Give --org ORG for the data directory on this machine, or --url URL for a "
                    "server."
                )
            command(_directory(org, data_dir, creates), **rest)

        if not organisation:
            return wrapped
        return click.option("--org", help="Organisation in the local data directory.")(wrapped)

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="JSON, in the shapes of the HTTP API."
)


def perform(place: Place, work: Callable[[Target], Awaitable[T]]) -> T:
    """Open the place, work there, close it again."""

    async def main() -> T:
        async with place() as target:
            return await work(target)

    return asyncio.run(main())


def _server(url: str, insecure: bool) -> Place:
    api_key = config.api_key()
    if not api_key:
        raise click.UsageError(
            f"--url needs an API key in the environment variable {config.API_KEY}."
        )
    # aiohttp takes most of a short command's time: a usage error need not wait for it.
    from . import remote

    server = Server(url, Plaintext(api_key), insecure)
    return functools.partial(remote.opened, remote.client(url, api_key, insecure), server)


def _directory(org: str | None, data_dir: Path | None, creates: bool) -> Place:
    settings = config.from_environment()
    if data_dir is not None:
        settings = replace(settings, data_dir=data_dir)
    if org is not None:
        check_org(org)
    # Opening it would make it: a mistyped path has to say so instead of being empty.
    if not creates and not settings.root.is_dir():
        raise ConfigurationError(
            f"There is no data directory {settings.root}. Name it with --data-dir or "
            f"{config.PREFIX}DIR; 'set', 'keys create' and 'serve' make a new one."
        )
    from . import local

    return functools.partial(local.opened, settings, org)
