"""`log archive`: old segments move away beside whoever works on the log, and nothing is lost at any
moment; what is left is proven, listed and queried as before.
"""

import asyncio
import fcntl
import gzip
import itertools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import aiohttp
import orjson
import pytest
import zstandard
from tlog_scales import tiles as scales_tiles
from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader

from flowmason_secrets import app
from flowmason_secrets.archiving import Archived
from flowmason_secrets.cli.verify import verified
from flowmason_secrets.core import checkpoint, merkle, times, tlogproof
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import (
    AnotherLog,
    EventArchived,
    LogDamaged,
    SecretsError,
)
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import AuditQuery, Grouping, ListQuery
from flowmason_secrets.core.tiles import Edge
from flowmason_secrets.index import sqlite
from flowmason_secrets.service import Service
from flowmason_secrets.storage import scanning
from flowmason_secrets.storage.archive import Target
from flowmason_secrets.storage.chunks import segment_name, segments
from flowmason_secrets.storage.compression import Form
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.exporting import export
from flowmason_secrets.storage.minimum import MinimumFile
from flowmason_secrets.storage.published import Layout
from flowmason_secrets.storage.signing import SigningKey
from flowmason_secrets.storage.staging import Journal
from flowmason_secrets.verifying import Request

from .harness.faults import Failing, Stopping, Watched, io_error
from .harness.following import AUDIT, Stream
from .harness.golang import go_verify
from .harness.grown import ACME, OTHER, SEGMENT, drop_oldest, grow, work
from .harness.load import SECRETS
from .harness.loss import Volatile
from .harness.server import issue_key, serving, session, settings_for
from .harness.signed import history, key_of, newest, sign, tree_of, verifier_of
from .harness.swift import swiftly
from .test_cli import Ended, local, run
from .test_log_export import exported, quiet

EVERYTHING = AuditQuery(None, limit=100_000)


class Log(NamedTuple):
    """A data directory, and the place that is archived to."""

    root: Path
    to: Path

    @property
    def firsts(self) -> list[int]:
        return segments(self.root / "events")

    @property
    def minimum(self) -> int:
        return MinimumFile(self.root / "minimum").read().minimum

    def segment(self, first: int) -> Path:
        return self.root / "events" / segment_name(first)

    def lines(self) -> list[bytes]:
        """All lines that are left, in the log and in the archive: each one is in one of them, or
        in both, as long as nothing is lost.
        """
        found: dict[int, bytes] = {}
        sources = {path.name: path.read_bytes() for path in (self.root / "events").iterdir()}
        if self.to.is_dir():
            archived = (path for path in self.to.iterdir() if path.suffix != ".part")
            sources |= {path.stem: plain(path) for path in archived}
        for data in sources.values():
            for line in data.split(b"\n")[:-1]:
                found[orjson.loads(line)["seq"]] = line
        assert sorted(found) == [*range(len(found))]
        return [found[seq] for seq in range(len(found))]


def plain(path: Path) -> bytes:
    """What a compressed file holds, as others read it."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def backdate(root: Path) -> None:
    """Nobody has written to any segment for a minute."""
    for path in (root / "events").iterdir():
        os.utime(path, (time.time() - 60,) * 2)


async def archived(
    log: Log, disk: Durable | None = None, before: float | None = None, form: Form = "zstd"
) -> Archived | None:
    """Archive what is older than that, or all that may go."""
    before = time.time() if before is None else before
    async with app.open_archiving(settings_for(log.root), disk) as archiving:
        return await archiving.archive(ACME, before, Target(log.to, form), quiet)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 900 events in several segments, one of which ends with a torn tail."""
    root = tmp_path_factory.mktemp("log") / "data"
    asyncio.run(grow(root, 150))
    with max((root / "events").iterdir()).open("ab") as file:
        file.write(b'{"v":1,"id":"0199')
    asyncio.run(grow(root, 730))
    backdate(root)
    assert len(segments(root / "events")) > 5
    return root


@pytest.fixture
def log(made: Path, tmp_path: Path) -> Log:
    """A copy of it."""
    shutil.copytree(made.parent, tmp_path / "copy")
    return Log(tmp_path / "copy" / "data", tmp_path / "archive")


# --- what moves, and what is left ---------------------------------------------------------------


