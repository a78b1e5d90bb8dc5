"""A disk that is full for real: what is refused, what is answered, and that it goes on by itself.

Each test has a row for every way to fill a disk and for one and several workers.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from flowmason_secrets.core.names import org_hash, secret_hash
from flowmason_secrets.storage.published import Layout

from .harness.disk import Disk, FileSizeLimit, SmallFileSystem
from .harness.load import SECRETS, Grown, check_acknowledged, check_pairs, read_log
from .harness.server import MASTER_KEY, ServerProcess, issue_key, serving, session
from .harness.workers import SOON, Load, one_each, workers
from .test_cli import environment, run
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


def make_small_file_system(place: Path, size: int = 16 << 20) -> SmallFileSystem:
    try:
        return SmallFileSystem(place, size)
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


async def idle(data_dir: Path, server: ServerProcess) -> None:
    """Return when nothing is staged: no room is given back later on."""
    async with asyncio.timeout(SOON):
        while list((data_dir / "staged").iterdir()) or any(
            ".journal" in path for pid in processes(server) for path in opened(pid)
        ):
            await asyncio.sleep(0.01)


def opened(pid: int) -> list[str]:
    """What a process has open; a file that was removed takes its room until it is closed."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return found


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
        await idle(data_dir, server)
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
        for _ in range(2):
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
PAGES = range(5)

# How many times longer the second version is.
LONG = 500


@dataclass(frozen=True, slots=True)
class Told:
    """Which versions of secrets there may be, 0 for none, after what clients were told."""

    versions: dict[str, set[int]]
    key: str | None

    async def check(self, client: aiohttp.ClientSession) -> None:
        """All that needs no event says so, and the same."""
        answer = await ask(client, "GET", f"{SECRETS}?limit=1000")
        assert answer.status == 200, answer.text
        self.check_listing(json.loads(answer.text))
        listed = versions(json.loads(answer.text))
        for name in self.versions:
            answer = await ask(client, "GET", f"{SECRETS}/{name}/metadata")
            if name in listed:
                assert (answer.status, listed[name]) == (200, json.loads(answer.text)["version"])
            else:
                # That there is none is an event.
                assert answer.status in (404, 503), answer.text
        answer = await ask(client, "GET", KEYS)
        assert answer.status == 200, answer.text
        assert self.key is None or self.key in [entry["name"] for entry in json.loads(answer.text)]

    def check_listing(self, entries: list[dict[str, Any]]) -> None:
        listed = versions(entries)
        for name, allowed in self.versions.items():
            assert listed.get(name, 0) in allowed, (name, listed)

    async def check_values(self, client: aiohttp.ClientSession) -> None:
        for name, allowed in self.versions.items():
            answer = await ask(client, "GET", f"{SECRETS}/{name}")
            document = json.loads(answer.text)
            if answer.status == 200:
                assert document["version"] in allowed
                assert document["value"] == VALUE * (LONG if document["version"] == 2 else 1)
            else:
                assert (answer.status, 0 in allowed) == (404, True), answer.text

    def published(self, data_dir: Path) -> bool:
        """Whether the files say so."""
        return all(version(data_dir, name) in may for name, may in self.versions.items())


