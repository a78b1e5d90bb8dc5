"""Who asks, and what they may: principals, scopes, allowed names."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import Denied, InvalidInput
from .names import check_line

FULL, READ, EXECUTE, DEPLOY = "full", "read", "execute", "deploy"
SCOPES = (FULL, READ, EXECUTE, DEPLOY)
ANY: frozenset[str] = frozenset(SCOPES)

MAX_PATTERNS = 64
MAX_PATTERN_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Principal:
    """An API key, or a local process that uses the library or the command line.

    `expires_at` is in seconds since the epoch. `digest`, the SHA-256 of the API key, is None for
    local processes, which hold the master key anyway.
    """

    org_id: str
    actor: str
    actor_type: str
    scopes: frozenset[str]
    allow: tuple[str, ...] = ()
    expires_at: float | None = None
    digest: str | None = field(default=None, repr=False)

    def require(self, scopes: Collection[str]) -> None:
        """Raises:
        Denied: none of `scopes` is among those of this principal.
        """
        if self.scopes.isdisjoint(scopes):
            raise Denied(
                f"This needs the scope {' or '.join(sorted(scopes))}; "
                f"the API key has {', '.join(sorted(self.scopes))}."
            )

    def require_unrestricted(self) -> None:
        """Raises:
        Denied: the API key is limited to some names, so it can't hand out wider keys.
        """
        if self.allow:
            raise Denied("An API key that is limited to some names can't manage API keys.")

    def may_name(self, name: str) -> bool:
        """Whether this principal may touch, or see, the secret `name`."""
        return not self.allow or any(matches(pattern, name) for pattern in self.allow)

    def require_name(self, name: str) -> None:
        """Raises:
        Denied: no pattern of the API key matches `name`. Says nothing about its existence.
        """
        if not self.may_name(name):
            raise Denied(f"This API key may not use the name {name!r}.")


class Peer(NamedTuple):
    """A process that an agent asks for, as the agent's kernel told it: user id and process id."""

    uid: int
    pid: int


class Sender(NamedTuple):
    """What a request says of who sent it: the SHA-256 of the API key, the address, the user agent,
    for whom it asks, and how the client calls the request.
    """

    digest: str
    client_ip: str | None
    user_agent: str | None
    peer: Peer | None
    request_id: str | None


class Caller(NamedTuple):
    """A principal together with the request it makes.

    `as_of` is the size of the log, in events, when the principal was looked up. `peer` is what the
    principal says: for whom it asks.
    """

    principal: Principal
    as_of: int = 0
    client_ip: str | None = None
    user_agent: str | None = None
    request_id: str | None = None
    peer: Peer | None = None


def check_scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    """Raises:
    InvalidInput: none at all, or one that does not exist.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if not scopes or unknown:
        raise InvalidInput("scopes", f"must be some of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in scopes)


def check_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """`*` stands for any run of characters, `?` for one; everything else for itself.

    Raises:
        InvalidInput: more than 64 patterns or 2,048 bytes, or one that is empty, over 256
            characters or has control characters.
    """
    if len(patterns) > MAX_PATTERNS:
        raise InvalidInput("allow", f"must have at most {MAX_PATTERNS} patterns")
    if any(not 1 <= len(pattern) <= 256 for pattern in patterns):
        raise InvalidInput("allow", "patterns must have 1 to 256 characters")
    for pattern in patterns:
        check_line("allow", pattern)
    # They have to fit into the line of their event.
    if sum(len(pattern.encode()) for pattern in patterns) > MAX_PATTERN_BYTES:
        raise InvalidInput("allow", f"must have at most {MAX_PATTERN_BYTES} bytes in all")
    return tuple(patterns)


def matches(pattern: str, name: str) -> bool:
    """Whether the whole name matches. Takes at most len(pattern) × len(name) steps, which no
    regular expression with as many stars promises.
    """
    p = n = 0
    # Where the last * was, and up to where it has taken characters.
    star, taken = -1, 0
    while n < len(name):
        if p < len(pattern) and pattern[p] == "*":
            star, taken = p, n
            p += 1
        elif p < len(pattern) and pattern[p] in ("?", name[n]):
            p, n = p + 1, n + 1
        elif star >= 0:
            taken += 1
            p, n = star + 1, taken
        else:
            return False
    return pattern[p:].strip("*") == ""
