"""`log export`: the static layout, grown in steps, beside writers, and what it refuses."""

import asyncio
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tlog_scales import tiles as scales_tiles
from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader
from tlog_scales.signing import Vkey

from flowmason_secrets.core import checkpoint, tiles
from flowmason_secrets.core.errors import AnotherLog, CheckpointPending, LogDamaged
from flowmason_secrets.core.minimum import Minimum
from flowmason_secrets.core.ports import Chunk
from flowmason_secrets.core.tiles import ENTRIES
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.exporting import export
from flowmason_secrets.storage.published import Layout
from flowmason_secrets.storage.signing import SigningKey
from flowmason_secrets.storage.staticlayout import Exported, Source, StaticLayout

from .harness.faults import Stopping, Unplugged
from .harness.golang import go_verify
from .harness.grown import grow
from .harness.signed import key_of, newest, raw_lines, verifier_of
from .test_cli import run
from .test_tiles import KEY, LINES, TESSERA


def quiet(_done: int, _total: int) -> None:
    """Nobody looks."""


def exported(data_dir: Path, out: Path, disk: Durable | None = None) -> Exported:
    """Export the log of a data directory."""
    disk = disk or Durable()
    key = SigningKey(key_of(data_dir), disk)
    return export(Layout(data_dir), disk, key, out, quiet)


def contents(out: Path) -> dict[str, bytes]:
    """All files of an export."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with 700 events in several segments."""
    data_dir = tmp_path_factory.mktemp("log") / "data"
    asyncio.run(grow(data_dir, 690))
    assert len(list((data_dir / "events").iterdir())) > 3
    return data_dir


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    """A copy of it, with its key."""
    shutil.copytree(made.parent, tmp_path / "copy")
    return tmp_path / "copy" / "data"


# --- what others wrote ------------------------------------------------------------------------


def tessera(size: int) -> Source:
    """Tessera's test log when it had so many entries."""

    def lines(start: int, stop: int) -> Iterator[Chunk]:
        yield Chunk(start, 0, 0, b"".join(line + b"\n" for line in LINES[start:stop]))

    note = (TESSERA / f"checkpoint.{size}").read_bytes()
    checkpoint.verify(note, [KEY])
    return Source(note, lines, lambda tile: None, Minimum())


@pytest.mark.parametrize("steps", [range(1, 16), [15], [4, 9, 15]])
def test_tesseras_log_is_rebuilt_byte_for_byte(tmp_path: Path, steps: Sequence[int]) -> None:
    layout = StaticLayout(tmp_path / "out", Durable())
    for size in steps:
        assert layout.add(tessera(size), quiet).size == size
        assert contents(tmp_path / "out")["checkpoint"] == tessera(size).note
    theirs = contents(TESSERA)
    ours = contents(tmp_path / "out")
    assert ours == {name: theirs[name] for name in ours}
    every = {name for name in theirs if not name.startswith("checkpoint.")}
    assert len(ours) == 1 + 2 * len(steps)
    if len(steps) == len(LINES):
        assert set(ours) == every


async def test_others_read_and_verify_what_we_export(data_dir: Path, tmp_path: Path) -> None:
    out, olders = tmp_path / "out", []
    for step in range(3):
        exported(data_dir, out)
        olders.append(tmp_path / f"older.{step}")
        shutil.copy(out / "checkpoint", olders[-1])
        await grow(data_dir, (1, 300)[step % 2])
    done = exported(data_dir, out)
    lines, key = raw_lines(data_dir), verifier_of(key_of(data_dir))
    assert done.size == newest(data_dir).size == len(lines) > 1000
    assert go_verify(out, key.encode(), *olders) == len(lines)
    reader = TilesReader(LocalBackend(out))
    found = reader.get_checkpoint()
    found.verify(Vkey.from_string(key.encode()))
    assert reader.calculate_root_hash() == found.root_hash
    for index in range(0, len(lines), 37):
        entry = reader.get_entry(index)
        assert entry == lines[index]
        path = reader.get_inclusion_proof(index, found.size)
        path.check(scales_tiles.leaf_hash(entry), found.root_hash)
    old = checkpoint.read(olders[0].read_bytes())[0]
    reader.get_consistency_proof(old.size, found.size).check(old.root, found.root_hash)


# --- adding -----------------------------------------------------------------------------------