def versions(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {entry["name"]: entry["version"] for entry in entries}


def version(data_dir: Path, name: str) -> int:
    """The version that the secret's files hold; 0 without any, -1 if they are torn."""
    paths = Layout(data_dir).secret(org_hash("acme"), secret_hash(name))
    token, meta = (Path(path).read_bytes() if Path(path).exists() else b"" for path in paths)
    if not token and not meta:
        return 0
    with contextlib.suppress(ValueError):
        metadata = json.loads(meta)
        if hashlib.sha256(token.rstrip(b"\n")).hexdigest() == metadata["token_sha256"]:
            return int(metadata["version"])
    return -1


async def change_all(client: aiohttp.ClientSession, end: str) -> Told:
    """Every kind of change, each of another secret; `end` makes their names new."""
    new, old, gone, key = (f"{kind}-{end}" for kind in ("NEW", "OLD", "GONE", "KEY"))
    changes = {
        new: ("POST", SECRETS, {"name": new, "value": VALUE}),
        # Its files have to grow.
        old: ("POST", SECRETS, {"name": old, "value": VALUE * LONG}),
        gone: ("DELETE", f"{SECRETS}/{gone}", None),
        key: ("POST", KEYS, {"name": key}),
    }
    told: dict[str, bool] = {}
    for name, (method, path, document) in changes.items():
        answer = await ask(client, method, path, json=document)
        told[name] = answer.status in (200, 201)
        if not told[name]:
            check_refusal(answer)
    before = {new: 0, old: 1, gone: 1}
    after = {new: 1, old: 2, gone: 0}
    may = {name: {after[name]} | (set() if told[name] else {before[name]}) for name in after}
    return Told(may, key if told[key] else None)


async def test_changes_that_find_no_room_for_their_files(small: SmallFileSystem) -> None:
    """Whatever there is still room for, what was acknowledged is there for everybody."""
    data_dir = small.data_dir
    key = await issue_key(data_dir)
    unpublished: list[int] = []
    async with serving(data_dir, "--workers=2") as server, one_each(server.url, key, 2) as clients:
        first, second = clients
        for pages in PAGES:
            for name in (f"OLD-{pages}", f"GONE-{pages}"):
                answer = await ask(first, "POST", SECRETS, json={"name": name, "value": VALUE})
                assert answer.status == 201
            await idle(data_dir, server)
            small.leave(pages)
            told = await change_all(first, str(pages))
            for client in (second, first):
                await told.check(client)
                await check_audit_is_served(client, data_dir)
            if not told.published(data_dir):
                if not unpublished:
                    await check_newcomers(data_dir, key, told)
                unpublished.append(pages)
                await check_not_ready(second, small)
                assert not told.published(data_dir)
            small.free()
            for client in (second, first):
                await told.check_values(client)
                await told.check(client)
            assert told.published(data_dir)
            check_pairs(data_dir)
    # Otherwise this has shown nothing.
    assert unpublished
    async with serving(data_dir) as again, session(again.url, key) as client:
        await told.check_values(client)


async def check_newcomers(data_dir: Path, key: str, told: Told) -> None:
    """A process that starts while there are changes to publish, and no room, knows of them."""
    variables = {"FLOWMASON_SECRETS_KEY": MASTER_KEY}
    place = ["--org=acme", f"--data-dir={data_dir}"]
    told.check_listing((await run("list", *place, "--json", variables=variables)).json)
    async with serving(data_dir) as server, session(server.url, key) as client:
        await told.check(client)
        await check_audit_is_served(client, data_dir)
        for name in told.versions:
            check_refusal(await ask(client, "GET", f"{SECRETS}/{name}"))


# --- other processes on the same disk -------------------------------------------------------

LIBRARY = """
import sys
from flowmason_secrets.core.errors import LogUnavailable
from flowmason_studio.services.secrets import SecretsService
secrets = SecretsService("acme", storage_path=sys.argv[1])
print(secrets.get("TOKEN"), flush=True)
for call in sys.stdin:
    kind, *arguments = call.split()
    try:
        told = getattr(secrets, kind)(*arguments)
    except LogUnavailable as error:
        told = f"LogUnavailable: {error}"
    print(told, flush=True)
"""


class Library:
    """A process that uses the library, one call a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def call(self, *words: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words).encode() + b"\n")
        return await self.told()

    async def told(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line
        return line.decode().rstrip("\n")


@contextlib.asynccontextmanager
async def library(data_dir: Path) -> AsyncIterator[Library]:
    """Such a process, which has the data directory open."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LIBRARY, os.fspath(data_dir)),
        env=environment({"FLOWMASON_SECRETS_KEY": MASTER_KEY}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    there = Library(process)
    assert await there.told() == VALUE
    try:
        yield there
    finally:
        await process.communicate(b"")
    assert process.returncode == 0


async def test_the_library_and_the_command_line(disk: Disk) -> None:
    data_dir = disk.data_dir
    key = await issue_key(data_dir)
    place = ["--org=acme", f"--data-dir={data_dir}"]
    empty = data_dir.with_name("empty")
    variables = {"FLOWMASON_SECRETS_KEY": MASTER_KEY}
    async with serving(data_dir) as server, session(server.url, key) as client:
        for name in ("TOKEN", "OTHER"):
            document = {"name": name, "value": VALUE}
            assert (await ask(client, "POST", SECRETS, json=document)).status == 201
        await idle(data_dir, server)
        async with library(data_dir) as lib:
            pids = [*processes(server), lib.pid]
            disk.fill(*pids)
            await use_up(client)
            log = read_log(data_dir)
            for call in (("get", "TOKEN"), ("set", "TOKEN", "new"), ("delete", "TOKEN")):
                told = await lib.call(*call)
                assert told.startswith("LogUnavailable: "), told
                check_says_full(told, disk)
            assert await lib.call("exists", "TOKEN") == "True"
            assert "name='TOKEN'" in await lib.call("list")
            commands = [
                ("get", "TOKEN", *place),
                ("set", "TOKEN", *place),
                ("set", "NEW", *place),
                ("delete", "TOKEN", *place),
                ("keys", "create", "--name=new", *place),
                # Where there is nothing yet.
                ("keys", "create", "--name=new", "--org=acme", f"--data-dir={empty}"),
            ]
            for ended in await asyncio.gather(
                *(
                    run(*command, stdin=b"new", variables=variables, prefix=disk.prefix())
                    for command in commands
                )
            ):
                ended.failed(1)
                check_says_full(ended.err, disk)
            assert read_log(data_dir) == log
            disk.free(*pids)
            assert await lib.call("get", "TOKEN") == VALUE
            assert "version=2" in await lib.call("set", "TOKEN", f"{VALUE}-2")
        ended = await run("get", "TOKEN", *place, variables=variables)
        assert (ended.code, ended.out) == (0, f"{VALUE}-2\n")
        assert (await ask(client, "GET", f"{SECRETS}/TOKEN")).status == 200
    check_pairs(data_dir)


# --- started on a full disk -----------------------------------------------------------------


class Confined(ServerProcess):
    """A server that has no room from the start."""

    def __init__(self, disk: Disk, *arguments: str) -> None:
        super().__init__(disk.data_dir, *arguments)
        self.program = (*disk.prefix(), *ServerProcess.program)


@pytest.mark.parametrize("count", [1, 2])
async def test_a_server_that_starts_on_a_full_disk(disk: Disk, count: int) -> None:
    data_dir = disk.data_dir
    key = await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        for name in ("TOKEN", "OTHER"):
            document = {"name": name, "value": VALUE}
            assert (await ask(client, "POST", SECRETS, json=document)).status == 201
    disk.fill()
    log = read_log(data_dir)
    server = Confined(disk, f"--workers={count}")
    await server.start()
    pids = processes(server)
    # It says so before it says that it listens.
    said = b"".join(server.output).decode()
    (warning, *_), (listening) = said.splitlines()[:-1], said.splitlines()[-1]
    assert "ready on" in listening
    check_says_full(warning, disk)
    assert "values and changes are refused" in warning
    async with session(server.url, key) as client:
        await check_not_ready(client, disk)
        await use_up(client)
        check_refusal(await ask(client, "GET", f"{SECRETS}/TOKEN"))
        answer = await ask(client, "GET", f"{SECRETS}/TOKEN/metadata")
        assert (answer.status, '"version":1' in answer.text) == (200, True)
        assert (await ask(client, "GET", "/healthz")).status == 200
        # SQLite needs room to open what nobody else has open: then it is said.
        for path in (SECRETS, AUDIT_LOG):
            answer = await ask(client, "GET", path)
            assert answer.status in (200, 503), answer.text
            assert answer.status == 200 or json.loads(answer.text)["code"] == "index_unavailable"
        assert read_log(data_dir)[: len(log)] == log
        disk.free(*pids)
        assert (await ask(client, "GET", f"{SECRETS}/TOKEN")).status == 200
        assert (await ask(client, "GET", "/readyz")).status == 200
        await check_served_without_events(client, data_dir)
    assert await server.stop() == 0


# --- one file at its limit ------------------------------------------------------------------


async def test_the_journal_at_its_limit(limit: FileSizeLimit) -> None:
    """Changes that are too large are refused; all else goes on."""
    data_dir = limit.data_dir
    key = await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        for name in ("TOKEN", "OTHER"):
            document = {"name": name, "value": VALUE}
            assert (await ask(client, "POST", SECRETS, json=document)).status == 201
        await idle(data_dir, server)
        grown = Grown(data_dir)
        limit.limit(8000, *processes(server))
        for name in ("TOKEN", "NEW"):
            document = {"name": name, "value": VALUE * 600}
            for _ in range(2):
                check_refusal(await ask(client, "POST", SECRETS, json=document))
            answer = await ask(client, "GET", f"{SECRETS}/TOKEN")
            assert (answer.status, json.loads(answer.text)["value"]) == (200, VALUE)
            assert (await ask(client, "GET", f"{SECRETS}/NEW")).status == 404
            check_pairs(data_dir)
            # What could not be staged whole is out of the way.
            document = {"name": "SMALL", "value": VALUE}
            assert (await ask(client, "POST", SECRETS, json=document)).status in (200, 201)
        await check_served_without_events(client, data_dir)
        grown.check()
        limit.free(*processes(server))
        document = {"name": "NEW", "value": VALUE * 600}
        assert (await ask(client, "POST", SECRETS, json=document)).status == 201
    check_pairs(data_dir)


async def test_the_index_at_its_limit(limit: FileSizeLimit) -> None:
    """Values and changes go on, and everything that was done is found all the same."""
    data_dir = limit.data_dir
    key = await issue_key(data_dir)
    async with serving(data_dir, "--workers=2") as server, one_each(server.url, key, 2) as clients:
        pids = processes(server)
        for name in ("TOKEN", "OTHER"):
            document = {"name": name, "value": VALUE}
            assert (await ask(clients[0], "POST", SECRETS, json=document)).status == 201
        for client in clients:
            await check_served_without_events(client, data_dir)
        files = [data_dir / f"index.sqlite3{end}" for end in ("", "-wal")]
        limit.limit(max(path.stat().st_size for path in files), *pids)
        for turn in range(20):
            client = clients[turn % 2]
            document = {"name": f"S{turn}", "value": VALUE}
            assert (await ask(client, "POST", SECRETS, json=document)).status == 201
            assert (await ask(client, "GET", f"{SECRETS}/S{turn}")).status == 200
            await check_served_without_events(clients[1 - turn % 2], data_dir)
            answer = await ask(client, "GET", f"{SECRETS}?prefix=S")
            assert len(json.loads(answer.text)) == turn + 1
        assert (await ask(client, "GET", "/readyz")).status == 200
        before = [path.stat().st_size for path in files]
        limit.free(*pids)
        for client in clients:
            await check_served_without_events(client, data_dir)
        assert [path.stat().st_size for path in files] != before
