"""The database file: opened, checked, and replaced when it is gone or damaged.

Blocking, and for one thread: every method is called in the index's worker thread.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .. import forking
from ..core.ports import Tail

_LOG = logging.getLogger(__name__)

MEMORY = ":memory:"
VERSION = 5

_SCHEMA = """
create table state (
    id integer primary key check (id = 1), position integer not null, sealed integer not null,
    steps integer not null, filled integer not null, block integer not null,
    segment integer not null, "offset" integer not null, event text not null
);
create table term (
    id integer primary key, field integer not null, scope integer not null, value blob not null
);
create unique index term_value on term (value, field, scope);
create index term_names on term (scope) where field = 4;
create table event (
    seq integer primary key, segment integer not null, "offset" integer not null,
    time integer not null, org integer not null, type integer not null, action integer not null,
    outcome integer not null, name integer not null, actor integer not null
);
create table posting (id integer primary key, bits blob not null);
create table merged (id integer primary key, parts blob not null);
create table block (
    number integer primary key, first integer not null, last integer not null
);
create table piece (number integer primary key, spans blob not null);
create table secret (
    org text not null, stem text not null, id text not null, name blob not null,
    category text not null, expiry real, key_id text not null, data blob not null,
    crc integer not null
);
create unique index secret_stem on secret (org, stem);
create index secret_name on secret (org, name);
create index secret_id on secret (org, id);
create index secret_key on secret (key_id);
create table todo (org text not null, stem text not null, primary key (org, stem)) without rowid;
"""

# What says nothing about the file's content: somebody else's lock, a full disk, a missing right.
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
    }
)
# Within those classes: the file is shorter than it says, or another one took its name.
_YET_DAMAGE = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_READONLY_DBMOVED})

# How many rows are inserted with one statement.
_ROWS = 64

_Identity = tuple[int, int]


class Unsettled(Exception):
    """What would be written is not to be kept yet."""


class Damaged(Exception):
    """The database contradicts itself or the log. It is derived: remove it and build it again."""


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether SQLite complains about what is in the file, not about a lock, the disk or a right."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # Raised by the Python module itself: text that is not UTF-8, or a mistake of ours.
        return isinstance(error, sqlite3.OperationalError)
    return code in _YET_DAMAGE or code & 0xFF not in _NOT_DAMAGE


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    """`kind` is "deferred" for a consistent view, "immediate" for writing. A transaction within
    another one is a part of it.
    """
    if connection.in_transaction:
        yield
        return
    connection.execute(f"begin {kind}")
    try:
        yield
        connection.execute("commit")
    except BaseException:
        # The first error is the one to report; a connection that can't roll back refuses to
        # begin again, which counts as damage.
        with contextlib.suppress(sqlite3.Error):
            connection.rollback()
        raise


@contextlib.contextmanager
def writing(connection: sqlite3.Connection, tail: Tail) -> Iterator[None]:
    """A transaction of what is derived from the files.

    Raises:
        Unsettled: they are not what they will be; and this is not within `unwritten`.
    """
    kept = not connection.in_transaction
    with transaction(connection, "immediate"):
        # Asked under the write lock: a change that gets stuck later is marked later, too.
        if kept and not tail.settled():
            raise Unsettled("committed changes can't be published")
        yield


@contextlib.contextmanager
def unwritten(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction in memory, of which nothing is kept: it works on a full disk."""
    connection.execute("pragma cache_spill = off")
    try:
        connection.execute("begin immediate")
        try:
            yield
        finally:
            connection.rollback()
    finally:
        connection.execute("pragma cache_spill = on")


def insert(connection: sqlite3.Connection, table: str, rows: Iterable[tuple[object, ...]]) -> None:
    """Insert rows, many with one statement: that costs two thirds of as many statements."""
    found = iter(rows)
    first = next(found, None)
    if first is None:
        return
    found, rest = itertools.chain((first,), found), list[tuple[object, ...]]()

    def together() -> Iterator[tuple[object, ...]]:
        # Only a few of them exist at a time: they stay in a processor's cache.
        while len(some := list(itertools.islice(found, _ROWS))) == _ROWS:
            yield tuple(itertools.chain.from_iterable(some))
        rest.extend(some)

    row = f"({', '.join('?' * len(first))})"
    for at_once, values in ((_ROWS, together()), (1, rest)):
        statement = f"insert into {table} values {', '.join([row] * at_once)}"  # noqa: S608 - a table of ours
        connection.executemany(statement, values)


