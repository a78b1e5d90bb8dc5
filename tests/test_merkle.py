"""The tree: against RFC 6962 written down naively, and against the vectors of others."""

import base64
import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmason_secrets.core import merkle, tiles
from flowmason_secrets.core.merkle import EMPTY_ROOT, Frontier, Unverified
from flowmason_secrets.core.tiles import Tile, TileHashes

from .harness import trees

VECTORS = Path(__file__).parent / "vectors" / "merkle"
SIZE = 300
LEAVES = [f"leaf {n}".encode() for n in range(SIZE)]
HASHES = merkle.leaf_hashes(LEAVES)
ROOTS = [trees.mth(LEAVES[:size]) for size in range(SIZE + 1)]


def subtrees(height: int, index: int) -> bytes:
    """The hash of a subtree of LEAVES."""
    return merkle.subtree_root(HASHES[index << height : (index + 1) << height])


def vectors(kind: str) -> list[tuple[str, dict[str, object]]]:
    """The published proofs of one kind, by their paths."""
    found = sorted((VECTORS / kind).rglob("*.json"))
    return [(str(path.relative_to(VECTORS)), json.loads(path.read_text())) for path in found]


def decoded(encoded: object) -> bytes:
    """A hash of a vector."""
    return base64.b64decode(str(encoded or ""))


def proof_of(vector: dict[str, object]) -> list[bytes]:
    """The proof of a vector; JSON's null stands for an empty one."""
    proof = vector["proof"] or []
    assert isinstance(proof, list)
    return [decoded(one) for one in proof]


INCLUSION = vectors("inclusion")
CONSISTENCY = vectors("consistency")


def test_the_vectors_are_all_there() -> None:
    assert (len(INCLUSION), len(CONSISTENCY)) == (98, 98)
    for kind in (INCLUSION, CONSISTENCY):
        assert {vector["wantErr"] for _, vector in kind} == {True, False}


@pytest.mark.parametrize("vector", [v for _, v in INCLUSION], ids=[n for n, _ in INCLUSION])
def test_inclusion_proofs_of_others(vector: dict[str, object]) -> None:
    try:
        merkle.verify_inclusion(
            int(str(vector["leafIdx"])),
            int(str(vector["treeSize"])),
            decoded(vector["leafHash"]),
            proof_of(vector),
            decoded(vector["root"]),
        )
    except Unverified:
        assert vector["wantErr"]
    else:
        assert not vector["wantErr"]


@pytest.mark.parametrize("vector", [v for _, v in CONSISTENCY], ids=[n for n, _ in CONSISTENCY])
def test_consistency_proofs_of_others(vector: dict[str, object]) -> None:
    sizes = int(str(vector["size1"])), int(str(vector["size2"]))
    roots = decoded(vector["root1"]), decoded(vector["root2"])
    try:
        merkle.verify_consistency(sizes, roots, proof_of(vector))
    except Unverified:
        assert vector["wantErr"]
    else:
        assert not vector["wantErr"]


def test_the_root_of_nothing() -> None:
    assert Frontier().root() == EMPTY_ROOT == merkle.root_of(0, subtrees)


def test_the_frontier_has_the_root_of_every_size() -> None:
    frontier = Frontier()
    for size, leaf in enumerate(HASHES, 1):
        frontier.extend([leaf])
        assert (frontier.size, frontier.root()) == (size, ROOTS[size])
        assert merkle.root_of(size, subtrees) == ROOTS[size]
        again = Frontier(size, frontier.hashes)
        assert again.hashes == frontier.hashes == Frontier.of(size, subtrees).hashes
        assert again.root() == ROOTS[size]


@settings(deadline=None)
@given(st.lists(st.integers(0, 70), max_size=12))
def test_the_frontier_grows_by_any_steps(steps: list[int]) -> None:
    frontier = Frontier()
    rows: list[list[bytes]] = []
    for step in steps:
        start = frontier.size
        grown = frontier.extend(HASHES[start : min(start + step, SIZE)])
        for height, hashes in enumerate(grown):
            if height == len(rows):
                rows.append([])
            rows[height] += hashes
        assert frontier.root() == ROOTS[frontier.size]
    for height, row in enumerate(rows):
        assert row == [subtrees(height, index) for index in range(frontier.size >> height)]


@pytest.mark.parametrize(("size", "hashes"), [(-1, 0), (0, 1), (1, 0), (5, 1), (5, 3)])
def test_no_frontier_is_made_of_the_wrong_number_of_hashes(size: int, hashes: int) -> None:
    with pytest.raises(Unverified):
        Frontier(size, [EMPTY_ROOT] * hashes)


def test_inclusion_proofs_are_those_of_the_rfc() -> None:
    for size in (*range(1, 40), 255, 256, 257, SIZE):
        for index in range(0, size, 1 if size < 40 else 7):
            proof = merkle.inclusion_proof(index, size, subtrees)
            assert proof == trees.path(index, LEAVES[:size])
            merkle.verify_inclusion(index, size, HASHES[index], proof, ROOTS[size])


