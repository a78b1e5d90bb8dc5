"""Where values come from, and which of them are wanted."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..core.access import matches
from ..core.errors import InvalidInput
from ..core.keyring import Plaintext
from ..core.records import SecretMetadata

Values = Mapping[str, Plaintext]

# How many are read in one step: the largest values, of which every other character is escaped on
# the way, are not too much.
AT_ONCE = 16


class Listed(NamedTuple):
    """A secret that there is. Another `version` may be, but need not be, another value."""

    name: str
    version: str
    is_expired: bool
    expires_at: str | None = None

    @classmethod
    def of(cls, one: SecretMetadata) -> "Listed":
        """From what a listing has."""
        return cls(one.name, f"{one.version} {one.updated_at}", one.is_expired, one.expires_at)


class Source(Protocol):
    """The secrets of one organisation, as far as the caller may see them."""

    async def listed(self) -> Sequence[Listed]:
        """All of them; nothing is recorded.

        Raises:
            SecretsError: it can't be found out.
        """

    async def read(self, names: Sequence[str]) -> Values:
        """The values of all `names`; these reads are in the event log.

        Raises:
            UnresolvedReferences: names all those that can't be read; nothing is returned.
            SecretsError: they can't be read now.
        """

    def notices(self, selection: "Selection") -> AsyncIterator[None]:
        """Says that something of this may have changed, soon after every change of a value, without
        an end. Once the first one is there, none is missed.

        Raises:
            SecretsError: it will not be found out.
        """


class Found(NamedTuple):
    """Values, and the versions that were listed before they were read. `expired` were left out."""

    values: Values
    versions: Mapping[str, str]
    expired: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Some names, which all have to be there, and whatever else matches one of the patterns."""

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], only: Sequence[str]) -> "Selection":
        """`names`, and what `only` lists: names, and patterns with `*` and `?`."""
        patterns = tuple(one for one in only if "*" in one or "?" in one)
        exact = (*names, *(one for one in only if one not in patterns))
        return cls(tuple(dict.fromkeys(exact)), patterns)

    def wants(self, name: str) -> bool:
        """Whether it is one of these."""
        return name in self.names or any(matches(pattern, name) for pattern in self.patterns)

    def of_listed(self, listed: Sequence[Listed]) -> list[Listed]:
        """Those that are wanted."""
        return [one for one in listed if self.wants(one.name)]


async def find(source: Source, selection: Selection, *, listed: bool = True) -> Found:
    """Read what is wanted. If it is just names, it works without the list too.

    Raises:
        InvalidInput: nothing matches one of the patterns.
        SecretsError: as `Source` has it.
    """
    if not selection.patterns and not listed:
        return Found(await source.read(selection.names), {}, ())
    wanted = selection.of_listed(await source.listed())
    expired = tuple(
        one.name for one in wanted if one.is_expired and one.name not in selection.names
    )
    left = [one.name for one in wanted if one.name not in expired]
    # Those that are named and not there are refused, and recorded, one by one.
    names = tuple(dict.fromkeys((*selection.names, *left)))
    for pattern in selection.patterns:
        if not any(matches(pattern, one.name) for one in wanted):
            raise InvalidInput("only", f"no secret that may be read matches {pattern!r}")
    return Found(await source.read(names), {one.name: one.version for one in wanted}, expired)
