"""A disk that is full for real: what is refused and what is answered, and that it goes on by itself.

Each test has a row for every way to fill a disk and for one and several workers.
"""

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from flowmason_secrets.storage import wire

from .harness.disk import Disk, FileSizeLimit, SmallFileSystem
from .harness.load import (
    SECRETS,
    Grown,
    check_acknowledged,
    check_pairs,
    check_receipts,
    read_log,
)
from .harness.server import MASTER_KEY, ServerProcess, issue_key, serving, session
from .harness.workers import SOON, Load, one_each, workers
from .test_cli import Ended, environment
from .test_unaudited import (
    KEYS,
    VALUE,
    Answer,
    ask,
    check_metadata_are_served,
    check_nothing_is_served,
    check_unavailable,
)

AUDIT_LOG = "/api/v1/auth/audit-log"
WHOAMI = "/api/v1/auth/whoami"

# What to do, in the words of the problem document.
ADVICE = ("Make room", "try again", "by itself")


def make_small_file_system(place: Path) -> SmallFileSystem:
    try:
        return SmallFileSystem(place)
    except PermissionError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no small file system can be mounted here: {error}")


def make_limit(place: Path) -> FileSizeLimit:
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits other processes")
    return FileSizeLimit(place)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallFileSystem]:
    disk = make_small_file_system(tmp_path / "disk")
    yield disk
    disk.unmount()


@pytest.fixture
def limit(tmp_path: Path) -> FileSizeLimit:
    return make_limit(tmp_path / "disk")


@pytest.fixture(params=["small", "limit"])
def disk(request: pytest.FixtureRequest) -> Disk:
    found: Disk = request.getfixturevalue(request.param)
    return found


def processes(server: ServerProcess) -> list[int]:
    """The server and its workers."""
    assert server.process is not None
    return [server.process.pid, *workers(server)]


class Refused(aiohttp.ClientError):
    """A 503 that is as it should be. Those who put load on a server take it for no answer."""


class Refusals:
    """What a server has refused to the clients of its load."""

    def __init__(self) -> None:
        self.count = 0

    async def check(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 503:
            check_refusal(Answer(response, await response.text()))
            self.count += 1
            raise Refused

    def client(self, url: str, key: str) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            url, headers={"Authorization": f"Bearer {key}"}, raise_for_status=self.check
        )

    async def more(self, count: int) -> None:
        """Return when so many more were refused."""
        await until(lambda: self.count, count)


def check_refusal(answer: Answer) -> None:
    """It is a 503 that says what to do, and when to come back."""
    check_unavailable(answer)
    assert answer.headers["Content-Type"] == "application/problem+json"
    for words in ADVICE:
        assert words in json.loads(answer.text)["detail"]


def torn_tails(data_dir: Path) -> int:
    """How many segments end with something that is no line."""
    return sum(not path.read_bytes().endswith(b"\n") for path in (data_dir / "events").iterdir())


async def check_audit_is_served(client: aiohttp.ClientSession, data_dir: Path) -> None:
    """Every event of the organisation is found, the newest too."""
    answer = await ask(client, "GET", f"{AUDIT_LOG}?limit=1000")
    assert answer.status == 200, answer.text
    found = [entry["id"] for entry in json.loads(answer.text)]
    events = [line["id"] for line in read_log(data_dir) if line["org_id"] == "acme"]
    assert found == events[::-1][:1000]


async def check_served_without_events(client: aiohttp.ClientSession, data_dir: Path) -> None:
    await check_metadata_are_served(client)
    await check_audit_is_served(client, data_dir)
    assert (await ask(client, "GET", KEYS)).status == 200


async def check_not_ready(client: aiohttp.ClientSession, disk: Disk) -> None:
    answer = await ask(client, "GET", "/readyz")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1"), answer.text
    check_says_full(json.loads(answer.text)["reason"], disk)


def check_says_full(text: str, disk: Disk) -> None:
    """It says what is wrong and what to do."""
    assert os.strerror(disk.error) in text or "no room for the rest" in text, text
    for words in ADVICE:
        assert words in text


async def use_up(client: aiohttp.ClientSession, path: str = f"{SECRETS}/TOKEN") -> None:
    """Use the room that the log still has within its last block; return at the first refusal."""
    for _ in range(50):
        answer = await ask(client, "GET", path)
        if answer.status == 503:
            return
        assert (answer.status, VALUE in answer.text) == (200, True)
    raise AssertionError("the disk does not get full")


async def idle(data_dir: Path) -> None:
    """Return when nothing is staged: no room is given back later on."""
    async with asyncio.timeout(SOON):
        while list((data_dir / "staged").iterdir()):
            await asyncio.sleep(0.01)


async def until(count: Callable[[], int], more: int) -> None:
    """Return when so many more are counted."""
    wanted = count() + more
    async with asyncio.timeout(SOON):
        while count() < wanted:
            await asyncio.sleep(0.005)


