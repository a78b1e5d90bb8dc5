"""What goes to stdout: values, JSON for machines, tables for people.

Names, descriptions and user agents come from anywhere: no control character of theirs is printed.
"""

import re
import sys
from collections.abc import Sequence

import click
import msgspec
from rich.cells import cell_len

# Controls, lone surrogates, line separators, and what changes the direction of text: a name must
# neither move the cursor nor look like another name.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNSAFE_IN_JSON = re.compile(rf"(?![\t\n\r]){_UNSAFE.pattern}")


def printable(text: str) -> str:
    """`text` with everything that is not fit for a terminal shown as an escape, on one line."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def note(text: str) -> None:
    """Tell people something, on stderr."""
    click.echo(printable(text), err=True)


def value(text: str) -> None:
    """Print a secret value or a raw key as it is, and a newline."""
    # As bytes: a value must not depend on the locale.
    click.echo(text.encode())


def document(shape: object) -> None:
    """Print one line of JSON."""
    text = msgspec.json.encode(shape).decode()
    # Outside its strings, compact JSON holds none of these characters.
    click.echo(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode())


def json_text(text: bytes) -> None:
    """Print JSON as it is written, and a newline if it has none at its end."""
    # Inside its strings, JSON has none of the three that are left as they are.
    shown = _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text.decode())
    click.echo(shown.encode(), nl=not shown.endswith("\n"))


def table(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """Print a table; when stdout is no terminal, as aligned lines that are never wrapped."""
    cells = [[printable(cell) if cell else "-" for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(header, cells)
        return
    lines = [[title.upper() for title in header], *cells] if any(header) else cells
    widths = [max(cell_len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def _draw(header: Sequence[str], cells: list[list[str]]) -> None:
    # Takes longer to import than everything else here, and pipes don't need it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*header, box=None, header_style="bold", pad_edge=False, show_header=any(header))
    for column in drawn.columns:
        column.overflow = "fold"
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout, highlight=False).print(drawn)


def moment(time: str | None) -> str | None:
    """An RFC 3339 time without its fraction of a second."""
    return None if time is None else re.sub(r"\.\d+(?=Z$)", "", time)
