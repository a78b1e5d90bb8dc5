"""`verify` on logs as they are: archived, growing, torn, signed with several keys; one proof; and
the command.
"""

import asyncio
import base64
import gzip
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowmason_secrets import app, verifying
from flowmason_secrets.core import checkpoint, tlogproof
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.events import MAX_LINE, Line
from flowmason_secrets.core.merkle import Frontier, leaf_hashes
from flowmason_secrets.core.note import COSIGNATURE, Signature, Signer, Verifier, cosigned
from flowmason_secrets.core.tiles import Edge
from flowmason_secrets.storage import scanning
from flowmason_secrets.storage.strict import StrictLine
from flowmason_secrets.verifying import Request, verify
from flowmason_secrets.walking import Archived

from .harness.server import ServerProcess, issue_key, session, settings_for
from .harness.signed import history, key_of, newest, raw_lines, sign, tree_of, until, verifier_of
from .test_cli import Ended, run
from .test_cli import Place as CommandPlace
from .test_cli_output import Terminal
from .test_signing import write
from .test_verify import Place, change, cut, made, place, sign_anew

__all__ = ["made", "place"]


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """What is in a directory, and when it was changed."""
    found = [root, *root.rglob("*")]
    return {str(one): (one.stat().st_size, one.stat().st_mtime_ns) for one in found}


# --- many processes, and many blocks ----------------------------------------------------------


