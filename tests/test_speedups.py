"""What is compiled does what the Python beside it does: hashing, taking the lines of events,
reading them by the column, making postings, finding events, and showing them.
"""

import datetime
import json
import os
import random
import sqlite3
import struct
from array import array
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmason_secrets.api import entries, shapes
from flowmason_secrets.core import events, hashing, merkle
from flowmason_secrets.core.errors import LogDamaged
from flowmason_secrets.core.ports import AuditQuery, Chunk
from flowmason_secrets.index import audit, columns, plain, postings, recent
from flowmason_secrets.index.columns import Columns
from flowmason_secrets.index.terms import Terms
from flowmason_secrets.storage import scanning, strict, wire
from flowmason_secrets.storage.scanning import Block, Scanned, Source

try:
    from flowmason_secrets.api import _speedups as on_the_wire
    from flowmason_secrets.core import _speedups
    from flowmason_secrets.index import _speedups as by_column
except ImportError:
    if os.environ.get("CI"):
        raise
    needed = "a compiler and the headers of Python and OpenSSL"
    pytest.skip(f"not compiled: that takes {needed}", allow_module_level=True)

# Of two events each.
FILLED = (array("q", (1, 2)), *(array("I", (1, 2)) for _ in range(6)))
MANY = st.lists(st.binary(max_size=200), max_size=40)


def test_it_is_what_is_used() -> None:
    assert merkle.leaf_hashes is _speedups.leaf_hashes
    assert merkle.parents is _speedups.parents
    assert vars(scanning)["take_lines"] is _speedups.take_lines
    assert vars(columns)["read_columns"] is by_column.read_columns
    assert vars(postings)["postings_of"] is by_column.postings
    assert vars(audit)["unlike"] is by_column.unlike
    assert vars(recent)["matching"] is by_column.matching
    assert vars(entries)["shown"] is on_the_wire.shown


@given(MANY)
def test_leaf_hashes(lines: list[bytes]) -> None:
    assert _speedups.leaf_hashes(lines) == hashing.leaf_hashes(lines)
    assert _speedups.leaf_hashes(tuple(lines)) == hashing.leaf_hashes(tuple(lines))


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=40))
def test_parents(nodes: list[bytes]) -> None:
    assert _speedups.parents(nodes) == hashing.parents(nodes)


