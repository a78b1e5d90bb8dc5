"""The listing: one row for each secret, reloaded from its metadata after every change of it.

What has to be loaded is a table itself, so that it survives a crash, costs one load however
often a secret changed, and is shared by all processes.
"""

import sqlite3
import zlib
from collections.abc import Callable

import orjson

from ..core.events import MAX_EVENT_NAME
from ..core.names import org_hash, secret_hash
from ..core.ports import ListQuery, Tail
from ..core.records import Metadata
from .database import Damaged, Unsettled, writing
from .terms import matcher

# The organisation, the secret's id and its name if it is known, as the event has them.
Changed = tuple[str, str | None, str | None]

# Above every name: UTF-8 never has this byte.
_TOP = b"\xff"


def fill(connection: sqlite3.Connection, tail: Tail, position: int) -> None:
    """Mark all secrets there are for loading. Changes before `position` need no other mark.

    Raises:
        Unsettled: changes before it are not in the files yet.
    """
    if not tail.settled():
        raise Unsettled("committed changes can't be published")
    connection.execute("update state set filled = ?", (position,))
    for org in tail.organisations():
        _mark(connection, org, tail.stems(org))


def note(connection: sqlite3.Connection, tail: Tail, changed: set[Changed]) -> None:
    """Mark secrets for loading after events that changed them."""
    whole: set[str] = set()
    for org_id, secret_id, name in changed:
        org = org_hash(org_id)
        known = connection.execute(
            "select stem from secret where org = ? and id = ?", (org, secret_id)
        ).fetchall()
        _mark(connection, org, [stem for (stem,) in known])
        if name is not None:
            _mark(connection, org, [secret_hash(name)])
        if not known and not _leads_to_file(tail, org, name):
            whole.add(org)
    for org in whole:
        _mark(connection, org, tail.stems(org))


def _leads_to_file(tail: Tail, org: str, name: str | None) -> bool:
    """Whether the file of a secret follows from its name as an event has it."""
    if name is None:
        return False
    # The event holds a cut name if it was longer: then its hash leads nowhere.
    return len(name) < MAX_EVENT_NAME or tail.metadata(org, secret_hash(name)) is not None


def _mark(connection: sqlite3.Connection, org: str, stems: list[str]) -> None:
    rows = ((org, stem) for stem in stems)
    connection.executemany("insert or ignore into todo values (?, ?)", rows)


def load(connection: sqlite3.Connection, tail: Tail, org: str | None, most: int) -> bool:
    """Load at most `most` marked secrets, of one organisation or of all; whether any were left."""
    if org is None:
        found = connection.execute("select org, stem from todo limit ?", (most,)).fetchall()
    else:
        found = connection.execute(
            "select org, stem from todo where org = ? limit ?", (org, most)
        ).fetchall()
    if not found:
        return False
    with writing(connection, tail):
        for place in found:
            # Read under the write lock: whoever stores last has read last.
            metadata = tail.metadata(*place)
            connection.execute("delete from secret where org = ? and stem = ?", place)
            if metadata is not None:
                _store(connection, place, metadata)
            connection.execute("delete from todo where org = ? and stem = ?", place)
    return len(found) == most


def _store(connection: sqlite3.Connection, place: tuple[str, str], metadata: Metadata) -> None:
    name, data = metadata.name.encode(), orjson.dumps(metadata)
    # As SQLite will hand it back: the checksum covers its text.
    expiry = None if metadata.expiry is None else float(metadata.expiry)
    row = (name, metadata.category, expiry, metadata.key_id, data)
    connection.execute(
        "insert into secret values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*place, metadata.id, *row, _check(place[0], *row)),
    )


def _check(
    org: str, name: bytes, category: str, expiry: float | None, key_id: str, data: bytes
) -> int:
    return zlib.crc32(data, zlib.crc32(repr((org, name, category, expiry, key_id)).encode()))


def page(
    connection: sqlite3.Connection, query: ListQuery, most: int
) -> tuple[list[Metadata], str | None]:
    """What matches among the next `most` secrets, and where to go on, or None if that was all.

    Raises:
        Damaged: a row is not what was stored.
    """
    org, wanted = org_hash(query.org_id), _filter(query)
    low, high = _range(query.prefix or "")
    if query.after is not None:
        # The very next string of bytes.
        low = max(low, query.after.encode("utf-8", "surrogatepass") + b"\0")
    rows = connection.execute(
        "select name, category, expiry, key_id, data, crc from secret"
        " where org = ? and name >= ? and name < ? order by name limit ?",
        (org, low, high, most),
    )
    found: list[Metadata] = []
    seen, last = 0, query.after
    for name, category, expiry, key_id, data, crc in rows:
        if type(data) is not bytes or _check(org, name, category, expiry, key_id, data) != crc:
            raise Damaged("a secret does not match its checksum")
        seen, last = seen + 1, name.decode()
        if wanted(last, category, expiry):
            found.append(Metadata(**orjson.loads(data)))
            if len(found) == query.limit:
                return found, None
    return found, last if seen == most else None


def _range(prefix: str) -> tuple[bytes, bytes]:
    """The names that begin with `prefix`: from the first, up to and without the second."""
    low = prefix.encode("utf-8", "surrogatepass")
    # The last byte of UTF-8 is at most 0xf4, so there is always a next one.
    return (low, low[:-1] + bytes([low[-1] + 1])) if low else (low, _TOP)


def _filter(query: ListQuery) -> Callable[[str, str, float | None], bool]:
    may_name = matcher(query.allow)

    def wanted(name: str, category: str, expiry: float | None) -> bool:
        return (
            (query.category is None or category == query.category)
            and (
                query.expired is None
                or query.expired == (expiry is not None and expiry <= query.now)
            )
            and may_name(name)
        )

    return wanted


def key_counts(connection: sqlite3.Connection) -> dict[str, int]:
    """How many of the loaded secrets are under each master key."""
    rows = connection.execute("select key_id, count(*) from secret group by key_id")
    return dict(rows.fetchall())
