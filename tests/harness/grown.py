"""A log of some thousand events in many segments, signed: for exporting and archiving."""

import asyncio
import itertools
from pathlib import Path
from uuid import uuid4

import orjson

from flowmason_secrets import app
from flowmason_secrets.core import merkle
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.minimum import Minimum
from flowmason_secrets.core.tiles import Edge
from flowmason_secrets.service import Service
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.minimum import MinimumFile

from .server import settings_for
from .signed import sign

# In bytes: some hundred events.
SEGMENT = 50_000

ACME, OTHER = app.local_caller("acme", "tester"), app.local_caller("other", "tester")


async def grow(data_dir: Path, reads: int) -> None:
    """Add a new secret of two organisations and so many reads to the log, and sign it."""
    service = await app.open_service(settings_for(data_dir, segment_bytes=SEGMENT))
    try:
        await work(service, reads)
        await sign(service)
    finally:
        await service.close()


async def work(service: Service, reads: int) -> None:
    """A new secret of two organisations and so many reads of it."""
    name = f"N-{uuid4().hex}"
    for caller in (ACME, OTHER):
        await service.set(caller, Draft(name, Plaintext(f"{name} of {caller.principal.org_id}")))
    # In several batches, so that segments end.
    for start in range(0, reads, 50):
        await asyncio.gather(
            *(service.get(ACME, name) for _ in range(start, min(start + 50, reads)))
        )


def drop_oldest(data_dir: Path, count: int) -> None:
    """Archive so many segments to nowhere: the minimum index is raised, and they are gone."""
    events = data_dir / "events"
    names = sorted(path.name for path in events.iterdir())
    file = MinimumFile(data_dir / "minimum")
    known = file.read()
    edge = Edge(known.minimum, lambda tile: known.edge[tile.level])
    organisations = set(known.organisations)
    time = ""
    for name, following in itertools.pairwise(names[: count + 1]):
        lines = (events / name).read_bytes().split(b"\n")[: int(following[6:18]) - edge.size]
        edge.extend(merkle.leaf_hashes(lines))
        decoded = [orjson.loads(line) for line in lines]
        organisations |= {line["org_id"] for line in decoded} - {None}
        time = decoded[-1]["time"]
    minimum = Minimum(edge.size, time, tuple(sorted(organisations)), edge.rows)
    file.write(minimum, Durable())
    for name in names[:count]:
        (events / name).unlink()
