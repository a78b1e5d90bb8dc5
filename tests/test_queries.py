"""Audit queries over HTTP against a plain scan of the lines of the segment files."""

import asyncio
import json
import random
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmason_secrets.api import trail
from flowmason_secrets.app import local_caller
from flowmason_secrets.core import times
from flowmason_secrets.core.drafts import KeyDraft
from flowmason_secrets.core.events import Event
from flowmason_secrets.core.names import secret_id
from flowmason_secrets.core.ports import Sources
from flowmason_secrets.storage import wire
from flowmason_secrets.storage.cache import CiphertextCache
from flowmason_secrets.storage.chunks import segment_name
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.engine import Environment
from flowmason_secrets.storage.eventlog import HEADER_BYTES, SegmentLimits
from flowmason_secrets.storage.files import FilesTail
from flowmason_secrets.storage.published import Layout, Published

from .conftest import MEMORY, Client
from .harness.operations import open_on
from .harness.server import Inside
from .harness.truth import key_file

AUDIT = "/api/v1/auth/audit-log"
ORGS = ("acme", "globex", None)
NAMES = ("A", "A_1", "B*", "é", "\U0001f511", "x" * 256, None)
ACTORS = ("key_1", "key_2", "root", None)
KINDS = (
    *[("secret.read", "success", "secret")] * 4,
    ("secret.read", "denied", "secret"),
    ("secret.read", "not_found", "secret"),
    ("secret.create", "success", "secret"),
    ("api_key.create", "success", "api_key"),
    ("auth.failed", "denied", "api_key"),
    ("key.rotate", "success", "master_key"),
)
BEGIN = datetime(2025, 12, 31, 22, tzinfo=UTC).timestamp()
STEPS = (0.0, 0.0, 0.000001, 1.0, 700.0, 40_000.0)

Line = dict[str, Any]


class Log(NamedTuple):
    """How to make up a log: so many events, with segments of about so many lines."""

    seed: int
    events: int
    segment: int


def write(events: Path, log: Log) -> None:
    """Write the segments, some of them with a torn tail; times never decrease."""
    chance, now, seq = random.Random(log.seed), BEGIN, 0
    events.mkdir(parents=True, mode=0o700)
    while seq < log.events:
        first, lines = seq, []
        header = Event(f"segment-{log.seed}-{seq}", "log.segment", "success", None, "log", None)
        header = header._replace(details={"previous_checkpoint": None})
        lines.append(wire.encode_header(header, seq, times.render(now), HEADER_BYTES))
        for seq in range(first + 1, first + chance.randint(2, 2 * log.segment)):
            now += chance.choice(STEPS)
            lines.append(wire.encode_lines([made_up(chance, seq)], seq, times.render(now)))
        seq += 1
        torn = chance.choice((b"", b"", b'{"v":1,"id":"to', b"\0\0\0"))
        (events / segment_name(first)).write_bytes(b"".join(lines) + torn)


def made_up(chance: random.Random, seq: int) -> Event:
    action, outcome, resource = chance.choice(KINDS)
    org, name = chance.choice(ORGS), chance.choice(NAMES)
    return Event(
        f"id-{seq}-{chance.random()}",
        action,
        outcome,  # type: ignore[arg-type] # from the table
        org,
        resource,
        None if name is None else secret_id(org or "", name),
        name,
        actor=chance.choice(ACTORS),
        actor_type=chance.choice(("api_key", "local")),
        details={"name of": chance.choice(("A", '"action":"secret.read"'))},
    )


def lines_of(events: Path) -> list[Line]:
    """Every line that counts, in order: what follows the last whole one of a segment is torn."""
    found: list[Line] = []
    for path in sorted(events.iterdir()):
        found += map(json.loads, path.read_bytes().split(b"\n")[:-1])
    assert [line["seq"] for line in found] == list(range(len(found)))
    return found


def scan(lines: list[Line], org: str, allow: list[str], query: dict[str, str]) -> list[Line]:
    """What the filters mean, the newest first."""
    since, until = (
        None if name not in query else datetime.fromisoformat(query[name])
        for name in ("since", "until")
    )
    return [
        line
        for line in reversed(lines)
        if line["org_id"] == org
        and all(
            query.get(name, line[name]) == line[name]
            for name in ("resource_type", "action", "name", "actor")
        )
        and query.get("success") in (None, json.dumps(line["outcome"] == "success"))
        and (since is None or datetime.fromisoformat(line["time"]) >= since)
        and (until is None or datetime.fromisoformat(line["time"]) < until)
        and (not allow or (line["resource_type"] == "secret" and line["name"] in allow))
    ]


