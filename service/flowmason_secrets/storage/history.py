"""Reading all checkpoints that were ever signed, to verify them. FORMAT.md §9.3. Blocking."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..core import checkpoint
from ..core.checkpoint import Checkpoint
from ..core.merkle import Unverified
from ..core.note import Verifier

# In bytes.
_BATCH = 1 << 16
_TAIL = 1 << 13

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
# How a line is made: a time, and a note as JSON.
_HEAD, _MIDDLE = b'{"time":"', b'","checkpoint":"'
_TIME_BYTES = 27
_PART_OF_TIME = re.compile(rb"[0-9TZ:.-]{,27}")


class Batch(NamedTuple):
    """Some lines of the history, the first of which has this number and begins at this place, and
    the keys to check with: if there are none, signatures are not checked.
    """

    line: int
    place: int
    data: bytes
    verifiers: Sequence[Verifier]


class Entry(NamedTuple):
    """A line of the history: `end` is the place behind it.

    Of `statement` and `problem` one is None; both are if a crash tore the line.
    """

    line: int
    end: int
    statement: Checkpoint | None
    problem: str | None


class _Line(msgspec.Struct):
    time: str
    checkpoint: str


_decode = msgspec.json.Decoder(_Line).decode


def batches(path: Path, size: int, verifiers: Sequence[Verifier]) -> Iterator[Batch]:
    """The first `size` bytes of the history, in batches of lines.

    Raises:
        OSError: it can't be read.
    """
    line, place = 1, 0
    with path.open("rb") as file:
        while size > 0 and (data := file.read(min(_BATCH, size))):
            size -= len(data)
            if size > 0 and not data.endswith(b"\n"):
                rest = file.readline(size)
                size, data = size - len(rest), data + rest
            yield Batch(line, place, data, verifiers)
            line, place = line + data.count(b"\n"), place + len(data)


def tail(path: Path, size: int, verifiers: Sequence[Verifier]) -> list[Entry]:
    """The lines at the end of the first `size` bytes of the history; the first may be a part.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL))
        return entries(Batch(0, 0, file.read(min(size, _TAIL)), verifiers))


def entries(batch: Batch) -> list[Entry]:
    """Check the lines of a batch."""
    found: list[Entry] = []
    end = batch.place
    for number, line in enumerate(batch.data.split(b"\n"), batch.line):
        end += len(line) + 1
        if line:
            found.append(Entry(number, end, *_checked(line, batch.verifiers)))
    return found


def _checked(line: bytes, verifiers: Sequence[Verifier]) -> tuple[Checkpoint | None, str | None]:
    try:
        decoded = _decode(line)
        if not _TIME.fullmatch(decoded.time):
            return None, "its time is not one"
        return verified(decoded.checkpoint.encode(), verifiers), None
    except Unverified as error:
        return None, str(error)
    except (msgspec.DecodeError, UnicodeError) as error:
        return None, None if _torn(line) else f"not a line of the history: {error}"


def verified(note: bytes, verifiers: Sequence[Verifier]) -> Checkpoint:
    """What a checkpoint states; if there are no keys, its signature is not checked.

    Raises:
        Unverified: it is not a checkpoint, or not signed by one of the keys.
    """
    return checkpoint.verify(note, verifiers) if verifiers else checkpoint.read(note)[0]


def _torn(line: bytes) -> bool:
    """Whether it is the beginning of a whole line. # format §9.3"""
    place = len(_HEAD) + _TIME_BYTES
    head, time, rest = line[: len(_HEAD)], line[len(_HEAD) : place], line[place:]
    if not _HEAD.startswith(head) or not _PART_OF_TIME.fullmatch(time):
        return False
    if len(rest) <= len(_MIDDLE):
        return _MIDDLE.startswith(rest)
    return rest.startswith(_MIDDLE) and _begins_note(rest[len(_MIDDLE) :])


def _begins_note(data: bytes) -> bool:
    """Whether it is the beginning of a note, in JSON; at most its quotation mark is at its end."""
    text, blank, signatures = data.partition(rb"\n\n")
    if not blank:
        return b'"' not in text and b"\\" not in text.replace(rb"\n", b"").removesuffix(b"\\")
    dash = "\N{EM DASH} ".encode()
    *whole, last = signatures.split(rb"\n")
    return all(one.startswith(dash) for one in whole) and (
        (last.startswith(dash) and b'"' not in last)
        or dash.startswith(last.removesuffix(b"\\"))
        or (last == b'"' and bool(whole))
    )