@pytest.mark.parametrize(
    ("call", "arguments", "error"),
    [
        ("read_columns", (b"", 1, 0, ({},) * 6), ValueError),
        ("read_columns", (b"", 0, 0, ({},) * 5), TypeError),
        ("read_columns", ("", 0, 0, ({},) * 6), TypeError),
        ("postings", ([1, 2], [0], 8, 0), ValueError),
        ("postings", ([1], [8], 8, 0), ValueError),
        ("postings", ([1], [-1], 8, 0), OverflowError),
        ("postings", ([1] * 9, [0] * 9, 8, 0), ValueError),
        ("postings", ([1], [0], 1 << 17, 0), ValueError),
        ("postings", ([[]], [0], 8, 0), TypeError),
        ("postings", (1, [0], 8, 0), TypeError),
        ("among", ({1: 7}, {1: b""}, 4), TypeError),
        ("among", ({1: b""}, {1: None}, 4), TypeError),
        ("among", ({1: b"1"}, {1: b""}, 4), ValueError),
        ("among", ({1: b""}, {1: b"1"}, 4), ValueError),
        ("among", ({1: b"1234"}, {1: b"12345"}, 4), ValueError),
        ("among", ({1: b"12345678"}, {1: b"1234"}, 4), ValueError),
        ("among", ({1: b"\x20\x00"}, {1: b"1234"}, 4), ValueError),
        ("among", ({1: b"1234"}, {1: b"\xff\xff"}, 4), ValueError),
        ("among", ({1: None}, {1: b"12345"}, 4), ValueError),
        ("shown", ("",), TypeError),
        ("unlike", ([b""], [], (None,) * 7), ValueError),
        ("unlike", ([""], [0], (None,) * 7), TypeError),
        ("unlike", ([b""], [""], (None,) * 7), TypeError),
        ("unlike", ([b""], [1 << 64], (None,) * 7), OverflowError),
        ("unlike", ([], [], (None,) * 6), TypeError),
        ("unlike", ((), [], (None,) * 7), TypeError),
        ("matching", (FILLED, (-1,) * 7, None, (0, 9), 0, 3), ValueError),
        ("matching", (FILLED, (-1,) * 7, None, (0, 9), -1, 1), ValueError),
        ("matching", (FILLED, (-1,) * 6, None, (0, 9), 0, 1), TypeError),
        ("matching", (FILLED, (-1,) * 7, 7, (0, 9), 0, 1), TypeError),
        ("matching", (FILLED[:6], (-1,) * 7, None, (0, 9), 0, 1), ValueError),
        ("matching", (FILLED[1:] + FILLED[:1], (-1,) * 7, None, (0, 9), 0, 1), ValueError),
        ("matching", ((*FILLED[:6], [1, 2]), (-1,) * 7, None, (0, 9), 0, 1), TypeError),
        ("union", ([b"1"], 4), ValueError),
        ("union", ([b"1234", "1234"], 4), ValueError),
        ("union", ((), 4), TypeError),
        ("union", ([], 0), ValueError),
        ("union", ([], 8193), ValueError),
        ("among", ({}, {}, 0), ValueError),
        ("among", ({}, {}, -1), ValueError),
        ("among", ({}, {}, 8193), ValueError),
        ("among", ({}, {}), TypeError),
        ("without", ({1: None}, {1: b""}, 4), TypeError),
        ("without", ({1: b"12"}, {1: "12"}, 4), TypeError),
        ("without", ([], {}, 4), TypeError),
        ("leaf_hashes", (7,), TypeError),
        ("leaf_hashes", ([b"", "text"],), TypeError),
        ("parents", (None,), TypeError),
        ("parents", ([bytes(32), "text"],), TypeError),
        ("parents", ([bytes(32), bytes(31)],), ValueError),
        ("take_lines", (b"", 1, 0, bytes(27)), ValueError),
        ("take_lines", (b"", -1, 0, bytes(27)), ValueError),
        ("take_lines", (b"", 0, 0, bytes(26)), ValueError),
        ("take_lines", (bytearray(9), 0, 0, bytes(27)), TypeError),
        ("take_lines", (b"", 0, 1 << 64, bytes(27)), OverflowError),
    ],
)
def test_wrong_arguments(call: str, arguments: tuple[Any, ...], error: type[Exception]) -> None:
    for module in (by_column, _speedups, on_the_wire):
        if hasattr(module, call):
            with pytest.raises(error):
                getattr(module, call)(*arguments)
            return
    raise AssertionError


# Lines. Two of them are needed before one that is taken so: the first is always read the slow way.

TIMES = "2026-06-02T09:00:00.000000Z", "2026-06-02T09:00:01.000000Z", "2026-06-02T09:00:01.000001Z"
USUAL: dict[str, Any] = {
    "v": 1,
    "id": "019e878f-b03c-7000-8000-14931ac3a59e",
    "seq": 0,
    "time": TIMES[0],
    "action": "secret.read",
    "outcome": "success",
    "org_id": "organisation-27",
    "resource_type": "secret",
    "resource_id": "b3f8bfaf525a2b47",
    "name": "SERVICE_009_API_KEY",
    "version": 12,
    "actor": "0000001b00000001",
    "actor_type": "api_key",
    "client_ip": "10.27.0.158",
    "user_agent": "python-aiohttp/3.12",
    "request_id": "ce93b2ba2cc52075",
    "status": 200,
    "details": {"a": "b", "n": None, "yes": True, "no": False, "i": 0, "l": ["x", "y"], "e": []},
}
VALUES = [*map(str, USUAL.values()), None, "o", "N", "a", "auth.failed", "denied", "not_found"]
# What a value may be replaced with: all that JSON has, and more of what lines may have.
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.text(st.characters(min_codepoint=31, max_codepoint=128), max_size=9),
    st.sampled_from([*TIMES, "log.segment", "log.checkpoint", "logout", "denied", "failed", 0, 1]),
    st.lists(st.text(max_size=3) | st.integers(), max_size=3),
    st.dictionaries(
        st.text(max_size=3),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(max_size=3)),
        max_size=3,
    ),
)


def encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


# What all lines have.
NOTHING = (None,) * 7


def usual(seq: int) -> bytes:
    return encoded({**USUAL, "seq": seq, "time": TIMES[min(seq, 2)]})


def scanned(data: bytes) -> Scanned:
    return scanning.scan(Block(Source(0, "none", len(data), ""), 1, 1 + len(data), data))


def take_none(data: bytes, place: int, seq: int, time: bytes) -> tuple[int, bytes, bytes]:
    return place, b"", time


def both(data: bytes) -> tuple[Scanned, Scanned]:
    """What is found with what is compiled, and line by line; and in pieces it is the same."""
    found: list[Scanned] = []
    for take_lines in (_speedups.take_lines, take_none, strict.take_lines):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scanning, "take_lines", take_lines)
            found.append(scanned(data))
    assert found[1] == found[2]
    return found[0], found[1]


def agree(*lines: bytes, end: bytes = b"\n") -> None:
    data = b"\n".join(lines) + end
    found, slowly = both(data)
    assert found == slowly
    for line in lines:
        assert on_the_wire.shown(line) in (None, shown_slowly(line))
        assert is_event(line) or by_column.unlike([line], [1], NOTHING) == ([0], set())
    if data and end == b"\n":
        assert indexed(data, by_column.read_columns) == indexed(data, plain.read_columns)


def shown_slowly(line: bytes) -> bytes | None:
    """A line as it is on the wire; None if it is no event."""
    try:
        return msgspec.json.encode(shapes.audit_out(orjson.loads(line)))
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def is_event(line: bytes) -> bool:
    """Whether a line is the event with seq 1."""
    try:
        return bool(orjson.loads(line)["seq"] == 1)
    except (LookupError, TypeError, ValueError):
        return False


UNUSED = sqlite3.connect(":memory:")


class Numbered(Terms):
    """Terms that are in no database."""

    def __init__(self) -> None:
        super().__init__(UNUSED)
        self.values: dict[int, tuple[int, int, str]] = {}

    def add(self, field: int, scope: int, value: str) -> int:
        self.values[len(self.values) + 1] = field, scope, value
        return len(self.values)


def indexed(data: bytes, read_columns: object) -> dict[str, object]:
    """What the index has of these lines: the columns and the terms, or what is wrong with them."""
    terms, found = Numbered(), Columns(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "read_columns", read_columns)
        try:
            found.read(Chunk(0, 7, 1000, data), terms)
        except LogDamaged as error:
            return {"problem": str(error)}
    # Terms are numbered by the column in one, and by the line in the other.
    named = [[terms.values.get(term) for term in column] for column in found.terms]
    scopes = [terms.values.get(name[1]) if name else None for name in named[4]]
    names = [name[2] if name else None for name in named[4]]
    return {
        **vars(found),
        "terms": [*named[:4], names, named[5]],
        "scopes": scopes,
        "known": len(terms.values),
    }


def read(*lines: bytes) -> int:
    """How many of the lines are read by the column."""
    known = dict.fromkeys(VALUES, 1)
    mappings = (known, known, known, known, dict.fromkeys(VALUES, known), known)
    _, (places, *_) = by_column.read_columns(b"\n".join(lines) + b"\n", 0, 0, mappings)
    return len(places)


