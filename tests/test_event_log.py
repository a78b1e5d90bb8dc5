"""The event log on disk: lines, segments, what a crash leaves, and that nothing ever changes."""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmason_secrets.core import times
from flowmason_secrets.core.access import ANY, Caller, Principal
from flowmason_secrets.core.errors import LogDamaged
from flowmason_secrets.core.events import MAX_LINE, Event, Ids, Line, event
from flowmason_secrets.core.minimum import Minimum
from flowmason_secrets.core.ports import Sources
from flowmason_secrets.storage import wire
from flowmason_secrets.storage.chunks import ChunkReader, read_lines, segment_name, segments
from flowmason_secrets.storage.durable import Durable, ShortWrite
from flowmason_secrets.storage.eventlog import EventLog, SegmentLimits
from flowmason_secrets.storage.minimum import MinimumFile
from flowmason_secrets.storage.published import Layout

from .harness.faults import Faulty, PowerOff, Unplugged, io_error, no_space, short_write

FIELDS = [
    *("v", "id", "seq", "time", "action", "outcome", "org_id", "resource_type", "resource_id"),
    *("name", "version", "actor", "actor_type", "client_ip", "user_agent", "request_id", "status"),
    "details",
]


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Logs:
    """Opens event logs in one directory, each as a process of its own would."""

    def __init__(self, root: Path) -> None:
        self.clock = Clock()
        self.layout = Layout(root)
        self.directory, self.scratch = self.layout.events, self.layout.staged
        self.directory.mkdir()
        self.scratch.mkdir()
        self.new_id = Ids(self.clock, Random(1).randbytes)

    def new(
        self, *, size: int = 64 << 20, age: float = 86400.0, durable: Durable | None = None
    ) -> EventLog:
        """One that is not open yet."""
        return EventLog(
            self.layout,
            durable or Durable(),
            Sources(self.clock, self.new_id),
            SegmentLimits(size, age),
        )

    def open(
        self, *, size: int = 64 << 20, age: float = 86400.0, durable: Durable | None = None
    ) -> EventLog:
        log = self.new(size=size, age=age, durable=durable)
        log.open()
        return log

    def event(self, name: str = "A") -> Event:
        return Event(self.new_id(), "secret.read", "success", "acme", "secret", "0" * 16, name)

    def lines(self) -> list[Line]:
        """All lines that count, read the plain way: a torn tail ends a segment."""
        found: list[Line] = []
        firsts = segments(self.directory)
        for first in firsts:
            assert first == len(found)
            # What follows the last newline is no line.
            for raw in (self.directory / segment_name(first)).read_bytes().split(b"\n")[:-1]:
                try:
                    line = wire.decode_line(raw)
                except wire.Malformed:
                    break
                if line["seq"] != len(found):
                    break
                found.append(line)
        return found

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}

    def tear(self, tail: bytes) -> None:
        """What a crash may leave behind the last line."""
        with (self.directory / segment_name(segments(self.directory)[-1])).open("ab") as file:
            file.write(tail)


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def check_only_appended(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    for name, data in before.items():
        begin = after[name][: len(data)]
        assert hashlib.sha256(begin).digest() == hashlib.sha256(data).digest(), name


def test_a_line_has_the_fields_of_the_format(logs: Logs) -> None:
    log = logs.open()
    written = logs.event("TOKEN")._replace(
        version=3, actor="key_1", actor_type="api_key", client_ip="::1", user_agent="curl/8",
        request_id="r-1", status=200, details={"kind": "update"},
    )  # fmt: skip
    assert log.append([written]) == "2023-11-14T22:13:20.000000Z"
    header, line = (json.loads(raw) for raw in logs.contents()[segment_name(0)].splitlines())
    assert list(header) == list(line) == FIELDS
    assert line == {
        "v": 1,
        "id": written.id,
        "seq": 1,
        "time": "2023-11-14T22:13:20.000000Z",
        "action": "secret.read",
        "outcome": "success",
        "org_id": "acme",
        "resource_type": "secret",
        "resource_id": "0" * 16,
        "name": "TOKEN",
        "version": 3,
        "actor": "key_1",
        "actor_type": "api_key",
        "client_ip": "::1",
        "user_agent": "curl/8",
        "request_id": "r-1",
        "status": 200,
        "details": {"kind": "update"},
    }
    log.close()


class Name(str):
    """A caller of the library may have texts of his own kind."""


texts = st.text(max_size=40) | st.text(max_size=40).map(Name)
events = st.builds(
    Event,
    *[texts] * 3,
    st.none() | texts,
    texts,
    *[st.none() | texts] * 2,
    st.none() | st.integers(-(1 << 62), (1 << 63) - 1),
    *[st.none() | texts, texts],
    *[st.none() | texts] * 3,
    st.none() | st.integers(0, 999),
    st.none()
    | st.dictionaries(
        st.text(max_size=9),
        st.none() | st.booleans() | texts | st.integers(0, 1 << 60) | st.lists(texts, max_size=3),
        max_size=3,
    ),
)


@given(st.lists(events, max_size=4), st.integers(0, 1 << 40))
def test_lines_say_what_events_say(batch: list[Event], first: int) -> None:
    """Whoever wrote them and whoever reads them: another JSON library finds the same there."""
    data = wire.encode_lines(batch, first, "2026-01-31T12:00:00.000000Z")
    lines = data.split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == len(batch)
    assert [line.seq for line in wire.decode_lines(data)] == list(range(first, first + len(batch)))
    for seq, (line, written) in enumerate(zip(lines, batch, strict=True), first):
        assert list(orjson.loads(line)) == FIELDS
        assert orjson.loads(line) == {
            "v": 1,
            "seq": seq,
            "time": "2026-01-31T12:00:00.000000Z",
            **written._asdict(),
            "details": written.details or {},
        }


NO_LINES = {
    "a lone surrogate": {"name": "\ud800"},
    "too long": {"details": {"note": "x" * 8000}},
    "a number beyond 64 bits": {"version": 1 << 64},
    "no JSON": {"details": {"note": object()}},
}


@pytest.mark.parametrize("fields", NO_LINES.values(), ids=NO_LINES)
def test_what_can_be_no_line_is_named_by_its_place(fields: dict[str, object], logs: Logs) -> None:
    bad = logs.event()._replace(**fields)  # type: ignore[arg-type]
    with pytest.raises(wire.Unwritable) as caught:
        wire.encode_lines([logs.event(), bad, logs.event(), bad], 5, "")
    assert sorted(caught.value.reasons) == [1, 3]
    assert all(caught.value.reasons.values())


NO_EVENTS = {
    "half a line": lambda line: line[:50],
    "bytes that were never written": lambda line: bytes(len(line)),
    "an empty line": lambda line: b"",
    "another document": lambda line: b"[1,2]",
    "no UTF-8": lambda line: line.replace(b"TOKEN", b"T\xff").replace(b"secret.read", b"\xff"),
    "no seq": lambda line: line.replace(b'"seq":6,', b""),
    "a seq that is text": lambda line: line.replace(b'"seq":6,', b'"seq":"6",'),
}


@pytest.mark.parametrize("spoil", NO_EVENTS.values(), ids=NO_EVENTS)
def test_lines_are_read_up_to_what_is_no_event(spoil: Callable[[bytes], bytes], logs: Logs) -> None:
    batch = [logs.event("TOKEN") for _ in range(3)]
    lines = wire.encode_lines(batch, 5, "2026-01-31T12:00:00.000000Z").splitlines()
    spoilt = spoil(lines[1])
    assert spoilt != lines[1]
    data = b"\n".join([lines[0], spoilt, lines[2], b""])
    assert [line.id for line in wire.decode_lines(data)] == [batch[0].id]


@pytest.mark.parametrize(
    "moved",
    [
        lambda first, second, third: first + second + b"\n\n" + third,
        lambda first, second, third: first + b"\n" + second + third + b"\n",
        lambda first, second, third: first.replace(b",", b",\n", 1) + b"\n" + second + third,
        lambda first, second, third: first + second.replace(b"{}}", b"\n{}}\n") + third,
        lambda first, second, third: first + second[:-1] + b"\n}\n" + third,
    ],
)
def test_a_line_is_one_event(moved: Callable[[bytes, bytes, bytes], bytes], logs: Logs) -> None:
    """Also where there are as many lines as events, and each is whole."""
    batch = [logs.event() for _ in range(3)]
    lines = wire.encode_lines(batch, 5, "2026-01-31T12:00:00.000000Z").splitlines()
    data = moved(*lines) + b"\n"
    assert data.count(b"\n") == 3
    assert data.translate(None, b"\n") == b"".join(lines)
    one_by_one: list[str] = []
    for line in data.splitlines():
        try:
            one_by_one.append(wire.decode_line(line)["id"])
        except wire.Malformed:
            break
    assert len(one_by_one) < 3
    assert [line.id for line in wire.decode_lines(data)] == one_by_one


@pytest.mark.parametrize(
    "character", ["a", "\0", "\x1f", '"', "\\", "\n", "\x7f", "é", "\U0001f511"]
)
def test_the_worst_line_fits_into_8000_bytes_and_is_one_line(logs: Logs, character: str) -> None:
    org = character * 256 if character.isprintable() else "o" * 256
    who = Principal(org, character * 128, "local", ANY)
    caller = Caller(who, 0, "::ffff:255.255.255.255%" + "e" * 15, character * 5000, "r" * 128)
    worst = event(
        logs.new_id(), caller, "secret.metadata", "not_found",
        ("secret", "f" * 16, character * 10_000), 500, 1 << 62,
        {"error": "decryption_failed", "key_id": "aabbccdd", "held": ["aabbccdd"] * 20},
    )  # fmt: skip
    line = wire.encode_lines([worst], 10**12, times.render(253402300799.0))
    assert len(line) <= MAX_LINE == 8000
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    log = logs.open()
    log.append([worst, worst])
    (segment,) = logs.contents().values()
    assert len(segment.splitlines()) == segment.count(b"\n") == 3
    decoded = logs.lines()[1]
    assert decoded["name"] == character * 256
    assert decoded["user_agent"] == character * 256
    log.close()


def test_the_header_tells_segments_apart(logs: Logs) -> None:
    log = logs.open(size=1)
    for _ in range(20):
        log.append([logs.event()])
    log.close()
    starts: set[bytes] = set()
    for name, data in logs.contents().items():
        header = data[: data.index(b"\n") + 1]
        assert 1024 <= len(header) <= 1100
        line = wire.decode_line(header)
        assert (line["action"], line["seq"]) == ("log.segment", int(name[6:18]))
        assert line["details"]["previous_checkpoint"] is None
        assert line["resource_id"] == name
        assert data.index(line["id"].encode()) + len(line["id"]) <= 50
        starts.add(data[:50])
    assert len(starts) == len(logs.contents()) == 20


def test_segments_roll_at_their_size(logs: Logs) -> None:
    log = logs.open(size=4000)
    before: dict[str, bytes] = {}
    for _ in range(60):
        log.append([logs.event()])
        check_only_appended(before, logs.contents())
        before = logs.contents()
    log.close()
    names = sorted(before)
    assert len(names) > 4
    position = 0
    for name in names:
        assert name == segment_name(position)
        assert re.fullmatch(r"audit-\d{12}\.ndjson", name)
        raw = before[name].splitlines(keepends=True)
        position += len(raw)
        if name != names[-1]:
            # As soon as it was that large, and no sooner.
            assert len(before[name]) >= 4000 > len(before[name]) - len(raw[-1])
    assert [line["seq"] for line in logs.lines()] == list(range(position))
    assert oct((logs.directory / names[0]).stat().st_mode & 0o777) == "0o640"
    assert list(logs.scratch.iterdir()) == []


def test_segments_roll_at_their_age_also_in_another_process(logs: Logs) -> None:
    log = logs.open(age=100.0)
    log.append([logs.event()])
    logs.clock.now += 99.9
    log.append([logs.event()])
    assert segments(logs.directory) == [0]
    # The age is that of the segment, not of the process.
    other = logs.open(age=100.0)
    logs.clock.now += 0.2
    other.append([logs.event()])
    assert segments(logs.directory) == [0, 3]
    assert [line.seq for line in log.catch_up()] == [3, 4]
    log.append([logs.event()])
    assert segments(logs.directory) == [0, 3]
    assert [line["seq"] for line in logs.lines()] == list(range(6))
    log.close()
    other.close()


def test_a_batch_stays_in_one_segment(logs: Logs) -> None:
    log = logs.open(size=2000)
    log.append([logs.event() for _ in range(100)])
    assert segments(logs.directory) == [0]
    log.append([logs.event()])
    assert segments(logs.directory) == [0, 101]
    log.close()


def test_processes_follow_each_other_into_new_segments(logs: Logs) -> None:
    random = Random(7)
    processes = [logs.open(size=3000) for _ in range(3)]
    seen: list[list[int]] = [[], [], []]
    before: dict[str, bytes] = {}
    for _ in range(150):
        index = random.randrange(3)
        log = processes[index]
        assert log.changed() == (log.position < len(logs.lines()))
        seen[index] += [line.seq for line in log.catch_up()]
        assert not log.changed()
        assert log.position == len(logs.lines())
        begin = log.position
        log.append([logs.event() for _ in range(random.randint(1, 4))])
        seen[index] += range(begin, log.position)
        check_only_appended(before, logs.contents())
        before = logs.contents()
    for index, log in enumerate(processes):
        seen[index] += [line.seq for line in log.catch_up()]
        assert seen[index] == list(range(len(logs.lines())))
        log.close()
    assert len(before) > 10


def next_line(logs: Logs, offset: int = 0) -> bytes:
    """A line as the next event would be, but for its seq."""
    seq = len(logs.lines()) + offset
    return wire.encode_lines([logs.event("NEVER")], seq, times.render(logs.clock.now))


Tail = Callable[[Logs], bytes]

TAILS: dict[str, Tail] = {
    "half a line": lambda logs: next_line(logs)[:100],
    "a line without its newline": lambda logs: next_line(logs)[:-1],
    "one byte": lambda logs: b"{",
    "a newline": lambda logs: b"\n",
    "newlines": lambda logs: b"\n\n\n",
    "garbage": lambda logs: b"\xff\xfe\r\x00\x80garbage",
    "garbage and a newline": lambda logs: b"\xff\xfe\r\x00\x80garbage\r\n",
    "zeros": lambda logs: bytes(5000),
    "zeros and a newline": lambda logs: bytes(5000) + b"\n",
    "more than a chunk of zeros": lambda logs: bytes((1 << 20) + 5000),
    "more than a chunk of lines of garbage": lambda logs: b"garbage\n" * 200_000,
    "a line with a seq too large": lambda logs: next_line(logs, 1),
    "a line with a seq too small": lambda logs: next_line(logs, -1),
    "the first half of a batch, then half a line": lambda logs: next_line(logs)[:-7] + b"\n",
    "JSON that is no event": lambda logs: b"[]\n{}\n1\n",
    "garbage, then the line after next": lambda logs: b"garbage\n" + next_line(logs, 1),
    "garbage, then the next line": lambda logs: b"garbage\n" + next_line(logs),
    "zeros, then the line after next": lambda logs: bytes(512) + b"\n" + next_line(logs, 1),
    "half a line, then three more": lambda logs: (
        next_line(logs)[:200] + b"\n" + b"".join(next_line(logs, n) for n in (1, 2, 3))
    ),
    "a line with a hole in it, then one more": lambda logs: (
        next_line(logs).replace(b"NEVER", bytes(5)) + next_line(logs, 1)
    ),
}


@pytest.mark.parametrize("who", ["opens", "follows", "opens after approaching", "approaches"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_torn_tail_stays_and_a_new_segment_begins(logs: Logs, tail: str, who: str) -> None:
    log = logs.open()
    log.append([logs.event() for _ in range(5)])
    other = logs.open()
    size = len(logs.lines())
    assert size == 6
    logs.tear(TAILS[tail](logs))
    before = logs.contents()
    assert len(logs.lines()) == size
    reader = logs.new() if who.startswith("opens") else other
    if who in ("opens after approaching", "approaches"):
        assert len(list(reader.approach())) == (size if reader is not other else 0)
        assert list(reader.approach()) == []
    if who.startswith("opens"):
        reader.open()
    assert list(reader.catch_up()) == []
    assert reader.position == size
    assert not reader.changed()
    reader.append([logs.event("AFTER")])
    after = logs.contents()
    # Not a byte of it has changed, and none was added.
    assert {name: after[name] for name in before} == before
    assert sorted(after) == [segment_name(0), segment_name(size)]
    assert [line["seq"] for line in logs.lines()] == list(range(size + 2))
    assert logs.lines()[-1]["name"] == "AFTER"
    # The one who wrote first finds his way, too, and so does a plain reader.
    assert [line.seq for line in log.catch_up()] == [size, size + 1]
    log.append([logs.event("LAST")])
    chunks = list(ChunkReader(logs.directory).read(0, log.position))
    decoded = [wire.decode_line(raw) for chunk in chunks for raw in chunk.data.splitlines()]
    assert decoded == logs.lines()
    for one in {id(one): one for one in (log, other, reader)}.values():
        one.close()


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_just_being_written_is_read_later(logs: Logs, seed: int, *, opened: bool) -> None:
    """Without the lock a log may end anywhere. It is read to its end all the same, each line once,
    and is not torn.
    """
    random = Random(seed)
    size = random.choice((2000, 20_000, 64 << 20))
    writer = logs.open(size=size)
    for _ in range(60):
        writer.append(
            [logs.event("N" * random.randint(1, 200)) for _ in range(random.randint(1, 9))]
        )
    whole = logs.contents()
    for path in logs.directory.iterdir():
        path.unlink()
    lines: list[int] = []
    reader = logs.new(size=size)
    for number, (name, data) in enumerate(sorted(whole.items())):
        header = data.index(b"\n") + 1
        ends = [
            random.randrange(header, len(data) + 1) for _ in range(random.choice((0, 1, 3, 30)))
        ]
        path = logs.directory / name
        for end in [*sorted(ends), len(data)]:
            # A segment appears with its header. What is behind it grows.
            path.write_bytes(data[:end])
            if number == 0 and opened and not lines:
                reader.open()
                lines += range(reader.position)
            lines += [line.seq for line in reader.approach()]
            assert len(lines) == reader.position == data[:end].count(b"\n") + int(name[6:18])
    if not opened:
        reader.open()
    assert not reader.changed()
    assert lines == list(range(writer.position))
    reader.append([logs.event("LAST")])
    assert logs.lines()[-1]["name"] == "LAST"
    # Only what is sealed has a successor.
    assert len(logs.contents()) == len(whole) + (len(data) >= size)
    reader.close()
    writer.close()


def archive(logs: Logs, minimum: int) -> None:
    """Nothing is left of what was before this segment."""
    MinimumFile.beside(logs.directory).write(Minimum(minimum), Durable())
    for first in segments(logs.directory):
        if first < minimum:
            (logs.directory / segment_name(first)).unlink()


@pytest.mark.parametrize("rolls", [0, 1, 2, 5])
@pytest.mark.parametrize("archived", [False, True])
def test_between_approaching_and_opening_others_go_on(
    logs: Logs, rolls: int, *, archived: bool
) -> None:
    writer = logs.open(size=1)
    for _ in range(3):
        writer.append([logs.event()])
    reader = logs.new(size=1)
    assert [line.seq for line in reader.approach()] == [4, 5]
    for _ in range(rolls):
        writer.append([logs.event(), logs.event()])
    if archived:
        archive(logs, segments(logs.directory)[-1])
    reader.open()
    assert reader.position == writer.position == 6 + 3 * rolls
    assert not reader.changed()
    reader.append([logs.event("LAST")])
    assert [line.seq for line in writer.catch_up()][-1] == reader.position - 1
    reader.close()
    writer.close()


@pytest.mark.parametrize("damage", ["removed", "cut off", "all removed"])
def test_what_is_taken_away_between_approaching_and_opening_is_missed(
    logs: Logs, damage: str
) -> None:
    writer = logs.open(size=4000)
    for _ in range(30):
        writer.append([logs.event()])
    reader = logs.new()
    read = [line.seq for line in reader.approach()]
    last = logs.directory / segment_name(read[0])
    if damage == "cut off":
        last.write_bytes(last.read_bytes()[:-1])
    else:
        last.unlink()
    if damage == "all removed":
        for path in logs.directory.iterdir():
            path.unlink()
    with pytest.raises(LogDamaged, match=last.name):
        reader.open()
    reader.close()
    writer.close()


def test_a_long_way_is_gone_again(logs: Logs) -> None:
    """What is appended while much is read is read as well, and what is appended then is little."""
    writer, reader = logs.open(), logs.open()
    batch = [logs.event("N" * 200) for _ in range(2000)]
    for _ in range(3):
        writer.append(batch)
    seen: list[int] = []
    for line in reader.approach():
        seen.append(line.seq)
        if line.seq in (10, 6010):
            writer.append(batch)
    assert seen == list(range(writer.position))
    assert len(seen) == reader.position == 10_001
    reader.close()
    writer.close()


def test_lines_far_from_each_other_are_read_together(tmp_path: Path) -> None:
    """More segments than are open at once, some with lines far behind each other."""
    line, far, longest = b'{"seq":1}', 1 << 20, b"x" * (MAX_LINE - 1)
    places: list[tuple[int, int]] = []
    for segment in range(150):
        data = line + b"\n" + b"y" * (far * (segment % 30 == 0)) + b"\n"
        (tmp_path / segment_name(segment)).write_bytes(data + longest + b"\n" + line)
        places += [(segment, 0), (segment, len(data)), (segment, len(data) + MAX_LINE)]
    Random(1).shuffle(places)
    expected = [longest if 0 < n < 20 or far < n < far + 20 else line for _, n in places]
    assert read_lines(tmp_path, places) == expected
    assert read_lines(tmp_path, []) == []
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path, [(0, 0), (150, 0)])
    with pytest.raises(ValueError, match="no place"):
        read_lines(tmp_path, [(0, (1 << 63) - 1)])


def test_a_line_that_rotted_away_is_missed(logs: Logs) -> None:
    """In a segment that is read again for a recovery: it may stand for a change."""
    log = logs.open(size=2000)
    for _ in range(3):
        log.append([logs.event() for _ in range(10)])
    first = logs.directory / segment_name(0)
    lines = first.read_bytes().split(b"\n")
    lines[4] = bytes(len(lines[4]))
    first.write_bytes(b"\n".join(lines))
    assert [line.seq for line in log.lines(12)] == list(range(12, log.position))
    with pytest.raises(LogDamaged, match="Event 4 "):
        list(log.lines(2))
    log.close()


def test_complete_lines_before_a_torn_one_count(logs: Logs) -> None:
    """A batch of which a part reached the disk: whole lines happened, the torn one did not."""
    log = logs.open()
    log.append([logs.event()])
    logs.tear(next_line(logs) + next_line(logs, 1) + next_line(logs, 2)[:50])
    assert [line.seq for line in log.catch_up()] == [2, 3]
    log.append([logs.event()])
    assert segments(logs.directory) == [0, 4]
    assert [line["seq"] for line in logs.lines()] == list(range(6))
    log.close()


@pytest.mark.parametrize("content", [b"", b"garbage\n", b"{", bytes(2000)])
def test_a_segment_without_its_header_is_reported(logs: Logs, content: bytes) -> None:
    log = logs.open()
    log.append([logs.event()])
    (logs.directory / segment_name(2)).write_bytes(content)
    with pytest.raises(LogDamaged, match="audit-000000000002"):
        list(log.catch_up())
    with pytest.raises(LogDamaged, match="audit-000000000002"):
        logs.open()
    log.close()


def test_a_segment_that_begins_with_another_seq_is_reported(logs: Logs) -> None:
    log = logs.open()
    log.append([logs.event()])
    log.close()
    (logs.directory / segment_name(0)).rename(logs.directory / segment_name(5))
    with pytest.raises(LogDamaged):
        logs.open()


def test_other_files_in_the_directory_are_no_segments(logs: Logs) -> None:
    log = logs.open()
    log.append([logs.event()])
    log.close()
    for name in ("audit-000000000000.ndjson.gz", "audit-old.ndjson", ".audit-0.ndjson.swp", "x"):
        (logs.directory / name).write_bytes(b"not ours")
    again = logs.open()
    assert again.position == 2
    again.append([logs.event()])
    again.close()


FAULTS = [("write", no_space), ("write", short_write), ("sync", io_error), ("create", no_space)]
FAULTS += [("rename", io_error), ("sync_path", io_error), ("open_existing", io_error)]


@pytest.mark.parametrize(("kind", "error"), FAULTS)
@pytest.mark.parametrize("size", [1, 64 << 20])
def test_a_failed_append_leaves_a_log_that_goes_on(
    logs: Logs, kind: str, error: Callable[[], OSError], size: int
) -> None:
    disk = Faulty({kind}, error)
    log = logs.open(size=size, durable=disk)
    log.append([logs.event()])
    acknowledged = logs.lines()
    before = logs.contents()
    disk.broken = True
    for _ in range(3):
        try:
            log.append([logs.event("LOST")])
        except OSError:
            log.close()
            disk.broken = False
            log = logs.open(size=size, durable=disk)
            disk.broken = True
        else:
            assert size > 1 or kind not in ("write", "sync", "create", "rename")
    disk.broken = False
    check_only_appended(before, logs.contents())
    log.append([logs.event("AFTER")])
    check_only_appended(before, logs.contents())
    lines = logs.lines()
    assert lines[: len(acknowledged)] == acknowledged
    assert lines[-1]["name"] == "AFTER"
    assert log.position == len(lines)
    log.close()


def test_a_segment_appears_with_its_header_or_not_at_all(logs: Logs) -> None:
    for calls in itertools.count():
        disk = Unplugged()
        log = logs.open(size=1, durable=disk)
        before = logs.lines()
        disk.arm(calls)
        try:
            log.append([logs.event()])
        except PowerOff:
            assert disk.off.is_set()
        log.close()
        for name, data in logs.contents().items():
            line = wire.decode_line(data[: data.index(b"\n") + 1])
            assert (line["action"], line["seq"]) == ("log.segment", int(name[6:18]))
        assert logs.lines()[: len(before)] == before
        # Whoever comes next goes on behind it.
        after = logs.open()
        assert after.position == len(logs.lines())
        after.close()
        if not disk.off.is_set():
            break
    assert calls > 8


def test_an_event_that_is_too_long_is_not_written(logs: Logs) -> None:
    log = logs.open()
    log.append([logs.event()])
    before = logs.contents()
    long = logs.event()._replace(details={"allow": ["x" * 8000]})
    with pytest.raises(ValueError, match="does not fit"):
        log.append([logs.event(), long])
    assert logs.contents() == before
    log.append([logs.event()])
    assert [line["seq"] for line in logs.lines()] == [0, 1, 2]
    log.close()


def test_a_part_of_a_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.write` may take less than it was given without saying why."""
    path = tmp_path / "file"
    descriptor = Durable().open_append(path, 0o600)
    monkeypatch.setattr("os.write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(ShortWrite, match="wrote 2 of 3"):
        Durable().write(descriptor, b"abc")
    monkeypatch.undo()


@pytest.mark.parametrize("seed", range(6))
def test_a_chunk_reader_reads_what_is_there(logs: Logs, seed: int) -> None:
    random = Random(seed)
    log = logs.open(size=random.choice((1, 5000, 1 << 20)))
    for _ in range(40):
        log.append([logs.event("N" * random.randint(1, 250)) for _ in range(random.randint(1, 30))])
        if random.random() < 0.1:
            logs.tear(random.choice((b"{torn", b"torn\n", bytes(100), next_line(logs, 3))))
            assert list(log.catch_up()) == []
    plain = [
        line.rstrip(b"\n")
        for first, data in sorted((int(name[6:18]), data) for name, data in logs.contents().items())
        for line in data.splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    # Of torn tails none is a line that counts.
    expected = [raw for raw in plain if _seq(raw) is not None]
    expected = _continuing(expected)
    assert len(expected) == log.position == len(logs.lines())
    reader = ChunkReader(logs.directory)
    for turn in range(300):
        start = random.randint(0, log.position)
        stop = random.randint(start, log.position)
        chunks = list((reader if turn % 3 else ChunkReader(logs.directory)).read(start, stop))
        found: list[bytes] = []
        places: list[tuple[int, int]] = []
        for chunk in chunks:
            assert chunk.first == start + len(found)
            raw = chunk.data.splitlines(keepends=True)
            place = chunk.offset
            for line in raw:
                assert line.endswith(b"\n")
                places.append((chunk.segment, place))
                place += len(line)
            found += [line.rstrip(b"\n") for line in raw]
        assert found == expected[start:stop] == read_lines(logs.directory, places)
    with pytest.raises(LogDamaged):
        list(reader.read(0, log.position + 1))
    log.close()


def _seq(raw: bytes) -> int | None:
    try:
        return wire.decode_line(raw)["seq"]
    except wire.Malformed:
        return None


def _continuing(lines: Sequence[bytes]) -> list[bytes]:
    found: list[bytes] = []
    for raw in lines:
        if _seq(raw) == len(found):
            found.append(raw)
    return found


def test_a_chunk_reader_follows_a_log_of_several_mebibytes(logs: Logs) -> None:
    log = logs.open(size=3 << 20)
    reader = ChunkReader(logs.directory)
    known = 0
    for _ in range(12):
        log.append([logs.event("N" * 250) for _ in range(1000)])
        chunks = list(reader.read(known, log.position))
        for chunk in chunks:
            assert chunk.first == known
            assert len(chunk.data) < (1 << 20) + MAX_LINE
            for raw in chunk.data.splitlines():
                assert wire.decode_line(raw)["seq"] == known
                known += 1
        assert known == log.position
    assert len(segments(logs.directory)) > 1
    log.close()


def test_times_never_go_backwards(logs: Logs) -> None:
    random = Random(3)
    logs_of = [logs.open(size=4000), logs.open(size=4000)]
    for _ in range(80):
        index = random.randrange(2)
        if random.random() < 0.1:
            # A new process knows no more than what is in the log.
            logs_of[index].close()
            logs_of[index] = logs.open(size=4000)
        list(logs_of[index].catch_up())
        logs.clock.now += random.choice((-5000.0, -0.000001, 0.0, 0.0000004, 1.1, 3.3))
        given = logs_of[index].append([logs.event(), logs.event()])
        assert logs.lines()[-1]["time"] == given
    moments = [line["time"] for line in logs.lines()]
    assert moments == sorted(moments)
    assert len(segments(logs.directory)) > 3
    # The clock is followed as soon as it is ahead again.
    logs.clock.now = times.parse(moments[-1], "time") + 10.5
    list(logs_of[0].catch_up())
    assert logs_of[0].append([logs.event()]) == times.render(logs.clock.now)
    for log in logs_of:
        log.close()


def test_the_real_clock_is_in_the_lines(logs: Logs) -> None:
    logs.clock.now = time.time()
    log = logs.open()
    log.append([logs.event()])
    assert abs(times.parse(logs.lines()[-1]["time"], "time") - time.time()) < 5
    log.close()


@pytest.mark.parametrize("place", [0, 7, 40])
def test_a_line_has_8000_bytes_and_not_one_more(logs: Logs, place: int) -> None:
    """Wherever it stands among others."""
    events = [logs.event() for _ in range(41)]
    time = times.render(logs.clock.now)
    room = MAX_LINE - len(
        wire.encode_lines([events[place]._replace(details={"n": ""})], place, time)
    )
    events[place] = events[place]._replace(details={"n": "x" * room})
    lines = wire.encode_lines(events, 0, time).splitlines(keepends=True)
    assert len(lines[place]) == MAX_LINE
    events[place] = events[place]._replace(details={"n": "x" * (room + 1)})
    with pytest.raises(wire.Unwritable) as raised:
        wire.encode_lines(events, 0, time)
    assert list(raised.value.reasons) == [place]