# --- what is refused, what is answered ------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
async def test_a_full_disk(disk: Disk, count: int) -> None:
    data_dir = disk.data_dir
    key = await issue_key(data_dir)
    await issue_key(data_dir)
    grown = Grown(data_dir)
    async with (
        serving(data_dir, f"--workers={count}") as server,
        one_each(server.url, key, count) as clients,
    ):
        pids = processes(server)
        for name in ("TOKEN", "OTHER"):
            document = {"name": name, "value": VALUE}
            assert (await ask(clients[0], "POST", SECRETS, json=document)).status == 201
        key_id = json.loads((await ask(clients[0], "GET", KEYS)).text)[-1]["id"]
        await idle(data_dir)
        for turn in range(2):
            # Events that are in no index yet.
            for client in clients:
                assert (await ask(client, "GET", f"{SECRETS}/OTHER")).status == 200
            disk.fill(*pids)
            # Nobody had to be refused first.
            for client in clients:
                await check_not_ready(client, disk)
            await use_up(clients[turn % count])
            log = read_log(data_dir)
            for client in clients:
                await check_nothing_is_served(client, key_id)
                await check_served_without_events(client, data_dir)
                await check_not_ready(client, disk)
                await check_served_without_events(client, data_dir)
            check_refusal(await ask(clients[0], "GET", f"{SECRETS}/TOKEN"))
            assert read_log(data_dir) == log
            check_pairs(data_dir)
            grown.check()
            disk.free(*pids)
            # The very next request is served, of whatever kind and by whichever worker.
            for client in clients[:: 1 - 2 * turn]:
                answer = await ask(client, "GET", f"{SECRETS}/TOKEN")
                assert (answer.status, VALUE in answer.text) == (200, True), answer.text
                line = read_log(data_dir)[int(answer.headers["Audit-Seq"])]
                assert line["id"] == answer.headers["Audit-Id"]
                assert (await ask(client, "GET", "/readyz")).status == 200
        assert processes(server) == pids
        created = await ask(clients[0], "POST", SECRETS, json={"name": "LAST", "value": VALUE})
        assert created.status == 201
    grown.check()
    check_pairs(data_dir)
    assert list((data_dir / "staged").iterdir()) == []
    async with serving(data_dir) as again, session(again.url, key) as client:
        assert (await ask(client, "GET", f"{SECRETS}/LAST")).status == 200
        await check_served_without_events(client, data_dir)


@pytest.mark.parametrize("count", [1, 2])
async def test_a_disk_that_gets_full_under_load(disk: Disk, count: int) -> None:
    data_dir, random, refusals = disk.data_dir, Random(28), Refusals()
    key, other = await issue_key(data_dir, "load"), await issue_key(data_dir)
    load, grown = Load(6, 6, random), Grown(data_dir)
    async with (
        serving(data_dir, f"--workers={count}") as server,
        refusals.client(server.url, key) as busy,
        session(server.url, other) as client,
    ):
        pids = processes(server)
        for name in ("TOKEN", "OTHER"):
            document = {"name": name, "value": VALUE}
            assert (await ask(client, "POST", SECRETS, json=document)).status == 201
        for _ in range(3):
            async with load.on(busy):
                await until(lambda: len(load.seen.receipts), 100)
                disk.crowd(*pids)
                await refusals.more(10)
                # In the midst of it all, whatever could not be finished.
                for _ in range(10):
                    await check_served_without_events(client, data_dir)
                disk.fill(*pids)
                await refusals.more(100)
                await check_served_without_events(client, data_dir)
                grown.check()
                disk.free(*pids)
                # What was asked for before there was room may still be refused.
                await until(lambda: len(load.seen.receipts), 200)
            await check_acknowledged(busy, load.known, load.seen, data_dir)
            check_pairs(data_dir)
            grown.check()
        assert processes(server) == pids
    assert load.seen.reads > 100
    # Where a write stopped in the midst of a line, it was left there.
    assert torn_tails(data_dir) or disk.error == errno.ENOSPC
    async with serving(data_dir) as again, session(again.url, key) as busy:
        await check_acknowledged(busy, load.known, load.seen, data_dir)
    check_pairs(data_dir)
    grown.check()
    assert list((data_dir / "staged").iterdir()) == []




# --- committed, and no room for its files ---------------------------------------------------

# What is left, in pages: for the journal, the log, the secret's files, its directory.
PAGES = range(7)


async def test_changes_that_find_no_room_for_their_files(small: SmallFileSystem) -> None:
    """Whatever a change still has room for, what was acknowledged is there for everybody."""
    data_dir = small.data_dir
    key = await issue_key(data_dir)
    unpublished = 0
    async with serving(data_dir, "--workers=2") as server, one_each(server.url, key, 2) as clients:
        first, second = clients
        for pages in PAGES:
            names = {"NEW": f"NEW-{pages}", "OLD": f"OLD-{pages}", "GONE": f"GONE-{pages}"}
            for name in (names["OLD"], names["GONE"]):
                answer = await ask(first, "POST", SECRETS, json={"name": name, "value": VALUE})
                assert answer.status == 201
            await idle(data_dir)
            small.leave(pages)
            changes = [
                await ask(first, "POST", SECRETS, json={"name": names["NEW"], "value": VALUE}),
                # Its files have to grow.
                await ask(
                    first, "POST", SECRETS, json={"name": names["OLD"], "value": VALUE * 500}
                ),
                await ask(first, "DELETE", f"{SECRETS}/{names['GONE']}"),
                await ask(first, "POST", KEYS, json={"name": names["NEW"]}),
            ]
            for answer in changes:
                if answer.status == 503:
                    check_refusal(answer)
            told = Told(names, [answer.status for answer in changes])
            unpublished += not told.published(data_dir)
            for client in (second, first):
                await told.check(client)
                await check_audit_is_served(client, data_dir)
            await told.check_another_process(data_dir)
            small.free()
            for client in (second, first):
                await told.check(client)
                await told.check_values(client)
            check_pairs(data_dir)
            await idle(data_dir)
            assert told.published(data_dir)
    # It would test nothing else.
    assert unpublished
    async with serving(data_dir) as again, session(again.url, key) as client:
        await told.check_values(client)
