"""The Merkle tree of the log: RFC 6962 §2.1, with the proofs of RFC 9162 §2.1.

A *subtree* is `(height, index)`: the complete tree over the 2**height leaves from
index * 2**height on. Hashes are 32 bytes.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

try:
    from ._speedups import leaf_hashes as leaf_hashes
    from ._speedups import parents as parents
except ImportError:
    from .hashing import leaf_hashes as leaf_hashes
    from .hashing import parents as parents

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()

# The hash of a subtree.
Subtrees = Callable[[int, int], bytes]


class Unverified(ValueError):
    """A proof, signature, tile or note that does not hold, or is not well-formed."""


def leaf_hash(data: bytes) -> bytes:
    """The hash of one leaf: of a line of the log without its newline."""
    return leaf_hashes([data])[0]


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return parents([left, right])[0]


def subtree_root(nodes: Sequence[bytes]) -> bytes:
    """The root over 2**n hashes of neighbouring subtrees of one height."""
    while len(nodes) > 1:
        nodes = parents(nodes)
    return nodes[0]


class Frontier:
    """The right edge of a growing tree: the roots of the complete subtrees that make it up,
    the largest first. They and the size are all it takes to go on.

    Raises:
        Unverified: as many hashes are not what a tree of this size has.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if size < 0 or len(hashes) != size.bit_count():
            raise Unverified(f"{len(hashes)} hashes are no frontier of {size} leaves")
        self.size = size
        # By height.
        self._peaks: list[bytes | None] = [None] * size.bit_length()
        for (height, _), root in zip(frontier_of(size), hashes, strict=True):
            self._peaks[height] = root

    @classmethod
    def of(cls, size: int, subtrees: Subtrees) -> "Frontier":
        """The frontier of a tree of this size, from the hashes of its subtrees."""
        return cls(size, [subtrees(*subtree) for subtree in frontier_of(size)])

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """What a frontier can be made from again."""
        return tuple(peak for peak in reversed(self._peaks) if peak is not None)

    def extend(self, leaves: Sequence[bytes]) -> list[list[bytes]]:
        """Append leaf hashes; returns, by height, the hashes of the subtrees that are now complete
        and were not before, in their order. Costs one hash a leaf.
        """
        grown: list[list[bytes]] = []
        nodes = list(leaves)
        self.size += len(nodes)
        while nodes:
            height = len(grown)
            grown.append(nodes)
            if height == len(self._peaks):
                self._peaks.append(None)
            peak = self._peaks[height]
            row = nodes if peak is None else [peak, *nodes]
            self._peaks[height] = row[-1] if len(row) % 2 else None
            nodes = parents(row)
        return grown

    def root(self) -> bytes:
        """The root hash of the tree: MTH of RFC 6962 §2.1."""
        return _fold(self.hashes)


def frontier_of(size: int) -> Iterator[tuple[int, int]]:
    """The complete subtrees that make up a tree of this size, the largest first."""
    yield from _complete(0, size)


def root_of(size: int, subtrees: Subtrees) -> bytes:
    """The root hash of the tree over the first `size` leaves."""
    return _range_root(0, size, subtrees)


def inclusion_proof(index: int, size: int, subtrees: Subtrees) -> list[bytes]:
    """The path from a leaf to the root of a tree, from the leaf upward. RFC 9162 §2.1.3.1

    Raises:
        Unverified: the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise Unverified(f"a tree of {size} leaves has no leaf {index}")
    proof: list[bytes] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            proof.append(_range_root(middle, stop, subtrees))
            stop = middle
        else:
            proof.append(_range_root(start, middle, subtrees))
            start = middle
    return proof[::-1]


def consistency_proof(old: int, new: int, subtrees: Subtrees) -> list[bytes]:
    """What shows that a tree of `old` leaves is the beginning of one of `new`.
    RFC 9162 §2.1.4.1. Empty if the sizes are equal.

    Raises:
        Unverified: it is not 0 < `old` <= `new`.
    """
    if not 0 < old <= new:
        raise Unverified(f"no tree of {old} leaves can be shown to begin one of {new}")
    proof: list[bytes] = []
    start, stop = 0, new
    # Whether the old tree is whole in what is left of the new one: its root is known then.
    known = True
    while old != stop:
        middle = start + _split(stop - start)
        if old <= middle:
            proof.append(_range_root(middle, stop, subtrees))
            stop = middle
        else:
            proof.append(_range_root(start, middle, subtrees))
            start = middle
            known = False
    if not known:
        proof.append(_range_root(start, stop, subtrees))
    return proof[::-1]


def verify_inclusion(
    index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes
) -> None:
    """Check that the leaf of hash `leaf` is in the tree. RFC 9162 §2.1.3.2

    Raises:
        Unverified: it is not, as far as this proof goes.
    """
    if not 0 <= index < size:
        raise Unverified(f"a tree of {size} leaves has no leaf {index}")
    _check_hashes(leaf, root, *proof)
    node, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise Unverified("the inclusion proof is too long")
        if node & 1 or node == last:
            found = node_hash(sibling, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        node, last = node >> 1, last >> 1
    if last:
        raise Unverified("the inclusion proof is too short")
    if found != root:
        raise Unverified("the inclusion proof leads to another root")


def verify_consistency(
    sizes: tuple[int, int], roots: tuple[bytes, bytes], proof: Sequence[bytes]
) -> None:
    """Check that the first tree is the beginning of the second one. RFC 9162 §2.1.4.2

    Raises:
        Unverified: it is not, as far as this proof goes. From an empty tree nothing can be shown.
    """
    (old, new), (old_root, new_root) = sizes, roots
    if not 0 < old <= new:
        raise Unverified(f"no tree of {old} leaves can be shown to begin one of {new}")
    if old == new:
        if proof:
            raise Unverified("the consistency proof is too long")
        if old_root != new_root:
            raise Unverified("two trees of one size have different roots")
        return
    _check_hashes(old_root, new_root, *proof)
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        raise Unverified("the consistency proof is too short")
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    older = newer = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise Unverified("the consistency proof is too long")
        if node & 1 or node == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        node, last = node >> 1, last >> 1
    if last:
        raise Unverified("the consistency proof is too short")
    if (older, newer) != (old_root, new_root):
        raise Unverified("the consistency proof leads to other roots")


def _check_hashes(*hashes: bytes) -> None:
    if any(len(one) != HASH_BYTES for one in hashes):
        raise Unverified(f"a hash has {HASH_BYTES} bytes")


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _complete(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The complete subtrees of a node's leaves, the largest first; `start` is aligned to it."""
    while start < stop:
        height = (stop - start).bit_length() - 1
        yield height, start >> height
        start += 1 << height


def _range_root(start: int, stop: int, subtrees: Subtrees) -> bytes:
    return _fold([subtrees(*subtree) for subtree in _complete(start, stop)])


def _fold(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return EMPTY_ROOT
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root
