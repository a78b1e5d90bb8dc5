"""The tree of the log: its tiles on disk, and what a server gives to those who verify."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmason_secrets import app, trail
from flowmason_secrets.core import checkpoint, merkle, tiles, tlogproof
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import LogDamaged
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.merkle import Unverified
from flowmason_secrets.core.tiles import Edge, Tile
from flowmason_secrets.service import Service
from flowmason_secrets.storage.chunks import ChunkReader, _near
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.published import Layout
from flowmason_secrets.storage.tree import TileFiles

from .conftest import Client
from .harness.golang import go_verify
from .harness.signed import key_of, newest, raw_lines, sign, tree_of, verifier_of
from .harness.trees import mth

LOG = "/api/v1/log"
ACME = app.local_caller("acme", "tester")


async def grow(service: Service, count: int) -> None:
    """So many events at least."""
    await service.set(ACME, Draft("N", Plaintext("v")))
    for _ in range(0, count, 50):
        await asyncio.gather(*(service.get(ACME, "N") for _ in range(50)))


# --- the edge ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(0, 700), max_size=5), again=st.integers(0, 5))
def test_the_edge_of_a_growing_tree(steps: list[int], again: int) -> None:
    """Full tiles come out once, in their place; and it can be resumed from tiles at any size."""
    stored: dict[Tile, bytes] = {}
    data: list[bytes] = []
    edge = Edge()
    for number, step in enumerate(steps):
        new = [b"%d" % n for n in range(len(data), len(data) + step)]
        data += new
        for tile, hashes in edge.extend(merkle.leaf_hashes(new)):
            assert tile not in stored
            stored[tile] = hashes
        edges = dict(edge.partial())
        assert {*stored, *edges} == set(tiles.tiles_of(len(data)))
        assert edge.size == len(data)
        if number == again:
            edge = Edge(len(data), lambda tile, edges=edges: edges[tile])  # type: ignore[misc]
            assert dict(edge.partial()) == edges
    assert edge.root() == mth(data)
    leaves = merkle.leaf_hashes(data)
    for tile, hashes in {**stored, **dict(edge.partial())}.items():
        if tile.level == 0:
            start = tile.number * tiles.WIDTH
            assert hashes == b"".join(leaves[start : start + tile.width])


def test_an_edge_of_tiles_that_are_too_short() -> None:
    with pytest.raises(Unverified):
        Edge(300, lambda tile: bytes(32 * tile.width - 1))


# --- lines by their seq -----------------------------------------------------------------------


async def test_a_line_is_found_wherever_it_is(
    service: Service, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a segment that is much longer than what is read at once, and has a torn tail."""
    await grow(service, 300)
    (segment,) = (data_dir / "events").iterdir()
    lines = segment.read_bytes().splitlines(keepends=True)
    with segment.open("ab") as file:
        file.write(b'{"v":1,"id":"torn\nmore\n' + b"x" * 5000)
    monkeypatch.setattr("flowmason_secrets.storage.chunks._CHUNK", 1000)
    for start in range(0, len(lines), 7):
        for stop in (start + 1, min(start + 9, len(lines))):
            chunks = list(ChunkReader(data_dir / "events").read(start, stop))
            assert [chunk.first for chunk in chunks][:1] == [start]
            assert b"".join(chunk.data for chunk in chunks) == b"".join(lines[start:stop])
            for chunk in chunks:
                assert chunk.offset == sum(map(len, lines[: chunk.first]))
    # Not by reading all of it.
    with segment.open("rb") as file:
        seq, offset = _near(file, 250, (0, 0))
    assert 240 < seq <= 250
    assert offset == sum(map(len, lines[:seq]))


# --- proofs -----------------------------------------------------------------------------------


def check_proof(data_dir: Path, seq: int) -> None:
    """The tree proves the line as it is in the log."""
    proof = tree_of(data_dir).prove(seq)
    assert proof is not None
    verifiers = [verifier_of(key_of(data_dir))]
    found = tlogproof.verify(raw_lines(data_dir)[seq], tlogproof.parse(proof), verifiers)
    assert found == newest(data_dir)