async def test_it_only_adds(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exported(data_dir, out)
    before = contents(out)
    assert exported(data_dir, out) == Exported(first.size, first.size, 0)
    assert contents(out) == before
    await grow(data_dir, 40)
    second = exported(data_dir, out)
    assert second.old == first.size < second.size == len(raw_lines(data_dir))
    after = contents(out)
    assert {**after, "checkpoint": b""} | before == {**after, "checkpoint": before["checkpoint"]}
    fresh = tmp_path / "fresh"
    exported(data_dir, fresh)
    assert {**after, **contents(fresh)} == after
    modes = {oct(path.stat().st_mode)[-3:] for path in out.rglob("*")}
    assert modes == {"640", "750"}


def test_whatever_moment_it_dies_in_it_goes_on(data_dir: Path, tmp_path: Path, fast: Path) -> None:
    whole = tmp_path / "whole"
    exported(data_dir, whole)
    out, states = fast / "out", list[Path]()

    def moment(when: str) -> None:
        states.append(fast / str(len(states)))
        if out.exists():
            shutil.copytree(out, states[-1])

    exported(data_dir, out, Stopping(moment))
    assert len(states) > 60
    for state in states:
        if (state / "checkpoint").exists():
            # Whoever reads it meanwhile finds all that the checkpoint covers.
            assert {**contents(state), ".draft": b""} == {**contents(whole), ".draft": b""}
        exported(data_dir, state)
        assert contents(state) == contents(whole)
        shutil.rmtree(state)


def test_on_a_full_disk_it_is_not_published(data_dir: Path, tmp_path: Path) -> None:
    class Full(Unplugged):
        """Fails as a disk fails."""

        def perform(self, call: object) -> object:
            try:
                return super().perform(call)  # type: ignore[arg-type] # a Call
            except BaseException as error:
                raise OSError(28, "No space left on device") from error

    disk = Full()
    disk.arm(40)
    with pytest.raises(OSError, match="No space"):
        exported(data_dir, tmp_path / "out", disk)
    assert not (tmp_path / "out/checkpoint").exists()
    exported(data_dir, tmp_path / "out")
    exported(data_dir, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what it refuses --------------------------------------------------------------------------


async def test_another_log(data_dir: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other" / "data"
    exported(data_dir, out)
    before = contents(out)
    await grow(other, 900)
    with pytest.raises(AnotherLog, match="it is of the log"):
        exported(other, out)
    # Of the same name, and of another content.
    shutil.rmtree(other)
    shutil.copy(key_of(data_dir), key_of(other))
    await grow(other, 900)
    with pytest.raises(AnotherLog, match="of another log, or this log is damaged"):
        exported(other, out)
    (out / "checkpoint").unlink()
    with pytest.raises(AnotherLog, match="is another one"):
        exported(other, out)
    del before["checkpoint"]
    assert contents(out) == before


async def test_a_directory_that_is_ahead(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir.parent, tmp_path / "older")
    await grow(data_dir, 5)
    exported(data_dir, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(AnotherLog, match="it is ahead"):
        exported(tmp_path / "older" / "data", tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["tile/0/002.p", "tile/entries/002.p", "tile/1/000.p"])
async def test_a_damaged_export(data_dir: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    exported(data_dir, out)
    (file,) = (out / name).iterdir()
    data = file.read_bytes()
    await grow(data_dir, 5)
    for wrong in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], b""):
        file.write_bytes(wrong)
        with pytest.raises(AnotherLog, match="is damaged"):
            exported(data_dir, out)
    file.write_bytes(data)
    exported(data_dir, out)


def test_a_directory_of_other_things(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(AnotherLog, match="it is not empty"):
        exported(data_dir, tmp_path / "out")
    (tmp_path / "out/notes.txt").unlink()
    (tmp_path / "out/checkpoint").write_text("no checkpoint")
    with pytest.raises(AnotherLog, match="its checkpoint is none"):
        exported(data_dir, tmp_path / "out")


def test_somebody_else_exports_to_it(data_dir: Path, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(AnotherLog, match="somebody else"):
            exported(data_dir, tmp_path)
    finally:
        os.close(descriptor)


def test_a_log_that_was_changed(data_dir: Path, tmp_path: Path) -> None:
    segment = min((data_dir / "events").iterdir())
    segment.write_bytes(segment.read_bytes().replace(b'"tester"', b'"nobody"', 1))
    with pytest.raises(LogDamaged, match="do not give the root"):
        exported(data_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


async def test_nothing_was_signed_yet(tmp_path: Path) -> None:
    (tmp_path / "data" / "events").mkdir(parents=True)
    with pytest.raises(CheckpointPending):
        exported(tmp_path / "data", tmp_path / "out")


# --- the command ------------------------------------------------------------------------------


async def test_the_command(data_dir: Path, tmp_path: Path) -> None:
    size, out = newest(data_dir).size, tmp_path / "out"
    export_command = ("log", "export", "--data-dir", str(data_dir), "--out", str(out))
    first = await run(*export_command)
    assert (first.code, first.out) == (0, "")
    assert first.err == f"{size} events added to {out}, {size} now.\n"
    # What an auditor gets has no key.
    key_of(data_dir).unlink()
    second = await run(*export_command)
    assert (second.code, second.err) == (0, f"0 events added to {out}, {size} now.\n")
    lines = tiles.decode_bundle((out / tiles.Tile(ENTRIES, 0).path).read_bytes())
    assert lines == raw_lines(data_dir)[:256]
    (await run("log", "export", "--data-dir", str(tmp_path / "no"), "--out", str(out))).failed(
        2, "There is no data directory"
    )
    (out / "checkpoint").write_text("mine")
    (await run(*export_command)).failed(1, "Nothing was exported", "its checkpoint is none")
