"""The index against a plain scan of the lines: same answers, whatever happens to its file."""

import asyncio
import contextlib
import logging
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmason_secrets.core import times
from flowmason_secrets.core.access import Principal
from flowmason_secrets.core.errors import IndexUnavailable, LogDamaged
from flowmason_secrets.core.events import Line
from flowmason_secrets.core.minimum import Minimum
from flowmason_secrets.core.names import org_hash, secret_hash, secret_id
from flowmason_secrets.core.ports import AuditQuery, Chunk, Index, ListQuery, Tail
from flowmason_secrets.core.records import Metadata
from flowmason_secrets.index import (
    candidates,
    events,
    listing,
    pieces,
    recent,
    sealing,
    shelf,
    sqlite,
)
from flowmason_secrets.index.database import Database
from flowmason_secrets.index.progress import Progress
from flowmason_secrets.index.sqlite import SqliteIndex

ORGS = ("acme", "globex")
NAMES = ("a", "b[1]", "b%1", "b_1", "bx1", "b]1", "é", "\U0001f511", "z" * 256, "b*", "a?")
ACTORS = ("key_1", "key_2", "local")
PATTERNS = ("a", "b*", "b[1]", "b%1", "b_?", "?", "*1", "b]*", "nothing", "*")
CATEGORIES = ("token", "other")
NOW = 1_700_000_000.0


