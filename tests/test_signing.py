"""The log is signed while it grows, and a log that is not the one that was signed is refused."""

import asyncio
import contextlib
import itertools
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from flowmason_secrets import app
from flowmason_secrets import signer as signer_module
from flowmason_secrets.config import from_environment
from flowmason_secrets.core import tlogproof
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import ConfigurationError, LogDamaged
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.note import Signer
from flowmason_secrets.library import AsyncSecretsService
from flowmason_secrets.service import Service
from flowmason_secrets.storage.chunks import segment_name
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.eventlog import SegmentLimits
from flowmason_secrets.storage.signing import SigningKey

from .harness.faults import PowerOff, Unplugged, Watched
from .harness.grown import drop_oldest
from .harness.load import read_log
from .harness.loss import Volatile
from .harness.server import MASTER_KEY, ServerProcess, issue_key, serving, session, settings_for
from .harness.signed import (
    check_signed,
    history,
    key_of,
    newest,
    raw_lines,
    sign,
    tree_of,
    until,
    verifier_of,
)
from .test_stores import files_store, read

SECRETS = "/api/v1/secrets"
ACME = app.local_caller("acme", "tester")


async def signed_beyond(data_dir: Path, size: int) -> int:
    """Return when more than so many events are signed, and how many."""
    await until(lambda: newest(data_dir).size > size)
    return newest(data_dir).size


async def all_signed(data_dir: Path) -> None:
    """Return when there is nothing left to sign."""
    await until(lambda: newest(data_dir).size == len(read_log(data_dir)))


async def write(service: Service, count: int, caller: Caller = ACME) -> None:
    """Events: a secret that is set, and read."""
    await service.set(caller, Draft("N", Plaintext("v")))
    for done in range(0, count, 50):
        await asyncio.gather(*(service.get(caller, "N") for _ in range(min(count - done, 50))))


# --- processes --------------------------------------------------------------------------------


