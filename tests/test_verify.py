"""`verify`: a log is held against what was signed, and the first bad place is named."""

import asyncio
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import orjson
import pytest

from flowmason_secrets import app
from flowmason_secrets import signer as signer_module
from flowmason_secrets.core import merkle
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.errors import ConfigurationError, LogDamaged
from flowmason_secrets.core.merkle import Frontier
from flowmason_secrets.core.note import Signer
from flowmason_secrets.storage import scanning
from flowmason_secrets.verifying import Request, Verdict, verify

from .harness.server import settings_for
from .harness.signed import history, key_of, newest, raw_lines, until
from .test_signing import write


class Place(NamedTuple):
    """A data directory that can be changed."""

    root: Path

    @property
    def segments(self) -> list[Path]:
        return sorted((self.root / "events").iterdir())

    def segment_of(self, seq: int) -> Path:
        return next(one for one in reversed(self.segments) if int(one.name[6:18]) <= seq)

    def edit(self, seq: int, change: Callable[[list[bytes], int], None]) -> None:
        """Change the lines of a segment; `change` gets them, and the place of line `seq`."""
        path = self.segment_of(seq)
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines, seq - int(path.name[6:18]))
        path.write_bytes(b"".join(lines))

    @property
    def signer(self) -> Signer:
        return Signer.decode(key_of(self.root).read_text().strip())

    @property
    def size(self) -> int:
        return newest(self.root).size

    @property
    def middle(self) -> int:
        """A line in the midst of a segment in the midst of the log."""
        firsts = [int(one.name[6:18]) for one in self.segments]
        return (firsts[1] + firsts[2]) // 2

    @property
    def sealed(self) -> int:
        """The first line of the third segment."""
        return int(self.segments[2].name[6:18])

    def verify(self, **options: object) -> Verdict:
        keys = [self.signer.verifier]
        return verify(Request(self.root, keys, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("verify") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signer_module, "INTERVAL", 0.01)
        asyncio.run(make(root))
    place = Place(root)
    assert len(place.segments) > 3
    return place


async def make(root: Path, segment_bytes: int = 90_000, rounds: Sequence[int] = (150,) * 6) -> None:
    """A log of several segments, with checkpoints in it, all of it signed."""
    settings = settings_for(root, segment_bytes=segment_bytes)
    service = await app.open_service(settings, signs=True)
    for count in rounds:
        await write(service, count)
        await until(lambda: newest(root).size >= len(raw_lines(root)))
    await service.close()


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """A copy to change."""
    shutil.copytree(made.root.parent, tmp_path / "copy")
    return Place(tmp_path / "copy" / made.root.name)


def test_what_the_service_wrote_is_valid(made: Place) -> None:
    lines = raw_lines(made.root)
    assert any(orjson.loads(line)["action"] == "log.checkpoint" for line in lines)
    verdict = made.verify()
    assert verdict.differences == []
    frontier = Frontier()
    frontier.extend(merkle.leaf_hashes(lines))
    assert (verdict.events, verdict.signed) == (len(lines), len(lines))
    assert verdict.root == frontier.root() == newest(made.root).root
    assert verdict.checkpoints == len(history(made.root)) > 5
    times = tuple(orjson.loads(lines[at])["time"] for at in (0, -1))
    assert verdict.times == times


# --- tampering --------------------------------------------------------------------------------


def change(place: Place, seq: int) -> None:
    """Another line, that is still an event with this number."""

    def one(lines: list[bytes], at: int) -> None:
        lines[at] = lines[at].replace(b'"status":', b'"status": ')

    place.edit(seq, one)


def swap(place: Place, seq: int) -> None:
    def two(lines: list[bytes], at: int) -> None:
        lines[at : at + 2] = lines[at + 1], lines[at]

    place.edit(seq, two)


def swap_contents(place: Place, seq: int) -> None:
    """Two events change places, and get each other's number and time."""

    def two(lines: list[bytes], at: int) -> None:
        one, other = orjson.loads(lines[at]), orjson.loads(lines[at + 1])
        for name in ("seq", "time"):
            one[name], other[name] = other[name], one[name]
        lines[at : at + 2] = orjson.dumps(other) + b"\n", orjson.dumps(one) + b"\n"

    place.edit(seq, two)


def join(place: Place, seq: int) -> None:
    """Two events on one line and none on the next: as many of both as before."""

    def two(lines: list[bytes], at: int) -> None:
        lines[at : at + 2] = lines[at][:-1] + lines[at + 1], b"\n"

    place.edit(seq, two)


def shift(place: Place, seq: int) -> None:
    """An event that ends on the next line, where another one follows."""

    def two(lines: list[bytes], at: int) -> None:
        lines[at : at + 2] = b"{\n", lines[at][1:-1] + lines[at + 1]

    place.edit(seq, two)


def repeat(place: Place, seq: int) -> None:
    place.edit(seq, lambda lines, at: lines.insert(at, lines[at]))


def drop(place: Place, seq: int) -> None:
    place.edit(seq, lambda lines, at: lines.__delitem__(at))


def drop_and_renumber(place: Place, seq: int) -> None:
    """Nothing is missing from the numbers."""
    drop(place, seq)
    for path in place.segments:
        first = int(path.name[6:18])
        lines = path.read_bytes().splitlines(keepends=True)
        if first > seq:
            path.unlink()
            first -= 1
            path = path.with_name(f"audit-{first:012d}.ndjson")
        numbered = [orjson.loads(line) | {"seq": first + at} for at, line in enumerate(lines)]
        path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in numbered))