def taken(*lines: bytes) -> int:
    """How many of the lines behind the first one are taken."""
    data = b"".join(line + b"\n" for line in lines)
    place = len(lines[0]) + 1
    stop, hashes, _ = _speedups.take_lines(data, place, 1, TIMES[0].encode())
    assert data[:stop].count(b"\n") - 1 == len(hashes) // 32
    return len(hashes) // 32


def test_usual_lines_are_taken() -> None:
    lines = [usual(seq) for seq in range(20)]
    assert taken(*lines) == 19
    assert read(*lines) == 20
    agree(*lines)
    found, _ = both(b"\n".join(lines) + b"\n")
    assert (found.first, found.times, found.bad) == (0, (TIMES[0], TIMES[2]), None)
    assert found.leaves == b"".join(hashing.leaf_hashes(lines))


def test_lines_of_the_service_are_taken() -> None:
    """As they are written, with every field and with none that may be missing."""
    full = events.Event(
        *(USUAL["id"], "secret.read", "not_found", "o", "secret", "r", "N", 3, "a", "api_key"),
        *("ip", "agent", "request", 404),
        details={"listed": ["a", "b"], "count": 3, "peer_uid": 0},
    )
    empty = events.Event(USUAL["id"], "auth.failed", "denied", None, "secret", None)
    lines = [usual(0), *wire.encode_lines([full, empty, full], 1, TIMES[1]).splitlines()]
    assert taken(*lines) == 3
    assert read(*lines) == 4
    agree(*lines)


@pytest.mark.parametrize("place", range(len(usual(1))))
def test_any_byte_changed(place: int) -> None:
    """At each place of a line another byte, none, and one more."""
    line = usual(1)
    for byte in b'\x00\n\x1f 09:"\\,[]{}ex\x7f\x80\xc3\xff':
        for until in (place, place + 1):
            agree(usual(0), line[:place] + bytes([byte]) + line[until:], usual(2))
    agree(usual(0), line[:place] + line[place + 1 :], usual(2))
    agree(usual(0), usual(1), line[:place], end=b"")


@given(st.sampled_from(list(USUAL)), ANYTHING)
def test_any_value_changed(field: str, value: object) -> None:
    line = {**USUAL, "seq": 1, "time": TIMES[1], field: value}
    agree(usual(0), encoded(line), usual(2))


@given(st.text(max_size=8), ANYTHING)
def test_any_detail(key: str, value: object) -> None:
    line = {**USUAL, "seq": 1, "time": TIMES[1], "details": {"a": 1, key: value}}
    agree(usual(0), encoded(line), usual(2))


@given(st.lists(st.sampled_from([usual(seq) for seq in range(4)]), max_size=6), st.binary())
def test_any_order(lines: list[bytes], end: bytes) -> None:
    agree(*lines, end=end)


def test_what_concerns_the_log_itself_is_left() -> None:
    quoting = {"action": "log.checkpoint", "details": {"checkpoint": "of nothing"}}
    line = encoded({**USUAL, "seq": 1, "time": TIMES[1], **quoting})
    assert taken(usual(0), line, usual(2)) == 0
    agree(usual(0), line, usual(2))
    assert both(usual(0) + b"\n" + line + b"\n")[0].quotes == [(1, "of nothing")]


def test_times_and_lengths() -> None:
    early = encoded({**USUAL, "seq": 2, "time": TIMES[0]})
    assert taken(usual(0), usual(1), early, usual(3)) == 1
    agree(usual(0), usual(1), early, usual(3))
    for length in (3000, 4096, events.MAX_LINE - 1, events.MAX_LINE, events.MAX_LINE + 1):
        more = length - len(usual(1)) + len(USUAL["user_agent"])
        long = encoded({**USUAL, "seq": 1, "time": TIMES[1], "user_agent": "a" * more})
        assert len(long) == length
        agree(usual(0), long, usual(2))