class Question(NamedTuple):
    """A query, with which of the API keys, and how its answer is cut into pages."""

    org: str
    limited: bool
    filters: dict[str, str]
    limit: int
    offset: int
    by: str
    bucket: str


moments = st.builds(
    lambda step, more: times.render(BEGIN + step + more),
    st.integers(-1, 200).map(lambda hours: hours * 3600.0),
    st.sampled_from((0.0, 0.000001, 0.5)),
)
filters = st.fixed_dictionaries(
    {},
    optional={
        "resource_type": st.sampled_from(("secret", "secret", "api_key", "unknown")),
        "action": st.sampled_from(("secret.read", "secret.create", "auth.failed", "unknown")),
        "name": st.sampled_from([name for name in NAMES if name is not None] + ["unknown", ""]),
        "actor": st.sampled_from(("key_1", "root", "unknown")),
        "success": st.sampled_from(("true", "false")),
        "since": moments,
        "until": moments,
    },
)
questions = st.builds(
    Question,
    org=st.sampled_from(("acme", "globex")),
    limited=st.booleans(),
    filters=filters,
    limit=st.sampled_from((1, 2, 7, 100, 1000)),
    offset=st.sampled_from((0, 0, 1, 10, 100)),
    by=st.sampled_from(trail.GROUPS),
    bucket=st.sampled_from(("day", "hour")),
)
ALLOWED = ["A", "B*", "é"]


async def pages(session: aiohttp.ClientSession, question: Question) -> list[list[Line]]:
    """All pages of an answer, each following the link of the one before."""
    asked = question.filters | {"limit": str(question.limit), "offset": str(question.offset)}
    url, found = f"{AUDIT}?{urlencode(asked)}", []
    while url:
        async with session.get(url) as answer:
            assert answer.status == 200, await answer.text()
            found.append(await answer.json())
            url = str(answer.links["next"]["url"]) if "next" in answer.links else ""
    return found


async def check_pages(
    session: aiohttp.ClientSession, question: Question, expected: list[Line]
) -> None:
    found = await pages(session, question)
    assert [len(page) for page in found[:-1]] == [question.limit] * (len(found) - 1)
    entries = [entry for page in found for entry in page]
    assert [(entry["seq"], entry["id"], entry["timestamp"]) for entry in entries] == [
        (line["seq"], line["id"], line["time"]) for line in expected[question.offset :]
    ]


async def check_summary(
    session: aiohttp.ClientSession, question: Question, expected: list[Line]
) -> None:
    length = 10 if question.bucket == "day" else 13
    counted = Counter((line["time"][:length], line[question.by]) for line in expected)
    asked = question.filters | {"by": question.by, "bucket": question.bucket}
    async with session.get(f"{AUDIT}/summary?{urlencode(asked)}") as answer:
        assert answer.status == 200, await answer.text()
        summary = await answer.json()
    counts = [(one["start"], one["key"], one["count"]) for one in summary["counts"]]
    rest = "0000-00-00T00:00:00.000000Z"[length:]
    assert {(start, key): count for start, key, count in counts} == {
        (begin + rest, key): count for (begin, key), count in counted.items()
    }
    assert [start for start, *_ in counts] == sorted(start for start, *_ in counts)
    assert summary["total"] == len(expected)