def cut(place: Place, size: int) -> None:
    """Leave so many events."""
    for segment in reversed(place.segments):
        first = int(segment.name[6:18])
        if first >= size:
            segment.unlink()
        else:
            lines = segment.read_bytes().splitlines(keepends=True)
            segment.write_bytes(b"".join(lines[: size - first]))
            return


def go_on(place: Place, seq: int, count: int) -> None:
    """Cut, and continue with new events, later ones of the same kind."""
    reads = [line for line in raw_lines(place.root) if b'"action":"secret.read"' in line]
    last = orjson.loads(reads[-1])
    cut(place, seq)
    with place.segments[-1].open("ab") as file:
        for number in range(seq, seq + count):
            file.write(orjson.dumps(last | {"seq": number, "id": f"{number:032x}"}) + b"\n")


def overlap(place: Place, seq: int) -> None:
    """A second segment with lines that the first one has."""
    path = place.segment_of(seq)
    lines = path.read_bytes().splitlines(keepends=True)[seq - int(path.name[6:18]) :]
    path.with_name(f"audit-{seq:012d}.ndjson").write_bytes(b"".join(lines))


def without_segments(place: Place) -> None:
    for segment in place.segments:
        segment.unlink()


def roll_everything_back(place: Place) -> None:
    roll_back(place, 2)
    cut(place, place.size)


def roll_back(place: Place, entries: int) -> None:
    """The checkpoint is an old one, and the history ends with it."""
    path = place.root / "checkpoints.ndjson"
    lines = path.read_bytes().splitlines(keepends=True)[:entries]
    path.write_bytes(b"".join(lines))
    (place.root / "checkpoint").write_bytes(history(place.root)[-1])


def old_checkpoint(place: Place) -> None:
    (place.root / "checkpoint").write_bytes(history(place.root)[0])


def sign_anew(place: Place, signer: Signer | None = None) -> None:
    """Every checkpoint of the history is made anew over the lines as they are."""
    signer = signer or place.signer
    leaves = merkle.leaf_hashes(raw_lines(place.root))
    entries = b""
    for note in history(place.root):
        frontier = Frontier()
        frontier.extend(leaves[: int(note.splitlines()[1])])
        note = Checkpoint(signer.name, frontier.size, frontier.root()).sign(signer)
        time = "2026-01-01T00:00:00.000000Z"
        entries += orjson.dumps({"time": time, "checkpoint": note.decode()}) + b"\n"
    (place.root / "checkpoints.ndjson").write_bytes(entries)
    (place.root / "checkpoint").write_bytes(note)


def change_and_sign_anew(place: Place, seq: int) -> None:
    change(place, seq)
    sign_anew(place)
    shutil.rmtree(place.root / "tree")


