"""Terms: the strings that audit queries ask for, as small integers. Only what is known is kept."""

import sqlite3
from collections.abc import Callable, Mapping

from ..core.access import Principal
from .database import Damaged

# In the order of the columns.
FIELDS = ORG, TYPE, ACTION, OUTCOME, NAME, ACTOR = range(6)

# Stands for "no value"; the ids of terms begin at 1.
NONE = 0

# The terms of values, by the field; see `Terms.known`.
Values = Mapping[str | None, int]
Mappings = tuple[Values, Values, Values, Values, Mapping[str | None, Values], Values]

# Bounded: names come from callers.
_MAX_CACHED = 200_000
_MAX_ALLOWED = 16


def matcher(allow: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a name is allowed, by the same rule as everywhere else."""
    return Principal("", "", "", frozenset(), allow=allow).may_name


class Terms:
    """The dictionary of one open database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._fields: dict[int, _Known] = {}
        self._names = _Scopes(self)
        # For an organisation and its patterns: the names that match among the terms up to an id.
        self._allowed: dict[tuple[int | None, tuple[str, ...]], tuple[int, set[int]]] = {}

    def forget(self) -> None:
        """Ids that were given in a transaction that did not commit are void."""
        self._fields.clear()
        self._names.clear()
        self._allowed.clear()

    def trim(self) -> None:
        """Bound the memory."""
        if sum(map(len, (*self._fields.values(), *self._names.values()))) > _MAX_CACHED:
            self.forget()

    def known(self) -> Mappings:
        """For each of the fields, the terms of its values, which get new ones if need be; names
        have theirs by the organisation.
        """
        org, kind, action, outcome, actor = map(self.of, (ORG, TYPE, ACTION, OUTCOME, ACTOR))
        return org, kind, action, outcome, self._names, actor

    def of(self, field: int) -> "_Known":
        """The terms of a field other than the name."""
        return self._fields.setdefault(field, _Known(self, field, 0))

    def add(self, field: int, scope: int, value: str) -> int:
        """The id of a term, a new one if no event had it. `scope` is the organisation's id for
        names, else 0.
        """
        known = self.find(field, scope, value)
        if known is not None:
            return known
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

    def text(self, field: int, term: int, org: int | None) -> str | None:
        """The value of a field, None for `NONE`. `org` is the organisation's id if it is known.

        Raises:
            Damaged: there is no such term of this field, or it is of another organisation.
        """
        if term == NONE:
            return None
        row = self._connection.execute(
            "select value, scope from term where id = ? and field = ?", (term, field)
        ).fetchone()
        if row is None or (field == NAME and org not in (None, row[1])):
            raise Damaged(f"term {term} is not there, or not of this kind")
        return _text(row[0])

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
                "select id, value from term where field = 4 and id > ?", (last,)
            )
        return self._connection.execute(
            "select id, value from term where field = 4 and scope = ? and id > ?", (org, last)
        )


class _Scopes(dict[str | None, "_Known"]):
    """The terms of names, by the organisation."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self._terms = terms

    def __missing__(self, org: str | None) -> "_Known":
        known = self[org] = _Known(self._terms, NAME, self._terms.of(ORG)[org])
        return known


class _Known(dict[str | None, int]):
    """The ids of a field's values, those that are at hand; any other is added when asked for."""

    def __init__(self, terms: Terms, field: int, scope: int) -> None:
        super().__init__({None: NONE})
        self._terms, self._field, self._scope = terms, field, scope

    def __missing__(self, value: str) -> int:
        term = self[value] = self._terms.add(self._field, self._scope, value)
        return term


def _storable(value: str) -> bytes:
    # What has no UTF-8 form is in no line, and is made into bytes that no line yields.
    return value.encode("utf-8", "surrogatepass")


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except (AttributeError, UnicodeDecodeError) as error:
        raise Damaged("a term is not text") from error