class FakeLog:
    """A log and the metadata of its secrets, in memory. Lines are in segments of seven."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.secrets: dict[tuple[str, str], Metadata] = {}
        self.reads = 0
        self.archived = 0
        self.is_settled = True
        self.claimed = False

    def position(self) -> int:
        return len(self.lines)

    def append(
        self,
        action: str = "secret.read",
        outcome: str = "success",
        org: str | None = "acme",
        name: str | None = "a",
        actor: str | None = "key_1",
        time: float | None = None,
        resource_id: str | None = None,
        details: dict[str, object] | None = None,
    ) -> None:
        seq = len(self.lines)
        full = None if org is None or name is None else secret_id(org, name)
        line = {
            "v": 1,
            "id": f"id-{seq}-{random.random()}",
            "seq": seq,
            "time": times.render(NOW + seq if time is None else time),
            "action": action,
            "outcome": outcome,
            "org_id": org,
            "resource_type": action.split(".")[0],
            "resource_id": resource_id or full,
            "name": None if name is None else name[:256],
            "version": None,
            "actor": actor,
            "actor_type": "api_key",
            "client_ip": None,
            "user_agent": None,
            "request_id": None,
            "status": 200,
            "details": details or {},
        }
        self.lines.append(orjson.dumps(line))

    def put(self, name: str, org: str = "acme", **fields: object) -> Metadata:
        metadata = self.store(name, org, **fields)
        self.append("secret.create", org=org, name=name)
        return metadata

    def store(self, name: str, org: str = "acme", **fields: object) -> Metadata:
        stamp = times.render(NOW)
        made = Metadata(
            secret_id(org, name), name, "", "other", stamp, stamp, None, None, 1, "", "k", None
        )
        made = replace(made, **fields)  # type: ignore[arg-type]
        self.secrets[org_hash(org), secret_hash(name)] = made
        return made

    def drop(self, name: str, org: str = "acme") -> None:
        self.secrets.pop((org_hash(org), secret_hash(name)), None)
        self.append("secret.delete", org=org, name=name)

    def rotate(self, key_id: str, names: Sequence[str], org: str = "acme") -> None:
        """A batch of re-encryption."""
        for name in names:
            place = org_hash(org), secret_hash(name)
            self.secrets[place] = replace(self.secrets[place], key_id=key_id)
        ids = [secret_id(org, name) for name in names]
        details = {"kind": "batch", "count": len(ids), "from": ["k"], "to": key_id, "secrets": ids}
        self.append("key.rotate", org=org, name=None, resource_id=key_id, details=details)

    def decoded(self) -> list[Line]:
        return [orjson.loads(line) for line in self.lines]

    def claim(self) -> Callable[[], None] | None:
        """Once until it is released, like a lock on the log."""
        if self.claimed:
            return None
        self.claimed = True
        return lambda: setattr(self, "claimed", False)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        first = max(start, self.archived)
        stop = min(stop, len(self.lines))
        while first < stop:
            segment = first - first % 7
            end = min(segment + 7, stop, first + 3)
            before = self.lines[segment:first]
            data = b"".join(line + b"\n" for line in self.lines[first:end])
            yield Chunk(first, segment, sum(len(line) + 1 for line in before), data)
            first = end

    def minimum(self) -> Minimum:
        return Minimum(self.archived)

    def lines_at(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._line(segment, offset) for segment, offset in places]

    def _line(self, segment: int, offset: int) -> bytes:
        if segment < self.archived or segment >= len(self.lines):
            raise FileNotFoundError(segment)
        self.reads += 1
        data = b"".join(line + b"\n" for line in self.lines[segment : segment + 7])
        return data[offset:].split(b"\n")[0]

    def organisations(self) -> list[str]:
        return sorted({org for org, _ in self.secrets})

    def stems(self, org_hash: str) -> list[str]:
        return [stem for org, stem in self.secrets if org == org_hash]

    def metadata(self, org_hash: str, stem: str) -> Metadata | None:
        return self.secrets.get((org_hash, stem))

    def settled(self) -> bool:
        return self.is_settled


def _may_name(allow: tuple[str, ...], name: str | None) -> bool:
    principal = Principal("", "", "", frozenset(), allow=allow)
    return not allow or (name is not None and principal.may_name(name))


def scan(log: FakeLog, q: AuditQuery, position: int) -> list[Line]:
    """What an audit query means."""
    found = [
        line
        for line in log.decoded()[:position]
        if line["seq"] >= log.archived
        and q.org_id in (None, line["org_id"])
        and q.resource_type in (None, line["resource_type"])
        and q.action in (None, line["action"])
        and q.name in (None, line["name"])
        and q.actor in (None, line["actor"])
        and q.success in (None, line["outcome"] == "success")
        and (q.since is None or times.parse(line["time"], "") >= q.since)
        and (q.until is None or times.parse(line["time"], "") < q.until)
        and (q.before is None or line["seq"] < q.before)
        and (q.after is None or line["seq"] > q.after)
        and (not q.allow or line["resource_type"] == "secret")
        and _may_name(q.allow, line["name"])
    ]
    return found[:: 1 if q.after is not None else -1][q.offset : q.offset + q.limit]


async def lines(index: Index, query: AuditQuery, position: int) -> list[Line]:
    """What the index answers."""
    return [entry.line for entry in await index.audit(query, position)]


def scan_secrets(log: FakeLog, q: ListQuery) -> list[Metadata]:
    """What a listing means."""
    found = [
        metadata
        for (org, _), metadata in log.secrets.items()
        if org == org_hash(q.org_id)
        and q.category in (None, metadata.category)
        and metadata.name.startswith(q.prefix or "")
        and (q.expired is None or metadata.is_expired(q.now) == q.expired)
        and (q.after is None or metadata.name > q.after)
        and _may_name(q.allow, metadata.name)
    ]
    return sorted(found, key=lambda metadata: metadata.name)[: q.limit]


def build(log: Tail, position: FakeLog, path: Path | str, block: int = 16) -> SqliteIndex:
    return SqliteIndex(log, path, position.position, Path.unlink, block)


def make(log: FakeLog, path: Path | str = ":memory:", block: int = 16) -> SqliteIndex:
    return build(log, log, path, block)


def mixed(seed: int, size: int) -> FakeLog:
    """A log of all kinds of events, their times not in order, and what they left behind."""
    chance, log = random.Random(seed), FakeLog()
    log.store("z" * 300)
    for _ in range(size):
        org, name = chance.choice(ORGS), chance.choice(NAMES)
        more = chance.random()
        if more < 0.2:
            expiry = chance.choice((None, NOW, NOW + 1))
            log.put(name, org, category=chance.choice(CATEGORIES), expiry=expiry)
        elif more < 0.3:
            log.drop(name, org)
        elif more < 0.4:
            log.append("auth.failed", "denied", chance.choice((None, org)), None, None)
        elif more < 0.5:
            log.append("api_key.create", org=org, name=name)
        else:
            outcome = chance.choice(("success", "denied", "not_found"))
            time = NOW + chance.choice((0, 0.000001, 1, 50)) + len(log.lines) // 5
            log.append("secret.read", outcome, org, name, chance.choice(ACTORS), time)
    return log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite3"


@pytest.fixture
async def opened(path: Path) -> AsyncIterator[tuple[FakeLog, SqliteIndex, Path]]:
    log = mixed(1, 300)
    index = make(log, path)
    yield log, index, path
    await index.close()


async def check(log: FakeLog, index: Index) -> None:
    """A table of queries, all answered like by a scan."""
    end = log.position()
    for query in (
        AuditQuery(None),
        AuditQuery("acme", limit=7, offset=40),
        AuditQuery("globex", name="b%1"),
        AuditQuery("acme", action="secret.read", success=False, actor="key_2"),
        AuditQuery("acme", after=20, limit=90),
        AuditQuery("acme", allow=("b[1]", "a"), limit=1000),
        AuditQuery(None, since=NOW + 10, until=NOW + 30, limit=1000),
        AuditQuery("nobody"),
    ):
        assert await lines(index, query, end) == scan(log, query, end)
    for org in ORGS:
        for listed in (ListQuery(org, NOW), ListQuery(org, NOW, category="token", limit=2)):
            assert await index.listing(listed, end) == scan_secrets(log, listed)
    await check_counts(log, index)


def optional(values: tuple[str, ...]) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from((*values, "unknown", "\ud800"))


allows = st.just(()) | st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3).map(tuple)
moments = st.none() | st.sampled_from((NOW, NOW + 1e-6, NOW + 10, NOW + 12.5, float("inf"), -1e300))
audits = st.builds(
    AuditQuery,
    org_id=optional(ORGS),
    resource_type=optional(("secret", "auth")),
    action=optional(("secret.read", "secret.create", "auth.failed")),
    name=optional(NAMES),
    actor=optional(ACTORS),
    success=st.none() | st.booleans(),
    since=moments,
    until=moments,
    before=st.none() | st.integers(-1, 220) | st.integers(-1, 1200) | st.just(10**30),
    limit=st.sampled_from((0, 1, 3, 1000)),
    offset=st.sampled_from((0, 0, 1, 17, 60)),
    allow=allows,
    after=st.none() | st.integers(-1, 220) | st.integers(-1, 1200) | st.just(10**30),
)
listings = st.builds(
    ListQuery,
    org_id=st.sampled_from(("acme", "globex", "unknown")),
    now=st.sampled_from((NOW - 1, NOW, NOW + 0.5)),
    category=optional(CATEGORIES),
    prefix=optional(("", "b", "B", "b%", "b_", "z" * 256, "é")),
    expired=st.none() | st.booleans(),
    after=optional(("", *NAMES)),
    limit=st.sampled_from((0, 1, 2, 1000)),
    allow=allows,
)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(
    st.integers(0, 1000),
    st.integers(0, 300) | st.integers(600, 1200),
    st.lists(audits, min_size=10, max_size=30),
    # Of 32, groups are merged, and some terms have so few events that they are places.
    st.sampled_from((8, 16, 32, 64, 2048)),
    # The events of a piece, of how many candidates each has its row looked up, and how many
    # postings cost as much as a row: of none, names are found in rows only.
    st.sampled_from(((3, 0, 2), (3, 2, 0), (1024, 2, 2), (1024, 32, 0), (1024, 32, 9))),
    # Of the newest events, how many are read and looked at together, and of how many blocks.
    st.sampled_from(((2048, 1024, 2), (3, 5, 2), (20, 3, 1))),
    st.data(),
)
@quick
def test_an_audit_query_is_a_scan_of_the_lines(
    seed: int,
    size: int,
    queries: list[AuditQuery],
    block: int,
    lookup: tuple[int, int, int],
    newest: tuple[int, int, int],
    data: st.DataObject,
) -> None:
    log, (piece, few, rows) = mixed(seed, size), lookup

    async def run() -> None:
        index = make(log, block=block)
        for query in queries:
            position = data.draw(st.integers(0, log.position()))
            found = await lines(index, query, position)
            assert found == scan(log, query, position)
        await index.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        # A rebuilt one has the right answer, whatever the first one said.
        patch.setattr(Database, "discard", Mock(side_effect=AssertionError))
        for name, value in zip(("_AT_ONCE", "_TOGETHER", "_BLOCKS"), newest, strict=True):
            patch.setattr(recent, name, value)
        patch.setattr(candidates, "_FEW", few)
        # Hardly any postings are kept, if few rows are.
        patch.setattr(shelf, "_ROOM", 100 * newest[0])
        patch.setattr(candidates, "_ROWS", rows)
        patch.setattr(sealing, "_TERMS", 5)
        asyncio.run(run())


@given(st.integers(0, 1000), st.integers(0, 60), st.lists(listings, min_size=5, max_size=20))
@quick
def test_a_listing_is_a_scan_of_the_metadata(
    seed: int, size: int, queries: list[ListQuery]
) -> None:
    log = mixed(seed, size)

    async def run() -> None:
        index = make(log)
        for i, query in enumerate(queries):
            found = await index.listing(query, log.position())
            assert found == scan_secrets(log, query)
            (log.drop if i % 3 else log.put)(NAMES[i % len(NAMES)])
        await index.close()

    asyncio.run(run())


async def test_allow_patterns_are_literal_but_for_star_and_question_mark() -> None:
    log = FakeLog()
    for name in NAMES:
        log.put(name)
    index = make(log)
    for pattern, names in {
        "b[1]": {"b[1]"},
        "b%1": {"b%1"},
        "b_1": {"b_1"},
        "b]1": {"b]1"},
        "b?1": {"b%1", "b_1", "bx1", "b]1"},
        "%": set(),
        "[a-z]": set(),
    }.items():
        found = await lines(index, AuditQuery("acme", allow=(pattern,)), log.position())
        assert {line["name"] for line in found} == names
        listed = await index.listing(ListQuery("acme", NOW, allow=(pattern,)), log.position())
        assert {metadata.name for metadata in listed} == names
    await index.close()


async def test_a_long_listing_is_read_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_SCAN", 3)
    monkeypatch.setattr(sqlite, "_SECRETS", 2)
    log = mixed(3, 120)
    index = make(log)
    await check(log, index)
    query = ListQuery("acme", NOW, allow=("é", "\U0001f511"))
    assert await index.listing(query, log.position()) == scan_secrets(log, query)
    await index.close()


async def test_only_what_was_asked_for_is_read_from_the_log() -> None:
    log = mixed(1, 300)
    index = make(log)
    await lines(index, AuditQuery("acme", limit=5), 300)
    log.reads = 0
    await lines(index, AuditQuery("acme", limit=5), 300)
    assert log.reads == 5
    await index.close()


async def test_more_lines_appear(opened: tuple[FakeLog, SqliteIndex, Path]) -> None:
    log, index, _ = opened
    for i in range(60):
        log.put(f"new-{i}", category="token")
        if i % 7 == 0:
            await check(log, index)
    log.drop("new-1")
    await check(log, index)


async def test_a_truncated_name_finds_its_secret() -> None:
    log, long = FakeLog(), "n" * 300
    log.store(long)
    log.append()
    index, everything = make(log), ListQuery("acme", NOW)
    assert await index.listing(everything, log.position()) == [log.store(long)]
    changed = log.put(long, description="new")
    assert await index.listing(everything, log.position()) == [changed]
    # One that the index never saw: nothing of the event leads to its file.
    unseen = log.put("m" * 300)
    assert await index.listing(everything, log.position()) == [unseen, changed]
    log.drop(long)
    assert await index.listing(everything, log.position()) == [unseen]
    await index.close()


async def test_secrets_of_before_are_listed_without_events(path: Path) -> None:
    log = FakeLog()
    log.store("old")
    index = make(log, path)
    assert [m.name for m in await index.listing(ListQuery("acme", NOW), 0)] == ["old"]
    await index.close()


async def test_the_file_is_private(opened: tuple[FakeLog, SqliteIndex, Path]) -> None:
    log, index, path = opened
    await check(log, index)
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file


async def test_it_goes_on_where_it_was(path: Path) -> None:
    log = mixed(1, 100)
    for _ in range(3):
        index = make(log, path)
        await check(log, index)
        await index.close()
        with sqlite3.connect(path) as database:
            assert database.execute("select position from state").fetchone() == (log.position(),)
        log.put("more")


async def check_counts(log: FakeLog, index: Index) -> None:
    counts = Counter(metadata.key_id for metadata in log.secrets.values())
    assert await index.key_counts(log.position()) == counts


@given(st.integers(0, 1000), st.lists(st.integers(0, 1000), max_size=12))
@quick
def test_secrets_are_counted_per_master_key(seed: int, steps: list[int]) -> None:
    log = mixed(seed, 40)

    async def run() -> None:
        index = make(log)
        for step in steps:
            org = ORGS[step % 2]
            held = [m.name for (o, _), m in log.secrets.items() if o == org_hash(org)]
            if step % 3:
                log.rotate(f"key{step % 5}", held[step % 7 :][:3], org)
            else:
                (log.drop if step % 4 else log.put)(NAMES[step % len(NAMES)], org)
            if step % 5:
                await check_counts(log, index)
        await check_counts(log, index)
        await index.close()

    asyncio.run(run())


async def test_a_rotated_secret_of_an_id_of_its_own_is_counted(path: Path) -> None:
    log = FakeLog()
    log.store("odd", id="another")
    log.put("usual")
    index = make(log, path)
    await check_counts(log, index)
    log.append("key.rotate", name=None, resource_id="n", details={"kind": "begin"})
    log.rotate("n", ["odd"])
    await check_counts(log, index)
    await index.close()


def delete(path: Path) -> None:
    path.unlink()


def delete_all(path: Path) -> None:
    for file in path.parent.iterdir():
        file.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(5).randbytes(50_000))


def holes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for start in range(100, len(data), 8192):
        data[start : start + 4000] = random.Random(start).randbytes(len(data[start : start + 4000]))
    path.write_bytes(bytes(data))


def other_schema(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("pragma user_version = 77")
    database.close()


def _sql(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


def too_far(path: Path) -> None:
    _sql(path, "update state set position = position + 10, sealed = sealed + 16")


def not_a_number(path: Path) -> None:
    _sql(path, "update state set sealed = 'x'")


def no_state(path: Path) -> None:
    _sql(path, "delete from state")


def no_table(path: Path) -> None:
    _sql(path, "drop table posting")


def other_log(path: Path) -> None:
    _sql(path, "update state set event = 'another'")


def wrong_postings(path: Path) -> None:
    _sql(path, "update posting set bits = (select bits from posting order by id limit 1)")


def wrong_merged(path: Path) -> None:
    _sql(path, "update merged set parts = (select parts from merged where id = 1)")


def no_times(path: Path) -> None:
    _sql(path, "delete from piece")


def wrong_times(path: Path) -> None:
    _sql(path, "update piece set spans = (select spans from piece where number = 0)")


def wrong_rows(path: Path) -> None:
    _sql(path, 'update event set "offset" = "offset" + 1')


def no_row(path: Path) -> None:
    """Of an event with postings."""
    _sql(path, "delete from event where seq = 250")


def no_newest_row(path: Path) -> None:
    _sql(path, "delete from event where seq = (select position - 3 from state)")


def newest_rows_of_text(path: Path) -> None:
    _sql(path, "update event set actor = 'x' where seq >= (select sealed from state)")


def misspelt(path: Path) -> None:
    """Another name, but only in one of the two places that have it."""
    data = path.read_bytes()
    assert data.count(b"b%1") > 1
    path.write_bytes(data.replace(b"b%1", b"b#1", 1))


def wrong_secrets(path: Path) -> None:
    _sql(path, "update secret set category = 'token'")


AT_REST = (
    *(delete, delete_all, empty, shorten, garbage, holes, other_schema, too_far, not_a_number),
    *(no_state, no_table, other_log, wrong_postings, wrong_merged, wrong_rows, misspelt),
    *(no_times, wrong_times, wrong_secrets),
    *(no_row, no_newest_row, newest_rows_of_text),
)
# Those others are found when a file is opened.
WHILE_OPEN = tuple(harm for harm in AT_REST if harm not in (other_schema, other_log, misspelt))


@pytest.mark.parametrize("harm", AT_REST)
async def test_damaged_at_rest(path: Path, harm, caplog) -> None:  # type: ignore[no-untyped-def]
    log = mixed(1, 300)
    index = make(log, path)
    await check(log, index)
    await index.close()
    harm(path)
    index = make(log, path)
    await check(log, index)
    await index.close()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (0 if harm in (delete, delete_all, empty) else 1)


@pytest.mark.parametrize(
    ("column", "value", "query"),
    [
        ("org", "acme", AuditQuery("acme", limit=1000)),
        ("name", "b_1", AuditQuery("acme", name="b_1", limit=1000)),
        ("name", "b_1", AuditQuery(None, allow=("b_1",), limit=1000)),
        ("actor", "key_1", AuditQuery(None, actor="key_1", limit=1000)),
        ("action", "secret.read", AuditQuery(None, action="secret.read", limit=1000)),
        ("type", "secret", AuditQuery(None, resource_type="secret", limit=1000)),
        ("type", "secret", AuditQuery(None, allow=("*",), limit=1000)),
        ("outcome", "success", AuditQuery(None, success=True, limit=1000)),
        ("outcome", "denied", AuditQuery(None, success=False, limit=1000)),
    ],
)
async def test_nothing_that_was_not_asked_for(
    path: Path, caplog: pytest.LogCaptureFixture, column: str, value: str, query: AuditQuery
) -> None:
    """Though the newest rows say that they are all of a kind."""
    log = mixed(1, 300)
    for number in range(40):
        action, outcome = ("secret.read", "api_key.create"), ("success", "success", "denied")
        log.append(
            action[number % 2],
            outcome[number % 3],
            ORGS[number // 2 % 2],
            NAMES[number % 5],
            "key_2",
        )
    index = make(log, path)
    await check(log, index)
    await index.close()
    term = f"(select id from term where value = cast('{value}' as blob) order by scope limit 1)"
    _sql(path, f"update event set {column} = {term} where seq >= (select sealed from state)")
    index = make(log, path)
    assert await lines(index, query, log.position()) == scan(log, query, log.position())
    await index.close()
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("harm", WHILE_OPEN)
async def test_damaged_while_open(  # type: ignore[no-untyped-def]
    opened: tuple[FakeLog, SqliteIndex, Path], harm, caplog
) -> None:
    log, index, path = opened
    await check(log, index)
    # Another connection empties the write-ahead log, so that the harm is done to what is read.
    _sql(path, "pragma wal_checkpoint(truncate)")
    harm(path)
    await check(log, index)
    log.put("more")
    await check(log, index)
    assert path.exists()
    assert {record.levelno for record in caplog.records} <= {logging.WARNING}


async def test_a_group_is_merged_at_once_or_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "_TERMS", 5)
    log, steps = mixed(2, 320), tmp_path / "steps"
    # Two groups of blocks, and a part of one.
    end = log.position()
    assert 34 < end // 8 < 48
    index = make(log, steps, block=8)
    for position in range(0, end, 5):
        await lines(index, AuditQuery(None, limit=1), position)
    await check(log, index)
    await index.close()
    at_once = tmp_path / "at once"
    index = make(log, at_once, block=8)
    await check(log, index)
    await index.close()

    def blocks(path: Path, table: str) -> set[int]:
        database = sqlite3.connect(path)
        found = database.execute(f"select distinct id >> 32 from {table}").fetchall()
        database.close()
        return {number for (number,) in found}

    assert blocks(steps, "merged") == blocks(at_once, "merged") == {0, 1}
    assert blocks(steps, "posting") >= set(range(34))
    assert not blocks(at_once, "posting") & set(range(32))


async def test_two_that_rebuild_one_index(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, query = mixed(3, 400), AuditQuery("acme", action="secret.read")
    both = make(log, path, block=8), make(log, path, block=8)
    # What one has gathered by then, the other seals.
    for position in range(24, log.position(), 24):
        for index in both if position % 48 else reversed(both):
            assert await lines(index, query, position) == scan(log, query, position)
    for index in both:
        await check(log, index)
        await index.close()
    assert not caplog.records


@pytest.mark.parametrize("allow", [(), ("b?1",)])
async def test_times_at_the_edges_of_pieces(
    monkeypatch: pytest.MonkeyPatch, allow: tuple[str, ...]
) -> None:
    """Names are looked up in the rows, and nothing that was wrong is made right by a rebuild."""
    monkeypatch.setattr(pieces, "PIECE", 3)
    monkeypatch.setattr(candidates, "_ROWS", 0)
    monkeypatch.setattr(Database, "discard", Mock(side_effect=AssertionError))
    log = mixed(4, 200)
    index, end = make(log), log.position()
    for moment in sorted({times.parse(line["time"], "") for line in log.decoded()}):
        for query in (
            AuditQuery(None, since=moment, limit=1000, allow=allow),
            AuditQuery(None, until=moment, limit=1000, allow=allow),
            AuditQuery(None, until=moment, after=-1, limit=1000, allow=allow),
        ):
            assert await lines(index, query, end) == scan(log, query, end)
    await index.close()


async def test_a_log_that_became_shorter(opened: tuple[FakeLog, SqliteIndex, Path]) -> None:
    log, index, _ = opened
    await check(log, index)
    del log.lines[150:]
    await check(log, index)


async def test_an_index_ahead_of_this_process_is_kept(path: Path) -> None:
    log = mixed(1, 100)
    ahead, behind = make(log, path), SqliteIndex(log, path, lambda: 90, Path.unlink, 16)
    await check(log, ahead)
    inode = path.stat().st_ino
    query = AuditQuery(None, limit=1000)
    assert await lines(behind, query, 90) == scan(log, query, 90)
    assert path.stat().st_ino == inode
    await ahead.close()
    await behind.close()


async def test_a_segment_was_archived(opened: tuple[FakeLog, SqliteIndex, Path]) -> None:
    log, index, _ = opened
    await check(log, index)
    log.archived = 140
    everything = AuditQuery(None, limit=1000)
    assert await lines(index, everything, 300) == scan(log, everything, 300)
    assert await lines(index, everything._replace(success=False), 300) == scan(
        log, everything._replace(success=False), 300
    )
    # A page that ends where all that is older was archived since, with events of the same block.
    for before in (130, 139, 140, 141):
        for limit in (2, 1000):
            query = AuditQuery(None, before=before, limit=limit)
            assert await lines(index, query, 300) == scan(log, query, 300)


async def test_a_log_without_the_events_it_should_have() -> None:
    log = mixed(1, 20)
    index = make(log)
    with pytest.raises(LogDamaged, match="ends before"):
        await lines(index, AuditQuery(None), 21)
    log.lines[10] = log.lines[11]
    other = make(log)
    with pytest.raises(LogDamaged, match="Line 10"):
        await lines(other, AuditQuery(None), 20)
    log.lines[10] = b"{}"
    with pytest.raises(LogDamaged, match="event 9"):
        await lines(other, AuditQuery(None), 20)
    # As many lines as events, and each event is whole.
    moved = mixed(1, 20)
    moved.lines[10], moved.lines[11] = moved.lines[10] + moved.lines[11], b""
    third = make(moved)
    with pytest.raises(LogDamaged, match="event 9"):
        await lines(third, AuditQuery(None), 20)
    for one in (index, other, third):
        await one.close()


async def test_a_line_with_space_around_its_event_is_one() -> None:
    log = mixed(1, 20)
    log.lines[10] = b" " + log.lines[10] + b"\r"
    index = make(log)
    await check(log, index)
    await index.close()


async def test_two_on_one_file(path: Path) -> None:
    log = FakeLog()
    one, two = make(log, path), make(log, path)
    for seed in range(6):
        more = mixed(seed, 40)
        for line in more.decoded():
            log.append(line["action"], line["outcome"], line["org_id"], line["name"], line["actor"])
        log.secrets |= more.secrets
        for org, stem in more.secrets:
            name = more.secrets[org, stem].name
            log.append("secret.create", org=next(o for o in ORGS if org_hash(o) == org), name=name)
        await asyncio.gather(*(check(log, index) for index in (one, two) for _ in range(3)))
        if seed % 2:
            (delete if seed == 1 else garbage)(path)
    await one.close()
    await check(log, two)
    await two.close()


async def test_it_follows_in_the_background(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_PAUSE", 0.001)
    monkeypatch.setattr(sqlite, "_REST", 0)
    monkeypatch.setattr(sqlite, "_EVENTS", 32)
    log = mixed(1, 200)
    index = make(log, path)
    index.start()

    async def until_current() -> None:
        while True:
            with sqlite3.connect(path) as database:
                if database.execute("select * from sqlite_schema").fetchall():
                    (at,) = database.execute("select position from state").fetchone()
                    (todo,) = database.execute("select count(*) from todo").fetchone()
                    if (at, todo) == (log.position(), 0):
                        return
            database.close()
            await asyncio.sleep(0.005)

    await asyncio.wait_for(until_current(), 20)
    log.put("later")
    await asyncio.wait_for(until_current(), 20)
    await index.close()
    await index.close()


async def test_it_hurries_when_it_is_far_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_WORK", 1e-9)
    # After one step at its usual pace, it would rest for longer than this test takes.
    monkeypatch.setattr(sqlite, "_REST", 1_000_000)
    monkeypatch.setattr(sqlite, "_REST_IN_HURRY", 0)
    monkeypatch.setattr(sqlite, "_EVENTS", 8)
    log, block = mixed(1, 50), 16
    far = sqlite._TOO_FAR * block
    index = make(log, path, block)
    await check(log, index)
    for _ in range(far + 300):
        log.append("secret.read", org=ORGS[0], name="busy")
    index.start()

    async def until_near() -> int:
        while True:
            with contextlib.closing(sqlite3.connect(path)) as database:
                (at,) = database.execute("select position from state").fetchone()
            if log.position() - at <= far:
                return int(at)
            await asyncio.sleep(0.005)

    near = await asyncio.wait_for(until_near(), 20)
    assert near < log.position()
    await index.close()


class Reader:
    """A process's view of a log; counts how often it was read."""

    def __init__(self, log: FakeLog) -> None:
        self._log = log
        self.reads = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        self.reads += 1
        return self._log.chunks(start, stop)


