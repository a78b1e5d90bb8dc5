"""`flowmason-secrets agent`: a sidecar that serves the processes beside it."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from .. import config
from ..core.errors import ConfigurationError, InvalidInput
from ..sidecar.agent import HEADER, QUIT_PATH, READY_PATH, certificates
from .exits import CONFIGURATION, DENIED, UNAVAILABLE, Ended, sysexits

if TYPE_CHECKING:
    from ..sidecar.agent.peers import Allowed
    from ..sidecar.agent.process import AgentSettings

# Of agents, and what run keeps.
AGENT_DIR = Path("~/.flowmason/agent")
state_dir_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=AGENT_DIR,
    show_default=True,
    help="Where the encrypted cache and the queue of offline reads are.",
)

# Seconds between looks, and for one of them.
_LOOK = 0.1
_PATIENCE = 5.0
_EVERYDAY = 86400.0


_socket_option = click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    help=f"The agent's socket.  [default: {config.AGENT_SOCKET} or agent.sock in --state-dir]",
)


@click.group(invoke_without_command=True)
@click.option("--url", help=f"The server; the API key comes from {config.API_KEY}.")
@click.option("--insecure", is_flag=True, help="Send the API key over plain HTTP.")
@_socket_option
@state_dir_option
@click.option("--allow-uid", multiple=True, metavar="USER", help="Serve this user: name or id.")
@click.option("--allow-gid", multiple=True, metavar="GROUP", help="Serve this group: name or id.")
@click.option(
    "--allow-exe",
    multiple=True,
    metavar="FILE",
    help="Serve them only while they execute this file.",
)
@click.option(
    "--socket-group", metavar="GROUP", help="Let this group connect: the socket has mode 0660."
)
@click.option(
    "--max-age",
    type=click.FloatRange(min=1),
    default=_EVERYDAY,
    show_default=True,
    help="Seconds for which a value may be served without the server.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.05, max=60),
    default=2.0,
    show_default=True,
    help="Seconds after which the server counts as away.",
)
@click.pass_context
@sysexits
def agent(
    context: click.Context,
    url: str | None,
    insecure: bool,
    path: Path | None,
    state_dir: Path,
    allow_uid: tuple[str, ...],
    allow_gid: tuple[str, ...],
    allow_exe: tuple[str, ...],
    socket_group: str | None,
    max_age: float,
    timeout: float,
) -> None:
    """Serve secrets to the processes beside it, over a unix socket, until SIGTERM or SIGINT.

    They need no API key: the kernel says who they are. By default only the agent's own user is
    served. Each read is recorded by the server with the process's user and id; while the server
    is away, last known values are served, and the reads are recorded later.

    Exit codes: 69 unavailable and nothing cached, 77 denied, 78 configuration.
    """
    if context.invoked_subcommand is not None:
        return
    # Takes most of the time of a short command.
    with certificates.postponed():
        from ..client.address import check_api_key
        from ..sidecar.agent.process import AgentSettings

    api_key = config.api_key()
    if url is None or api_key is None:
        raise ConfigurationError(
            f"The agent needs a server, --url, and an API key for it, in {config.API_KEY}."
        )
    state_dir = config.data_dir(state_dir, "--state-dir")
    settings = AgentSettings(
        url,
        check_api_key(api_key),
        path or _default_socket(state_dir),
        state_dir,
        _allowed(allow_uid, allow_gid, allow_exe),
        None if socket_group is None else _group(socket_group),
        max_age,
        timeout,
        insecure,
    )
    try:
        asyncio.run(_run(settings))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Ended(f"{where}{error.strerror or error}.", CONFIGURATION) from None


def _allowed(
    users: tuple[str, ...], groups: tuple[str, ...], programs: tuple[str, ...]
) -> "Allowed":
    from ..sidecar.agent.peers import Allowed

    uids, gids = frozenset(map(_user, users)), frozenset(map(_group, groups))
    if not uids and not gids:
        uids = frozenset({os.geteuid()})
    return Allowed(uids, gids, frozenset(map(os.path.realpath, programs)))


async def _run(settings: "AgentSettings") -> None:
    from ..sidecar.agent import process

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def announce() -> None:
        click.echo(f"flowmason-secrets agent is ready on unix:{settings.socket.absolute()}")

    await process.serve(settings, announce, stop)


@agent.command()
@_socket_option
@click.option(
    "--wait",
    default="0s",
    show_default=True,
    metavar="TIME",
    help="Wait so long until it is ready: 60s, 2m.",
)
@sysexits
def ready(path: Path | None, wait: str) -> None:
    """Succeed once the agent can serve values: a start-up probe."""
    until = time.monotonic() + _seconds(wait)
    where = path or _default_socket(config.data_dir(AGENT_DIR))
    while True:
        code, message = _status(where)
        if code != UNAVAILABLE:
            break
        if time.monotonic() >= until:
            break
        time.sleep(_LOOK)
    if code:
        raise Ended(message, code)


@agent.command(name="quit")
@_socket_option
@sysexits
def quit_agent(path: Path | None) -> None:
    """End the agent: for jobs whose work is done."""
    where = path or _default_socket(config.data_dir(AGENT_DIR))
    answered = _ask(where, "POST", QUIT_PATH)
    if answered is None:
        raise Ended(f"No agent listens on {where}.", UNAVAILABLE)
    status, body = answered
    if status != 200:
        raise Ended(_told(body), DENIED if status == 403 else UNAVAILABLE)


def _status(where: Path) -> tuple[int, str]:
    """The exit code for how it stands with the agent, and what to say."""
    answered = _ask(where, "GET", READY_PATH)
    if answered is None:
        return UNAVAILABLE, f"No agent listens on {where}."
    status, body = answered
    if status == 200:
        return 0, ""
    if status == 403:
        return DENIED, _told(body)
    found: dict[str, str] = msgspec.json.decode(body)
    code = DENIED if found.get("status") == "denied" else UNAVAILABLE
    return code, f"The agent is not ready: {found.get('reason')}."


def _ask(where: Path, method: str, path: str) -> tuple[int, bytes] | None:
    """The answer of the agent; None if there is none."""
    # Half as long to import as all the rest of the other commands.
    import http.client

    connection = http.client.HTTPConnection("localhost", timeout=_PATIENCE)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(_PATIENCE)
        connection.sock.connect(os.fspath(where))
        connection.request(method, path, headers={HEADER: "true"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except PermissionError as error:
        raise Ended(f"{where}: {error.strerror}.", DENIED) from None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _told(body: bytes) -> str:
    found: dict[str, object] = msgspec.json.decode(body)
    return str(found.get("detail"))


def _default_socket(state_dir: Path) -> Path:
    return config.agent_socket() or state_dir / "agent.sock"


def _user(name: str) -> int:
    # Not on every system that the other commands run on; the same below.
    import pwd

    try:
        return int(name) if name.isascii() and name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigurationError(f"There is no user {name!r}.") from None


def _group(name: str) -> int:
    import grp

    try:
        return int(name) if name.isascii() and name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigurationError(f"There is no group {name!r}.") from None


def _seconds(text: str) -> float:
    scale = {"s": 1.0, "m": 60.0}.get(text[-1:], 0.0)
    number = text[:-1]
    if not scale or not number.isascii() or not number.isdigit():
        raise InvalidInput("--wait", "must be like 60s or 2m")
    return int(number) * scale