def test_a_block_without_a_usual_line() -> None:
    agree(b"")
    agree(b"", end=b"")
    agree(usual(0), end=b"")
    assert _speedups.take_lines(b"", 0, 0, TIMES[0].encode()) == (0, b"", TIMES[0].encode())


DAYS = """
1969-12-31 1970-01-01 0001-01-01 0000-01-01 2000-02-29 2100-02-29 2024-02-29 2024-02-30 2023-02-29
2026-00-10 2026-13-10 2026-04-31 2026-06-00 9999-12-31
"""
HOURS = "00:00:00.000000 23:59:59.999999 24:00:00.000000 12:60:00.000000 12:00:60.000000"


@pytest.mark.parametrize("day", DAYS.split())
def test_days(day: str) -> None:
    for time in HOURS.split():
        line = {**USUAL, "seq": 1, "time": f"{day}T{time}Z"}
        agree(usual(0), encoded(line), usual(2))


@given(st.dates(), st.times())
def test_any_time(day: datetime.date, time: datetime.time) -> None:
    text = datetime.datetime.combine(day, time).isoformat(timespec="microseconds") + "Z"
    agree(usual(0), encoded({**USUAL, "seq": 1, "time": text}))


def test_changes_are_found() -> None:
    """Of those that need be looked at: the events before `filled` need not."""
    changes = [
        ("secret.create", "success"),
        ("secret.delete", "success"),
        ("secret.create", "denied"),
    ]
    lines = [
        encoded({**USUAL, "seq": seq, "name": f"N{seq}", "action": action, "outcome": outcome})
        for seq, (action, outcome) in enumerate([*changes, ("secret.read", "success"), *changes])
    ]
    rotate = {"resource_type": "master_key", "details": {"secrets": ["one", "two"]}}
    lines.append(encoded({**USUAL, "seq": 7, "action": events.KEY_ROTATE, **rotate}))
    agree(*lines)
    found = indexed(b"\n".join(lines) + b"\n", by_column.read_columns)["changed"]
    assert isinstance(found, set)
    assert {name for _, _, name in found} == {"N1", "N4", "N5", None}
    assert {secret for _, secret, name in found if name is None} == {"one", "two"}


BLOCK = 256
SIZE = BLOCK // 8