def turn_back_time(place: Place, seq: int) -> None:
    def one(lines: list[bytes], at: int) -> None:
        line = orjson.loads(lines[at])
        lines[at] = orjson.dumps(line | {"time": "2020-01-01T00:00:00.000000Z"}) + b"\n"

    place.edit(seq, one)
    sign_anew(place)


def forge_entry(place: Place) -> None:
    """A checkpoint that another key of the same name signed."""
    path = place.root / "checkpoints.ndjson"
    lines = path.read_bytes().splitlines(keepends=True)
    signer = Signer(place.signer.name, bytes(32))
    note = Checkpoint(signer.name, 5, bytes(32)).sign(signer).decode()
    entry = {"time": "2026-01-01T00:00:00.000000Z", "checkpoint": note}
    path.write_bytes(orjson.dumps(entry) + b"\n" + b"".join(lines))


def other_root(place: Place) -> None:
    """A checkpoint by the right key about a log that never was."""
    note = Checkpoint(place.signer.name, place.size - 1, bytes(32)).sign(place.signer)
    path = place.root / "checkpoints.ndjson"
    lines = path.read_bytes().splitlines(keepends=True)
    entry = {"time": "2026-01-01T00:00:00.000000Z", "checkpoint": note.decode()}
    lines.insert(-1, orjson.dumps(entry) + b"\n")
    path.write_bytes(b"".join(lines))


def without_header(place: Place) -> None:
    """A segment begins with another event, and all of it is signed."""

    def other(lines: list[bytes], at: int) -> None:
        lines[at] = (
            orjson.dumps(orjson.loads(lines[at + 1]) | {"seq": place.sealed, "id": "0"}) + b"\n"
        )

    place.edit(place.sealed, other)
    sign_anew(place)


def swap_entries(place: Place) -> None:
    path = place.root / "checkpoints.ndjson"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2:4] = lines[3], lines[2]
    path.write_bytes(b"".join(lines))


def other_cosigned(place: Place) -> None:
    note = Checkpoint(place.signer.name, 7, bytes(32)).sign(place.signer)
    (place.root / "checkpoint.cosigned").write_bytes(note)


class Row(NamedTuple):
    """How a log is tampered with; the seq and the place that are named first, and the reason;
    whether the service refuses to start on it.
    """

    tamper: Callable[[Place], object]
    seq: Callable[[Place], int | None]
    reason: str
    refused: bool = False
    since: Callable[[Place], bytes] | None = None


def middle(place: Place) -> int:
    return place.middle


def last(place: Place) -> int:
    return place.size - 1


def nowhere(place: Place) -> None:
    """No line is wrong."""


def first_checkpoint(place: Place) -> bytes:
    return history(place.root)[0]


def newest_checkpoint(place: Place) -> bytes:
    return history(place.root)[-1]