class Database:
    """One file, or ":memory:", and at most one connection to it.

    `fill` is called within the transaction that creates the schema. `remove` deletes a file.
    """

    def __init__(
        self,
        path: Path | str,
        remove: Callable[[Path], None],
        block: int,
        fill: Callable[[sqlite3.Connection], None],
    ) -> None:
        self._path = None if str(path) == MEMORY else Path(path)
        self._remove = remove
        self._block = block
        self._fill = fill
        self._connection: sqlite3.Connection | None = None
        self._identity: _Identity | None = None

    @property
    def current(self) -> sqlite3.Connection | None:
        """The open connection, if it is to the file that has the path now."""
        if self._connection is None or self._identity == self._stat():
            return self._connection
        _LOG.warning("The index %s was deleted or replaced; building it from the log.", self._path)
        self.close()
        return None

    def open(self) -> sqlite3.Connection:
        """A connection to a database of this schema, created if there is none.

        Raises:
            Damaged, sqlite3.DatabaseError: call `discard` if it is damage, and open again.
        """
        self.close()
        with self._alone():
            connection = self._connection = self._connect()
            self._configure(connection)
        # A value that was misspelt there would not be found, and nothing else would tell.
        for table in ("term", "secret"):
            (found,) = connection.execute(f"pragma integrity_check({table})").fetchone()
            if found != "ok":
                raise Damaged(found)
        return connection

    def discard(self, reason: str) -> None:
        """Delete the file, unless another process did so already."""
        with self._alone():
            mine = self._identity is not None and self._identity == self._stat()
            if self._path is not None and mine:
                _LOG.warning("The index %s is damaged (%s); rebuilding it.", self._path, reason)
                # The database first: a leftover log of it is removed by whoever opens next,
                # while a database without its log would pass for whole.
                self._remove(self._path)
                self._remove_companions()
            # Open until here, so that its inode number can't have gone to the next file.
            self.close()

    def close(self) -> None:
        connection, self._connection, self._identity = self._connection, None, None
        if connection is not None:
            # Closing a damaged database may fail at its last checkpoint; it is closed then, too.
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        if self._path is None:
            return self._connection_to(MEMORY)
        if self._stat() is None:
            self._remove_companions()
        while True:
            before = self._stat()
            connection = self._connection_to(str(self._path))
            if before is not None and before == self._stat():
                self._identity = before
                return connection
            # Created just now, or deleted meanwhile: which file it is shows the next round.
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self._path, 0o600)
            connection.close()

    def _connection_to(self, target: str) -> sqlite3.Connection:
        return sqlite3.connect(target, timeout=10, isolation_level=None, cached_statements=64)

    def _configure(self, connection: sqlite3.Connection) -> None:
        connection.execute("pragma page_size = 8192")
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        connection.execute("pragma cache_size = -8192")
        connection.execute("pragma journal_size_limit = 16777216")
        if self._is_empty(connection):
            self._create(connection)
        (version,) = connection.execute("pragma user_version").fetchone()
        if version != VERSION:
            raise Damaged(f"schema version {version}, not {VERSION}")
        row = connection.execute("select block from state where id = 1").fetchone()
        if row != (self._block,):
            raise Damaged("its state is missing or for another block size")

    def _is_empty(self, connection: sqlite3.Connection) -> bool:
        found = connection.execute("select 1 from sqlite_schema limit 1").fetchone()
        return found is None

    def _create(self, connection: sqlite3.Connection) -> None:
        with transaction(connection, "immediate"):
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(
                "insert into state values (1, 0, 0, 0, 0, ?, 0, 0, '')", (self._block,)
            )
            self._fill(connection)
            connection.execute(f"pragma user_version = {VERSION}")

    def _stat(self) -> _Identity | None:
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _remove_companions(self) -> None:
        for suffix in ("-wal", "-shm"):
            companion = Path(f"{self._path}{suffix}")
            if companion.exists():
                self._remove(companion)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from opening or deleting meanwhile."""
        if self._path is None:
            yield
            return
        # Locked is the directory: closing a descriptor of the database itself would drop the
        # locks that SQLite holds on it in this process.
        descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        forking.close_in_children(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            forking.close(descriptor)
