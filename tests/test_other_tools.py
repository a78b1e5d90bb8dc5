"""What others wrote verifies our trees: tlog-scales, and Go's own packages."""

from pathlib import Path

import pytest
from tlog_scales import tiles as scales_tiles
from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader
from tlog_scales.signing import Vkey

from flowmason_secrets.core import merkle, tlogproof
from flowmason_secrets.core.note import Signer
from flowmason_secrets.core.tiles import TileHashes
from flowmason_secrets.core.tlogproof import Proof

from .harness.golang import go_verify
from .harness.trees import StaticLog

SIGNER = Signer("secrets.example/log", bytes(range(32)))
# Sizes at which tiles begin and end, and what lies between.
STEPS = (1, 1, 5, 248, 1, 1, 255, 700, 1000)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> StaticLog:
    """A log that grew in steps; the checkpoint of each one is kept beside it."""
    made = StaticLog(tmp_path_factory.mktemp("log"), SIGNER)
    for number, step in enumerate(STEPS):
        start = made.frontier.size
        lines = [
            f'{{"seq":{n},"x":"{"y" * (n % 50)}"}}'.encode() for n in range(start, start + step)
        ]
        checkpoint = made.append(lines)
        (made.directory / f"older.{number}").write_bytes(checkpoint)
    return made


def olders(log: StaticLog) -> list[Path]:
    """The checkpoints on the way."""
    return sorted(log.directory.glob("older.*"))


def proof(log: StaticLog, index: int, size: int, signed: bytes) -> Proof:
    """The proof of a line in a tree of this size."""
    hashes = TileHashes(size, log.read)
    return Proof(index, tuple(merkle.inclusion_proof(index, size, hashes)), signed)


def test_tlog_scales_reads_our_layout(log: StaticLog) -> None:
    reader = TilesReader(LocalBackend(log.directory))
    found = reader.get_checkpoint()
    found.verify(Vkey.from_string(SIGNER.verifier.encode()))
    assert (found.origin, found.size) == (SIGNER.name, len(log.lines))
    assert reader.calculate_root_hash() == found.root_hash == log.frontier.root()
    for index in (0, 1, 6, 7, 255, 256, 511, 1000, found.size - 1):
        entry = reader.get_entry(index)
        assert entry == log.lines[index]
        path = reader.get_inclusion_proof(index, found.size)
        path.check(scales_tiles.leaf_hash(entry), found.root_hash)
        ours = proof(log, index, found.size, (log.directory / "checkpoint").read_bytes())
        assert list(ours.hashes) == path.node_hashes
        merkle.verify_inclusion(
            index, found.size, merkle.leaf_hash(entry), path.node_hashes, found.root_hash
        )
    old = 1
    for step in STEPS[1:]:
        root = merkle.root_of(old, TileHashes(found.size, log.read))
        between = reader.get_consistency_proof(old, found.size)
        between.check(root, found.root_hash)
        assert between.node_hashes == merkle.consistency_proof(
            old, found.size, TileHashes(found.size, log.read)
        )
        old += step


def test_go_verifies_every_line_and_every_step(log: StaticLog, tmp_path: Path) -> None:
    proofs = []
    for index in (0, 255, 256, 2000):
        file = tmp_path / f"{index}.tlog-proof"
        signed = (log.directory / "checkpoint").read_bytes()
        file.write_bytes(proof(log, index, log.frontier.size, signed).encode())
        tlogproof.verify(log.lines[index], tlogproof.parse(file.read_bytes()), [SIGNER.verifier])
        proofs.append(file)
    vkey = SIGNER.verifier.encode()
    assert go_verify(log.directory, vkey, *olders(log), *proofs) == len(log.lines)


def test_go_refuses_what_was_changed(tmp_path: Path) -> None:
    """The program that vouches for us does look."""
    vkey = SIGNER.verifier.encode()
    log = StaticLog(tmp_path, SIGNER)
    older = tmp_path / "older"
    older.write_bytes(log.append([b"a", b"b", b"c"]))
    log.append([b"d"] * 300)
    other = StaticLog(tmp_path / "other", SIGNER)
    other.append([b"a", b"x", b"c", *[b"d"] * 300])
    assert go_verify(tmp_path, vkey, older) == go_verify(other.directory, vkey) == 303
    with pytest.raises(AssertionError, match="invalid transparency proof"):
        go_verify(other.directory, vkey, older)
    with pytest.raises(AssertionError, match="no verifiable signatures"):
        go_verify(tmp_path, Signer("secrets.example/other", bytes(32)).verifier.encode())
    tile = tmp_path / "tile/0/000"
    whole = tile.read_bytes()
    tile.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AssertionError, match="other hashes"):
        go_verify(tmp_path, vkey)
    tile.write_bytes(whole)
    bundle = tmp_path / "tile/entries/000"
    bundle.write_bytes(bundle.read_bytes().replace(b"b", b"B", 1))
    with pytest.raises(AssertionError, match="another root"):
        go_verify(tmp_path, vkey)