async def test_one_at_a_time_follows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_PAUSE", 0.001)
    monkeypatch.setattr(sqlite, "_REST", 0)
    log = mixed(1, 100)
    readers = [Reader(log), Reader(log)]
    one, two = (build(reader, log, path) for reader in readers)  # type: ignore[arg-type]
    one.start()
    await indexed(path, log)
    two.start()
    for _ in range(20):
        log.put("more")
        await indexed(path, log)
    assert readers[0].reads > 1
    assert readers[1].reads == 0
    # It answers all the same, and takes over.
    await check(log, two)
    await one.close()
    log.put("more")
    await indexed(path, log)
    await two.close()
    assert not log.claimed


async def indexed(path: Path, log: FakeLog) -> None:
    """Return when everything is indexed, by whomever."""

    async def wait() -> None:
        while True:
            if path.exists():
                database = sqlite3.connect(path)
                with contextlib.suppress(sqlite3.OperationalError):
                    if database.execute("select position from state").fetchone() == (
                        len(log.lines),
                    ):
                        return
                database.close()
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), 20)


async def test_it_says_how_far_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = mixed(1, 1000)
    index, seen = make(log, path, 8), []
    query = asyncio.create_task(lines(index, AuditQuery(None, limit=1), log.position()))
    while not query.done():
        seen.append(index.building)
        await asyncio.sleep(0)
    told = [building for building in seen if building is not None]
    assert told
    assert {building.events for building in told} == {1000}
    assert [building.indexed for building in told] == sorted(building.indexed for building in told)
    assert index.building is None
    await index.close()


