"""What was signed of a log, read the plain way."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from flowmason_secrets.core import checkpoint, merkle
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.merkle import Frontier
from flowmason_secrets.core.note import Signer, Verifier
from flowmason_secrets.service import Service
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.published import Layout
from flowmason_secrets.storage.signedtree import FilesTree
from flowmason_secrets.storage.signing import SigningKey

from .load import read_log

# Seconds within which what has to be signed is signed.
SOON = 20.0


def key_of(data_dir: Path) -> Path:
    """The signing key of a data directory, where it is by default."""
    return data_dir.with_name(f"{data_dir.name}-signing.key")


def verifier_of(key: Path) -> Verifier:
    """The public half of a signing key."""
    return Signer.decode(key.read_text().strip()).verifier


async def sign(service: Service) -> None:
    """Sign the log as it is now, as a server does once a second."""
    await service.signer.open()
    await service.signer.sign()


def tree_of(data_dir: Path, disk: Durable | None = None) -> FilesTree:
    """The tree of a data directory as another process has it."""
    disk = disk or Durable()
    return FilesTree(Layout(data_dir), disk, SigningKey(key_of(data_dir), disk), time.time)


def raw_lines(data_dir: Path) -> list[bytes]:
    """All lines of the log without their newlines; torn tails are none."""
    found: list[bytes] = []
    for segment in sorted((data_dir / "events").iterdir()):
        assert int(segment.name[6:18]) == len(found)
        for line in segment.read_bytes().split(b"\n")[:-1]:
            try:
                if orjson.loads(line)["seq"] != len(found):
                    break
            except orjson.JSONDecodeError:
                break
            found.append(line)
    assert len(found) == len(read_log(data_dir))
    return found


def history(data_dir: Path) -> list[bytes]:
    """All notes that were ever signed; torn lines are none."""
    notes: list[bytes] = []
    path = data_dir / "checkpoints.ndjson"
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            notes.append(orjson.loads(line)["checkpoint"].encode())
        except orjson.JSONDecodeError:
            continue
    return notes


def newest(data_dir: Path) -> Checkpoint:
    """What the newest checkpoint says, unverified; before there is one, that the log is empty."""
    path = data_dir / "checkpoint"
    return checkpoint.read(path.read_bytes())[0] if path.exists() else Checkpoint("", 0, b"")


def check_signed(data_dir: Path, key: Path) -> list[Checkpoint]:
    """Everything that was signed is signed with the key, and is true of the log as it is now.
    Returns it.
    """
    verifier = verifier_of(key)
    signed = [checkpoint.verify(note, [verifier]) for note in history(data_dir)]
    leaves = merkle.leaf_hashes(raw_lines(data_dir))
    frontier = Frontier()
    for one in signed:
        # Each is of a longer log than the one before.
        assert frontier.size < one.size <= len(leaves)
        frontier.extend(leaves[frontier.size : one.size])
        assert frontier.root() == one.root
    path = data_dir / "checkpoint"
    if path.exists():
        assert checkpoint.verify(path.read_bytes(), [verifier]) in signed[-2:]
    return signed


async def until(true: Callable[[], bool]) -> None:
    """Return when it is true, which has to be soon."""
    async with asyncio.timeout(SOON):
        while not true():
            await asyncio.sleep(0.02)
