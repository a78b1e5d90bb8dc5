"""Terms: the strings that audit queries ask for, as small integers. Only what is known is kept."""

import sqlite3
from collections.abc import Callable

from ..core.access import Principal
from .database import Damaged

ORG, TYPE, ACTION, SUCCESS, ACTOR, NAME = range(6)

# Bounded: names come from callers.
_MAX_CACHED = 200_000
_MAX_ALLOWED = 16


def matcher(allow: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a name is allowed, by the same rule as everywhere else."""
    return Principal("", "", "", frozenset(), allow=allow).may_name


class Terms:
    """The dictionary of one open database. Ids begin at 1; 0 stands for "no value"."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[tuple[int, int], dict[str | None, int]] = {}
        self._count = 0
        # For an organisation and its patterns: the names that match among the terms up to an id.
        self._allowed: dict[tuple[int | None, tuple[str, ...]], tuple[int, set[int]]] = {}

    def forget(self) -> None:
        """Ids that were given in a transaction that did not commit are void."""
        self._known.clear()
        self._allowed.clear()
        self._count = 0

    def trim(self) -> None:
        """Bound the memory. Not between `known` and the last use of its answer."""
        if self._count > _MAX_CACHED:
            self.forget()

    def known(self, field: int, scope: int) -> dict[str | None, int]:
        """Ids at hand: where a value is missing, `code` has it and adds it."""
        found = self._known.get((field, scope))
        if found is None:
            found = self._known[field, scope] = {None: 0}
        return found

    def code(self, field: int, scope: int, value: str | None) -> int:
        """The id of a term, new if need be. `scope` is the organisation's id for names, else 0."""
        known = self.known(field, scope)
        term = known.get(value)
        if term is None and value is not None:
            term = self.find(field, scope, value) or self._add(field, scope, value)
            known[value] = term
            self._count += 1
        return term or 0

    def _add(self, field: int, scope: int, value: str) -> int:
        cursor = self._connection.execute(
            "insert into term (field, scope, value) values (?, ?, ?)",
            (field, scope, value.encode()),
        )
        return cursor.lastrowid or 0

    def find(self, field: int, scope: int, value: str) -> int | None:
        """The id of a term, or None if no event has it."""
        row = self._connection.execute(
            "select id from term where value = ? and field = ? and scope = ?",
            (_storable(value), field, scope),
        ).fetchone()
        return None if row is None else int(row[0])

    def organisations(self) -> list[str]:
        """All organisations that events name.

        Raises:
            Damaged: a term is not text.
        """
        rows = self._connection.execute("select value from term where field = ?", (ORG,))
        return [_text(value) for (value,) in rows]

    def names(self, name: str) -> set[int]:
        """The ids of a name in all organisations."""
        rows = self._connection.execute(
            "select id from term where value = ? and field = ?", (_storable(name), NAME)
        )
        return {term for (term,) in rows}

    def allowed(self, org: int | None, allow: tuple[str, ...]) -> set[int]:
        """The ids of an organisation's names (None: of all) that match one of the patterns.

        Raises:
            Damaged: a term is not text.
        """
        last, ids = self._allowed.pop((org, allow), (0, set()))
        may_name = matcher(allow)
        for term, value in self._since(org, last):
            last = max(last, term)
            if may_name(_text(value)):
                ids.add(term)
        if len(self._allowed) >= _MAX_ALLOWED:
            del self._allowed[next(iter(self._allowed))]
        self._allowed[org, allow] = last, ids
        return ids

    def _since(self, org: int | None, last: int) -> sqlite3.Cursor:
        if org is None:
            return self._connection.execute(
                "select id, value from term where field = 5 and id > ?", (last,)
            )
        return self._connection.execute(
            "select id, value from term where field = 5 and scope = ? and id > ?", (org, last)
        )


def _storable(value: str) -> bytes:
    # What has no UTF-8 form is in no line, and is made into bytes that no line yields.
    return value.encode("utf-8", "surrogatepass")


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except (AttributeError, UnicodeDecodeError) as error:
        raise Damaged("a term is not text") from error
