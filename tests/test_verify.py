"""`verify`: a log is held against what was signed, and the first bad place is named."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import orjson
import pytest

from flowmason_secrets import app, verifying
from flowmason_secrets import signer as signer_module
from flowmason_secrets.core import merkle
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.merkle import Frontier
from flowmason_secrets.core.note import Signer
from flowmason_secrets.verifying import Request, Verdict, verify

from .harness.server import settings_for
from .harness.signed import history, key_of, newest, raw_lines, sign, until, verifier_of
from .test_signing import write


class Place(NamedTuple):
    """A data directory that can be changed."""

    root: Path

    @property
    def segments(self) -> list[Path]:
        return sorted((self.root / "events").iterdir())

    def segment_of(self, seq: int) -> Path:
        return next(one for one in reversed(self.segments) if int(one.name[6:18]) <= seq)

    def edit(self, seq: int, change: Callable[[list[bytes], int], None]) -> None:
        """Change the lines of a segment; `change` gets them, and the place of line `seq`."""
        path = self.segment_of(seq)
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines, seq - int(path.name[6:18]))
        path.write_bytes(b"".join(lines))

    @property
    def signer(self) -> Signer:
        return Signer.decode(key_of(self.root).read_text().strip())

    @property
    def size(self) -> int:
        return newest(self.root).size

    @property
    def middle(self) -> int:
        """A line in the midst of a segment in the midst of the log."""
        firsts = [int(one.name[6:18]) for one in self.segments]
        return (firsts[1] + firsts[2]) // 2

    @property
    def sealed(self) -> int:
        """The first line of the third segment."""
        return int(self.segments[2].name[6:18])

    def verify(self, **options: object) -> Verdict:
        keys = [self.signer.verifier]
        return verify(Request(self.root, keys, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("verify") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signer_module, "INTERVAL", 0.01)
        asyncio.run(make(root))
    place = Place(root)
    assert len(place.segments) > 3
    return place


async def make(root: Path) -> None:
    """A log of several segments, with checkpoints in it, all of it signed."""
    service = await app.open_service(settings_for(root, segment_bytes=90_000), signs=True)
    for _ in range(6):
        await write(service, 150)
        await until(lambda: newest(root).size >= len(raw_lines(root)))
    await service.close()


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """A copy to change."""
    shutil.copytree(made.root.parent, tmp_path / "copy")
    return Place(tmp_path / "copy" / made.root.name)


def test_what_the_service_wrote_is_valid(made: Place) -> None:
    lines = raw_lines(made.root)
    assert any(orjson.loads(line)["action"] == "log.checkpoint" for line in lines)
    verdict = made.verify()
    assert verdict.differences == []
    frontier = Frontier()
    frontier.extend(merkle.leaf_hashes(lines))
    assert (verdict.events, verdict.signed) == (len(lines), len(lines))
    assert verdict.root == frontier.root() == newest(made.root).root
    assert verdict.checkpoints == len(history(made.root)) > 5
    times = tuple(orjson.loads(lines[at])["time"] for at in (0, -1))
    assert verdict.times == times
