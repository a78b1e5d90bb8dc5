"""`flowmason-secrets verify`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from .. import config, supervisor
from ..core import tlogproof
from ..core.errors import ConfigurationError
from ..core.merkle import Unverified
from ..core.note import Verifier, encode_base64
from ..storage.durable import Durable
from ..storage.minimum import MinimumFile
from ..storage.signing import SigningKey
from . import output, progress
from .where import json_option

if TYPE_CHECKING:
    from ..verifying import Request, Verdict

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)

_HOW = "'flowmason-secrets log key', run once where the log is written, prints the key for --vkey."


class Bad(msgspec.Struct, frozen=True):
    """A difference: the first bad line's `seq`, if it is a line, where, and what is wrong."""

    seq: int | None
    place: str
    problem: str


class Report(msgspec.Struct, frozen=True):
    """The verdict as JSON. `root` is in base64."""

    valid: bool
    log: str | None
    events: int
    signed: int
    unsigned: int
    root: str
    complete_from: int
    first_time: str
    last_time: str
    checkpoints: int
    checkpoints_not_compared: int
    signatures: str
    unknown_keys: list[str]
    torn: list[str]
    differences: list[Bad]
    more_differences: int


class Checked(msgspec.Struct, frozen=True):
    """What a proof shows: that event `seq` is in `log`, as it was signed at `signed` events."""

    valid: bool
    log: str | None
    seq: int | None
    signed: int | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A file with a proof, and where the event's line is: in `event`, or in the log `events`."""

    proof: Path
    event: Path | None
    events: Path

    def line(self, seq: int) -> bytes:
        """The line, without its newline.

        Raises:
            ConfigurationError: there is none.
        """
        from ..storage.scanning import line_of

        if self.event is not None:
            return self.event.read_bytes().removesuffix(b"\n")
        line = line_of(self.events, seq) if self.events.is_dir() else None
        if line is None:
            raise ConfigurationError(
                f"Event {seq} is not in {self.events}: give its line with --event FILE."
            )
        return line


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys to check with, and where they are from: `given`, `data_directory` or `unchecked`."""

    verifiers: list[Verifier]
    source: str


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help=f"The data directory, or a copy.  [default: {config.PREFIX}DIR or "
    f"{config.Settings().data_dir}]",
)
@click.option(
    "--vkey",
    "vkeys",
    multiple=True,
    help="The log's verifier key, or a file with it. Repeatable, for a log whose key was changed.",
)
@click.option("--since", type=_FILE, help="A checkpoint that you kept: the log has to continue it.")
@click.option(
    "--archive",
    "archives",
    type=_DIRECTORY,
    multiple=True,
    help="A directory with archived segments (.gz, .zst). Repeatable.",
)
@click.option("--receipt", type=_FILE, help="Check one proof instead: a .tlog-proof file.")
@click.option("--event", type=_FILE, help="With --receipt: a file with the event's line.")
@json_option
def verify(
    data_dir: Path | None,
    vkeys: tuple[str, ...],
    since: Path | None,
    archives: tuple[Path, ...],
    receipt: Path | None,
    event: Path | None,
    as_json: bool,
) -> None:
    """Verify the whole event log offline, from its files alone.

    Checks every line of every segment, the tree and its tiles, every checkpoint that was signed,
    and the order of times. It writes nothing, and may run beside a server. Exit code 1 if anything
    differs.
    """
    from .. import verifying  # The other commands need not wait for it.

    settings = config.from_environment()
    if data_dir is not None:
        settings = replace(settings, data_dir=data_dir)
    keys = _keys(vkeys, settings)
    if receipt is not None:
        if since is not None or archives:
            raise click.UsageError("--receipt goes with neither --since nor --archive.")
        _check_receipt(Receipt(receipt, event, settings.root / "events"), keys, as_json)
        return
    if event is not None:
        raise click.UsageError("--event goes with --receipt.")
    if not (settings.root / "events").is_dir():
        raise ConfigurationError(f"There is no event log in {settings.root}.")
    request = verifying.Request(
        settings.root,
        keys.verifiers,
        None if since is None else since.read_bytes(),
        archives,
        processes=len(supervisor.places(0)),
    )
    verdict = verified(request)
    if as_json:
        output.document(_report(verdict, keys))
    else:
        _show(verdict, keys)
    if verdict.count:
        raise click.exceptions.Exit(1)


def _keys(vkeys: tuple[str, ...], settings: config.Settings) -> Keys:
    if vkeys:
        return Keys([_decoded(vkey) for vkey in vkeys], "given")
    try:
        signer = SigningKey(settings.signing_key, Durable()).load()
    except ConfigurationError as error:
        output.note(str(error))
        signer = None
    if signer is None:
        return Keys([], "unchecked")
    return Keys([signer.verifier], "data_directory")


def _decoded(vkey: str) -> Verifier:
    try:
        if Path(vkey).is_file():
            vkey = Path(vkey).read_text(encoding="utf-8").strip()
        return Verifier.decode(vkey)
    except (Unverified, OSError, ValueError) as error:
        raise click.BadParameter(f"{error}. {_HOW}", param_hint="--vkey") from None


def verified(request: "Request") -> "Verdict":
    """The verdict over a log of which some may be archived meanwhile: what is not where it was then
    is no difference, and it begins again.

    Raises:
        OSError: something can't be read.
        LogDamaged: it can't be found out what was archived.
    """
    from .. import verifying
    from ..walking import Archived

    minimum = MinimumFile.beside(request.root / "events")
    while True:
        before = minimum.read()
        request = replace(request, archived=Archived(before.minimum, before.edge))
        try:
            with progress.telling("Verifying") as advance:
                verdict = verifying.verify(request, advance)
            if not verdict.count or minimum.read() == before:
                return verdict
        except FileNotFoundError:
            if minimum.read() == before:
                raise


# --- the whole log ----------------------------------------------------------------------------


def _report(verdict: "Verdict", keys: Keys) -> Report:
    return Report(
        valid=not verdict.count,
        log=verdict.origin,
        events=verdict.events,
        signed=verdict.signed,
        unsigned=verdict.events - verdict.signed,
        root=encode_base64(verdict.root),
        complete_from=verdict.absent,
        first_time=verdict.times[0],
        last_time=verdict.times[1],
        checkpoints=verdict.checkpoints,
        checkpoints_not_compared=verdict.unknown,
        signatures=keys.source,
        unknown_keys=verdict.foreign,
        torn=verdict.torn,
        differences=[Bad(*one) for one in verdict.differences],
        more_differences=verdict.count - len(verdict.differences),
    )


def _show(verdict: "Verdict", keys: Keys) -> None:
    """The verdict on stdout, what else there is to know on stderr."""
    for note in _notes(verdict, keys):
        output.note(note)
    if not verdict.count:
        word = "VALID" if keys.verifiers else "CONSISTENT, SIGNATURES NOT CHECKED"
        click.echo(output.printable(f"{word}: {_what(verdict)}"))
        return
    first, *others = verdict.differences
    for one in others:
        output.note(f"Also: {one.place}: {one.problem}.")
    if verdict.count > len(verdict.differences):
        output.note(f"And {verdict.count - len(verdict.differences):,} more differences.")
    click.echo(output.printable(f"DIFFERENT: {first.place}: {first.problem}."))


def _what(verdict: "Verdict") -> str:
    if not verdict.events:
        return "the log is empty."
    signed = f"{verdict.signed:,} of them signed as {verdict.origin}"
    text = f"{verdict.events:,} events, {signed}, {verdict.checkpoints:,} checkpoints"
    if verdict.absent:
        text += f"; complete from event {verdict.absent} on ({verdict.times[0]})"
    return f"{text}. Root {encode_base64(verdict.root)}."


def _notes(verdict: "Verdict", keys: Keys) -> Iterator[str]:
    if keys.source == "unchecked":
        yield f"There is no key: whoever changed the log may have signed it anew. {_HOW}"
    if keys.source == "data_directory":
        yield f"The key is the one of this machine. An auditor has his own copy: {_HOW}"
    if verdict.foreign:
        names = ", ".join(verdict.foreign)
        yield f"The lines quote checkpoints by other keys, not checked: {names}. Add their --vkey."
    if verdict.unknown:
        yield (
            f"{verdict.unknown:,} checkpoints of fewer than {verdict.absent:,} events could not be "
            "compared: the hashes of archived events are not in tree/ any more. Give --archive."
        )
    unsigned = verdict.events - verdict.signed
    if unsigned and not verdict.count:
        yield f"Not signed yet, behind the newest checkpoint: {unsigned:,} events."
    for torn in verdict.torn:
        yield f"A crash left a torn tail, which is no part of the log: {torn}."


# --- one proof --------------------------------------------------------------------------------


def _check_receipt(receipt: Receipt, keys: Keys, as_json: bool) -> None:
    if not keys.verifiers:
        raise ConfigurationError(f"A proof can't be checked without the log's key. {_HOW}")
    line = b""
    try:
        proof = tlogproof.parse(receipt.proof.read_bytes())
        line = receipt.line(proof.index)
        signed = tlogproof.verify(line, proof, keys.verifiers)
    except Unverified as error:
        found = Checked(False, None, None, None, str(error))
    else:
        found = Checked(True, signed.origin, proof.index, signed.size, None)
    if as_json:
        output.document(found)
    elif found.valid:
        click.echo(
            output.printable(
                f"VALID: event {found.seq} is in the log {found.log}, signed when that had "
                f"{found.signed:,} events: {line.decode(errors='replace')}"
            )
        )
    else:
        click.echo(output.printable(f"DIFFERENT: {receipt.proof}: {found.problem}."))
    if not found.valid:
        raise click.exceptions.Exit(1)
