"""Log shippers follow the event log: every line once, whatever dies, begins anew or goes away.

rsyslog and syslog-ng run with the very configurations of `deploy/shippers`, but for addresses.
"""

import asyncio
import itertools
import json
import os
import re
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from flowmason_secrets.core.events import MAX_LINE, Event, Ids
from flowmason_secrets.core.ports import Sources
from flowmason_secrets.storage import wire
from flowmason_secrets.storage.chunks import segment_name, segments
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.eventlog import HEADER_BYTES, EventLog, SegmentLimits
from flowmason_secrets.storage.published import Layout

from .harness.grown import drop_oldest
from .harness.load import Known, Seen, read_on, until_gone, write_on
from .harness.server import ServerProcess, issue_key, session
from .harness.shippers import (
    CONFIGURATIONS,
    HOST,
    RSYSLOG,
    SYSLOG_NG,
    Collector,
    Kind,
    Shipper,
    differences,
    shipping,
)
from .harness.signed import newest
from .test_cli_serve import Certificate

SEGMENT_BYTES = 60_000
# By how many segments the log grows before each kill.
GROWTH = 6
# The newest segments stay: one is written to, and recovery may still look into those before it.
STAYING = 8

LONG = b'{"v":1,"id":"01990000-0000-7000-8000-000000000000","seq":' + b"9" * 7900
# What a writer that died in the middle of a line has left.
TORN = (b'{"v":1,"id":"0199', LONG, b"", '{"v":1,"name":"Schlüssel'.encode()[:-4], b"\0" * 100)


class Log:
    """The event log as it was written, with what was removed of it since."""

    def __init__(self, data_dir: Path) -> None:
        self.events = data_dir / "events"
        self.removed: dict[int, list[bytes]] = {}
        self._inodes: dict[int, int] = {}

    def firsts(self) -> list[int]:
        """The segments that are there, oldest first."""
        firsts = segments(self.events)
        for first in firsts:
            if first not in self._inodes:
                self._inodes[first] = (self.events / segment_name(first)).stat().st_ino
        return firsts

    @property
    def begun(self) -> int:
        """How many segments there have been."""
        return len(self.firsts()) + len(self.removed)

    @property
    def reused(self) -> int:
        """How many segments got the inode of an earlier one."""
        return len(self._inodes) - len(set(self._inodes.values()))

    def segment(self, first: int) -> list[bytes]:
        """The whole lines of a segment that is there."""
        return (self.events / segment_name(first)).read_bytes().split(b"\n")[:-1]

    def all(self) -> dict[int, list[bytes]]:
        """The lines of all segments by their first seq."""
        return self.removed | {first: self.segment(first) for first in self.firsts()}

    async def grow(self, count: int) -> None:
        """Return when so many more segments have begun."""
        aim = self.begun + count
        async with asyncio.timeout(20):
            while self.begun < aim:
                await asyncio.sleep(0.005)

    def append_longest(self, count: int) -> None:
        """Append lines of 8,000 bytes, as another process would."""
        new_id = Ids(time.time, os.urandom)
        log = EventLog(
            Layout(self.events.parent),
            Durable(),
            Sources(time.time, new_id),
            SegmentLimits(SEGMENT_BYTES),
        )
        log.open()
        for _ in range(count):
            log.append([longest(new_id(), log.position)])
        log.close()

    def tear(self, tail: bytes) -> None:
        """Leave this at the end of the newest segment."""
        with (self.events / segment_name(self.firsts()[-1])).open("ab") as file:
            file.write(tail)

    def staged_from(self) -> float:
        """From which event on recovery looks into the log."""
        journals = (self.events.parent / "staged").glob("*.journal")
        return min((int(path.name[:12]) for path in journals), default=float("inf"))

    async def remove_shipped(self, collector: Collector) -> None:
        """Remove old segments of which all has arrived, until it is cancelled. None that archiving
        would leave: what recovery may look into, or what is not signed with lines of a later one.
        """
        root = self.events.parent
        while True:
            firsts = self.firsts()
            for first, following in itertools.pairwise(firsts[: 1 - STAYING]):
                lines = self.segment(first)
                await collector.all_of(lines)
                if self.staged_from() < following or newest(root).size <= following:
                    break
                self.removed[first] = lines
                drop_oldest(root, 1)
            await asyncio.sleep(0.005)


