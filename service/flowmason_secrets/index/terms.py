"""Terms: the strings that audit queries ask for, as small integers. Only what is known is kept."""

import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated

import msgspec

from ..core.access import Principal
from .database import Damaged

# In the order of the columns.
FIELDS = ORG, TYPE, ACTION, OUTCOME, NAME, ACTOR = range(6)

# Stands for "no value"; the ids of terms begin at 1.
NONE = 0

# Bounded: names come from callers.
_MAX_CACHED = 200_000
_MAX_ALLOWED = 16


class Indexed(msgspec.Struct, gc=False):
    """The fields of an event that are indexed."""

    id: str
    seq: int
    time: Annotated[datetime, msgspec.Meta(tz=True)]
    action: str
    outcome: str
    org_id: str | None
    resource_type: str
    name: str | None
    actor: str | None


_Value = str | None | tuple[str | None, str | None]


def matcher(allow: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a name is allowed, by the same rule as everywhere else."""
    return Principal("", "", "", frozenset(), allow=allow).may_name


class Terms:
    """The dictionary of one open database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # For each field what is known of its values; names come with their organisations.
        self._known: list[dict[_Value, int]] = []
        self.forget()
        # For an organisation and its patterns: the names that match among the terms up to an id.
        self._allowed: dict[tuple[int | None, tuple[str, ...]], tuple[int, set[int]]] = {}

    def forget(self) -> None:
        """Ids that were given in a transaction that did not commit are void."""
        self._known = [{None: NONE} for _ in FIELDS]

    def trim(self) -> None:
        """Bound the memory."""
        if sum(map(len, self._known)) > _MAX_CACHED:
            self.forget()

    def columns(self, events: Sequence[Indexed]) -> list[list[int]]:
        """The terms of events, new ones if need be: a list for each of the fields."""
        return [
            self._column(ORG, [event.org_id for event in events]),
            self._column(TYPE, [event.resource_type for event in events]),
            self._column(ACTION, [event.action for event in events]),
            self._column(OUTCOME, [event.outcome for event in events]),
            self._column(NAME, [(event.org_id, event.name) for event in events]),
            self._column(ACTOR, [event.actor for event in events]),
        ]

    def _column(self, field: int, values: Sequence[_Value]) -> list[int]:
        known = self._known[field]
        try:
            return list(map(known.__getitem__, values))
        except KeyError:
            for value in values:
                if value not in known:
                    known[value] = self._code(field, value)
        return list(map(known.__getitem__, values))

    def _code(self, field: int, value: _Value) -> int:
        scope = 0
        if isinstance(value, tuple):
            org, value = value
            scope = self._known[ORG][org]
        if value is None:
            return NONE
        return self.find(field, scope, value) or self._add(field, scope, value)

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
                "select id, value from term where field = 4 and id > ?", (last,)
            )
        return self._connection.execute(
            "select id, value from term where field = 4 and scope = ? and id > ?", (org, last)
        )


def _storable(value: str) -> bytes:
    # What has no UTF-8 form is in no line, and is made into bytes that no line yields.
    return value.encode("utf-8", "surrogatepass")


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except (AttributeError, UnicodeDecodeError) as error:
        raise Damaged("a term is not text") from error
