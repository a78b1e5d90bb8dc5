"""RFC 6962 §2.1 written down naively, to compare with; and a log in the static layout."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flowmason_secrets.core import merkle, tiles
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.merkle import Frontier
from flowmason_secrets.core.note import Signer
from flowmason_secrets.core.tiles import ENTRIES, Tile


def mth(leaves: Sequence[bytes]) -> bytes:
    """The root over the data of leaves. RFC 6962 §2.1"""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = split(len(leaves))
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(m: int, leaves: Sequence[bytes]) -> list[bytes]:
    """The audit path of leaf `m`. RFC 6962 §2.1.1"""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def consistency(m: int, leaves: Sequence[bytes], *, known: bool = True) -> list[bytes]:
    """The consistency proof from size `m`. RFC 6962 §2.1.2"""
    if m == len(leaves):
        return [] if known else [mth(leaves)]
    k = split(len(leaves))
    if m <= k:
        return [*consistency(m, leaves[:k], known=known), mth(leaves[k:])]
    return [*consistency(m - k, leaves[k:], known=False), mth(leaves[:k])]


def split(size: int) -> int:
    """The largest power of two below `size`."""
    k = 1
    while k * 2 < size:
        k *= 2
    return k


class StaticLog:
    """A log in the layout of C2SP tlog-tiles below a directory, made by our core."""

    def __init__(self, directory: Path, signer: Signer) -> None:
        self.directory = directory
        self.signer = signer
        self.lines: list[bytes] = []
        self.frontier = Frontier()
        # The hashes of each level of tiles.
        self._levels: list[list[bytes]] = []

    def append(self, lines: Sequence[bytes]) -> bytes:
        """Append lines, write what is new, and return the new checkpoint."""
        old = self.frontier.size
        self.lines += lines
        grown = self.frontier.extend(merkle.leaf_hashes(lines))
        for level, hashes in enumerate(grown[:: tiles.HEIGHT]):
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level] += hashes
        for tile in tiles.tiles_between(old, self.frontier.size):
            self._write(tile.path, b"".join(self.hashes(tile)))
        for bundle in tiles.bundles_between(old, self.frontier.size):
            self._write(bundle.path, tiles.encode_bundle(self._entries(bundle)))
        root = self.frontier.root()
        checkpoint = Checkpoint(self.signer.name, self.frontier.size, root).sign(self.signer)
        self._write("checkpoint", checkpoint)
        return checkpoint

    def hashes(self, tile: Tile) -> list[bytes]:
        """The hashes in a tile, from memory."""
        start = tile.number * tiles.WIDTH
        return self._levels[tile.level][start : start + tile.width]

    def read(self, tile: Tile) -> bytes:
        """The bytes of a tile, from its file."""
        return (self.directory / tile.path).read_bytes()

    def _entries(self, bundle: Tile) -> list[bytes]:
        assert bundle.level == ENTRIES
        start = bundle.number * tiles.WIDTH
        return self.lines[start : start + bundle.width]

    def _write(self, name: str, data: bytes) -> None:
        place = self.directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
