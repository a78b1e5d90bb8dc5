"""Tiles and entry bundles: C2SP tlog-tiles. Paths, what a tree of a size has, and their bytes."""

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .merkle import HASH_BYTES, Frontier, Unverified, subtree_root

HEIGHT = 8
WIDTH = 1 << HEIGHT
# The level of entry bundles, which have the lines themselves in place of their hashes.
ENTRIES = -1

_MAX_LEVEL = 63
_PATH = re.compile(
    r"tile/(?P<level>entries|0|[1-9][0-9]?)/(?P<number>(?:x[0-9]{3}/){0,6}[0-9]{3})"
    r"(?:\.p/(?P<width>[1-9][0-9]{0,2}))?"
)
_LENGTH = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile, or an entry bundle; `width` of them are in it, at most 256."""

    level: int
    number: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        """Its path below the log, like `tile/0/x001/234.p/7`."""
        digits = f"{self.number:03d}"
        digits = digits.zfill(-len(digits) // 3 * -3)
        groups = [digits[place : place + 3] for place in range(0, len(digits), 3)]
        number = "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])
        level = "entries" if self.level == ENTRIES else str(self.level)
        part = "" if self.width == WIDTH else f".p/{self.width}"
        return f"tile/{level}/{number}{part}"

    @property
    def full(self) -> "Tile":
        """The full tile of the same place."""
        return replace(self, width=WIDTH)


def parse_path(path: str) -> Tile:
    """The tile of a path: of exactly the path that `Tile.path` gives.

    Raises:
        Unverified: it is not the path of a tile.
    """
    match = _PATH.fullmatch(path)
    if match is not None:
        level = ENTRIES if match["level"] == "entries" else int(match["level"])
        number = int(match["number"].replace("/", "").replace("x", ""))
        width = int(match["width"] or WIDTH)
        tile = Tile(level, number, width)
        if level <= _MAX_LEVEL and width <= WIDTH and tile.path == path:
            return tile
    raise Unverified("not the path of a tile")


def tiles_between(old: int, new: int) -> Iterator[Tile]:
    """The hash tiles that a tree of `new` leaves has and one of `old` has not, the lowest level
    first: the partial ones too.
    """
    level = 0
    while new:
        full, width = divmod(new, WIDTH)
        for index in range(old // WIDTH, full):
            yield Tile(level, index)
        if width and new != old:
            yield Tile(level, full, width)
        level, old, new = level + 1, old // WIDTH, full


def tiles_of(size: int) -> Iterator[Tile]:
    """All hash tiles of a tree of this size."""
    return tiles_between(0, size)


def bundles_between(old: int, new: int) -> Iterator[Tile]:
    """The entry bundles that a log of `new` lines has and one of `old` has not."""
    for tile in tiles_between(old, new):
        if tile.level:
            return
        yield replace(tile, level=ENTRIES)


def level_size(size: int, level: int) -> int:
    """How many hashes a tree of this size has in the tiles of a level."""
    return size >> HEIGHT * level


def exists_in(tile: Tile, size: int) -> bool:
    """Whether a tree of this size, or a smaller one before it, has this tile."""
    end = tile.number * WIDTH + tile.width
    return end <= level_size(size, max(tile.level, 0))


def split_hashes(data: bytes, width: int) -> list[bytes]:
    """The hashes in a tile.

    Raises:
        Unverified: there are not `width` of them.
    """
    if len(data) != width * HASH_BYTES:
        raise Unverified(f"a tile of {width} hashes has {width * HASH_BYTES} bytes")
    return [data[place : place + HASH_BYTES] for place in range(0, len(data), HASH_BYTES)]


def encode_bundle(lines: Sequence[bytes]) -> bytes:
    """An entry bundle of at most 256 lines, each without its newline and below 64 KiB."""
    return b"".join([_LENGTH.pack(len(line)) + line for line in lines])


def decode_bundle(data: bytes) -> list[bytes]:
    """The lines of an entry bundle.

    Raises:
        Unverified: it ends in the middle of one, or has more than 256.
    """
    lines: list[bytes] = []
    place = 0
    while place < len(data):
        begin = place + _LENGTH.size
        place = begin + int.from_bytes(data[begin - _LENGTH.size : begin], "big")
        if begin > len(data) or place > len(data) or len(lines) == WIDTH:
            raise Unverified("not an entry bundle")
        lines.append(data[begin:place])
    return lines


class TileHashes:
    """The hashes of all complete subtrees of a tree, from its tiles: a `merkle.Subtrees`.

    `read` returns the bytes of a tile, and may return more of it than asked for. What it raises
    is raised here; so is Unverified, if a tile is too short.
    """

    def __init__(self, size: int, read: Callable[[Tile], bytes], keep: int = 64) -> None:
        self.size = size
        self._read = read
        self._rows = lru_cache(keep)(self._load)

    def __call__(self, height: int, index: int) -> bytes:
        """The hash of a subtree."""
        level, within = divmod(height, HEIGHT)
        if (index + 1) << height > self.size or index < 0:
            raise Unverified(f"a tree of {self.size} leaves has no such subtree")
        place = index << within
        hashes = self._rows(level, place // WIDTH)
        start = place % WIDTH
        return subtree_root(hashes[start : start + (1 << within)])

    def _load(self, level: int, index: int) -> list[bytes]:
        width = min(level_size(self.size, level) - index * WIDTH, WIDTH)
        data = self._read(Tile(level, index, width))
        return split_hashes(data[: width * HASH_BYTES], width)


class Edge:
    """The right edge of a growing tree: for each level of tiles, the hashes of the last tile, which
    is not full. That is all it takes to go on, and to tell the root.

    `read` returns the bytes of a tile, of a tree of this size.
    """

    def __init__(self, size: int = 0, read: Callable[[Tile], bytes] | None = None) -> None:
        self._rows: list[list[bytes]] = []
        while read is not None and level_size(size, len(self._rows)):
            level = len(self._rows)
            number, width = divmod(level_size(size, level), WIDTH)
            row = read(Tile(level, number, width))[: width * HASH_BYTES] if width else b""
            self._rows.append(split_hashes(row, width))
        self._frontier = Frontier.of(size, self._subtree)

    @property
    def size(self) -> int:
        """How many leaves the tree has."""
        return self._frontier.size

    def root(self) -> bytes:
        """The root hash of the tree."""
        return self._frontier.root()

    @property
    def rows(self) -> tuple[bytes, ...]:
        """The hashes of the last tile of each level if it is not full, one after the other."""
        return tuple(b"".join(row) for row in self._rows)

    def extend(self, leaves: Sequence[bytes]) -> list[tuple[Tile, bytes]]:
        """Append leaf hashes; returns the tiles that are full now, the lowest level first."""
        before = self.size
        full: list[tuple[Tile, bytes]] = []
        for level, hashes in enumerate(self._frontier.extend(leaves)[::HEIGHT]):
            if level == len(self._rows):
                self._rows.append([])
            row = [*self._rows[level], *hashes]
            number = level_size(before, level) // WIDTH
            while len(row) >= WIDTH:
                full.append((Tile(level, number), b"".join(row[:WIDTH])))
                row, number = row[WIDTH:], number + 1
            self._rows[level] = row
        return full

    def partial(self) -> Iterator[tuple[Tile, bytes]]:
        """The last tile of each level that has one which is not full."""
        for level, row in enumerate(self._rows):
            if row:
                number = level_size(self.size, level) // WIDTH
                yield Tile(level, number, len(row)), b"".join(row)

    def _subtree(self, height: int, index: int) -> bytes:
        level, within = divmod(height, HEIGHT)
        start = (index << within) % WIDTH
        return subtree_root(self._rows[level][start : start + (1 << within)])