async def test_a_server_signs_while_the_log_grows_and_when_it_ends(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        sizes = []
        for number in range(3):
            before = len(read_log(data_dir))
            async with client.post(SECRETS, json={"name": f"N{number}", "value": "v"}) as answer:
                seq = int(answer.headers["Audit-Seq"])
            assert seq >= before
            sizes.append(await signed_beyond(data_dir, seq))
        # Nothing new: nothing is signed.
        await asyncio.sleep(2.2)
        assert [one.size for one in check_signed(data_dir, key_of(data_dir))] == sizes
        async with client.get(f"{SECRETS}/N0") as answer:
            assert answer.status == 200
        assert await server.stop() == 0
    assert newest(data_dir).size == len(read_log(data_dir)) == seq + 2
    check_signed(data_dir, key_of(data_dir))


async def test_another_process_goes_on_when_the_signer_is_killed(data_dir: Path) -> None:
    """Under load, again and again; at every moment what was signed is true of the log."""
    key = await issue_key(data_dir)
    random = Random(5)
    running = [ServerProcess(data_dir, FLOWMASON_SECRETS_SEGMENT_BYTES="90000") for _ in range(2)]
    for server in running:
        await server.start()
    signed = 0
    for _ in range(4):
        # The older one has the lock.
        dying, living = running
        async with session(living.url, key) as client:

            async def load(client: object = client) -> None:
                while True:
                    async with client.post(SECRETS, json={"name": "N", "value": "v"}) as answer:  # type: ignore[attr-defined]
                        assert answer.status in (200, 201)

            tasks = [asyncio.create_task(load()) for _ in range(4)]
            await signed_beyond(data_dir, signed)
            await asyncio.sleep(random.uniform(0.0, 1.2))
            await dying.kill()
            signed = await signed_beyond(data_dir, len(read_log(data_dir)))
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        running = [living, ServerProcess(data_dir, FLOWMASON_SECRETS_SEGMENT_BYTES="90000")]
        await running[1].start()
    for server in running:
        assert await server.stop() == 0
    statements = check_signed(data_dir, key_of(data_dir))
    assert statements[-1].size == len(read_log(data_dir))
    assert len(statements) > 8
    assert len(list((data_dir / "events").iterdir())) > 2


async def test_neither_server_nor_library_starts_on_a_log_that_was_changed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await app.open_service(settings_for(data_dir), signs=True)
    await write(service, 10)
    await service.close()
    (segment,) = (data_dir / "events").iterdir()
    segment.write_bytes(segment.read_bytes().replace(b'"seq":5', b'"seq":5 ', 1))
    before = contents(data_dir)
    server = ServerProcess(data_dir)
    with pytest.raises(AssertionError, match="It differs at event 5"):
        await server.start()
    assert server.process is not None
    assert await server.process.wait() == 1
    monkeypatch.setenv("FLOWMASON_SECRETS_KEY", MASTER_KEY)
    with pytest.raises(LogDamaged, match="It differs at event 5"):
        await AsyncSecretsService("acme", storage_path=data_dir).get("N")
    # Nothing was read, and nothing was changed.
    assert contents(data_dir) == before


async def test_a_program_that_uses_the_library_signs_what_it_did(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMASON_SECRETS_KEY", MASTER_KEY)
    for count in (1, 2):
        async with AsyncSecretsService("acme", storage_path=data_dir) as secrets:
            await secrets.set("N", "v")
        assert len(check_signed(data_dir, key_of(data_dir))) == count
        assert newest(data_dir).size == len(read_log(data_dir))


# --- what is found at the start ---------------------------------------------------------------


def contents(data_dir: Path) -> dict[str, bytes]:
    """Everything that may not change when a log is refused."""
    kept = [data_dir / "checkpoint", data_dir / "checkpoints.ndjson", key_of(data_dir)]
    files = [*(data_dir / "events").rglob("*"), *(data_dir / "tree").rglob("*"), *kept]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


class Place(NamedTuple):
    """A data directory that can be changed; the older checkpoint was signed over `older` events."""

    root: Path
    older: int

    @property
    def segments(self) -> list[Path]:
        return sorted((self.root / "events").iterdir())

    def change(self, seq: int) -> None:
        """Change one line, which is still the same event."""
        for segment in self.segments:
            data = segment.read_bytes()
            changed = data.replace(b'"seq":%d,' % seq, b'"seq":%d, ' % seq)
            if changed != data:
                segment.write_bytes(changed)
                return
        raise AssertionError(seq)

    def cut(self, size: int) -> None:
        """Leave so many events."""
        for segment in reversed(self.segments):
            first = int(segment.name[6:18])
            if first >= size:
                segment.unlink()
                continue
            lines = segment.read_bytes().splitlines(keepends=True)
            segment.write_bytes(b"".join(lines[: size - first]))
            return

    def publish(self, note: bytes) -> None:
        (self.root / "checkpoint").write_bytes(note)

    def forged(self, size: int) -> bytes:
        """A statement that nothing supports, by the right key."""
        signer = Signer.decode(key_of(self.root).read_text().strip())
        return Checkpoint(signer.name, size, bytes(32)).sign(signer)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """700 events in three segments, the first checkpoint over a part of them, and what follows the
    newest one.
    """
    root = tmp_path_factory.mktemp("signed") / "data"
    return Place(root, asyncio.run(make(root)))


async def make(root: Path) -> int:
    """Make it; returns the size of the older checkpoint."""
    service = await app.open_service(settings_for(root, segment_bytes=90_000))
    await write(service, 300)
    await sign(service)
    older = newest(root).size
    await write(service, 400)
    await sign(service)
    await write(service, 9)
    await service.gate.drain()
    # As after a crash: the newest lines are not signed.
    shutil.copytree(root.parent, root.parent.with_name("crashed"))
    await service.close()
    shutil.rmtree(root.parent)
    root.parent.with_name("crashed").rename(root.parent)
    assert len(list((root / "events").iterdir())) == 3, os.listdir(root / "events")
    return older


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """A copy to change."""
    shutil.copytree(made.root.parent, tmp_path / "copy")
    return Place(tmp_path / "copy" / made.root.name, made.older)


def size_of(place: Place) -> int:
    return newest(place.root).size


def last_segment(place: Place) -> int:
    return int(place.segments[-1].name[6:18])


def roll_back(place: Place) -> None:
    place.publish(history(place.root)[0])


def roll_all_back(place: Place) -> None:
    place.cut(place.older)
    roll_back(place)


def lose_key(place: Place) -> None:
    key_of(place.root).unlink()


def other_key(place: Place) -> None:
    key = Signer("another/log", bytes(32))
    key_of(place.root).write_text(key.encode())


def same_name_other_key(place: Place) -> None:
    name = verifier_of(key_of(place.root)).name
    key_of(place.root).write_text(Signer(name, bytes(32)).encode())


def without_tiles(place: Place) -> None:
    shutil.rmtree(place.root / "tree")


def edge_garbled(place: Place) -> None:
    """The tiles that the tree is resumed from have other hashes."""
    for path in (place.root / "tree/tile/1/000", place.root / "tree/tile/0/002"):
        path.write_bytes(bytes(path.stat().st_size))


def two_changed(place: Place) -> None:
    place.change(size_of(place) - 1)
    place.change(last_segment(place) + 7)


def changed_without_tiles(place: Place) -> None:
    place.change(3)
    without_tiles(place)


def changed_with_wrong_tiles(place: Place) -> None:
    place.change(size_of(place) - 1)
    edge_garbled(place)


REFUSED: dict[str, tuple[Callable[[Place], object], type[Exception], str]] = {
    "three lines less": (
        lambda place: place.cut(size_of(place) - 3),
        LogDamaged,
        r"has {short} events, and {size} of them were signed: events {short} to {last} are missing",
    ),
    "a segment less": (
        lambda place: place.segments[-1].unlink(),
        LogDamaged,
        r"events {segment} to {last} are missing",
    ),
    "the last signed line changed": (
        lambda place: place.change(size_of(place) - 1),
        LogDamaged,
        r"It differs at event {last}\.",
    ),
    "the header of the last segment changed": (
        lambda place: place.change(last_segment(place)),
        LogDamaged,
        r"It differs at event {segment}\.",
    ),
    "two lines changed": (
        two_changed,
        LogDamaged,
        r"It differs at event {eighth}\.",
    ),
    "a line changed, and no tiles": (
        changed_without_tiles,
        LogDamaged,
        r"It differs at somewhere among events 0 to {last}",
    ),
    "a line changed, and a wrong tile": (
        changed_with_wrong_tiles,
        LogDamaged,
        r"It differs at ",
    ),
    "the log and the checkpoint rolled back": (roll_all_back, LogDamaged, r"are missing"),
    "another key": (other_key, LogDamaged, r"can't be verified with the key another/log\+"),
    "another key of this name": (same_name_other_key, LogDamaged, r"can't be verified"),
    "no key": (lose_key, ConfigurationError, r"is gone, and the log was signed with it"),
    "not a checkpoint": (
        lambda place: place.publish(b"what\n"),
        LogDamaged,
        r"checkpoint can't be verified",
    ),
    "two statements about one size": (
        lambda place: place.publish(place.forged(size_of(place))),
        LogDamaged,
        r"two different statements about one size",
    ),
    "an older statement about another log": (
        lambda place: place.publish(place.forged(place.older)),
        LogDamaged,
        r"signed over two different logs",
    ),
    "a statement about more than there is": (
        lambda place: place.publish(place.forged(10_000)),
        LogDamaged,
        r"events \d+ to 9999 are missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused(place: Place, name: str) -> None:
    size = size_of(place)
    places = {
        "size": size,
        "last": size - 1,
        "short": size - 3,
        "segment": last_segment(place),
        "eighth": last_segment(place) + 7,
    }
    change, kind, text = REFUSED[name]
    change(place)
    for word, number in places.items():
        text = text.replace(f"{{{word}}}", str(number))
    before = contents(place.root)
    for _ in range(2):
        with pytest.raises(kind, match=text):
            await app.open_service(settings_for(place.root), signs=True)
    after = contents(place.root)
    # Missing tiles may have been written, which changes nothing.
    assert {path: after[path] for path in before} == before


def end_of_history_torn(place: Place) -> None:
    path = place.root / "checkpoints.ndjson"
    path.write_bytes(path.read_bytes() + b'{"time":"2026-')


def shorten_history(place: Place) -> None:
    path = place.root / "checkpoints.ndjson"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


def without(*names: str) -> Callable[[Place], object]:
    def remove(place: Place) -> None:
        for name in names:
            (place.root / name).unlink()

    return remove


def check_proofs(root: Path) -> None:
    """Lines of all parts of the log are proven."""
    tree = tree_of(root)
    lines = raw_lines(root)
    for seq in (0, 1, 255, 256, 300, 511, 512, 600, len(lines) - 1):
        proof = tree.prove(seq)
        assert proof is not None
        found = tlogproof.verify(lines[seq], tlogproof.parse(proof), [verifier_of(key_of(root))])
        assert found == newest(root)


def tile_cut_short(place: Place) -> None:
    path = place.root / "tree/tile/0/001"
    path.write_bytes(path.read_bytes()[:1000])


ACCEPTED: dict[str, Callable[[Place], object]] = {
    "as it was": lambda place: None,
    "a line changed that was not signed yet": lambda place: place.change(size_of(place) + 2),
    "lines missing that were not signed yet": lambda place: place.cut(size_of(place)),
    "no tiles": without_tiles,
    "the tiles of the edge garbled": edge_garbled,
    "a tile cut short": tile_cut_short,
    "the checkpoint rolled back": roll_back,
    "no checkpoint": without("checkpoint"),
    "a half-written history": end_of_history_torn,
    "a shorter history": shorten_history,
}


async def test_tiles_that_a_power_loss_took_are_no_second_log(data_dir: Path) -> None:
    """Between the history and the checkpoint, in the first segment: no tile was needed so far."""
    for count in (5, 7):
        service = await app.open_service(settings_for(data_dir))
        await write(service, count)
        await sign(service)
        await service.close()
    tile = data_dir / "tree/tile/0/000"
    tile.write_bytes(bytes(tile.stat().st_size))
    (data_dir / "checkpoint").write_bytes(history(data_dir)[0])
    await (await app.open_service(settings_for(data_dir), signs=True)).close()
    check_signed(data_dir, key_of(data_dir))
    assert any(tile.read_bytes())


@pytest.mark.parametrize("name", ACCEPTED)
async def test_what_is_accepted(made: Place, place: Place, name: str) -> None:
    ACCEPTED[name](place)
    service = await app.open_service(settings_for(place.root), signs=True)
    await service.get(ACME, "N")
    await service.close()
    statements = check_signed(place.root, key_of(place.root))
    assert statements[-1] == newest(place.root)
    assert newest(place.root).size == len(raw_lines(place.root)) > size_of(made)
    check_proofs(place.root)
    if "tiles" in name:
        # The cache is whole again.
        for tile in (made.root / "tree").rglob("*"):
            if tile.is_file():
                again = place.root / tile.relative_to(made.root)
                assert again.read_bytes()[: tile.stat().st_size] == tile.read_bytes()


async def test_without_history_and_checkpoint_it_begins_anew(place: Place) -> None:
    without("checkpoint", "checkpoints.ndjson")(place)
    other_key(place)
    service = await app.open_service(settings_for(place.root), signs=True)
    await service.close()
    (statement,) = check_signed(place.root, key_of(place.root))
    assert (statement.origin, statement.size) == ("another/log", len(raw_lines(place.root)))


async def test_archived_segments_are_not_needed(place: Place) -> None:
    """Nor are their tiles: what is left gives the same root."""
    await (await app.open_service(settings_for(place.root))).close()
    size = len(raw_lines(place.root))
    aside = place.segments[0].rename(place.root / "aside")
    without_tiles(place)
    with pytest.raises(LogDamaged, match="event 0 of the log is missing"):
        await app.open_service(settings_for(place.root), signs=True)
    aside.rename(place.root / "events" / segment_name(0))
    drop_oldest(place.root, 1)
    for tiles in (True, False):
        if not tiles:
            without_tiles(place)
        service = await app.open_service(settings_for(place.root), signs=True)
        await service.get(ACME, "N")
        await service.close()
        assert newest(place.root).size > size
        size = newest(place.root).size
        assert tree_of(place.root).prove(size - 1) is not None


# --- durable before signed --------------------------------------------------------------------


@pytest.mark.parametrize("segment", [64 << 20, 1])
async def test_what_is_signed_is_durable(tmp_path: Path, segment: int) -> None:
    """Another process writes a line, and dies at any moment, perhaps before it has synced it; then
    the power fails.
    """
    longer = 0
    for calls in itertools.count():
        root = tmp_path / str(calls) / "data"
        service = await app.open_service(settings_for(root))
        await write(service, 1)
        await sign(service)
        await service.close()
        medium = Volatile(root.parent)
        tree = tree_of(root, Watched(medium))
        assert tree.lead()
        tree.begin()
        before = len(read_log(root))
        tree.check(before)
        disk = Unplugged(medium)
        dying = files_store(root, disk, SegmentLimits(segment))
        disk.arm(calls)
        with contextlib.suppress(PowerOff):
            await dying.commit([read("N")])
        size = len(read_log(root))
        assert tree.sign(size).size == size == newest(root).size
        longer += size > before
        target = tmp_path / f"{calls} lost"
        medium.after_loss(target, None)
        assert len(read_log(target / "data")) >= newest(target / "data").size == size
        check_signed(target / "data", key_of(root))
        tree.close()
        with contextlib.suppress(PowerOff):
            await dying.close()
        medium.close()
        if not disk.off.is_set():
            break
    assert longer > 1


async def test_the_work_is_not_the_committers(service: Service) -> None:
    """Tiles, syncs and signatures come from a thread of their own."""
    threads: set[str] = set()
    durable = service.signer._tree._durable  # type: ignore[attr-defined]

    class Spying(Durable):
        def sync_path(self, path: str | Path) -> None:
            threads.add(threading.current_thread().name)
            Durable.sync_path(self, path)

    service.signer._tree._durable = Spying()  # type: ignore[attr-defined]
    await write(service, 3)
    await sign(service)
    service.signer._tree._durable = durable  # type: ignore[attr-defined]
    assert {name.rpartition("_")[0] for name in threads} == {"flowmason-sign"}


async def test_lines_are_hashed_in_portions_before_they_are_signed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody waits while those of a whole second are hashed at once."""
    monkeypatch.setattr(signer_module, "INTERVAL", 3600.0)
    service = await app.open_service(settings_for(data_dir), signs=True)
    grown: list[int] = []
    grow = service.signer._tree.grow

    def noted(position: int, most: int) -> int:
        grown.append(grow(position, most))
        return grown[-1]

    monkeypatch.setattr(service.signer._tree, "grow", noted)
    await write(service, 2000)
    await until(lambda: grown[-1:] == [service._store.position])
    assert not (data_dir / "checkpoint").exists()
    steps = [after - before for before, after in itertools.pairwise([0, *grown])]
    assert max(steps) <= signer_module._PORTION < 2000 < sum(steps)
    for tile in ("000", "006"):
        assert (data_dir / "tree" / "tile" / "0" / tile).stat().st_size == 256 * 32
    # It signs when it ends.
    await service.close()
    check_signed(data_dir, key_of(data_dir))


# --- in the log itself ------------------------------------------------------------------------


def anchors(data_dir: Path) -> list[tuple[int, str]]:
    """The seqs of the events that hold checkpoints, and these."""
    return [
        (line["seq"], str(line["details"]["checkpoint"]))
        for line in read_log(data_dir)
        if line["action"] == "log.checkpoint"
    ]


def anchored(data_dir: Path) -> bool:
    """Whether there is a checkpoint in the newest segment, or only one segment."""
    segments = sorted((data_dir / "events").iterdir())
    return len(segments) == 1 or b'"log.checkpoint"' in segments[-1].read_bytes()


async def test_the_checkpoint_goes_into_the_log_when_a_segment_begins(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signer_module, "INTERVAL", 0.01)
    service = await app.open_service(settings_for(data_dir, segment_bytes=30_000), signs=True)
    for _ in range(4):
        await write(service, 60)
        await until(lambda: anchored(data_dir))
    await all_signed(data_dir)
    await service.close()
    notes = {note.decode() for note in history(data_dir)}
    lines = read_log(data_dir)
    headers = [line for line in lines if line["action"] == "log.segment"]
    assert len(headers) > 2
    assert headers[0]["details"]["previous_checkpoint"] is None
    # A segment that began before anything was signed may say so; the others quote.
    quoted = [line["details"]["previous_checkpoint"] for line in headers[1:]]
    assert any(quoted)
    assert {note for note in quoted if note} <= notes
    for seq, note in anchors(data_dir):
        assert note in notes
        size = int(note.splitlines()[1])
        begins = max(line["seq"] for line in headers if line["seq"] < seq)
        # It covers all of the segments before.
        assert begins <= size <= seq
    # One for each begun segment at most, and none for the first.
    assert 0 < len(anchors(data_dir)) < len(headers)
    check_signed(data_dir, key_of(data_dir))


async def test_and_once_an_hour_if_there_is_something_new(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signer_module, "INTERVAL", 0.01)
    service = await app.open_service(settings_for(data_dir), signs=True)
    await write(service, 5)
    await all_signed(data_dir)
    assert anchors(data_dir) == []
    monkeypatch.setattr(signer_module, "ANCHOR_EVERY", 0.0)
    await until(lambda: len(anchors(data_dir)) == 1)
    await asyncio.sleep(0.2)
    assert len(anchors(data_dir)) == 1
    await service.get(ACME, "N")
    await until(lambda: len(anchors(data_dir)) == 2)
    await service.close()
    # The next process knows of them.
    monkeypatch.setattr(signer_module, "ANCHOR_EVERY", 3600.0)
    service = await app.open_service(settings_for(data_dir), signs=True)
    await service.get(ACME, "N")
    await all_signed(data_dir)
    await service.close()
    assert len(anchors(data_dir)) == 2


# --- who signs, and with what -----------------------------------------------------------------


async def test_one_signs_and_another_takes_over(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signer_module, "INTERVAL", 0.01)
    first = await app.open_service(settings_for(data_dir), signs=True)
    second = await app.open_service(settings_for(data_dir), signs=True)
    for number in range(3):
        await second.set(ACME, Draft(f"N{number}", Plaintext("v")))
        await all_signed(data_dir)
    await until(lambda: first.signer._leads and not second.signer._leads)
    await first.close()
    await second.get(ACME, "N0")
    await all_signed(data_dir)
    # Whoever removes the lock makes room for another one, and nothing is signed twice.
    third = await app.open_service(settings_for(data_dir), signs=True)
    (data_dir / "signing.lock").unlink()
    for _ in range(3):
        await third.get(ACME, "N0")
        await asyncio.sleep(0.1)
    await all_signed(data_dir)
    await until(lambda: second.signer._leads != third.signer._leads)
    await second.close()
    await third.close()
    check_signed(data_dir, key_of(data_dir))


async def test_it_goes_on_after_an_error(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signer_module, "INTERVAL", 0.01)
    monkeypatch.setattr(signer_module, "_AFTER_ERROR", 0.01)

    class Broken(Durable):
        broken = False

        def rename(self, source: Path, target: Path) -> None:
            if self.broken:
                raise OSError(5, "Input/output error")
            super().rename(source, target)

    disk = Broken()
    service = await app.open_service(settings_for(data_dir), disk, signs=True)
    await service.set(ACME, Draft("N", Plaintext("v")))
    await until(lambda: newest(data_dir).size > 0)
    signed = newest(data_dir).size
    disk.broken = True
    await service.get(ACME, "N")
    await until(lambda: len(history(data_dir)) > 1)
    assert newest(data_dir).size == signed
    disk.broken = False
    await service.get(ACME, "N")
    await all_signed(data_dir)
    await service.close()
    check_signed(data_dir, key_of(data_dir))


async def test_the_verifier_key_is_printed(data_dir: Path, service: Service) -> None:
    async def printed() -> tuple[int | None, str, str]:
        command = ("-m", "flowmason_secrets", "log", "key", f"--data-dir={data_dir}")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    code, out, err = await printed()
    assert (code, out) == (1, "")
    assert f"no signing key {key_of(data_dir)} yet" in err
    await write(service, 1)
    await sign(service)
    vkey = verifier_of(key_of(data_dir)).encode()
    assert await printed() == (0, f"{vkey}\n", "")


def test_the_key_is_made_once(tmp_path: Path) -> None:
    """Whatever many processes do at once; only its owner can read it."""
    path = tmp_path / "signing.key"
    found: list[Signer] = []
    threads = [
        threading.Thread(target=lambda: found.append(SigningKey(path, Durable()).make()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.verifier for one in found}) == 1
    assert os.listdir(tmp_path) == ["signing.key"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    name = found[0].name
    assert name.startswith("flowmason-secrets/")
    assert SigningKey(tmp_path / "other.key", Durable()).make().name != name


@pytest.mark.parametrize(
    ("data", "mode", "text"),
    [
        (b"", 0o600, "is not one"),
        (b"PRIVATE+KEY+a+00000000+AAAA", 0o600, "is not one"),
        (b"\xff", 0o600, "can't be read"),
        (Signer("a/b", bytes(32)).encode().encode(), 0o640, "chmod 600"),
        (Signer("a" * 400, bytes(32)).encode().encode(), 0o600, "too long"),
    ],
)
def test_bad_keys(tmp_path: Path, data: bytes, mode: int, text: str) -> None:
    path = tmp_path / "signing.key"
    path.write_bytes(data)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=text) as caught:
        SigningKey(path, Durable()).load()
    assert "AAAA" not in str(caught.value)


def test_where_the_key_is(tmp_path: Path) -> None:
    place = {"FLOWMASON_SECRETS_DIR": str(tmp_path / "data")}
    beside = tmp_path / "data-signing.key"
    assert from_environment(place).signing_key == beside
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert from_environment({"FLOWMASON_SECRETS_DIR": str(tmp_path / "link")}).signing_key == beside
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    place["CREDENTIALS_DIRECTORY"] = str(credentials)
    assert from_environment(place).signing_key == beside
    (credentials / "flowmason-signing-key").touch()
    assert from_environment(place).signing_key == credentials / "flowmason-signing-key"
    place["FLOWMASON_SECRETS_SIGNING_KEY_FILE"] = str(tmp_path / "own")
    assert from_environment(place).signing_key == tmp_path / "own"