@pytest.mark.parametrize("block", [700, 5000, 1 << 20])
def test_it_is_the_same_in_blocks_and_in_processes(
    place: Place, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = place.verify()
    monkeypatch.setattr(scanning, "BLOCK", block)
    assert place.verify() == whole
    change(place, place.middle)
    here = place.verify()
    assert [one.seq for one in here.differences] == [place.middle]
    if block != 700:
        monkeypatch.setattr(verifying, "SMALL", 0)
        progress: list[tuple[int, int]] = []
        request = Request(place.root, [place.signer.verifier], processes=2)
        assert verify(request, lambda *of: progress.append(of)) == here
        total = sum(one.stat().st_size for one in place.segments)
        assert progress[-1] == (total, total)
        assert progress == sorted(progress)


@pytest.mark.parametrize("block", [400, 3000, 7999, 8000, 8001])
def test_the_longest_line_goes_on_behind_its_block(
    place: Place, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longest(lines: list[bytes], at: int) -> None:
        fields = orjson.loads(lines[at]) | {"details": {"x": ""}}
        fields["details"]["x"] = "x" * (MAX_LINE - 1 - len(orjson.dumps(fields)))
        lines[at] = orjson.dumps(fields) + b"\n"
        assert len(lines[at]) == MAX_LINE

    place.edit(place.middle, longest)
    sign_anew(place)
    whole = place.verify()
    monkeypatch.setattr(scanning, "BLOCK", block)
    assert place.verify() == whole
    # All there is to say of it is what checkpoints say that later events quote.
    quoted = re.compile(r"was changed since the checkpoint in event \d+ was signed")
    for one in whole.differences:
        assert one.seq == place.middle
        assert quoted.fullmatch(one.problem)
    assert whole.events == place.size


async def test_processes_end_with_who_started_them() -> None:
    """Killed while they work."""
    script = (
        "import time; from flowmason_secrets.processes import pool\n"
        "with pool(2) as two: list(two.each(time.sleep, [600, 600, 600]))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await until(lambda: len(descendants(process.pid)) >= 3)
        started = descendants(process.pid)
    finally:
        process.kill()
        await process.wait()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def descendants(pid: int) -> list[int]:
    """The processes that a process started: those of the pool, and one that Python adds."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- archives ---------------------------------------------------------------------------------


def packed(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {
        f"{path.name}.gz": gzip.compress(data),
        f"{path.name}.zst": zstandard.compress(data),
    }


@pytest.fixture
def archive(place: Place, tmp_path: Path) -> Path:
    """The first two segments are archived, packed in two ways."""
    directory = tmp_path / "archive"
    directory.mkdir()
    for path, ending in zip(place.segments[:2], (".gz", ".zst"), strict=True):
        name = f"{path.name}{ending}"
        (directory / name).write_bytes(packed(path)[name])
        path.unlink()
    return directory


def test_archived_segments_are_part_of_the_log(
    made: Place, place: Place, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.verify().differences[0].seq == 0
    for block in (1 << 20, 9000):
        monkeypatch.setattr(scanning, "BLOCK", block)
        assert place.verify(archives=[archive]) == made.verify()


def edge_of(root: Path, minimum: int) -> tuple[bytes, ...]:
    """The edge of the tree of the first lines."""
    edge = Edge()
    edge.extend(leaf_hashes(raw_lines(root)[:minimum]))
    rows = {tile.level: data for tile, data in edge.partial()}
    return tuple(rows.get(level, b"") for level in range(max(rows) + 1))


def test_archived_segments_may_be_known_by_their_hashes_alone(
    made: Place, place: Place, archive: Path
) -> None:
    minimum = int(place.segments[0].name[6:18])
    for edge in ((), edge_of(made.root, minimum)):
        verdict = place.verify(archived=Archived(minimum, edge))
        assert (verdict.differences, verdict.absent, verdict.unknown) == ([], minimum, 0)
        assert verdict.root == made.verify().root
    first = place.verify(archived=Archived(minimum, edge[::-1])).differences[0]
    assert (first.place, first.seq) == ("minimum", minimum)
    assert place.verify(archived=Archived(minimum - 1)).differences[0].seq == 0


def test_archived_segments_may_be_known_by_the_edge_of_their_tree_alone(
    made: Place, place: Place, archive: Path
) -> None:
    """Also if an interrupted archiving left some of them."""
    minimum = int(place.segments[0].name[6:18])
    edge = edge_of(made.root, minimum)
    shutil.rmtree(place.root / "tree")
    first = place.verify(archived=Archived(minimum)).differences[0]
    assert (first.place, first.seq) == ("tree/tile/0/000", 0)
    for _ in range(2):
        verdict = place.verify(archived=Archived(minimum, edge))
        assert (verdict.differences, verdict.absent) == ([], minimum)
        assert verdict.root == made.verify().root
        older = [note for note in history(place.root) if int(note.splitlines()[1]) < minimum]
        assert verdict.unknown >= len(older) > 0
        shutil.copy(made.segments[1], place.root / "events")
    wrong = (bytes(len(edge[0])), *edge[1:])
    first = place.verify(archived=Archived(minimum, wrong)).differences[0]
    assert first.seq == minimum
    assert place.verify(archived=Archived(minimum, edge[:1])).differences[0].place == "minimum"
    change(place, minimum + 5)
    assert place.verify(archived=Archived(minimum, edge)).differences[0].seq == minimum


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:100] + b"x" * 500],
)
def test_a_damaged_archive(
    place: Place, tmp_path: Path, ending: str, damage: Callable[[bytes], bytes]
) -> None:
    path = place.segments[1]
    name = f"{path.name}{ending}"
    (tmp_path / name).write_bytes(damage(packed(path)[name]))
    begin, end = int(path.name[6:18]), place.sealed
    path.unlink()
    first = place.verify(archives=[tmp_path]).differences[0]
    assert first.seq is not None
    assert begin <= first.seq < end
    assert name in first.place


# --- growing, and torn ------------------------------------------------------------------------


async def test_beside_a_server_that_writes(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    server = ServerProcess(data_dir, FLOWMASON_SECRETS_SEGMENT_BYTES="60000")
    await server.start()
    grown: set[int] = set()
    async with session(server.url, key) as client:

        async def load() -> None:
            while True:
                async with client.post("/api/v1/secrets", json={"name": "N", "value": "v"}) as got:
                    assert got.status in (200, 201)

        tasks = [asyncio.create_task(load()) for _ in range(4)]
        while newest(data_dir).size < 2000:
            keys = [verifier_of(key_of(data_dir))] if key_of(data_dir).exists() else []
            verdict = await asyncio.to_thread(verify, Request(data_dir, keys))
            if verdict.signed:
                assert verdict.differences == []
                grown.add(verdict.events)
            await asyncio.sleep(0.02)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert await server.stop() == 0
    assert len(grown) > 10
    verdict = verify(Request(data_dir, [verifier_of(key_of(data_dir))]))
    assert (verdict.differences, verdict.signed) == ([], verdict.events)


async def test_torn_tails_are_no_part_of_the_log(data_dir: Path) -> None:
    """In the middle, where a new segment followed, and at the end, where somebody writes now."""
    for torn in (b'{"v":1,', b'{"v":1,"id"\n\x00\x00\x00\n', b"\n\n"):
        service = await app.open_service(settings_for(data_dir), signs=True)
        await write(service, 20)
        await service.close()
        last = sorted((data_dir / "events").iterdir())[-1]
        end = last.stat().st_size
        with last.open("ab") as file:
            file.write(torn)
        verdict = Place(data_dir).verify()
        assert verdict.differences == []
        assert verdict.events == len(raw_lines(data_dir))
        assert verdict.torn[-1] == f"{last.name} from byte {end} on"
    assert len(verdict.torn) == 3


async def test_lines_behind_the_newest_checkpoint(data_dir: Path) -> None:
    service = await app.open_service(settings_for(data_dir))
    await write(service, 20)
    unsigned = Request(data_dir)
    assert verify(unsigned).differences[0].place == "the newest checkpoint"
    await sign(service)
    await write(service, 9)
    verdict = Place(data_dir).verify()
    assert verdict.differences == []
    assert (verdict.signed, verdict.events) == (newest(data_dir).size, len(raw_lines(data_dir)))
    assert verdict.events - verdict.signed == 10
    await service.gate.drain()


def test_a_torn_line_of_the_history(place: Place) -> None:
    """Whatever a crash leaves of a line, and whether another one follows."""
    path = place.root / "checkpoints.ndjson"
    data = path.read_bytes()
    line = data.splitlines(keepends=True)[-1]
    before = data.removesuffix(line)
    whole = len(line) - 1
    for end in (*range(1, whole - 12, 4), *range(whole - 12, whole)):
        for torn in (data + line[:end], before + line[:end] + b"\n" + line):
            path.write_bytes(torn)
            assert place.verify().differences == [], torn


# --- keys -------------------------------------------------------------------------------------


async def another_key(root: Path) -> tuple[Verifier, Verifier]:
    """The key is changed as the README says; returns the old one and the new one."""
    old = verifier_of(key_of(root))
    for name in ("checkpoint", "checkpoints.ndjson"):
        (root / name).rename(root.with_name(f"old-{name}"))
    key_of(root).unlink()
    service = await app.open_service(settings_for(root, segment_bytes=90_000), signs=True)
    await write(service, 300)
    await service.close()
    return old, verifier_of(key_of(root))


@pytest.mark.parametrize("block", [9000, 1 << 20])
async def test_a_log_whose_key_was_changed(
    place: Place, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it quotes is by the old key."""
    monkeypatch.setattr(scanning, "BLOCK", block)
    old, new = await another_key(place.root)
    verdict = verify(Request(place.root, [new]))
    assert verdict.differences == []
    assert verdict.foreign == [f"{old.name}+{old.key_id.hex()}"]
    since = place.root.with_name("old-checkpoint").read_bytes()
    verdict = verify(Request(place.root, [new, old], since=since))
    assert (verdict.differences, verdict.foreign) == ([], [])


@pytest.mark.parametrize("block", [9000, 1 << 20])
def test_a_line_that_quotes_what_was_never_signed(
    place: Place, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the statement is of lines just before, or of some far back."""
    monkeypatch.setattr(scanning, "BLOCK", block)
    lines = raw_lines(place.root)
    seq = max(n for n, line in enumerate(lines) if b'"log.checkpoint"' in line)
    for size in (3, seq - 1):
        note = Checkpoint("another/log", size, bytes(32)).sign(Signer("another/log", bytes(32)))
        quoting = orjson.loads(lines[seq]) | {"details": {"checkpoint": note.decode()}}

        def quote(lines: list[bytes], at: int, quoting: dict[str, object] = quoting) -> None:
            lines[at] = orjson.dumps(quoting) + b"\n"

        place.edit(seq, quote)
        sign_anew(place)
        found = [one for one in place.verify().differences if "tree/" not in one.place]
        assert any(one.place == f"the checkpoint in event {seq}" for one in found), found


@pytest.mark.parametrize(
    ("note", "words"),
    [("what", "no checkpoint of this log"), (None, "which were not there yet")],
)
def test_a_line_that_quotes_what_can_not_be(place: Place, note: str | None, words: str) -> None:
    if note is None:
        note = Checkpoint(place.signer.name, place.size, bytes(32)).sign(place.signer).decode()
    last = orjson.loads(raw_lines(place.root)[-1])
    line = last | {"action": "log.checkpoint", "details": {"checkpoint": note}}
    cut(place, place.size - 1)
    with place.segments[-1].open("ab") as file:
        file.write(orjson.dumps(line) + b"\n")
    sign_anew(place)
    first = place.verify().differences[0]
    assert first.seq == place.size - 1
    assert words in first.problem


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"v": 2}, "not an event"),
        ({"outcome": "perhaps"}, "not an event"),
        ({"status": "200"}, "not an event"),
        ({"time": "yesterday"}, "its time is not one"),
        ({"name": "n" * 8000}, "longer than 8000 bytes"),
    ],
)
def test_lines_that_are_signed_and_yet_no_events(
    place: Place, fields: dict[str, object], words: str
) -> None:
    def other(lines: list[bytes], at: int) -> None:
        lines[at] = orjson.dumps(orjson.loads(lines[at]) | fields) + b"\n"

    seq = place.middle
    place.edit(seq, other)
    sign_anew(place)
    first = place.verify().differences[0]
    assert (first.seq, words in first.problem) == (seq, True), first


def test_cosignatures_are_checked_by_who_has_the_key(place: Place) -> None:
    own = place.signer.verifier
    witness = Verifier("witness/1", own.public, COSIGNATURE)
    path = place.root / "checkpoint.cosigned"
    note = (place.root / "checkpoint").read_bytes()
    text = checkpoint.read(note)[1].text
    for time, wrong in ((5, False), (6, True)):
        data = time.to_bytes(8, "big") + signed_with(place, cosigned(text, 5))
        path.write_bytes(note + Signature(witness.name, witness.key_id, data).line.encode())
        assert place.verify().differences == []
        found = verify(Request(place.root, [own, witness])).differences
        assert [one.place for one in found] == ["the cosigned checkpoint"] * wrong


def signed_with(place: Place, message: bytes) -> bytes:
    """A signature by the log's key, which plays the witness."""
    encoded = key_of(place.root).read_text().strip().split("+", 4)[4]
    seed = base64.b64decode(encoded)[1:]
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


# --- one proof, and the command ---------------------------------------------------------------


async def command(root: Path, *arguments: str) -> Ended:
    return await run("verify", f"--data-dir={root}", *arguments)


async def test_the_command(place: Place, tmp_path: Path) -> None:
    """It writes nothing, and needs no more than the log and what was signed."""
    vkey = tmp_path / "log.vkey"
    vkey.write_text(f"{place.signer.verifier.encode()}\n")
    copy = tmp_path / "elsewhere" / "data"
    copy.mkdir(parents=True)
    shutil.copytree(place.root / "events", copy / "events")
    for name in ("checkpoint", "checkpoints.ndjson"):
        shutil.copy(place.root / name, copy)
    before = contents(tmp_path)
    found = await asyncio.gather(
        command(copy, f"--vkey={vkey}"),
        command(copy, "--vkey", vkey.read_text().strip(), "--json"),
        command(place.root),
        command(copy),
        command(copy, f"--vkey={vkey}", f"--since={place.root}/checkpoint"),
    )
    assert contents(tmp_path) == before
    size = place.size
    text = f"VALID: {size} events, {size} of them signed as {place.signer.name}"
    assert found[0].out.startswith(text)
    assert found[0].err == ""
    assert found[1].json["valid"] is True
    assert found[1].json["signatures"] == "given"
    assert found[1].json["events"] == size
    assert found[2].out == found[4].out == found[0].out
    assert "of this machine" in found[2].err
    assert found[3].out.startswith("CONSISTENT, SIGNATURES NOT CHECKED: ")
    assert "log key" in found[3].err
    assert {one.code for one in found} == {0}


async def test_the_command_on_a_log_that_was_changed(place: Place) -> None:
    change(place, place.middle)
    change(place, place.sealed + 3)
    plain, document = await asyncio.gather(command(place.root), command(place.root, "--json"))
    name = place.segments[1].name
    line = place.middle - int(name[6:18]) + 1
    where = f"event {place.middle}, line {line} of {name}"
    assert plain.code == document.code == 1
    assert plain.out.startswith(f"DIFFERENT: {where}: was changed since ")
    assert document.json["valid"] is False
    assert document.json["differences"][0]["seq"] == place.middle
    assert document.json["differences"][0]["place"] == where


async def test_on_a_terminal_there_is_a_bar_and_then_the_verdict(place: Place) -> None:
    terminal = Terminal()
    here = CommandPlace(place.root, (f"--data-dir={place.root}",), {}, "")
    assert await terminal.run(here, "verify") == 0
    assert "Verifying" in terminal.shown
    last = terminal.shown.rpartition("VALID: ")[2]
    assert last.startswith(f"{place.size} events")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vkey=what"], "not a key"),
        (["--event={root}/checkpoint"], "--event goes with --receipt"),
        (["--since={root}/none"], "does not exist"),
        (["--receipt={root}/checkpoint", "--archive={root}"], "goes with neither"),
        (["--data-dir={root}/none"], "no event log"),
    ],
)
async def test_wrong_usage(place: Place, arguments: list[str], words: str) -> None:
    given = [one.format(root=place.root) for one in arguments]
    (await command(place.root, *given)).failed(2, words)


def proven(place: Place, seq: int) -> bytes:
    proof = tree_of(place.root).prove(seq)
    assert proof is not None
    return proof


def other_index(place: Place, proof: bytes) -> bytes:
    return proof.replace(b"index 5\n", b"index 6\n")


def other_hash(place: Place, proof: bytes) -> bytes:
    parsed = tlogproof.parse(proof)
    hashes = (bytes(32), *parsed.hashes[1:])
    return tlogproof.Proof(parsed.index, hashes, parsed.signed).encode()


def other_key(place: Place, proof: bytes) -> bytes:
    """Everything fits but the signature."""
    parsed = tlogproof.parse(proof)
    signer = Signer(place.signer.name, bytes(32))
    signed = newest(place.root).sign(signer)
    return tlogproof.Proof(parsed.index, parsed.hashes, signed).encode()


def other_log(place: Place, proof: bytes) -> bytes:
    """A proof of a made-up log of one line, under its own key."""
    frontier = Frontier()
    frontier.extend(leaf_hashes(raw_lines(place.root)[:1]))
    signer = Signer("another/log", bytes(32))
    return tlogproof.Proof(0, (), Checkpoint(signer.name, 1, frontier.root()).sign(signer)).encode()


FORGED: dict[str, tuple[Callable[[Place, bytes], bytes], str]] = {
    "of another event": (other_index, "leads to another root"),
    "another hash": (other_hash, "leads to another root"),
    "another key": (other_key, "no known key"),
    "another log": (other_log, "no known key"),
    "cut short": (lambda place, proof: proof[:100], "proof file"),
    "no proof": (lambda place, proof: b"\xff", "proof file"),
}


@pytest.mark.parametrize("name", FORGED)
async def test_forged_receipts(place: Place, tmp_path: Path, name: str) -> None:
    forge, words = FORGED[name]
    path = tmp_path / "5.tlog-proof"
    path.write_bytes(forge(place, proven(place, 5)))
    ended = await command(place.root, f"--receipt={path}")
    assert ended.code == 1
    assert ended.out.startswith(f"DIFFERENT: {path}: ")
    assert words in ended.out


async def test_a_receipt(place: Place, tmp_path: Path) -> None:
    """With the line from the log, or from elsewhere; never with another line."""
    path, line = tmp_path / "5.tlog-proof", tmp_path / "line"
    path.write_bytes(proven(place, 5))
    lines = raw_lines(place.root)
    line.write_bytes(lines[5] + b"\n")
    vkey = f"--vkey={place.signer.verifier.encode()}"
    ended = await command(place.root, f"--receipt={path}")
    text = f"VALID: event 5 is in the log {place.signer.name}, signed when that had {place.size}"
    assert ended.code == 0
    assert ended.out.startswith(text)
    assert lines[5].decode() in ended.out
    nowhere = tmp_path / "nowhere"
    ended = await command(nowhere, vkey, f"--receipt={path}", f"--event={line}", "--json")
    assert ended.json == {
        "valid": True,
        "log": place.signer.name,
        "seq": 5,
        "signed": place.size,
        "problem": None,
    }
    line.write_bytes(lines[6] + b"\n")
    ended = await command(nowhere, vkey, f"--receipt={path}", f"--event={line}", "--json")
    assert (ended.code, ended.json["valid"]) == (1, False)
    (await command(nowhere, vkey, f"--receipt={path}")).failed(2, "--event FILE")
    (await command(nowhere, f"--receipt={path}")).failed(2, "can't be checked without")


def test_it_knows_all_fields_of_a_line() -> None:
    # A type of its own, because it is decoded in half the time that the other takes.
    assert list(StrictLine.__struct_fields__) == list(Line.__annotations__)