async def test_a_wrong_tile_is_found_when_it_is_needed(service: Service, data_dir: Path) -> None:
    await grow(service, 800)
    await sign(service)
    for name in ("0/000", "1/000", "0/001", "0/002"):
        path = data_dir / "tree/tile" / name
        right = path.read_bytes()
        path.write_bytes(right[:64] + bytes(32) + right[96:])
        check_proof(data_dir, int(name[-1]) * 256 + 3)
        assert path.read_bytes() == right
    (data_dir / "tree/tile/1/000").unlink()
    (data_dir / "tree/tile/0/002").unlink()
    check_proof(data_dir, 515)


@pytest.mark.parametrize("seq", [5, 300, 780])
async def test_a_changed_line_is_not_proven(service: Service, data_dir: Path, seq: int) -> None:
    await grow(service, 800)
    await sign(service)
    (segment,) = (data_dir / "events").iterdir()
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b'"seq":%d,' % seq, b'"seq":%d, ' % seq))
    with pytest.raises(LogDamaged, match=rf"It differs at event {seq}\."):
        tree_of(data_dir).prove(seq)
    # Nor are others, for the log as a whole is another one: but their own paths are intact.
    check_proof(data_dir, seq - 1 if seq % 2 == 0 else seq + 2)


async def test_tiles_follow_from_the_lines(service: Service, data_dir: Path) -> None:
    await grow(service, 600)
    await sign(service)
    layout = Layout(data_dir)
    files = TileFiles(layout.tree, layout.events, Durable())
    without = TileFiles(data_dir / "nothing", layout.events, Durable())
    for tile in tiles.tiles_of(newest(data_dir).size):
        assert files.stored(tile) == without.read(tile)
    assert not (data_dir / "nothing").exists()


# --- over HTTP --------------------------------------------------------------------------------


async def get(client: aiohttp.ClientSession, path: str) -> tuple[int, str, bytes]:
    """The status, the code of a problem, and the body."""
    async with client.get(f"{LOG}/{path}") as answer:
        problem = answer.content_type == "application/problem+json"
        code = (await answer.json(content_type=None))["code"] if problem else ""
        return answer.status, code, await answer.read()


async def test_go_verifies_what_a_server_gives(
    service: Service, client: Client, data_dir: Path, tmp_path: Path
) -> None:
    """The checkpoint, every tile, proofs; the lines come from the log itself."""
    reader = await client(scopes=("read",))
    olders: list[Path] = []
    for number in range(3):
        await grow(service, 250)
        await sign(service)
        olders.append(tmp_path / f"older.{number}")
        olders[-1].write_bytes((await get(reader, "checkpoint"))[2])
    static = tmp_path / "static"
    lines = raw_lines(data_dir)
    size = newest(data_dir).size
    assert size == len(lines) > 750
    for tile in tiles.tiles_of(size):
        status, _, data = await get(reader, tile.path)
        assert status == 200
        keep(static / tile.path, data)
    for bundle in tiles.bundles_between(0, size):
        begin = bundle.number * tiles.WIDTH
        keep(static / bundle.path, tiles.encode_bundle(lines[begin : begin + bundle.width]))
    keep(static / "checkpoint", (await get(reader, "checkpoint"))[2])
    proofs: list[Path] = []
    for seq in (1, 255, 256, 600, size - 1):
        status, _, proof = await get(reader, f"proof/{seq}")
        # The events of nobody's organisation are nobody's to see.
        if status == 404:
            assert b'"org_id":"acme"' not in lines[seq]
            continue
        proofs.append(tmp_path / f"{seq}.tlog-proof")
        proofs[-1].write_bytes(proof)
    assert len(proofs) > 3
    vkey = verifier_of(key_of(data_dir)).encode()
    assert go_verify(static, vkey, *olders, *proofs) == size


