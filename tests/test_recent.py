"""The newest events against the rows that they are read from."""

import sqlite3
from collections.abc import Iterator

import pytest

from flowmason_secrets.index import recent
from flowmason_secrets.index.database import Damaged, insert
from flowmason_secrets.index.plan import Plan
from flowmason_secrets.index.recent import Recent

BLOCK = 16
SCHEMA = (
    'create table event (seq integer primary key, segment, "offset", time, org, type, action,'
    " outcome, name, actor)"
)


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute(SCHEMA)
    yield connection
    connection.close()


def add(database: sqlite3.Connection, first: int, stop: int, actor: int = 6) -> None:
    rows = ((seq, 7, 100 * seq, seq, 1, 2, 3, 4, 5, actor) for seq in range(first, stop))
    insert(database, "event", rows)


def found(kept: Recent, high: int, actor: int = 6, ascending: bool = True) -> list[int]:
    plan = Plan(
        *(1, 2, 3, 4, None, 5, actor, None, ""),
        since=0,
        until=10**6,
        low=0,
        high=high,
        ascending=ascending,
    )
    return list(kept.matching(plan, high))


def test_what_is_sealed_is_forgotten(database: sqlite3.Connection) -> None:
    add(database, 0, 100)
    kept = Recent(BLOCK)
    for sealed, position in ((0, 10), (0, 20), (16, 40), (32, 33), (32, 60), (96, 100)):
        kept.read(database, sealed, position)
        assert kept.first == sealed
        assert found(kept, position) == list(range(sealed, position))
        assert found(kept, position, ascending=False) == list(range(sealed, position))[::-1]
        assert kept.place(sealed) == (7, 100 * sealed)
        assert kept.place(sealed - 1) is kept.place(kept.end) is None


def test_only_what_is_new_is_read(database: sqlite3.Connection) -> None:
    add(database, 0, 30)
    kept = Recent(BLOCK)
    kept.read(database, 0, 20)
    database.execute("update event set actor = 9")
    kept.read(database, 16, 30)
    assert found(kept, 30) == list(range(16, 20))
    assert found(kept, 30, actor=9) == list(range(20, 30))


def test_what_did_not_commit_is_void(database: sqlite3.Connection) -> None:
    kept = Recent(BLOCK)
    add(database, 0, 10)
    kept.read(database, 0, 10)
    database.execute("begin")
    add(database, 10, 20)
    kept.read(database, 0, 20)
    assert found(kept, 20) == list(range(20))
    database.execute("rollback")
    kept.forget()
    add(database, 10, 20, actor=9)
    kept.read(database, 0, 20)
    assert found(kept, 20) == list(range(10))
    assert found(kept, 20, actor=9) == list(range(10, 20))


def test_a_log_whose_beginning_was_archived(database: sqlite3.Connection) -> None:
    add(database, 37, 60)
    kept = Recent(BLOCK)
    kept.read(database, 32, 40)
    assert (kept.first, kept.end) == (37, 40)
    kept.read(database, 32, 60)
    assert found(kept, 60) == list(range(37, 60))
    kept.read(database, 48, 60)
    assert found(kept, 60) == list(range(48, 60))


def test_no_more_than_two_blocks(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not all of them for one query."""
    monkeypatch.setattr(recent, "_AT_ONCE", 20)
    add(database, 0, 100)
    kept = Recent(BLOCK)
    for end in (20, 32, 32):
        kept.read(database, 0, 100)
        assert kept.end == end
    kept.read(database, 16, 100)
    assert found(kept, 100) == list(range(16, 48))


@pytest.mark.parametrize(
    "harm",
    [
        "delete from event where seq = 5",
        "delete from event where seq = 10",
        "update event set actor = 'x' where seq = 12",
        "update event set name = null where seq = 12",
        "update event set org = -1 where seq = 12",
        "update event set time = 1 << 40, type = 1 << 40 where seq = 12",
        "update event set segment = 1.5 where seq = 12",
    ],
)
def test_rows_that_no_index_has(database: sqlite3.Connection, harm: str) -> None:
    add(database, 0, 20)
    kept = Recent(BLOCK)
    if "= 5" not in harm:
        kept.read(database, 0, 10)
    database.execute(harm)
    for _ in range(2):
        with pytest.raises(Damaged):
            kept.read(database, 0, 20)