@pytest.mark.parametrize("form", ["zstd", "gzip"])
async def test_what_is_old_and_signed_moves(log: Log, form: Form) -> None:
    whole = {path.name: path.read_bytes() for path in (log.root / "events").iterdir()}
    lines, firsts = log.lines(), log.firsts
    done = await archived(log, form=form)
    assert done is not None
    left = done.left
    suffix = {"zstd": ".zst", "gzip": ".gz"}[form]
    assert {path.name.removesuffix(suffix): plain(path) for path in log.to.iterdir()} == {
        name: data for name, data in whole.items() if int(name[6:18]) < left.minimum
    }
    assert {oct(path.stat().st_mode)[-3:] for path in log.to.iterdir()} == {"640"}
    # All but the newest went, and what has a bundle that is not full yet.
    assert left.minimum == log.minimum == max(n for n in firsts[1:] if n <= len(lines) // 256 * 256)
    assert log.firsts == [first for first in firsts if first >= left.minimum]
    assert (done.segments, done.events) == (len(list(log.to.iterdir())), left.minimum)
    assert log.lines()[: len(lines)] == lines
    # It is in the log what was done.
    event = orjson.loads(log.lines()[-1])
    assert (event["action"], event["actor"], event["org_id"]) == ("log.archive", "tester", None)
    assert event["details"] == {
        "segments": done.segments,
        "events": left.minimum,
        "first": 0,
        "last": left.minimum - 1,
        "minimum": left.minimum,
    }
    # The file says what FORMAT.md says.
    shown = orjson.loads((log.root / "minimum").read_bytes())
    assert shown["minimum"] == left.minimum
    assert shown["complete_since"] == orjson.loads(lines[left.minimum])["time"]
    assert shown["complete_since"] > orjson.loads(lines[left.minimum - 1])["time"]
    assert shown["organisations"] == ["acme", "other"]
    edge = Edge(left.minimum, lambda tile: left.edge[tile.level])
    edge.extend(merkle.leaf_hashes(lines[left.minimum :]))
    assert edge.root() == newest(log.root).root
    assert await archived(log) is None


async def test_only_what_is_older_than_that(log: Log) -> None:
    lines, firsts = log.lines(), log.firsts
    for count in (1, 2):
        last = times.parse(orjson.loads(lines[firsts[count] - 1])["time"], "time")
        assert await archived(log, before=last) is None
        assert log.firsts == firsts[count - 1 :]
        assert await archived(log, before=last + 1e-6) is not None
        assert log.firsts == firsts[count:]
    assert log.lines()[: len(lines)] == lines


async def test_what_others_still_need_stays(log: Log) -> None:
    """Changes that are staged, what was written just now, and what is not signed."""
    second, third = log.firsts[1:3]
    os.utime(log.segment(second))
    assert await archived(log) is not None
    assert log.minimum == second
    backdate(log.root)
    async with app.open_archiving(settings_for(log.root)) as archiving:
        # Of a process that may still write the event.
        journal = Journal(log.root / "staged", Durable(), "ab", third)
        assert await archiving.archive(ACME, time.time(), Target(log.to, "zstd"), quiet)
        assert log.minimum == third
    journal.settle()
    assert await archived(log) is not None
    assert log.minimum > third


async def test_what_is_not_signed_stays(tmp_path: Path) -> None:
    log = Log(tmp_path / "data", tmp_path / "archive")
    service = await app.open_service(settings_for(log.root, segment_bytes=SEGMENT))
    await work(service, 600)
    backdate(log.root)
    assert await archived(log) is None
    await sign(service)
    await work(service, 600)
    backdate(log.root)
    signed = newest(log.root).size
    done = await archived(log)
    assert done is not None
    assert log.minimum <= signed // 256 * 256
    # The next segment is not signed to its end, or its last bundle is not.
    assert min(first for first in log.firsts if first > log.minimum) > signed // 256 * 256
    await service.close()


async def test_what_is_left_is_listed_proven_and_queried(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """With the index as it was, and with a new one."""
    before = await look(log)
    await archived(log)
    left = log.minimum
    for again in range(3):
        if again == 1:
            remove_index(log)
        if again == 2:
            shutil.rmtree(log.root / "tree")
            remove_index(log)
        after = await look(log)
        # What was archived is no damage of the index.
        assert not [record for record in caplog.records if "index" in record.name]
        assert after.names == before.names
        assert after.organisations == before.organisations == ["acme", "other"]
        size = len(before.seqs)
        assert [seq for seq in after.seqs if seq < size] == [*range(left, size)]
        assert after.counted == len(after.seqs)
        assert before.since is None
        assert after.since == orjson.loads(log.lines()[left])["time"]
        service = await app.open_service(settings_for(log.root), signs=True)
        with pytest.raises(EventArchived, match=f"before {left} were archived"):
            await service.trail.proof(ACME, left - 1)
        with pytest.raises(EventArchived):
            await service.audit(ACME, AuditQuery("acme", after=0))
        assert await service.audit(ACME, AuditQuery("acme", after=left - 1, limit=1))
        seq = next(entry.line["seq"] for entry in await service.audit(ACME, AuditQuery("acme")))
        proof = tlogproof.parse(await service.trail.proof(ACME, seq))
        await service.close()
        tlogproof.verify(log.lines()[seq], proof, [verifier_of(key_of(log.root))])
        for seq in (left, left + 1, size - 1):
            made = tree_of(log.root).prove(seq)
            assert made is not None
            proof = tlogproof.parse(made)
            tlogproof.verify(log.lines()[seq], proof, [verifier_of(key_of(log.root))])


class Look(NamedTuple):
    """What users see of a data directory."""

    names: list[str]
    organisations: list[str]
    seqs: list[int]
    counted: int
    since: str | None


async def look(log: Log) -> Look:
    service = await app.open_service(settings_for(log.root))
    try:
        names = [
            entry.name
            for caller in (ACME, OTHER)
            async for page in service.listing(caller, ListQuery(caller.principal.org_id, 0.0))
            for entry in page
        ]
        for name in set(names):
            assert (await service.get(ACME, name)).value.reveal() == f"{name} of acme"
        survey = await service.rotation.survey(())
        assert not survey.nameless
        entries = await service.audit(ACME, EVERYTHING)
        counts = await service.audit_summary(ACME, EVERYTHING, Grouping("action", 86400, 1000))
        since = await service.complete_since()
        seqs = sorted(entry.line["seq"] for entry in entries)
        counted = sum(count.events for count in counts)
        return Look(names, sorted(survey.secrets), seqs, counted, since)
    finally:
        await service.close()


async def test_an_index_is_made_anew_if_what_follows_it_was_archived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is open, and more of it than it takes in one step."""
    monkeypatch.setattr(sqlite, "_EVENTS", 16)
    log = Log(tmp_path / "data", tmp_path / "archive")
    await grow(log.root, 20)
    service = await app.open_service(settings_for(log.root))
    before = await service.audit(ACME, EVERYTHING)
    await grow(log.root, 730)
    drop_oldest(log.root, 2)
    assert log.minimum > before[0].line["seq"] + 16
    after = [entry.line["seq"] for entry in await service.audit(ACME, EVERYTHING)]
    assert after == sorted(set(after), reverse=True)
    assert after[-1] == log.minimum
    assert "the events that follow were archived" in caplog.text
    await service.close()


def remove_index(log: Log) -> None:
    for path in log.root.glob("index.sqlite3*"):
        path.unlink()


async def test_others_verify_it_before_and_after(log: Log, tmp_path: Path) -> None:
    key = verifier_of(key_of(log.root)).encode()
    out, older = tmp_path / "out", tmp_path / "older"
    exported(log.root, out)
    shutil.copy(out / "checkpoint", older)
    assert go_verify(out, key) == len(log.lines())
    await archived(log)
    await grow(log.root, 300)
    # The export that there was has every line; a new one those that are left.
    exported(log.root, out)
    assert go_verify(out, key, older) == len(log.lines()) == newest(log.root).size
    fresh = tmp_path / "fresh"
    minimum = exported(log.root, fresh).minimum
    assert log.minimum <= minimum < log.minimum + 256
    assert go_verify(fresh, key, older, minimum=minimum) == len(log.lines())
    with pytest.raises(AssertionError, match="no such file"):
        go_verify(fresh, key, older)
    missing = {path.relative_to(out) for path in out.rglob("*") if "x" not in path.name}
    missing -= {path.relative_to(fresh) for path in fresh.rglob("*")}
    assert {str(path) for path in missing if path.parts[-2:-1] == ("entries",)} >= {
        f"tile/entries/{number:03d}" for number in range(minimum // 256)
    }
    # Without the tiles of what was archived, the same holds.
    shutil.rmtree(log.root / "tree")
    bare = tmp_path / "bare"
    exported(log.root, bare)
    assert not (bare / "tile/0/000").exists()
    assert go_verify(bare, key, older, minimum=minimum) == len(log.lines())
    lines = log.lines()
    for place in (fresh, bare):
        reader = TilesReader(LocalBackend(place))
        found = reader.get_checkpoint()
        for index in range(minimum, len(lines), 23):
            entry = reader.get_entry(index)
            assert entry == lines[index]
            reader.get_inclusion_proof(index, found.size).check(
                scales_tiles.leaf_hash(entry), found.root_hash
            )
    # What was exported last before the minimum can't be brought up to it.
    behind = tmp_path / "behind"
    shutil.copytree(out, behind)
    (behind / "checkpoint").write_bytes(history(log.root)[0])
    with pytest.raises(AnotherLog, match="were archived since"):
        exported(log.root, behind)


# --- at any moment ------------------------------------------------------------------------------


def check_whole(log: Log, lines: list[bytes], when: str) -> None:
    """No line is lost, and no segment went that the minimum does not tell of."""
    assert log.lines()[: len(lines)] == lines, when
    assert log.minimum in log.firsts, when


async def go_on(log: Log, lines: list[bytes], when: str) -> None:
    """The log opens, and archiving again leads to where it would have led."""
    check_whole(log, lines, when)
    service = await app.open_service(settings_for(log.root))
    seen = await service.audit(ACME, EVERYTHING)
    await service.close()
    # An answer is complete from the minimum on, wherever it stopped.
    assert sorted(entry.line["seq"] for entry in seen) == [*range(log.minimum, len(log.lines()))], (
        when
    )
    await archived(log)
    check_whole(log, lines, when)
    assert log.firsts[0] == log.minimum > 0, when
    assert not list(log.to.glob("*.part")), when


async def test_whatever_moment_it_dies_in(
    log: Log, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, within and after every system call."""
    swiftly(monkeypatch)
    running = shrunk(log, fast / "running")
    lines, deaths = running.lines(), list[tuple[str, Log]]()

    def moment(when: str) -> None:
        place = fast / str(len(deaths))
        shutil.copytree(running.root.parent, place)
        deaths.append((when, Log(place / "data", place / "archive")))

    await archived(running, Stopping(moment))
    assert running.minimum > 0
    for when, place in deaths:
        await go_on(place, lines, when)
        shutil.rmtree(place.root.parent)
    assert len(deaths) > 40


async def test_whatever_the_power_takes(
    log: Log, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was not synced nothing is left, or anything."""
    swiftly(monkeypatch)
    running = shrunk(log, fast / "running")
    lines, losses = running.lines(), list[tuple[str, Log]]()
    ages = {first: running.segment(first).stat().st_mtime for first in running.firsts}
    medium = Volatile(running.root.parent)

    def moment(when: str) -> None:
        for chance in (None, Random(when)):
            place = fast / str(len(losses))
            medium.after_loss(place, chance)
            lost = Log(place / "data", place / "archive")
            for first in lost.firsts:
                os.utime(lost.segment(first), (ages[first],) * 2)
            losses.append((when, lost))

    await archived(running, Stopping(moment, medium))
    medium.close()
    for when, place in losses:
        await go_on(place, lines, when)
        shutil.rmtree(place.root.parent)
    assert len(losses) > 80


async def test_whatever_system_call_fails(
    log: Log, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swiftly(monkeypatch)
    sound = shrunk(log, fast / "sound")
    watched, lines = Watched(), sound.lines()
    await archived(sound, watched)

    def eio(call: object) -> object:
        call.do_half()  # type: ignore[attr-defined] # a Call
        raise io_error()

    failed = 0
    for call in watched.calls:
        place = shrunk(log, fast / "failing")
        disk = Failing(call.number, eio, lasting=False)
        try:
            await archived(place, disk)
        except (OSError, SecretsError):
            failed += 1
        await go_on(place, lines, str(call))
        shutil.rmtree(place.root.parent)
    assert failed > 20


def shrunk(log: Log, place: Path) -> Log:
    """A copy of which only the oldest two segments are old: less to copy at each moment."""
    shutil.copytree(log.root.parent, place)
    copy = Log(place / "data", place / "archive")
    for first in copy.firsts[2:]:
        os.utime(copy.segment(first), (time.time() + 3600,) * 2)
    for path in (*copy.root.glob("index.sqlite3*"),):
        path.unlink()
    return copy


# --- beside others ------------------------------------------------------------------------------


async def test_a_process_that_slept_meanwhile_goes_on(log: Log) -> None:
    """Its newest segment was sealed, archived and removed by others."""
    sleeper = await app.open_service(settings_for(log.root, segment_bytes=SEGMENT))
    name = await a_name(sleeper)
    await sleeper.get(ACME, name)
    slept = max(log.firsts)
    # With a change in it that the sleeper has cached.
    other = await app.open_service(settings_for(log.root, segment_bytes=SEGMENT))
    await other.set(ACME, Draft(name, Plaintext("changed meanwhile")))
    await work(other, 600)
    await sign(other)
    await other.close()
    backdate(log.root)
    done = await archived(log)
    assert done is not None
    assert log.minimum > slept
    assert (await sleeper.get(ACME, name)).value.reveal() == "changed meanwhile"
    await sleeper.set(ACME, Draft("AFTER", Plaintext("v")))
    await sign(sleeper)
    await sleeper.close()
    lines = log.lines()
    assert orjson.loads(lines[-1])["name"] == "AFTER"
    assert newest(log.root).size == len(lines)


@pytest.mark.parametrize("name", ["an empty log", "a torn tail"])
async def test_a_process_that_was_to_begin_a_segment(tmp_path: Path, name: str) -> None:
    """Others have begun it, and archived it, while he slept: he must not begin it again."""
    log = Log(tmp_path / "data", tmp_path / "archive")
    if name == "a torn tail":
        await grow(log.root, 10)
        with max((log.root / "events").iterdir()).open("ab") as file:
            file.write(b'{"v":1,"id":"0199')
    sleeper = await app.open_service(settings_for(log.root, segment_bytes=SEGMENT))
    await grow(log.root, 900)
    backdate(log.root)
    assert await archived(log) is not None
    assert len(list(log.to.iterdir())) > 2
    await sleeper.set(ACME, Draft("AFTER", Plaintext("v")))
    await sign(sleeper)
    await sleeper.close()
    assert orjson.loads(log.lines()[-1])["name"] == "AFTER"
    assert log.firsts[0] == log.minimum
    assert check_signed_lines(log)[-1] == len(log.lines())


def test_what_is_archived_while_it_is_exported(log: Log, tmp_path: Path) -> None:
    """The export is of what is left then."""
    key, told = verifier_of(key_of(log.root)).encode(), list[int]()

    def tell(done: int, _total: int) -> None:
        if not told:
            asyncio.run(archived(log))
        told.append(done)

    disk, out = Durable(), tmp_path / "out"
    done = export(Layout(log.root), disk, SigningKey(key_of(log.root), disk), out, tell)
    assert log.minimum <= done.minimum < log.minimum + 256
    assert go_verify(out, key, minimum=done.minimum) == done.size == newest(log.root).size


async def test_who_reads_slowly_is_told(log: Log) -> None:
    """Nothing is left out of what he reads without a word."""
    service = await app.open_service(settings_for(log.root))
    query = AuditQuery("acme", limit=10)
    following = service.following
    pages = following.export(ACME, query)
    stream = following.follow(ACME, await following.begin(ACME, query._replace(after=0)))
    newest = following.follow(ACME, await following.begin(ACME, query))
    first = await anext(pages)
    assert [entry.line["seq"] for entry in first] == [
        entry.line["seq"] for entry in await anext(stream)
    ]
    assert await anext(newest) == []
    await archived(log)
    for reader in (pages, stream):
        with pytest.raises(EventArchived):
            await anext(reader)
    read = await service.get(ACME, await a_name(service))
    while not (page := await anext(newest)):
        pass
    assert [entry.line["seq"] for entry in page] == [read.receipt.seq]
    # Of an organisation without events that are left, a stream begins at what is left.
    begun = await following.begin(app.local_caller("third"), AuditQuery("third"))
    assert begun.after == log.minimum - 1
    await service.close()


async def a_name(service: Service) -> str:
    """The name of one of the secrets."""
    return (await anext(service.listing(ACME, ListQuery("acme", 0.0))))[0].name


async def test_readers_and_writers_beside_it(tmp_path: Path) -> None:
    """A server with two workers, whose clients read, write, follow and poll while segments go."""
    log = Log(tmp_path / "data", tmp_path / "archive")
    key = await issue_key(log.root)
    segment = {"FLOWMASON_SECRETS_SEGMENT_BYTES": "20000"}
    ended = asyncio.Event()
    async with (
        serving(log.root, "--workers=2", **segment) as server,
        session(server.url, key) as client,
    ):
        streamed, polled = list[int](), list[int]()

        async def read_up_to(seq: int) -> None:
            """Wait for the readers; the group ends if one of them fails."""
            while not (streamed and polled and min(streamed[-1], polled[-1]) >= seq):
                await asyncio.sleep(0.02)

        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            readers = [
                group.create_task(stream(client, streamed)),
                group.create_task(poll(client, polled)),
            ]
            writers = [group.create_task(write(client, n, ended)) for n in range(6)]
            went = 0
            # Until more was signed than what the first of them needed: that is once a second.
            while went < 3 or len(history(log.root)) < 4:
                sealed = log.firsts
                # Whoever reads what is archived is told, which is not what this is about.
                await read_up_to(sealed[-1])
                for first in sealed[:-1]:
                    # Nobody waits for a second.
                    os.utime(log.segment(first), (time.time() - 60,) * 2)
                done = await archived(log)
                went += done is not None
                await summaries(client, log)
            ended.set()
            await asyncio.wait(writers)
            # The newest event that the organisation has: all readers get that far.
            async with client.post(SECRETS, json={"name": "LAST", "value": "v"}) as response:
                last = int(response.headers["Audit-Seq"])
            await read_up_to(last)
            for reader in readers:
                reader.cancel()
    lines = [orjson.loads(line) for line in log.lines()]
    of_acme = [line["seq"] for line in lines if line["org_id"] == "acme"]
    for seqs in (streamed, polled):
        assert seqs == of_acme[of_acme.index(seqs[0]) :]
    assert b"rror" not in b"".join(server.output), b"".join(server.output).decode()
    assert len(check_signed_lines(log)) > 3


def check_signed_lines(log: Log) -> list[int]:
    """The sizes that were signed, each of which is true of the lines."""
    leaves, frontier = merkle.leaf_hashes(log.lines()), merkle.Frontier()
    sizes: list[int] = []
    for note in history(log.root):
        statement = checkpoint.verify(note, [verifier_of(key_of(log.root))])
        frontier.extend(leaves[frontier.size : statement.size])
        assert frontier.root() == statement.root
        sizes.append(statement.size)
    return sizes


async def write(client: aiohttp.ClientSession, number: int, ended: asyncio.Event) -> None:
    """Change and read a secret of one's own."""
    for version in itertools.count():
        if ended.is_set():
            return
        body = {"name": f"W{number}", "value": f"{version}"}
        async with client.post(SECRETS, json=body) as response:
            assert response.status in (200, 201), await response.text()
        async with client.get(f"{SECRETS}/W{number}") as response:
            assert (await response.json())["value"] == f"{version}"


async def stream(client: aiohttp.ClientSession, seqs: list[int]) -> None:
    async with client.get(f"{AUDIT}/stream") as response:
        assert response.status == 200
        events = Stream(response)
        while (message := await events.next(30)) is not None:
            seqs.append(int(message.id))


async def poll(client: aiohttp.ClientSession, seqs: list[int]) -> None:
    """From the newest event on, as long as it takes."""
    async with client.get(AUDIT, params={"limit": "1"}) as response:
        after = (await response.json())[0]["seq"]
    while True:
        query = {"after": str(after), "wait": "1", "limit": "1000"}
        async with client.get(AUDIT, params=query) as response:
            assert response.status == 200, await response.text()
            seqs += [entry["seq"] for entry in await response.json()]
        after = seqs[-1] if seqs else after


async def summaries(client: aiohttp.ClientSession, log: Log) -> None:
    """Answers that are complete since the time that they give, while it is archived."""
    async with client.get(f"{AUDIT}/summary") as response:
        assert response.status == 200, await response.text()
        shown = await response.json()
        since = response.headers.get("Audit-Complete-Since")
    assert shown["complete_since"] == since
    assert (since is None) == (log.minimum == 0)
    async with client.get(f"{AUDIT}/export") as response:
        assert response.status == 200
        first = orjson.loads(await response.content.readline())
        since = response.headers.get("Audit-Complete-Since")
        assert since is None or first["time"] >= since
        await response.read()


# --- what is told over HTTP and on the command line ---------------------------------------------


async def test_what_clients_are_told(log: Log) -> None:
    await archived(log)
    left, since = log.minimum, orjson.loads(log.lines()[log.minimum])["time"]
    key = await issue_key(log.root)
    async with serving(log.root) as server, session(server.url, key) as client:
        for path, status in {
            f"/api/v1/log/proof/{left - 1}": 410,
            f"/api/v1/log/proof/{left + 1}": 200,
            f"{AUDIT}?after=0": 410,
            f"{AUDIT}?after={left - 2}": 410,
            f"{AUDIT}?after={left - 1}": 200,
            f"{AUDIT}/stream?after={left - 2}": 410,
            f"{AUDIT}/stream": 200,
            f"{AUDIT}/export?format=csv": 200,
            f"{AUDIT}/summary": 200,
            "/api/v1/log/tile/0/000": 200,
            "/api/v1/log/checkpoint": 200,
        }.items():
            async with client.get(path) as response:
                assert response.status == status, (path, await response.text())
                if status == 410:
                    problem = await response.json()
                    assert (problem["code"], problem["minimum"]) == ("event_archived", left)
                    assert f"after {left - 1}" in problem["detail"]
                elif AUDIT in path:
                    assert response.headers["Audit-Complete-Since"] == since
        shutil.rmtree(log.root / "tree")
        async with client.get("/api/v1/log/tile/0/000") as response:
            assert response.status == 404
        async with client.get(f"/api/v1/log/proof/{left + 1}") as response:
            assert response.status == 200


async def test_the_command(log: Log) -> None:
    place = local(log.root)
    archive = ("log", "archive", "--data-dir", str(log.root), "--to", str(log.to))
    before = times.render(time.time())

    async def call(*arguments: str) -> Ended:
        return await run(*arguments, variables=place.variables)

    shown = await place.run("audit", "--limit", "1")
    assert (shown.code, shown.err) == (0, "")
    done = await call(*archive, "--before", before, "--compress", "gzip")
    assert (done.code, done.out) == (0, ""), done
    since = orjson.loads(log.lines()[log.minimum])["time"]
    assert f"moved to {log.to}. The log begins with event {log.minimum} now" in done.err
    assert f"complete since {since}." in done.err
    assert {path.suffix for path in log.to.iterdir()} == {".gz"}
    again = await call(*archive, "--before", before)
    assert (again.code, again.out) == (0, "")
    assert again.err.startswith("Nothing to archive")
    note = f"Older events were archived; this is complete since {since}.\n"
    for command in (("audit",), ("audit", "export"), ("audit", "--since", "2001-01-01T00:00:00Z")):
        assert (await place.run(*command)).err == note
    assert (await place.run("audit", "--since", times.render(time.time()))).err == "No events.\n"
    future = times.render(time.time() + 60)
    (await call(*archive, "--before", future)).failed(2, "before: is in the future")
    (await call(*archive, "--before", "yesterday")).failed(2, "before")
    inside = ("log", "archive", "--data-dir", str(log.root), "--to", str(log.root / "events"))
    (await call(*inside, "--before", before)).failed(2, "to: lies in the data directory")


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["another", "cut off", "longer", "no compression"])
async def test_another_file_of_that_name(log: Log, name: str) -> None:
    first = log.firsts[0]
    data = log.segment(first).read_bytes()
    compressor = zstandard.ZstdCompressor()
    wrong = {
        "another": compressor.compress(data.replace(b"tester", b"nobody")),
        "cut off": compressor.compress(data)[:-10],
        "longer": compressor.compress(data + b"\n"),
        "no compression": data,
    }[name]
    log.to.mkdir()
    copy = log.to / f"{segment_name(first)}.zst"
    copy.write_bytes(wrong)
    with pytest.raises(AnotherLog, match="does not hold the segment"):
        await archived(log)
    assert (log.minimum, log.firsts[0]) == (0, 0)
    copy.write_bytes(compressor.compress(data))
    assert await archived(log) is not None
    assert plain(copy) == data


async def test_lines_that_were_changed(log: Log) -> None:
    path = log.segment(log.firsts[1])
    path.write_bytes(path.read_bytes().replace(b'"tester"', b'"nobody"', 1))
    backdate(log.root)
    with pytest.raises(LogDamaged, match=f"differs at event {log.firsts[1] + 1}"):
        await archived(log)
    assert (log.minimum, log.firsts[0]) == (0, 0)


async def test_wrong_tiles_do_not_keep_it(log: Log) -> None:
    tile = log.root / "tree/tile/0/000"
    tile.write_bytes(bytes(tile.stat().st_size))
    assert await archived(log) is not None
    assert check_signed_lines(log)


async def test_somebody_else_archives(log: Log) -> None:
    log.to.mkdir()
    descriptor = os.open(log.to, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(AnotherLog, match="Somebody else"):
            await archived(log)
    finally:
        os.close(descriptor)


async def test_a_segment_that_was_not_archived_is_missing(log: Log) -> None:
    await archived(log)
    await grow(log.root, 200)
    remove_index(log)
    oldest, *others = log.firsts
    assert others
    log.segment(oldest).rename(log.root / "aside")
    service = await app.open_service(settings_for(log.root))
    with pytest.raises(LogDamaged, match=f"event {oldest} of the log is missing"):
        await service.audit(ACME, EVERYTHING)
    await service.close()
    # All of them: nothing begins anew.
    for first in others:
        log.segment(first).unlink()
    with pytest.raises(LogDamaged, match=f"event {oldest} of the log is missing"):
        await app.open_service(settings_for(log.root))
    assert log.firsts == []


@pytest.mark.parametrize("text", ["", "{}", '{"minimum":"7"}', "7", "[]"])
async def test_a_minimum_that_is_none(log: Log, text: str) -> None:
    """Nothing begins anew, or is served, on a guess."""
    (log.root / "minimum").write_text(text)
    with pytest.raises(LogDamaged, match="does not say which events were archived"):
        await app.open_service(settings_for(log.root))


# --- verifying ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zstd", "gzip"])
async def test_it_is_verified_with_the_archive_and_without(log: Log, form: Form) -> None:
    lines = log.lines()
    await archived(log, form=form)
    minimum = log.minimum
    assert minimum > 0
    since = orjson.loads(lines[minimum])["time"]

    async def verified(*arguments: str) -> Ended:
        ended = await run("verify", f"--data-dir={log.root}", *arguments)
        assert ended.code == 0, ended
        assert ended.out.startswith(f"VALID: {len(lines) + 1} events")
        return ended

    part = f"complete from event {minimum} on ({since})"
    ended = await verified()
    assert part in ended.out
    assert "could not be compared" not in ended.err
    assert "complete from" not in (await verified(f"--archive={log.to}")).out
    shutil.rmtree(log.root / "tree")
    ended = await verified()
    assert part in ended.out
    assert "could not be compared" in ended.err
    assert "complete from" not in (await verified(f"--archive={log.to}")).out


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_verification_during_which_it_is_archived_begins_again(
    log: Log, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has listed the segments, and after: they are gone, and nothing is wrong."""
    listed, minimum = scanning.sources, log.minimum

    def sources(events: Path, archives: Sequence[Path]) -> list[scanning.Source]:
        monkeypatch.undo()
        if moment == "before":
            asyncio.run(archived(log))
        found = listed(events, archives)
        if moment == "after":
            asyncio.run(archived(log))
        return found

    monkeypatch.setattr(scanning, "sources", sources)
    request = Request(log.root, [verifier_of(key_of(log.root))])
    verdict = verified(request)
    assert verdict.differences == []
    assert verdict.absent == log.minimum > minimum
    # What is missing and was not archived is missed.
    (log.root / "minimum").unlink()
    assert verified(request).count


def test_what_vanishes_and_was_not_archived_ends_it(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = scanning.sources

    def sources(events: Path, archives: Sequence[Path]) -> list[scanning.Source]:
        found = listed(events, archives)
        log.segment(log.firsts[1]).unlink()
        return found

    monkeypatch.setattr(scanning, "sources", sources)
    with pytest.raises(FileNotFoundError):
        verified(Request(log.root, [verifier_of(key_of(log.root))]))