def keep(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


async def test_a_receipt_becomes_a_proof(service: Service, client: Client, data_dir: Path) -> None:
    """Also at once: it waits for the checkpoint that covers the event."""
    full = await client()
    async with full.post("/api/v1/secrets", json={"name": "A", "value": "v"}) as answer:
        seq, event_id = int(answer.headers["Audit-Seq"]), answer.headers["Audit-Id"]
    await service.signer.open()
    service.signer.start()
    async with full.get(f"{LOG}/proof/{seq}") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        proof = tlogproof.parse(await answer.read())
    line = raw_lines(data_dir)[seq]
    assert event_id.encode() in line
    verifier = verifier_of(key_of(data_dir))
    assert tlogproof.verify(line, proof, [verifier]).size > seq
    assert checkpoint.verify((await get(full, "checkpoint"))[2], [verifier]).size > seq


async def test_proofs_only_for_events_that_one_may_see(service: Service, client: Client) -> None:
    full, other = await client(), await client(org="other")
    fenced = await client(allow=("B*",))
    seqs = []
    for name in "AB":
        async with full.post("/api/v1/secrets", json={"name": name, "value": "v"}) as answer:
            seqs.append(int(answer.headers["Audit-Seq"]))
    await sign(service)
    a, b = seqs
    assert [(await get(full, f"proof/{seq}"))[0] for seq in seqs] == [200, 200]
    assert [(await get(fenced, f"proof/{seq}"))[0] for seq in seqs] == [404, 200]
    answers = {(await get(other, f"proof/{seq}"))[:2] for seq in (a, b, 0, b + 500)}
    assert answers == {(404, "event_not_found")}
    for seq in ("x", "-1", "1.0", "٣", "1" * 19, "%20"):
        assert (await get(full, f"proof/{seq}"))[:2] == (422, "invalid_input")


async def test_nothing_is_signed_yet(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trail, "_PATIENCE", 0.2)
    full = await client()
    async with full.post("/api/v1/secrets", json={"name": "A", "value": "v"}) as answer:
        seq = int(answer.headers["Audit-Seq"])
    for path in ("checkpoint", f"proof/{seq}"):
        async with full.get(f"{LOG}/{path}") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert (await answer.json(content_type=None))["code"] == "checkpoint_pending"
    assert (await get(full, "tile/0/000.p/1"))[:2] == (404, "tile_not_found")


async def test_tiles_that_are_covered_and_no_others(
    service: Service, client: Client, data_dir: Path
) -> None:
    full = await client()
    await grow(service, 300)
    await sign(service)
    # Not covered yet.
    await service.get(ACME, "N")
    size = newest(data_dir).size
    assert 300 < size < 500
    leaves = merkle.leaf_hashes(raw_lines(data_dir))
    for path, part in {
        "0/000": leaves[:256],
        "0/000.p/7": leaves[:7],
        "0/001.p/1": leaves[256:257],
        f"0/001.p/{size - 256}": leaves[256:size],
        "1/000.p/1": [mth_of(leaves[:256])],
    }.items():
        async with full.get(f"{LOG}/tile/{path}") as answer:
            assert (answer.status, await answer.read()) == (200, b"".join(part))
            assert answer.content_type == "application/octet-stream"
            assert "immutable" in answer.headers["Cache-Control"]
    beyond = [f"0/001.p/{size - 255}", "0/001", "0/002.p/1", "1/000.p/2", "1/000", "2/000.p/1"]
    never = ["entries/000", "entries/000.p/1", "0/0", "0/x000/000", "x/000", "0", "0/", "64/000"]
    for path in (*beyond, *never, "0/000/", "0/..%2f000", "%ff/000"):
        expected = (400, "malformed_request") if "%ff" in path else (404, "tile_not_found")
        assert (await get(full, f"tile/{path}"))[:2] == expected, path


def mth_of(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes."""
    while len(leaves) > 1:
        leaves = merkle.parents(leaves)
    return leaves[0]