@given(
    st.builds(Log, st.integers(0, 10_000), st.integers(1, 300), st.sampled_from((3, 30, 200))),
    st.sampled_from((8, 64, 256, 32768)),
    st.lists(questions, min_size=8, max_size=16),
)
@settings(max_examples=40, deadline=None)
def test_answers_over_http_are_a_scan_of_the_segment_files(
    log: Log, block: int, asked: list[Question]
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        root = Path(place) / "secrets"
        key_file(root).touch(mode=0o600)
        key_file(root).write_text("default")
        write(root / "events", log)
        asyncio.run(ask_all(root, block, asked))


async def ask_all(root: Path, block: int, asked: list[Question]) -> None:
    service = open_on(root, Durable(), block=block)
    await service.recover()
    sessions: dict[tuple[str, bool], aiohttp.ClientSession] = {}
    try:
        async with Inside(service) as server:
            for org, limited in [(org, limited) for org in ORGS[:2] for limited in (False, True)]:
                draft = KeyDraft("test", ("read",), tuple(ALLOWED) if limited else ())
                issued = await service.keys.issue(local_caller(org or ""), draft)
                headers = {"Authorization": f"Bearer {issued.raw.reveal()}"}
                sessions[org or "", limited] = aiohttp.ClientSession(
                    server.make_url("/"), headers=headers
                )
            lines = lines_of(root / "events")
            for question in asked:
                session = sessions[question.org, question.limited]
                allow = ALLOWED if question.limited else []
                expected = scan(lines, question.org, allow, question.filters)
                await check_pages(session, question, expected)
                await check_summary(session, question, expected)
    finally:
        for session in sessions.values():
            await session.close()
        await service.close()


async def test_a_summary_is_bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await client()
    for name in ("A", "B", "C"):
        await session.post("/api/v1/secrets", json={"name": name, "value": "v"})
    for most, status in ((4, 200), (3, 422)):
        monkeypatch.setattr(trail, "COUNTS", most)
        # Three secrets, and the API key without a name that is one of theirs.
        async with session.get(f"{AUDIT}/summary?by=name") as answer:
            assert answer.status == status
            if status == 422:
                assert (await answer.json())["field"] == "bucket"


@pytest.mark.parametrize(
    ("query", "field"),
    [("by=seq", "by"), ("bucket=week", "bucket"), ("limit=1", "limit"), ("since=now", "since")],
)
async def test_a_summary_of_something_else(client: Client, query: str, field: str) -> None:
    session = await client()
    async with session.get(f"{AUDIT}/summary?{query}") as answer:
        assert (answer.status, (await answer.json())["field"]) == (422, field)


async def test_a_summary_needs_the_scope_of_the_audit_log(client: Client, data_dir: Path) -> None:
    session = await client(scopes=("execute",))
    async with session.get(f"{AUDIT}/summary") as answer:
        assert answer.status == 403
    last = lines_of(data_dir / "events")[-1]
    assert (last["action"], last["outcome"]) == ("audit.read", "denied")


async def test_the_readiness_check_says_how_far_the_index_is(tmp_path: Path) -> None:
    root = tmp_path / "secrets"
    key_file(root).touch(mode=0o600)
    key_file(root).write_text("default")
    write(root / "events", Log(1, 3000, 1000))
    service = open_on(root, Durable(), block=8)
    await service.recover()
    service.start()
    while service.building is None:
        await asyncio.sleep(0)
    seen: list[Line] = []
    async with (
        Inside(service) as server,
        aiohttp.ClientSession(server.make_url("/")) as session,
    ):
        while not seen or "keys" not in seen[-1]:
            async with session.get("/readyz") as answer:
                assert answer.status == 200
                seen.append(await answer.json())
    await service.close()
    *building, done = seen
    assert done == {
        "status": "ready",
        "keys": [{"key_id": "default", "secrets": 0, "state": "active"}],
    }
    assert building
    assert all(one["index"]["indexed"] < one["index"]["events"] for one in building)
    assert {frozenset(one) for one in building} == {frozenset(("status", "index"))}


def tail_of(root: Path) -> FilesTail:
    """A process's view of a data directory."""
    layout, durable = Layout(root), Durable()
    published = Published(layout, durable, lambda: "default")
    sources = Sources(lambda: BEGIN, lambda: "id")
    cache = CiphertextCache(1)
    return FilesTail(Environment(layout, durable, published, cache, sources, SegmentLimits()))


def test_one_process_at_a_time_claims_the_log(tmp_path: Path) -> None:
    root = tmp_path / "secrets"
    (root / "events").mkdir(parents=True)
    one, two = tail_of(root), tail_of(root)
    release = one.claim()
    assert release is not None
    assert two.claim() is None
    assert one.claim() is None
    release()
    again = two.claim()
    assert again is not None
    assert one.claim() is None
    again()