ROWS: dict[str, Row] = {
    "a line changed": Row(lambda p: change(p, p.middle), middle, "was changed since"),
    "the first line changed": Row(lambda p: change(p, 0), lambda p: 0, "was changed since"),
    "the last line changed": Row(
        lambda p: change(p, p.size - 1), last, "was changed since", refused=True
    ),
    "a line swapped": Row(
        lambda p: swap(p, p.middle), middle, r"has seq {after} in place of {middle}$"
    ),
    "two events exchanged": Row(lambda p: swap_contents(p, p.middle), middle, "was changed since"),
    "two lines joined": Row(lambda p: join(p, p.middle), middle, "not an event"),
    "a line that ends elsewhere": Row(lambda p: shift(p, p.middle), middle, "not an event"),
    "a line repeated": Row(
        lambda p: repeat(p, p.middle),
        lambda p: p.middle + 1,
        r"has seq {middle} in place of {after}$",
    ),
    "a line dropped": Row(
        lambda p: drop(p, p.middle), middle, r"has seq {after} in place of {middle}$"
    ),
    "a line dropped, the others renumbered": Row(
        lambda p: drop_and_renumber(p, p.middle), middle, "was changed since", refused=True
    ),
    "the last line dropped": Row(lambda p: cut(p, p.size - 1), last, r"is missing", refused=True),
    "the end of a segment cut": Row(
        lambda p: drop(p, p.sealed - 1), lambda p: p.sealed - 1, r"event \d+ is missing"
    ),
    "a segment missing": Row(
        lambda p: p.segments[1].unlink(),
        lambda p: int(p.segments[1].name[6:18]),
        r"events {second} to {before_sealed} are missing",
    ),
    "the first segment missing": Row(
        lambda p: p.segments[0].unlink(), lambda p: 0, "events 0 to .* are missing"
    ),
    "the last segment missing": Row(
        lambda p: p.segments[-1].unlink(),
        lambda p: int(p.segments[-1].name[6:18]),
        r"to {last} are missing",
        refused=True,
    ),
    "no segment at all": Row(
        without_segments,
        lambda p: 0,
        r"events 0 to {last} are missing",
        refused=True,
    ),
    "an empty segment": Row(
        lambda p: p.segments[2].write_bytes(b""), lambda p: p.sealed, "its segment is empty"
    ),
    "a tail cut": Row(
        lambda p: cut(p, p.size - 30), lambda p: p.size - 30, "are missing", refused=True
    ),
    "a cut tail continued": Row(
        lambda p: go_on(p, p.size - 30, 40),
        lambda p: p.size - 30,
        "was changed since",
        refused=True,
    ),
    "a cut tail continued, not as far": Row(
        lambda p: go_on(p, p.size - 30, 20),
        lambda p: p.size - 30,
        "was changed since",
        refused=True,
    ),
    "segments overlap": Row(lambda p: overlap(p, p.middle), middle, "is there twice"),
    "a checkpoint rolled back": Row(old_checkpoint, nowhere, "an old one: {size} were signed"),
    "all checkpoints rolled back": Row(
        lambda p: roll_back(p, 1), nowhere, r"lacks the checkpoint of \d+ events that event"
    ),
    "the log rolled back, and an older checkpoint": Row(
        roll_everything_back,
        lambda p: int(history(p.root)[1].splitlines()[1]),
        "the older checkpoint was signed over them",
        since=newest_checkpoint,
    ),
    "a history signed anew": Row(
        lambda p: change_and_sign_anew(p, 3), nowhere, "was signed over other events"
    ),
    "a history signed anew, and an older checkpoint": Row(
        lambda p: change_and_sign_anew(p, 3),
        nowhere,
        "signed over other events",
        since=first_checkpoint,
    ),
    "a history signed anew with another key": Row(
        lambda p: sign_anew(p, Signer("a/log", bytes(32))),
        nowhere,
        "no known key has signed",
        refused=True,
    ),
    "a forged entry of the history": Row(forge_entry, nowhere, "no known key has signed"),
    "a statement about another log": Row(other_root, nowhere, "was signed over other events"),
    "time turned back": Row(lambda p: turn_back_time(p, p.middle), middle, "its time 2020-01-01"),
    "time turned back between segments": Row(
        lambda p: turn_back_time(p, p.sealed), lambda p: p.sealed, "its time 2020-01-01"
    ),
    "a segment without its first line": Row(
        without_header, lambda p: p.sealed, "not the first line of a segment"
    ),
    "two entries of the history swapped": Row(
        swap_entries, nowhere, r"is of \d+ events, and the one before it of \d+"
    ),
    "a cosigned checkpoint of another log": Row(
        other_cosigned, nowhere, "was signed over other events than the first 7"
    ),
    "no cosigned checkpoint": Row(
        lambda p: (p.root / "checkpoint.cosigned").write_bytes(b"\n"), nowhere, "the note has no"
    ),
    "no checkpoint": Row(lambda p: (p.root / "checkpoint").unlink(), nowhere, "is missing"),
    "no history": Row(lambda p: (p.root / "checkpoints.ndjson").unlink(), nowhere, "is missing"),
}


