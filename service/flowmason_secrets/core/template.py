r"""References to secrets in the strings of a JSON document: `{{secrets.NAME}}`.

A name has no braces, and the white space of JSON around it does not count. Backslashes before a
reference are halved, and an odd one makes it literal text: `\{{secrets.X}}` stands for
`{{secrets.X}}`, `\\{{secrets.X}}` for a backslash and the value. Everything else is copied as it
is written: keys, numbers, white space, other braces and backslashes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .errors import InvalidInput
from .keyring import Plaintext

# Bytes, as UTF-8: of a document, and of what becomes of it.
MAX_DOCUMENT = 512 << 10
MAX_RESULT = 2 << 20
# Different secrets in one document.
MAX_SECRETS = 100

_WHITE = " \t\r\n"
# A string of valid JSON, and the colon behind it if it is a key.
_STRING = re.compile(r'"((?:[^"\\]++|\\.)*+)"([ \t\r\n]*+:)?')
# Looks behind, so that a long run of backslashes is tried once and not from each of them.
_REFERENCE = re.compile(r"(?<!\\)(\\*+)\{\{[ \t\r\n]*+secrets\.([^{}]*+)\}\}")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Template:
    """A document in pieces: the text between references, and the names that these have. There is
    one more of the `literals` than of the `references`.
    """

    literals: tuple[str, ...] = field(repr=False)
    references: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Each name once."""
        return tuple(dict.fromkeys(self.references))

    def fill(self, values: Mapping[str, Plaintext]) -> Plaintext:
        """The document as JSON. Values are text in it, whatever they hold, and are not read again.

        Raises:
            InvalidInput: it would be larger than 2 MiB; nothing of that size was made.
        """
        # No variable here holds a value: tracebacks show variables.
        check_result(self._size(values))
        return Plaintext("".join(self._filled(values)))

    def _size(self, values: Mapping[str, Plaintext]) -> int:
        counts = Counter(self.references).items()
        filled = sum(count * json_size(values[name]) for name, count in counts)
        return filled + sum(map(utf8_size, self.literals))

    def _filled(self, values: Mapping[str, Plaintext]) -> Iterator[str]:
        inside = {name: _escaped(values[name].reveal()) for name in self.names}
        for literal, name in zip(self.literals, self.references, strict=False):
            yield literal
            yield inside[name]
        yield self.literals[-1]


def parse(document: Plaintext) -> Template:
    """Find the references of a JSON document. Takes time in proportion to its size.

    Raises:
        InvalidInput: not JSON, nested too deeply, over 512 KiB, or of more than 100 secrets.
    """
    if utf8_size(document.reveal()) > MAX_DOCUMENT:
        raise InvalidInput("document", f"must have at most {MAX_DOCUMENT} bytes")
    _check_json(document)
    template = _split(document.reveal())
    if len(template.names) > MAX_SECRETS:
        raise InvalidInput("document", f"must refer to at most {MAX_SECRETS} different secrets")
    return template


def json_size(value: Plaintext) -> int:
    """How many bytes a value has between the quotes of a JSON string."""
    return utf8_size(_escaped(value.reveal()))


def check_result(size: int) -> None:
    """Raises:
    InvalidInput: more than 2 MiB.
    """
    if size > MAX_RESULT:
        raise InvalidInput(
            "document", f"would have {size} bytes with its values, at most {MAX_RESULT} are allowed"
        )


def _split(document: str) -> Template:
    literals: list[str] = []
    references: list[str] = []
    text: list[str] = []
    for literal, name in _pieces(document):
        text.append(literal)
        if name is not None:
            literals.append("".join(text))
            references.append(name)
            text.clear()
    return Template((*literals, "".join(text)), tuple(references))


def references(text: str) -> Iterator[tuple[str, str | None]]:
    """A text in pieces, each with the name of the reference behind it, if there is one."""
    read = 0
    for reference in _REFERENCE.finditer(text):
        slashes = len(reference[1])
        before = text[read : reference.start()] + "\\" * (slashes // 2)
        if slashes % 2:
            yield before + reference[0][slashes:], None
        else:
            yield before, reference[2].strip(_WHITE)
        read = reference.end()
    yield text[read:], None


def _pieces(document: str) -> Iterator[tuple[str, str | None]]:
    """Text as it stands in the document, each with the name of the reference behind it, if any."""
    copied = 0
    for string in _STRING.finditer(document):
        inside, colon = string.groups()
        if colon is not None or ("{{" not in inside and "\\u" not in inside):
            continue
        content = json.loads(f'"{inside}"')
        if not _REFERENCE.search(content):
            continue
        yield document[copied : string.start(1)], None
        for text, name in references(content):
            yield _escaped(text), name
        copied = string.end(1)
    yield document[copied:], None


def _escaped(text: str) -> str:
    inside = json.dumps(text, ensure_ascii=False)[1:-1]
    # JSON can carry lone surrogates as escapes, UTF-8 can't.
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", inside)


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _check_json(document: Plaintext) -> None:
    try:
        # Numbers are not looked at: they may be larger than any type.
        json.loads(document.reveal(), parse_float=str, parse_int=str, parse_constant=_refuse)
    except ValueError:
        raise InvalidInput("document", "is not JSON") from None
    except RecursionError:
        raise InvalidInput("document", "is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def encode(document: object) -> Plaintext:
    """A document as JSON, of what `json.dumps` takes.

    Raises:
        InvalidInput: it is no JSON.
    """
    try:
        # As they are: of two surrogates, escapes would make one character.
        return Plaintext(json.dumps(document, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise InvalidInput("document", "is not JSON, or nested too deeply") from None