@given(
    st.sets(st.integers(0, BLOCK - 1)).map(sorted)
    | st.just(list(range(BLOCK)))
    | st.integers(0, BLOCK).map(lambda count: list(range(count))),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_postings(places: list[int], terms: int, chance: random.Random) -> None:
    column = [int(chance.triangular(0, terms, 0)) for _ in places]
    for few in (0, 5, 63, 64, BLOCK):
        found = by_column.postings(column, places, BLOCK, few)
        assert found == plain.postings(column, places, BLOCK, few)
        assert by_column.postings(tuple(column), tuple(places), BLOCK, few) == found
    assert by_column.postings([3] * 8, range(8), 8, 0) == {3: b""}


def test_the_widest_block() -> None:
    column, places = [1, 2] * (1 << 15), range(1 << 16)
    assert by_column.postings(column, places, 1 << 16, 64) == {1: b"U" * 8192, 2: b"\xaa" * 8192}
    few = [1, 2, 2], [300, 301, 65535], 1 << 16, 64
    assert by_column.postings(*few) == plain.postings(*few)


def test_more_values_than_are_remembered() -> None:
    """And each of them three times, in two organisations."""
    lines = [
        encoded({**USUAL, "seq": seq, "org_id": f"o{seq % 2}", "name": f"N{seq % 4999:04}"})
        for seq in range(3 * 2 * 4999)
    ]
    assert indexed(b"\n".join(lines) + b"\n", by_column.read_columns)["known"] == 2 * 4999 + 6
    agree(*lines)


PLACES = st.sets(st.integers(0, BLOCK - 1), max_size=80) | st.just(set(range(BLOCK)))
EVENTS = st.tuples(PLACES, st.booleans()).map(
    lambda drawn: (
        sum(1 << place for place in drawn[0]).to_bytes(SIZE, "little")
        if drawn[1] or len(drawn[0]) > plain.few_of(SIZE)
        else struct.pack(f"<{len(drawn[0])}H", *sorted(drawn[0]))
    )
)
BLOCKS = st.dictionaries(st.integers(0, 3), EVENTS)


@given(BLOCKS, BLOCKS)
def test_among_and_without(blocks: dict[int, Any], others: dict[int, Any]) -> None:
    every = dict.fromkeys(range(4))
    assert by_column.among(every, others, SIZE) == plain.among(every, others, SIZE)
    assert by_column.among(blocks, others, SIZE) == plain.among(blocks, others, SIZE)
    assert by_column.without(blocks, others, SIZE) == plain.without(blocks, others, SIZE)
    every_one = [*blocks.values(), *others.values()]
    assert by_column.union(every_one, SIZE) == plain.union(every_one, SIZE)


@pytest.mark.parametrize("size", [1, 3, 8, 9, 32, 8192])
def test_bitmaps_of_any_size(size: int) -> None:
    full: dict[int, Any] = {1: b"\xff" * size}
    for count in {1, 8, 63, 64, 65, 511, 512, 513, 514, 8 * size - 1, 8 * size}:
        some: dict[int, Any] = {1: ((1 << min(count, 8 * size)) - 1).to_bytes(size, "little")}
        assert by_column.among(full, some, size) == plain.among(full, some, size)
        assert by_column.without(full, some, size) == plain.without(full, some, size)


class Broken(dict[str | None, int]):
    def __missing__(self, value: str | None) -> int:
        raise RuntimeError(f"no term for {value}")


@pytest.mark.parametrize("field", range(6))
def test_an_error_of_a_mapping(field: int) -> None:
    known = [dict.fromkeys(VALUES, 1) for _ in range(6)]
    mappings: list[Any] = [*known[:4], dict.fromkeys(VALUES, known[4]), known[5]]
    mappings[field] = Broken()
    with pytest.raises(RuntimeError, match="no term for"):
        by_column.read_columns(usual(0) + b"\n", 0, 0, tuple(mappings))


# Lines on the wire.


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"outcome": "denied", "status": 403, "details": {"error": "not allowed"}},
        {"outcome": "failed", "details": {}},
        {"outcome": "expired", "details": {"n": 1, "error": "late", "l": ["error"]}},
        {"name": None, "version": None},
        {"name": None},
        {"version": None, "status": None, "request_id": None, "user_agent": None},
        {"actor": None, "actor_type": "system", "client_ip": None, "resource_id": None},
        {"actor_type": "user"},
        {"actor_type": "api_keys"},
        {"details": {f"key{number}": number for number in range(16)}},
    ],
    ids=str,
)
def test_usual_lines_are_shown(fields: dict[str, Any]) -> None:
    line = encoded({**USUAL, **fields})
    found = on_the_wire.shown(line)
    assert found == shown_slowly(line) is not None
    assert entries.encode(events.Entry(line, orjson.loads)) == found


@pytest.mark.parametrize(
    "fields",
    [
        *({"details": {key: "x"}} for key in ("name", "version", "outcome", "status")),
        *({"details": {"a": 1, key: "x"}} for key in ("request_id", "user_agent")),
        {"outcome": "failed", "details": {"error": 7}},
        {"outcome": "failed", "details": {"error": None}},
        {"details": {"error": None}},
        {"details": {f"key{number}": number for number in range(17)}},
        {"name": "\u00e9"},
        {"user_agent": "a\\b"},
    ],
    ids=str,
)
def test_unusual_lines_are_left_to_python(fields: dict[str, Any]) -> None:
    line = encoded({**USUAL, **fields})
    assert on_the_wire.shown(line) is None
    assert entries.encode(events.Entry(line, orjson.loads)) == shown_slowly(line) is not None


