"""The command line. Data go to stdout, everything else to stderr; exit codes 0, 1, 2."""

import importlib
import io
import logging
import os
import sys
from typing import NoReturn

import click

from .. import __version__
from ..core.errors import ConfigurationError, InvalidInput, SecretsError
from . import output

PROGRAM = "flowmason-secrets"

# Where each command is: a module of this package, and its name there.
_COMMANDS = {
    "agent": ("agent", "agent"),
    "audit": ("audit", "audit"),
    "delete": ("secret", "delete_secret"),
    "get": ("secret", "get_secret"),
    "inject": ("inject", "inject"),
    "keys": ("keys", "keys"),
    "list": ("secret", "list_secrets"),
    "log": ("log", "log"),
    "metadata": ("secret", "metadata"),
    "render": ("render", "render"),
    "rotate-key": ("rotate", "rotate_key"),
    "run": ("run", "run"),
    "serve": ("serve", "serve"),
    "set": ("secret", "set_secret"),
    "status": ("status", "status"),
    "verify": ("verify", "verify"),
}

_log = logging.getLogger(__name__)


class _Commands(click.Group):
    """Imports a command when it is asked for: programs wait for `run`, `inject` and `agent`."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f".{module}", __name__), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
@click.option("-v", "--verbose", count=True, help="Log more; twice for debugging.")
def cli(verbose: int) -> None:
    """Encrypted secrets with an event-sourced audit trail.

    Commands work on the data directory of this machine with --org, or on a server with --url.
    """
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Run the command line. Every error ends it with one line on stderr, and 1 or 2."""
    _fill_standard_streams()
    # A stream of another encoding shows what it can't carry as an escape.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_arguments(sys.argv[1:])
        sys.exit(cli.main(prog_name=PROGRAM, standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = PROGRAM if error.ctx is None else error.ctx.command_path
        _fail(f"{error.format_message()} See '{command} --help'.", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (ConfigurationError, InvalidInput) as error:
        _fail(str(error), 2)
    except (SecretsError, OSError) as error:
        _fail(str(error), 1)
    except click.Abort:
        _fail("aborted.", 1)
    except Exception as error:
        _log.debug("unexpected", exc_info=True)
        # Its text may hold anything, a value too.
        _fail(f"unexpected {type(error).__name__}: a defect, please report it; -vv tells more.", 1)


def _fill_standard_streams() -> None:
    # A file that is opened later would get the number of a closed stream, and whatever is printed
    # would go into it: into the event log, say.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)


def _check_arguments(arguments: list[str]) -> None:
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"Argument {number} is not UTF-8.") from None


def _fail(message: str, code: int) -> NoReturn:
    output.note(f"{PROGRAM}: {message}")
    if code == 1:
        # What could not be written stays in the buffer, and would fail again, noisily, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
