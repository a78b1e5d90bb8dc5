"""The tiles of the log's Merkle tree on disk. FORMAT.md §9.4. Blocking.

They are a cache: what is missing is computed from the lines of the log.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import LogDamaged
from ..core.merkle import HASH_BYTES, Unverified, leaf_hashes, subtree_root
from ..core.ports import Chunk
from ..core.tiles import WIDTH, Tile, level_size, split_hashes
from .chunks import ChunkReader
from .durable import PRIVATE_FILE, Durable
from .minimum import MinimumFile


class Pruned(LogDamaged):
    """The hashes of lines that were archived are not there any more."""


class TileFiles:
    """The tiles below a directory, of the log whose segments are in another one."""

    def __init__(self, directory: Path, events: Path, durable: Durable) -> None:
        self._path = os.fspath(directory)
        self._events = events
        self._archived = MinimumFile.beside(events)
        self._durable = durable

    def read(self, tile: Tile) -> bytes:
        """The hashes of a tile. Nothing vouches for what is in a file: check the root.

        Raises:
            LogDamaged: neither the file nor the lines are there.
        """
        stored = self.stored(tile)
        return self._computed(tile) if stored is None else stored

    def stored(self, tile: Tile) -> bytes | None:
        """The hashes of a tile as they are in its file; None if that is missing or too short."""
        try:
            with open(self._file(tile), "rb", buffering=0) as file:
                data = file.read(tile.width * HASH_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data if len(data) == tile.width * HASH_BYTES else None

    def stored_or_fail(self, tile: Tile) -> bytes:
        """Like `stored`.

        Raises:
            Unverified: there is none.
        """
        data = self.stored(tile)
        if data is None:
            raise Unverified("a tile is missing")
        return data

    def put(self, tile: Tile, data: bytes) -> None:
        """Write a tile, full or not, in place. Not synced: it can be computed again."""
        path = self._file(tile)
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            # One by one, so that each has its mode.
            for part in reversed([Path(directory), *Path(directory).parents]):
                self._durable.make_directory(part)
        self._durable.place(path, data, PRIVATE_FILE)

    def leaves(self, start: int, stop: int) -> list[bytes]:
        """The leaf hashes of some lines.

        Raises:
            LogDamaged: they are not all there.
        """
        chunks = whole_chunks(ChunkReader(self._events), start, stop)
        return [leaf for chunk in chunks for leaf in hashes_of(chunk)]

    def _computed(self, tile: Tile) -> bytes:
        known = self._edge(tile)
        start, stop = tile.number * WIDTH + len(known), tile.number * WIDTH + tile.width
        if start < stop and tile.level == 0:
            known += self.leaves(start, stop)
        below = (Tile(tile.level - 1, number) for number in range(start, stop))
        if tile.level:
            known += (subtree_root(split_hashes(self.read(one), WIDTH)) for one in below)
        return b"".join(known[: tile.width])

    def _edge(self, tile: Tile) -> list[bytes]:
        """The first hashes of a tile, those of archived lines; none if it has no others."""
        minimum = self._archived.read()
        number, width = divmod(level_size(minimum.minimum, tile.level), WIDTH)
        if tile.number == number:
            return split_hashes(minimum.edge[tile.level], width) if width else []
        if tile.number < number and tile.level == 0:
            raise Pruned(
                f"The tile of events {tile.number * WIDTH} to {tile.number * WIDTH + WIDTH - 1} is "
                "not there, and they were archived. Put back tree/ if you need it."
            )
        return []

    def _file(self, tile: Tile) -> str:
        # A tile that is not full yet is the beginning of a file.
        return f"{self._path}/{tile.full.path}"


def whole_chunks(reader: ChunkReader, start: int, stop: int) -> Iterator[Chunk]:
    """The lines of the log, in chunks that follow each other without gaps.

    Raises:
        LogDamaged: some are not there.
    """
    expected = start
    for chunk in reader.read(start, stop):
        if chunk.first != expected:
            break
        yield chunk
        expected += chunk.data.count(b"\n")
    if expected < stop:
        raise LogDamaged(
            f"Event {expected} of the log is not there. Put back the segments that are missing in "
            "events/: without them the tree of the log can't be computed."
        )


def hashes_of(chunk: Chunk) -> list[bytes]:
    """The leaf hashes of whole lines. # format §9.1"""
    return leaf_hashes(chunk.data.split(b"\n")[:-1])