def test_details_that_come_twice() -> None:
    line = encoded({**USUAL, "details": {"a": 1, "b": 2, "c": 3}})
    assert on_the_wire.shown(line) is not None
    for twice in (b'"a":2', b'"a":1'):
        assert on_the_wire.shown(line.replace(b'"b":2', twice)) is None


def test_a_line_and_more() -> None:
    for end in (b"\n", b" ", b"\0", b"}", usual(1)):
        line = usual(0) + end
        assert on_the_wire.shown(line) is None
        assert by_column.unlike([line], [0], NOTHING) == ([0], set())
    long = encoded({**USUAL, "user_agent": "u" * 4096})
    assert on_the_wire.shown(long) is None


# Lines that are asked for.

FEW_VALUES = st.sampled_from(("a", "b", "secret", "success", "denied"))
ASKED = st.builds(
    AuditQuery,
    org_id=st.none() | FEW_VALUES,
    resource_type=st.none() | FEW_VALUES,
    action=st.none() | FEW_VALUES,
    name=st.none() | FEW_VALUES,
    actor=st.none() | FEW_VALUES,
    success=st.none() | st.booleans(),
    allow=st.sampled_from(((), ("*",))),
)
GIVEN = st.fixed_dictionaries(
    {
        "seq": st.integers(0, 3),
        "org_id": st.none() | FEW_VALUES,
        "resource_type": FEW_VALUES,
        "action": FEW_VALUES,
        "name": st.none() | FEW_VALUES | st.just("\u00e9"),
        "actor": st.none() | FEW_VALUES,
        "outcome": st.sampled_from(("success", "denied", "failed", "unusual")),
    }
)


@given(st.lists(GIVEN, max_size=4), ASKED)
def test_what_is_not_known_to_be_asked_for(given: list[dict[str, Any]], query: AuditQuery) -> None:
    lines = [USUAL | fields for fields in given]
    doubtful, names = by_column.unlike(
        [encoded(line) for line in lines], [1] * len(lines), audit._wanted(query)
    )
    kind = "secret" if query.allow else query.resource_type
    free = query._replace(allow=(), resource_type=kind)
    expected = [
        place
        for place, line in enumerate(lines)
        if line["seq"] != 1
        or line["name"] == "\u00e9"
        or line["outcome"] == "unusual"
        or not audit._matches(line, free, lambda name: True)  # type: ignore[arg-type]
    ]
    assert doubtful == expected
    assert names == {
        encoded(line["name"]) for place, line in enumerate(lines) if place not in doubtful
    }


@given(st.integers(0, 12), st.data())
def test_events_by_their_columns(count: int, data: st.DataObject) -> None:
    def some(bound: int) -> st.SearchStrategy[list[int]]:
        return st.lists(st.integers(0, bound), min_size=count, max_size=count)

    held = (
        array("q", data.draw(some(3))),
        *(array("I", data.draw(some(2))) for _ in range(6)),
    )
    asked = data.draw(st.tuples(*[st.integers(-1, 2)] * 7))
    names = data.draw(st.none() | st.sets(st.integers(0, 3)))
    span = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, count)] * 2)))
    arguments = held, asked, names, span, low, high
    assert by_column.matching(*arguments) == plain.matching(*arguments)


def test_terms_and_times_at_their_bounds() -> None:
    held = (array("q", (-(2**63), 2**63 - 1)), *(array("I", (2**32 - 1, 0)) for _ in range(6)))
    ends, terms = (-(2**62), 2**62), (-1,) * 7
    for span in (ends, (-(2**63), 2**63 - 1), (-(2**63), 0)):
        for asked in (terms, (2**32 - 1, *terms[1:]), (2**40, *terms[1:]), (*terms[:6], 0)):
            arguments = held, asked, {2**32 - 1}, span, 0, 2
            assert by_column.matching(*arguments) == plain.matching(*arguments)
