"""A load of clients that remember what they were told, and checks of what they find afterwards."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import aiohttp

from flowmason_secrets.core.events import Line
from flowmason_secrets.storage import wire

SECRETS = "/api/v1/secrets"


@dataclass
class Known:
    """What clients know of one secret. Each has one writer, so it is a line of versions."""

    value: str | None = None
    # What was asked for and not answered: it may have happened, or not.
    pending: list[str | None] = field(default_factory=list)

    def may_be(self) -> set[str | None]:
        return {self.value, *self.pending}


@dataclass
class Seen:
    """What clients were told: receipts of everything that was answered."""

    receipts: list[tuple[int, str, str, str]] = field(default_factory=list)
    reads: int = 0

    def note(self, response: aiohttp.ClientResponse, action: str, name: str) -> None:
        headers = response.headers
        self.receipts.append((int(headers["Audit-Seq"]), headers["Audit-Id"], action, name))


async def write_on(
    client: aiohttp.ClientSession, number: int, known: dict[str, Known], seen: Seen, random: Random
) -> None:
    """Create, update and delete two secrets of one's own until the server is gone."""
    while True:
        await write_once(client, number, known, seen, random)


async def write_once(
    client: aiohttp.ClientSession, number: int, known: dict[str, Known], seen: Seen, random: Random
) -> None:
    """Create, update or delete one of two secrets of one's own, of which all is known."""
    name = f"W{number}-{random.randrange(2)}"
    secret = known[name]
    value: str | None = f"{name} {random.random()} " + "x" * random.choice((0, 10, 9000))
    if secret.value is not None and random.random() < 0.25:
        value = None
    secret.pending.append(value)
    if value is None:
        request = client.delete(f"{SECRETS}/{name}")
    else:
        request = client.post(SECRETS, json={"name": name, "value": value})
    async with request as response:
        await response.read()
        assert response.status in ((200,) if value is None or secret.value else (201,))
        action = "secret.delete" if value is None else "secret.create"
        seen.note(response, action, name)
    secret.value, secret.pending = value, []


async def read_on(
    client: aiohttp.ClientSession, names: list[str], seen: Seen, random: Random
) -> None:
    """Read anything until the server is gone."""
    while True:
        await read_once(client, random.choice(names), seen)


async def read_once(client: aiohttp.ClientSession, name: str, seen: Seen) -> None:
    """Read a secret that may be there."""
    async with client.get(f"{SECRETS}/{name}") as response:
        document = json.loads(await response.read())
        assert response.status in (200, 404), document
        if response.status == 200:
            assert document["value"].startswith(f"{name} ")
            seen.note(response, "secret.read", name)
            seen.reads += 1


async def until_gone(work: Awaitable[None]) -> None:
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        await work


def read_log(data_dir: Path) -> list[Line]:
    """All events; they have no gap and no repeat. What follows a torn line is none."""
    lines: list[Line] = []
    for path in sorted((data_dir / "events").glob("*")):
        assert int(path.name[6:18]) == len(lines), path.name
        for raw in path.read_bytes().splitlines(keepends=True):
            try:
                line = wire.decode_line(raw)
            except wire.Malformed:
                break
            if not raw.endswith(b"\n") or line["seq"] != len(lines):
                break
            lines.append(line)
    assert len({line["id"] for line in lines}) == len(lines)
    return lines


def check_pairs(data_dir: Path) -> None:
    """No half of a secret: each value has its metadata, and they are of one version."""
    for directory in data_dir.glob("[0-9a-f]" * 16):
        stems = Counter(path.stem for path in directory.iterdir())
        assert set(stems.values()) <= {2}, stems
        for stem in stems:
            meta = json.loads((directory / f"{stem}.meta").read_bytes())
            token = (directory / f"{stem}.secret").read_bytes().rstrip(b"\n")
            assert meta["token_sha256"] == hashlib.sha256(token).hexdigest()


class Grown:
    """The hash of every segment at its size so far: that much never changes."""

    def __init__(self, data_dir: Path) -> None:
        self._events = data_dir / "events"
        self._known: dict[str, tuple[int, str]] = {}

    def check(self) -> None:
        for name, (size, digest) in self._known.items():
            data = (self._events / name).read_bytes()
            assert hashlib.sha256(data[:size]).hexdigest() == digest, name
        for path in self._events.glob("*"):
            data = path.read_bytes()
            self._known[path.name] = (len(data), hashlib.sha256(data).hexdigest())


async def check_acknowledged(
    client: aiohttp.ClientSession, known: dict[str, Known], seen: Seen, data_dir: Path
) -> None:
    """Every secret is as its writer was told last, or as what he asked for and never heard of."""
    for name, secret in known.items():
        await find_out(client, name, secret, seen)
    async with client.get(SECRETS) as response:
        listed = [entry["name"] for entry in await response.json()]
    assert listed == sorted(name for name, secret in known.items() if secret.value is not None)
    check_receipts(seen, data_dir)


async def find_out(client: aiohttp.ClientSession, name: str, secret: Known, seen: Seen) -> None:
    """See which of the things that it may be a secret is."""
    async with client.get(f"{SECRETS}/{name}") as response:
        document = await response.json()
        assert response.status in (200, 404), document
        found = document["value"] if response.status == 200 else None
        assert found in secret.may_be(), name
        if response.status == 200:
            seen.note(response, "secret.read", name)
    secret.value, secret.pending = found, []


def check_receipts(seen: Seen, data_dir: Path) -> None:
    lines = read_log(data_dir)
    for seq, event_id, action, name in seen.receipts:
        line = lines[seq]
        assert (line["id"], line["action"], line["name"]) == (event_id, action, name)
        assert line["outcome"] == "success"
    assert len({seq for seq, *_ in seen.receipts}) == len(seen.receipts)
