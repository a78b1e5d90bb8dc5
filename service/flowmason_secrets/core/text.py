"""References to secrets in plain text: `{{secrets.NAME}}`, written as in `core.template`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .errors import InvalidInput
from .keyring import Plaintext
from .template import MAX_DOCUMENT, check_result, references, utf8_size


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A text in pieces, each with the name of the reference behind it, if there is one."""

    pieces: tuple[tuple[str, str | None], ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Each name once."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def fill(self, values: Mapping[str, Plaintext]) -> Plaintext:
        """The text with values, as they are, which are not read again.

        Raises:
            InvalidInput: it would be larger than 2 MiB; nothing of that size was made.
        """
        # No variable here holds a value: tracebacks show variables.
        check_result(sum(map(utf8_size, self._filled(values))))
        return Plaintext("".join(self._filled(values)))

    def _filled(self, values: Mapping[str, Plaintext]) -> Iterator[str]:
        for text, name in self.pieces:
            yield text
            if name is not None:
                yield values[name].reveal()


def parse(template: Plaintext) -> TextTemplate:
    """Find the references of a text. Everything else in it is copied.

    Raises:
        InvalidInput: over 512 KiB.
    """
    if utf8_size(template.reveal()) > MAX_DOCUMENT:
        raise InvalidInput("template", f"must have at most {MAX_DOCUMENT} bytes")
    return TextTemplate(tuple(references(template.reveal())))
