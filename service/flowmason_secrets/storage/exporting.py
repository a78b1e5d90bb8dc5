"""Exporting the log of a data directory in the static layout. FORMAT.md §12. Blocking."""

from pathlib import Path

from ..core.errors import CheckpointPending, LogDamaged
from .checkpoints import Checkpoints
from .chunks import ChunkReader
from .durable import Durable
from .minimum import MinimumFile
from .published import Layout
from .signing import SigningKey
from .staticlayout import Exported, Source, StaticLayout, Tell
from .tree import TileFiles, whole_chunks


def export(layout: Layout, durable: Durable, key: SigningKey, to: Path, tell: Tell) -> Exported:
    """Bring a directory up to the newest checkpoint, beside whoever works on the log.

    Raises:
        CheckpointPending: nothing was signed yet.
        AnotherLog: what is there is not an earlier state of this log.
        LogDamaged: the log is not what was signed.
    """
    checkpoints, reader = Checkpoints(layout, durable), ChunkReader(layout.events)
    tiles, minimum = TileFiles(layout.tree, layout.events, durable), MinimumFile(layout.minimum)
    signer, note = key.load(), checkpoints.newest()
    # A copy for an auditor has no key: whoever verifies the export finds out.
    if signer is not None:
        note = next((signed.note for signed in checkpoints.signed(signer.verifier)), None)
    if note is None:
        raise CheckpointPending
    while True:
        source = Source(
            note,
            lambda start, stop: whole_chunks(reader, start, stop),
            tiles.stored,
            minimum.read(),
        )
        try:
            return StaticLayout(to, durable).add(source, tell)
        except LogDamaged:
            # Unless it was archived meanwhile.
            if minimum.read() == source.minimum:
                raise