def test_consistency_proofs_are_those_of_the_rfc() -> None:
    for new in (*range(1, 40), 255, 256, 257, SIZE):
        for old in range(1, new + 1, 1 if new < 40 else 7):
            proof = merkle.consistency_proof(old, new, subtrees)
            assert proof == trees.consistency(old, LEAVES[:new])
            merkle.verify_consistency((old, new), (ROOTS[old], ROOTS[new]), proof)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (1, 1), (-1, 5), (5, 5), (7, 5)])
def test_no_inclusion_proof_of_what_is_not_there(index: int, size: int) -> None:
    with pytest.raises(Unverified):
        merkle.inclusion_proof(index, size, subtrees)
    with pytest.raises(Unverified):
        merkle.verify_inclusion(index, size, HASHES[0], [], ROOTS[size])


@pytest.mark.parametrize(("old", "new"), [(0, 0), (0, 5), (-1, 5), (6, 5), (1, 0)])
def test_no_consistency_proof_of_what_is_no_growth(old: int, new: int) -> None:
    with pytest.raises(Unverified):
        merkle.consistency_proof(old, new, subtrees)
    with pytest.raises(Unverified):
        merkle.verify_consistency((old, new), (ROOTS[0], ROOTS[new]), [])


def flipped(data: bytes, place: int) -> bytes:
    """The same with one bit changed."""
    changed = bytearray(data)
    changed[place // 8 % len(changed)] ^= 1 << place % 8
    return bytes(changed)


@settings(deadline=None)
@given(st.integers(1, SIZE), st.data())
def test_no_bit_of_an_inclusion_proof_can_be_changed(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    leaf, root = HASHES[index], ROOTS[size]
    proof = merkle.inclusion_proof(index, size, subtrees)
    merkle.verify_inclusion(index, size, leaf, proof, root)
    bit, place = data.draw(st.integers(0, 255)), data.draw(st.integers(0, len(proof) + 1))
    changed = [leaf, root, *proof]
    changed[place] = flipped(changed[place], bit)
    wrong = [
        (index, size, changed[0], changed[2:], changed[1]),
        (index, size, leaf, [*proof, root], root),
        (index, size, leaf, [*proof[:-1], proof[-1][:-1]] if proof else [b""], root),
    ]
    if proof:
        wrong.append((index, size, leaf, proof[:-1], root))
        wrong.append((index, size, leaf, proof[1:], root))
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        wrong.append((other, size, leaf, proof, root))
    for case in wrong:
        with pytest.raises(Unverified):
            merkle.verify_inclusion(*case)


@settings(deadline=None)
@given(st.integers(2, SIZE), st.data())
def test_no_bit_of_a_consistency_proof_can_be_changed(new: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, new - 1))
    sizes, roots = (old, new), (ROOTS[old], ROOTS[new])
    proof = merkle.consistency_proof(old, new, subtrees)
    merkle.verify_consistency(sizes, roots, proof)
    bit, place = data.draw(st.integers(0, 255)), data.draw(st.integers(0, len(proof) + 1))
    changed = [*roots, *proof]
    changed[place] = flipped(changed[place], bit)
    wrong = [
        (sizes, (changed[0], changed[1]), changed[2:]),
        (sizes, roots, proof[:-1]),
        (sizes, roots, proof[1:]),
        (sizes, roots, [*proof, ROOTS[old]]),
        (sizes, (roots[1], roots[0]), proof),
        (sizes, roots, [*proof[:-1], proof[-1][:-1]]),
    ]
    for case in wrong:
        with pytest.raises(Unverified):
            merkle.verify_consistency(*case)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70_000), st.randoms(use_true_random=False))
def test_proofs_from_tiles(size: int, random: Random) -> None:
    """Over levels of tiles: the subtrees' hashes come from the tiles' bytes alone."""
    frontier = Frontier()
    grown = frontier.extend([n.to_bytes(32, "big") for n in range(size)])
    levels = grown[:: tiles.HEIGHT]

    def read(tile: Tile) -> bytes:
        start = tile.number * tiles.WIDTH
        found = levels[tile.level][start : start + tile.width]
        assert len(found) == tile.width
        return b"".join(found)

    hashes = TileHashes(size, read)
    root = merkle.root_of(size, hashes)
    assert root == frontier.root()
    index = random.randrange(size)
    proof = merkle.inclusion_proof(index, size, hashes)
    merkle.verify_inclusion(index, size, index.to_bytes(32, "big"), proof, root)
    old = random.randint(1, size)
    older = merkle.root_of(old, hashes)
    proof = merkle.consistency_proof(old, size, hashes)
    merkle.verify_consistency((old, size), (older, root), proof)
    assert Frontier.of(old, hashes).root() == older