def longest(event_id: str, seq: int) -> Event:
    """An event whose line has as many bytes as any may have, in several scripts."""

    def made(padding: str) -> Event:
        return Event(
            event_id, "secret.read", "denied", "acme", "secret", None, details={"padding": padding}
        )

    # The first line of a segment may come before it, and its seq may have one more digit.
    size = len(wire.encode_lines([made("ü🔑\\")], seq + 1, "2026-01-31T12:00:00.000000Z"))
    return made("ü🔑\\" + "x" * (MAX_LINE - size))


async def under_load(data_dir: Path, log: Log, key: str, number: int, shipper: Shipper) -> None:
    """Serve many clients, and die by SIGKILL in the middle of it."""
    random = Random(number)
    server = ServerProcess(data_dir, FLOWMASON_SECRETS_SEGMENT_BYTES=str(SEGMENT_BYTES))
    await server.start()
    try:
        async with session(server.url, key) as client:
            writers = range(10 * number, 10 * number + 8)
            known = {f"W{writer}-{n}": Known() for writer in writers for n in range(2)}
            seen = Seen()
            works = [write_on(client, writer, known, seen, random) for writer in writers]
            works += [read_on(client, list(known), seen, random) for _ in range(8)]
            tasks = [asyncio.create_task(until_gone(work)) for work in works]
            await log.grow(GROWTH // 2)
            if number % 2:
                # What it knew is removed meanwhile, and what it doesn't know has those inodes.
                await shipper.stop()
                await log.grow(GROWTH)
                await shipper.start()
            await log.grow(GROWTH // 2)
            assert not any(task.done() for task in tasks)
            await server.kill()
            await asyncio.gather(*tasks)
    finally:
        await server.kill()


@pytest.mark.parametrize("kind", [RSYSLOG, SYSLOG_NG], ids=lambda kind: kind.name)
async def test_every_line_is_shipped_once(kind: Kind, tmp_path: Path, data_dir: Path) -> None:
    key = await issue_key(data_dir)
    log = Log(data_dir)
    certificate = Certificate(tmp_path, HOST)
    async with shipping(kind, tmp_path / "place", log.events, certificate) as (shipper, collector):
        removing = asyncio.create_task(log.remove_shipped(collector))
        for number, torn in enumerate(TORN):
            await under_load(data_dir, log, key, number, shipper)
            log.tear(torn)
            if number % 2 == 0:
                await shipper.stop()
                await shipper.start()
                log.append_longest(10)
            assert not removing.done(), removing.exception()
        removing.cancel()
        written = [line for lines in log.all().values() for line in lines]
        await collector.all_of(written)
        await shipper.stop()
        await collector.ended()
    assert collector.broken == []
    assert differences(written, collector.lines) == []
    check_order(log, collector.lines)
    print(
        f"{kind.name}: {len(written)} lines in {log.begun} segments, {len(log.removed)} of them "
        f"removed, {log.reused} inodes used again"
    )
    # It was a load, and the segments changed and went away in the middle of it.
    assert len(written) > 3000
    assert {json.loads(line)["seq"] for line in written} == set(range(len(written)))
    assert max(map(len, written)) == MAX_LINE - 1
    assert log.begun > 20
    assert len(log.removed) > 10
    assert log.reused or not reuses_inodes(tmp_path)


def check_order(log: Log, shipped: list[bytes]) -> None:
    """The lines of each segment came in their order."""
    segment_of = {line: first for first, lines in log.all().items() for line in lines}
    came = defaultdict(list)
    for line in shipped:
        came[segment_of[line]].append(line)
    for first, lines in log.all().items():
        assert came[first] == lines, segment_name(first)


def reuses_inodes(directory: Path) -> bool:
    """Whether a new file there gets the inode of one that was removed, as on ext4."""
    inodes = []
    for name in ("one", "two"):
        (directory / name).touch()
        inodes.append((directory / name).stat().st_ino)
        (directory / name).unlink()
    return inodes[0] == inodes[1]


# --- the configurations themselves ----------------------------------------------------------

GLOB = "/var/lib/flowmason/secrets/events/audit-*.ndjson"


def parsed(name: str) -> Any:
    """A configuration in YAML or TOML."""
    text = (CONFIGURATIONS / name).read_text(encoding="utf-8")
    return tomllib.loads(text) if name.endswith(".toml") else yaml.safe_load(text)


def options(name: str) -> set[str]:
    """The options that a configuration has before it says where to send."""
    text = (CONFIGURATIONS / name).read_text(encoding="utf-8").partition("# Where to.")[0]
    text = re.sub(r"^ *#.*", "", text, flags=re.MULTILINE)
    if name == "syslog-ng.conf":
        return set(re.findall(r"([a-z-]+)\(", text))
    if name == "rsyslog.conf":
        return set(re.findall(r"([A-Za-z.]+)=\"", text))
    if name.endswith(".toml"):
        return set(re.findall(r"^([a-z_.]+) =", text, re.MULTILINE))
    return set(re.findall(r"^[ -]*([a-z_.]+): \S", text, re.MULTILINE))


NAMES = sorted(path.name for path in CONFIGURATIONS.iterdir() if path.suffix != ".md")


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_says_why_each_option_is_there(name: str) -> None:
    readme = (CONFIGURATIONS / "README.md").read_text(encoding="utf-8")
    section = readme.partition(f"### `{name}`\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    explained = set(re.findall(r"`([A-Za-z_.-]+)`", section))
    found = options(name)
    assert len(found) > 5
    assert found - explained == set()


def test_fluent_bit() -> None:
    configuration = parsed("fluent-bit.yaml")
    (tail,) = configuration["pipeline"]["inputs"]
    (output,) = configuration["pipeline"]["outputs"]
    assert (tail["path"], tail["tag"]) == (GLOB, output["match"])
    assert tail["read_from_head"] is tail["db.compare_filename"] is True
    assert {"db", "key"} < tail.keys()
    assert int(tail["buffer_chunk_size"].removesuffix("k")) << 10 > MAX_LINE


def test_vector() -> None:
    configuration = parsed("vector.toml")
    source = configuration["sources"]["flowmason_secrets"]
    assert source["include"] == [GLOB]
    assert (source["read_from"], source["oldest_first"]) == ("beginning", True)
    # The first line of a segment is the one with the random id.
    assert source["fingerprint"] == {"strategy": "checksum", "lines": 1, "ignored_header_bytes": 0}
    assert source["max_line_bytes"] > MAX_LINE
    assert configuration["sinks"]["collector"]["inputs"] == ["flowmason_secrets"]


def test_filebeat() -> None:
    (source,) = parsed("filebeat.yml")["filebeat.inputs"]
    assert source["paths"] == [GLOB]
    # Smaller files are not read at all.
    fingerprint = source["prospector.scanner.fingerprint"]
    assert fingerprint == {"enabled": True, "offset": 0, "length": HEADER_BYTES}
    assert "file_identity.fingerprint" in source
    assert source["message_max_bytes"] > MAX_LINE


def test_opentelemetry_collector() -> None:
    configuration = parsed("otel-collector.yaml")
    receiver = configuration["receivers"]["filelog"]
    assert (receiver["include"], receiver["start_at"]) == ([GLOB], "beginning")
    # Anything else sends a torn tail as a line.
    assert receiver["force_flush_period"] == 0
    assert receiver["fingerprint_size"] == "1kb"
    assert receiver["storage"] in configuration["service"]["extensions"]
    assert receiver["storage"] in configuration["extensions"]
    assert configuration["service"]["pipelines"]["logs"]["receivers"] == ["filelog"]