@pytest.mark.parametrize("name", ROWS)
async def test_tampering_is_found(place: Place, name: str) -> None:
    row = ROWS[name]
    seq = row.seq(place)
    since = None if row.since is None else row.since(place)
    words = {
        "middle": place.middle,
        "after": place.middle + 1,
        "last": place.size - 1,
        "size": place.size,
        "second": int(place.segments[1].name[6:18]),
        "before_sealed": place.sealed - 1,
    }
    keys = [place.signer.verifier]
    row.tamper(place)
    verdict = verify(Request(place.root, keys, since=since))
    first = verdict.differences[0]
    print(f"{name}: {first.place}: {first.problem}")
    reason = row.reason
    for word, number in words.items():
        reason = reason.replace(f"{{{word}}}", str(number))
    assert re.search(reason, first.problem), first
    assert first.seq == seq, first
    if row.refused:
        with pytest.raises((LogDamaged, ConfigurationError)):
            await app.open_service(settings_for(place.root), signs=True)


def test_without_tiles_the_range_between_two_checkpoints_is_named(place: Place) -> None:
    sizes = [0, *(int(note.splitlines()[1]) for note in history(place.root))]
    change(place, place.middle)
    shutil.rmtree(place.root / "tree")
    before = max(size for size in sizes if size <= place.middle)
    after = min(size for size in sizes if size > place.middle)
    first = place.verify().differences[0]
    assert first.seq == before
    assert first.place == f"somewhere among events {before} to {after - 1}"


# --- one bit ----------------------------------------------------------------------------------


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def line_at(path: Path, place: int) -> int:
    return path.read_bytes().count(b"\n", 0, place)


def expected_place(root: Path, path: Path, place: int) -> str | None:
    """What has to be named if a bit of this byte is another one; None: nothing vouches for it."""
    name = str(path.relative_to(root))
    if name.startswith("events/"):
        line = line_at(path, place)
        return f"event {int(path.name[6:18]) + line}, line {line + 1} of {path.name}"
    if name == "checkpoint":
        return "the newest checkpoint"
    if name == "checkpoints.ndjson":
        start = path.read_bytes().rfind(b"\n", 0, place) + 1
        # `{"time":"` and 27 characters.
        if 9 <= place - start < 36:
            return None
        return f"line {line_at(path, place) + 1} of {name}"
    assert name.startswith("tree/tile/")
    return name


@pytest.fixture(scope="module")
def logs(made: Place, tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    """Logs of several lengths, with short segments and with long ones."""
    found = [made]
    random = Random(7)
    for number in range(3):
        root = tmp_path_factory.mktemp("flips") / "data"
        size = random.choice((20_000, 60_000, 10_000_000))
        rounds = [random.randint(1, 120) for _ in range(random.randint(1, 4))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signer_module, "INTERVAL", 0.01)
            asyncio.run(make(root, size, rounds))
        found.append(Place(root))
        assert found[-1].verify().differences == [], number
    return found


@pytest.mark.parametrize("kind", ["events", "tree", "checkpoint", "checkpoints.ndjson"])
@pytest.mark.parametrize("seed", range(4))
def test_any_bit_of_any_file(
    logs: list[Place], tmp_path: Path, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first bad place is the line, the checkpoint or the tile with the bit."""
    random = Random(f"{kind} {seed}")
    log = logs[seed]
    shutil.copytree(log.root.parent, tmp_path / "copy")
    root = tmp_path / "copy" / log.root.name
    within = root / kind
    files = [one for one in ([within] if within.is_file() else within.rglob("*")) if one.is_file()]
    for _ in range(40):
        path = random.choice(files)
        at, bit = random.randrange(path.stat().st_size), random.randrange(8)
        if kind == "checkpoints.ndjson" or random.random() < 0.1:
            # Ends of lines are the rarest, and the hardest.
            ends = [match.start() for match in re.finditer(b"\n", path.read_bytes())]
            at = random.choice([at, *ends[-1:]]) + random.choice((0, 0, -1))
        monkeypatch.setattr(scanning, "BLOCK", random.choice((9000, 30_000, 1 << 20)))
        flip(path, at, bit)
        differences = Place(root).verify().differences
        flip(path, at, bit)
        place = expected_place(root, path, at)
        if place is not None:
            assert differences, (path, at, bit)
            assert differences[0].place == place, (at, bit, differences)
    assert Place(root).verify().differences == []