def test_the_programs_log_says_now_and_then_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    progress = Progress(100, lambda: now)
    for done in range(0, 1000, 10):
        progress.see(done, 1000)
        now += 0.5
    assert progress.building is None
    assert [record.message for record in caplog.records] == [
        f"The index is being built: {done} of 1,000 events." for done in (200, 400, 600, 800)
    ]
    progress.see(0, 1000)
    assert len(caplog.records) == 4


@pytest.mark.parametrize("gets_on", [True, False])
async def test_a_lock_that_is_never_free(
    path: Path, monkeypatch: pytest.MonkeyPatch, gets_on: bool
) -> None:
    """It is an error unless its holder does the work."""
    log = mixed(1, 100)
    index = make(log, path)
    await lines(index, AuditQuery(None), 10)
    extend = events.extend

    def locked(*arguments: Any) -> bool:
        if gets_on:
            extend(*arguments)
        holder = sqlite3.connect(path, isolation_level=None)
        contender = sqlite3.connect(path, isolation_level=None, timeout=0)
        holder.execute("begin immediate")
        try:
            contender.execute("begin immediate")
        finally:
            holder.close()
            contender.close()
        return True

    monkeypatch.setattr(events, "extend", locked)
    query = AuditQuery(None, limit=1000)
    if gets_on:
        assert await lines(index, query, 100) == scan(log, query, 100)
    else:
        with pytest.raises(IndexUnavailable, match="locked"):
            await lines(index, query, 100)
    await index.close()


