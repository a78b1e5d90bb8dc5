"""References to secrets in plain text: `{{secrets.NAME}}`, written as in `core.template`."""

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InvalidInput
from .keyring import Plaintext
from .template import MAX_DOCUMENT, check_result, references, utf8_size


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A text in pieces, each with the name of the reference behind it, if there is one."""

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Each name once."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def fill(self, values: Mapping[str, Plaintext]) -> Plaintext:
        """The text with values, as they are, which are not read again.

        Raises:
            InvalidInput: it would be larger than 2 MiB; nothing of that size was made.
        """
        size = 0
        parts: list[str] = []
        for text, name in self.pieces:
            value = "" if name is None else values[name].reveal()
            size += utf8_size(text) + utf8_size(value)
            parts += (text, value)
            check_result(size)
        return Plaintext("".join(parts))


def parse(text: str) -> TextTemplate:
    """Find the references of a text. Everything else in it is copied.

    Raises:
        InvalidInput: over 512 KiB.
    """
    if utf8_size(text) > MAX_DOCUMENT:
        raise InvalidInput("template", f"must have at most {MAX_DOCUMENT} bytes")
    return TextTemplate(tuple(references(text)))
