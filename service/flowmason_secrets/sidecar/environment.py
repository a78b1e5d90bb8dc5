"""The environment of a child: what it inherits, and variables made of secrets."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..core import text
from ..core.errors import InvalidInput
from ..core.keyring import Plaintext
from ..core.text import TextTemplate
from .source import Values

# As `execve` takes it. Bytes, so that neither the locale nor what is inherited changes anything.
Environment = Mapping[bytes, bytes]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_]", re.ASCII)
# These say which programs and libraries are loaded: no secret sets them because of its name.
_LOADERS = re.compile(r"PATH|LD_.*|DYLD_.*")


class Assignment(NamedTuple):
    """A line of an environment file."""

    variable: str
    template: TextTemplate


@dataclass(frozen=True, slots=True)
class Plan:
    """Which variables there are to be: those of a file, and one for each other secret, with
    `prefix` in front of its name.
    """

    assignments: tuple[Assignment, ...] = ()
    prefix: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The secrets that the file refers to."""
        templates = (assignment.template for assignment in self.assignments)
        return tuple(dict.fromkeys(name for template in templates for name in template.names))

    def variables(self, values: Values, alone: Iterable[str]) -> dict[str, str]:
        """The variables; each of the secrets `alone` makes one of its own.

        Raises:
            InvalidInput: two of them have the same name, or one is none.
        """
        made = {one.variable: one.template.fill(values).reveal() for one in self.assignments}
        origins = dict.fromkeys(made, "the environment file")
        for name in alone:
            variable = variable_of(name, self.prefix)
            if variable in origins:
                raise InvalidInput(
                    "environment",
                    f"secret {name!r} and {origins[variable]} both make the variable {variable}; "
                    "choose with --only, or name the variables with --env-file",
                )
            origins[variable] = f"secret {name!r}"
            made[variable] = values[name].reveal()
        for variable, value in made.items():
            if "\0" in value:
                raise InvalidInput(
                    "environment",
                    f"the value for {variable} (from {origins[variable]}) holds a NUL character, "
                    "which no environment variable can; 'inject' writes such values into files",
                )
        return made


def variable_of(name: str, prefix: str) -> str:
    """The variable of a secret: its name, with '_' in place of what no variable's name has.

    Raises:
        InvalidInput: it would decide which program or library is loaded.
    """
    variable = _NOT_IN_NAMES.sub("_", prefix + name)
    if not _NAME.fullmatch(variable):
        variable = f"_{variable}"
    if _LOADERS.fullmatch(variable):
        raise InvalidInput(
            "environment",
            f"secret {name!r} would replace {variable}, which says what is loaded and run; "
            "use --prefix, or leave it out with --only",
        )
    return variable


def parse_file(content: Plaintext) -> tuple[Assignment, ...]:
    """The lines `NAME=text` of an environment file, in which `{{secrets.NAME}}` is a reference.
    Empty lines and those that begin with '#' say nothing; one pair of quotes around the text is
    taken off. Nothing else is special.

    Raises:
        InvalidInput: says which line is not such.
    """
    found: dict[str, Assignment] = {}
    for number, line in enumerate(content.reveal().split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        variable, equals, written = line.removeprefix("export ").partition("=")
        if not equals or not _NAME.fullmatch(variable):
            raise InvalidInput("env-file", f"line {number} is not NAME=text")
        if variable in found:
            raise InvalidInput("env-file", f"line {number} sets {variable} once more")
        if len(written) >= 2 and written[0] == written[-1] and written[0] in "'\"":
            written = written[1:-1]
        found[variable] = Assignment(variable, text.parse(Plaintext(written)))
    return tuple(found.values())


def overlaid(inherited: Environment, variables: Mapping[str, str]) -> Environment:
    """The environment with these variables in it, in place of others of the same names."""
    added = {name.encode(): value.encode() for name, value in variables.items()}
    return {**inherited, **added}


def shares(variables: Mapping[str, str]) -> str:
    """What the variables take of the room for an environment: sizes and names, no values."""
    sizes = sorted(((len(value.encode()), name) for name, value in variables.items()), reverse=True)
    largest = ", ".join(f"{name} ({size} bytes)" for size, name in sizes[:3])
    total = sum(size for size, _ in sizes)
    return (
        f"{len(sizes)} variables of secrets have {total} bytes; the largest are "
        f"{largest or 'none'}. Take fewer with --only, or write them into a file with 'inject'"
    )