async def test_errors_in_the_background_are_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite, "_AFTER_ERROR", 0.001)
    log, tried = mixed(1, 20), asyncio.Event()
    loop = asyncio.get_running_loop()
    calls = 0

    def chunks(start: int, stop: int) -> Iterator[Chunk]:
        nonlocal calls
        calls += 1
        if calls == 3:
            loop.call_soon_threadsafe(tried.set)
        raise OSError("the disk is gone")

    monkeypatch.setattr(log, "chunks", chunks)
    index = make(log)
    index.start()
    await asyncio.wait_for(tried.wait(), 20)
    await index.close()
    assert any("can't follow the log" in record.message for record in caplog.records)


async def test_a_busy_database_is_not_a_damaged_one(
    opened: tuple[FakeLog, SqliteIndex, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, index, path = opened

    def locked(*_: object) -> None:
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            connection.execute("begin immediate")
        finally:
            connection.close()

    await check(log, index)
    inode = path.stat().st_ino
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("begin immediate")
    monkeypatch.setattr(listing, "load", locked)
    with pytest.raises(IndexUnavailable, match="locked"):
        await index.listing(ListQuery("acme", NOW), log.position())
    holder.close()
    assert path.stat().st_ino == inode


async def test_a_closed_index_answers_nothing(path: Path) -> None:
    index = make(FakeLog(), path)
    await index.close()
    with pytest.raises(RuntimeError):
        await lines(index, AuditQuery(None), 0)
    assert not path.exists()


# --- what is not to be kept -----------------------------------------------------------------


async def test_what_waits_to_be_published_is_answered_and_not_kept(path: Path) -> None:
    log = mixed(4, 300)
    index = make(log, path)
    await check(log, index)
    log.is_settled = False
    for _ in range(2):
        # More than a listing loads at once, and more events than are in a block.
        for number in range(300):
            log.put(f"waiting {number}", version=log.position())
        await check(log, index)
    # What the files say when they can be written again is newer than the events known here.
    for number in range(300):
        log.store(f"waiting {number}", version=9999)
    log.is_settled = True
    await check(log, index)
    await index.close()


async def test_no_index_begins_with_what_waits_to_be_published(path: Path) -> None:
    log = mixed(5, 50)
    log.is_settled = False
    index = make(log, path)
    with pytest.raises(IndexUnavailable, match="published"):
        await index.listing(ListQuery("acme", NOW), log.position())
    log.is_settled = True
    await check(log, index)
    await index.close()
