"""The Merkle tree of a data directory's log, and its signing. FORMAT.md §9. Blocking.

One process at a time signs: the one that holds the lock. Any process may read.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence

from .. import forking
from ..core import checkpoint, merkle, times, witness
from ..core.checkpoint import Checkpoint
from ..core.errors import ConfigurationError, EventArchived, LogDamaged
from ..core.merkle import Unverified
from ..core.note import Signature, Signer
from ..core.ports import Anchor, Chunk, Clock, Progress
from ..core.tiles import ENTRIES, WIDTH, Edge, Tile, TileHashes, exists_in, split_hashes
from ..core.tlogproof import Proof
from ..core.witness import WitnessState
from . import wire
from .checkpoints import Checkpoints, Signed
from .chunks import ChunkReader, segment_name, segments
from .durable import Durable
from .minimum import MinimumFile
from .published import Layout
from .signing import SigningKey
from .tree import Pruned, TileFiles, hashes_of, whole_chunks
from .witnesses import WitnessStates

# How many lines are hashed before others get their turn: some fifty milliseconds.
_STEP = 1 << 16

# How many lines that may not be the signed ones are looked at.
_SUSPECTS = 1000

_ANCHOR = b'"action":"log.checkpoint"'


class FilesTree:
    """See `Tree`."""

    def __init__(self, layout: Layout, durable: Durable, key: SigningKey, clock: Clock) -> None:
        self._layout = layout
        self._durable = durable
        self._key = key
        self._clock = clock
        self._checkpoints = Checkpoints(layout, durable)
        self._witnesses = WitnessStates(layout, durable)
        self._files = TileFiles(layout.tree, layout.events, durable)
        self._reader = ChunkReader(layout.events)
        self._archived = MinimumFile(layout.minimum)
        self._lock: int | None = None
        self._signer: Signer | None = None
        self._signed: list[Signed] = []
        self._edge = Edge()
        # The newest segment that was read from, and whether its name may not be durable yet.
        self._segment = -1
        self._new_segment = True
        self._anchor = Anchor(0, 0.0, False)

    # --- who signs --------------------------------------------------------------------------

    def lead(self) -> bool:
        """See `Tree.lead`."""
        if self._leads():
            return True
        if self._lock is not None:
            # A lock on a file that somebody removed excludes nobody, and others may have signed.
            self._let_go()
            return False
        lock = self._durable.open_slot(self._layout.signing_lock)
        forking.close_in_children(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            forking.close(lock)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._lock = lock
        return True

    def close(self) -> None:
        """See `Tree.close`."""
        if self._lock is not None:
            self._let_go()

    def _leads(self) -> bool:
        return self._lock is not None and os.fstat(self._lock).st_nlink > 0

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        assert lock is not None  # noqa: S101 - both callers have looked
        forking.close(lock)

    # --- what was signed --------------------------------------------------------------------

    def begin(self) -> None:
        """See `Tree.begin`."""
        signer = self._key.load()
        if signer is None:
            if self._checkpoints.exist():
                raise ConfigurationError(
                    f"The signing key {self._key.path} is gone, and the log was signed with it. "
                    f"Put it back. {self._checkpoints.anew}"
                )
            signer = self._key.make()
        self._signer = signer
        self._signed = self._checkpoints.signed(signer.verifier)

    def check(self, position: int) -> None:
        """See `Tree.check`."""
        self._segment, self._new_segment = -1, True
        self._anchor = Anchor(0, 0.0, False)
        if not self._signed:
            self._edge = Edge()
            return
        newest, *older = self._signed
        size = newest.statement.size
        if size > position:
            raise LogDamaged(
                f"The log has {position} events, and {size} of them were signed: events {position} "
                f"to {size - 1} are missing. Put back what is missing, and start again."
            )
        self._edge = self._resumed(newest.statement) or self._rebuilt(newest.statement)
        for signed in older:
            if not self._begins(signed.statement):
                # Perhaps only the tiles are wrong: they are not synced.
                self._edge = self._rebuilt(newest.statement)
            if not self._begins(signed.statement):
                raise LogDamaged(
                    f"{self._layout.checkpoint} and {self._layout.checkpoints} were signed over "
                    "two different logs. Compare both with your copies."
                )

    @property
    def size(self) -> int:
        """How many events are signed and checked, or being signed."""
        return self._edge.size

    def vouch(self, edge: Edge) -> None:
        """Hold the first lines of the log, as somebody else read them, against what was signed when
        `check` was called.

        Raises:
            LogDamaged: they are others.
        """
        signed = self._signed[0].statement
        try:
            self._consistent(edge, signed)
        except Unverified:
            self._rebuilt(signed)  # A tile is wrong, or the lines are.
            try:
                self._consistent(edge, signed)
            except Unverified:
                raise LogDamaged(
                    f"The first {edge.size} events are not those that were signed as "
                    f"{signed.origin}. Compare them with your shipped copy."
                ) from None

    def _consistent(self, edge: Edge, signed: Checkpoint) -> None:
        hashes = TileHashes(signed.size, self._files.read)
        proof = merkle.consistency_proof(edge.size, signed.size, hashes)
        merkle.verify_consistency((edge.size, signed.size), (edge.root(), signed.root), proof)

    def _resumed(self, signed: Checkpoint) -> Edge | None:
        """The tree that was signed, from the tiles and the lines of the last segment; None if tiles
        are missing, or if that is not what was signed.
        """
        start = max(n for n in (0, *segments(self._layout.events)) if n < max(signed.size, 1))
        edge = None
        with contextlib.suppress(Unverified):
            edge = Edge(start, self._files.stored_or_fail)
        for chunk in whole_chunks(self._reader, start, signed.size):
            self._note(chunk)
            if edge is not None:
                edge.extend(hashes_of(chunk))
        return edge if edge is not None and edge.root() == signed.root else None

    def _begins(self, signed: Checkpoint) -> bool:
        """Whether the log of that size is the one that was signed, as far as the tiles tell."""
        return merkle.root_of(signed.size, TileHashes(signed.size, self._files.read)) == signed.root

    def _rebuilt(self, signed: Checkpoint) -> Edge:
        """The tree that was signed, from the lines alone; tiles that were wrong are replaced.

        Raises:
            LogDamaged: the lines are not those that were signed.
        """
        before, suspects = self._archived.read(), list[tuple[int, bytes]]()
        try:
            edge, wrong = self._hashed(signed.size, suspects)
        except LogDamaged:
            if self._archived.read() == before:
                raise
            # Some of it was archived meanwhile.
            return self._rebuilt(signed)
        if edge.root() != signed.root:
            raise self._damage(signed, suspects)
        if wrong:
            # Only now: what was wrong might have told which line had been changed.
            self._hashed(signed.size, None)
        return edge

    def _hashed(self, size: int, suspects: list[tuple[int, bytes]] | None) -> tuple[Edge, bool]:
        """The tree of the lines, whose missing tiles are written; whether some tile is wrong.

        `suspects` gets the lines whose stored leaf hashes are others. Without it, wrong tiles are
        overwritten.
        """
        edge, wrong = self._beginning(), False
        for chunk in whole_chunks(ChunkReader(self._layout.events), edge.size, size):
            full = edge.extend(hashes_of(chunk))
            last = edge.partial() if edge.size == size else ()
            for tile, data in (*full, *last):
                stored = self._files.stored(tile)
                if stored == data:
                    continue
                if stored is None or suspects is None:
                    self._files.put(tile, data)
                    continue
                wrong = True
                if tile.level == 0 and len(suspects) < _SUSPECTS:
                    suspects += _differences(tile, stored, data)
        return edge, wrong

    def _beginning(self) -> Edge:
        """The tree of what was archived."""
        minimum = self._archived.read()
        return Edge(minimum.minimum, lambda tile: minimum.edge[tile.level])

    def _damage(self, signed: Checkpoint, suspects: list[tuple[int, bytes]]) -> LogDamaged:
        """Where the log differs: the first line of which the tiles prove that it was another."""
        hashes = TileHashes(signed.size, self._files.stored_or_fail)
        for seq, leaf in suspects:
            with contextlib.suppress(Unverified):
                proof = merkle.inclusion_proof(seq, signed.size, hashes)
                merkle.verify_inclusion(seq, signed.size, leaf, proof, signed.root)
                place = f"event {seq}"
                break
        else:
            first = self._beginning().size
            place = (
                f"somewhere among events {first} to {signed.size - 1} (tree/ does not tell where)"
            )
        return LogDamaged(
            f"The log is not the one that was signed as {signed.origin} when it had {signed.size} "
            f"events. It differs at {place}. Compare it with your shipped copy, and put back what "
            "was changed; nothing was changed here."
        )

    # --- signing ----------------------------------------------------------------------------

    def grow(self, position: int, most: int) -> int:
        """See `Tree.grow`."""
        stop = min(position, self._edge.size + most)
        for chunk in whole_chunks(self._reader, self._edge.size, stop):
            self._note(chunk)
            for tile, data in self._edge.extend(hashes_of(chunk)):
                self._files.put(tile, data)
        return self._edge.size

    def sign(self, position: int) -> Progress:
        """See `Tree.sign`."""
        self.grow(position, _STEP)
        if self._edge.size > (self._signed[0].statement.size if self._signed else 0):
            self._publish()
        note = self._signed[0].note.decode() if self._signed else ""
        return Progress(self._edge.size, note, self._anchor)

    def _publish(self) -> None:
        """Sign what is there. The lines are synced first: whoever wrote them may not have yet."""
        signer = self._signer
        assert signer is not None  # noqa: S101 - begin has set it
        # Earlier segments are durable: that is the first thing that a new one's maker does.
        self._durable.sync_path(self._layout.events / segment_name(self._segment))
        if self._new_segment:
            self._durable.sync_path(self._layout.events)
            self._new_segment = False
        for tile, data in self._edge.partial():
            self._files.put(tile, data)
        statement = Checkpoint(signer.name, self._edge.size, self._edge.root())
        note = statement.sign(signer)
        self._checkpoints.publish(note, times.render(self._clock()))
        self._signed = [Signed(statement, note)]

    def _note(self, chunk: Chunk) -> None:
        """Remember the newest segment, and what of it went into the log as an anchor."""
        if chunk.segment != self._segment:
            self._segment, self._new_segment = chunk.segment, True
            began = self._anchor.time or _time(chunk.data, 0)
            self._anchor = Anchor(self._anchor.seq, began, chunk.segment > 0)
        place = chunk.data.rfind(_ANCHOR)
        if place >= 0:
            seq = chunk.first + chunk.data.count(b"\n", 0, place)
            self._anchor = Anchor(seq, _time(chunk.data, place), False)

    # --- witnesses --------------------------------------------------------------------------

    def connect(self, old: int, signed: bytes) -> list[bytes]:
        """See `Tree.connect`."""
        statement = checkpoint.read(signed)[0]
        if old in (0, statement.size):
            return []
        try:
            return self._connected(old, statement)
        except Unverified:
            # As below.
            self._rebuilt(statement)
            return self._connected(old, statement)

    def _connected(self, old: int, signed: Checkpoint) -> list[bytes]:
        hashes = TileHashes(signed.size, self._files.read)
        proof = merkle.consistency_proof(old, signed.size, hashes)
        roots = merkle.root_of(old, hashes), signed.root
        merkle.verify_consistency((old, signed.size), roots, proof)
        return proof

    def cosign(self, signed: bytes, cosignatures: Sequence[Signature]) -> None:
        """See `Tree.cosign`."""
        if not self._leads():
            return
        before = self._checkpoints.cosigned()
        note = witness.merge(signed, before, cosignatures)
        statement = checkpoint.read(note)[0]
        newest = bool(self._signed) and self._signed[0].statement == statement
        self._checkpoints.cosign(note, newest=newest)
        if newest:
            self._signed[0] = Signed(statement, note)

    def witnesses(self) -> list[WitnessState]:
        """See `Tree.witnesses`."""
        return self._witnesses.read()

    def record_witnesses(self, states: Sequence[WitnessState]) -> None:
        """See `Tree.record_witnesses`."""
        if self._leads():
            self._witnesses.write(states)

    # --- for readers ------------------------------------------------------------------------

    def newest(self, *, cosigned: bool = False) -> bytes | None:
        """See `Tree.newest`."""
        return self._checkpoints.cosigned() if cosigned else self._checkpoints.newest()

    def tile(self, tile: Tile) -> bytes | None:
        """See `Tree.tile`."""
        signed = self._statement()
        if signed is None or tile.level == ENTRIES or not exists_in(tile, signed.size):
            return None
        try:
            return self._files.read(tile)
        except Pruned:
            return None

    def prove(self, seq: int, *, cosigned: bool = False) -> bytes | None:
        """See `Tree.prove`."""
        note = self.newest(cosigned=cosigned)
        signed = None if note is None else self._statement(note)
        if note is None or signed is None or not seq < signed.size:
            return None
        try:
            return self._proof(seq, signed, note)
        except Unverified:
            # A tile is wrong, or the log is.
            self._rebuilt(signed)
            return self._proof(seq, signed, note)
        except LogDamaged:
            minimum = self._archived.read().minimum
            if seq < minimum:
                raise EventArchived(minimum) from None
            raise

    def _proof(self, seq: int, signed: Checkpoint, note: bytes) -> bytes:
        (leaf,) = self._files.leaves(seq, seq + 1)
        hashes = merkle.inclusion_proof(seq, signed.size, TileHashes(signed.size, self._files.read))
        merkle.verify_inclusion(seq, signed.size, leaf, hashes, signed.root)
        return Proof(seq, tuple(hashes), note).encode()

    def _statement(self, note: bytes | None = None) -> Checkpoint | None:
        note = note or self.newest()
        try:
            return None if note is None else checkpoint.read(note)[0]
        except Unverified as error:
            raise LogDamaged(f"{self._layout.checkpoint} is not a checkpoint: {error}.") from None


def _differences(tile: Tile, stored: bytes, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines whose stored leaf hashes are not those of the lines, with the stored ones."""
    pairs = zip(split_hashes(stored, tile.width), split_hashes(data, tile.width), strict=True)
    for place, (old, new) in enumerate(pairs):
        if old != new:
            yield tile.number * WIDTH + place, old


def _time(data: bytes, place: int) -> float:
    """The time of the line at a place."""
    start, end = data.rfind(b"\n", 0, place) + 1, data.index(b"\n", place)
    return times.parse_stored(wire.decode_line(data[start:end])["time"])
