"""None of FlowMason 1.0.24's own failures: each of them, against this service."""

import asyncio
import contextlib
import errno
import hashlib
import itertools
import json
import os
import resource
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from flowmason_secrets import app
from flowmason_secrets.api.routes import ROUTES
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import LogUnavailable
from flowmason_secrets.core.events import Line
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.names import CATEGORIES, org_hash, secret_hash
from flowmason_secrets.service import Service
from flowmason_secrets.storage.durable import Durable, StrPath

from .conftest import Client
from .harness.server import (
    MASTER_KEY,
    Inside,
    ServerProcess,
    issue_key,
    key_ids,
    serving,
    session,
    settings_for,
)

SECRETS = "/api/v1/secrets"
AUDIT_LOG = "/api/v1/auth/audit-log"
API_KEYS = "/api/v1/auth/api-keys"
WHOAMI = "/api/v1/auth/whoami"


async def ask(
    client: aiohttp.ClientSession, method: str, path: str, **options: Any
) -> tuple[int, Any]:
    """The status and the decoded body; the path is sent as it is."""
    async with client.request(method, URL(path, encoded=True), **options) as response:
        return response.status, json.loads(await response.read())


async def put(client: aiohttp.ClientSession, name: str, value: str, **fields: object) -> Any:
    """Write a secret; returns its metadata."""
    document = {"name": name, "value": value, **fields}
    status, written = await ask(client, "POST", SECRETS, json=document)
    assert status in (200, 201), written
    return written


def path_of(name: str, rest: str = "") -> str:
    return f"{SECRETS}/{quote(name, safe='')}{rest}"


def stem_of(data_dir: Path, name: str, org: str = "acme") -> Path:
    """The two files of a secret, without their suffix."""
    return data_dir / org_hash(org) / secret_hash(name)


def events_of(data_dir: Path) -> list[Line]:
    """All events, from the files and not from any index; a torn tail is none."""
    segments = sorted((data_dir / "events").iterdir())
    lines = [line for path in segments for line in path.read_bytes().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


@contextlib.asynccontextmanager
async def over_http(data_dir: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A server that opens the data directory anew, and a client with a full-scope key."""
    key = await issue_key(data_dir)
    service = await app.open_service(settings_for(data_dir))
    try:
        async with (
            Inside(service) as server,
            session(str(server.make_url("/")), key) as client,
        ):
            yield client
    finally:
        await service.close()


# An acknowledged secret is a 0-byte file after kill -9.


async def keep_writing(client: aiohttp.ClientSession, name: str, acked: dict[str, int]) -> None:
    """Write one version after the other until the server is gone."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        while True:
            wanted = acked[name] + 1
            await put(client, name, f"{name} {wanted}", description=f"{name} {wanted}")
            acked[name] = wanted


async def check_files_are_whole(data_dir: Path) -> None:
    for meta in data_dir.glob("[0-9a-f]*/*.meta"):
        # The newlines behind it are room that a longer version took before.
        token = meta.with_suffix(".secret").read_bytes().rstrip(b"\n")
        assert json.loads(meta.read_bytes())["token_sha256"] == hashlib.sha256(token).hexdigest()


async def test_what_was_acknowledged_is_whole_after_kill_9(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    acked = {f"SECRET_{number}": 0 for number in range(8)}
    for round_ in range(5):
        server = ServerProcess(data_dir)
        await server.start()
        async with session(server.url, key) as client:
            for name, version in acked.items():
                status, body = await ask(client, "GET", path_of(name))
                if version == 0:
                    assert status in (200, 404)
                    continue
                # What was on its way when the process died may have happened, whole.
                assert status == 200
                assert body["value"] in (f"{name} {version}", f"{name} {version + 1}")
                _, metadata = await ask(client, "GET", path_of(name, "/metadata"))
                assert metadata["description"] == body["value"]
                acked[name] = int(body["value"].rpartition(" ")[2])
            await check_files_are_whole(data_dir)
            writers = [asyncio.create_task(keep_writing(client, name, acked)) for name in acked]
            start = dict(acked)
            while acked == start:
                await asyncio.sleep(0)
            # The moment one was acknowledged, and in the following rounds a little later.
            for _ in range(200 * round_):
                await asyncio.sleep(0)
            await server.kill()
            await asyncio.gather(*writers)
    assert sum(acked.values()) > len(acked)
    async with over_http(data_dir) as client:
        status, listed = await ask(client, "GET", SECRETS)
        assert status == 200
        found = {entry["name"]: entry["version"] for entry in listed}
        assert all(found[name] >= version for name, version in acked.items() if version)


async def test_a_new_secret_is_whole_after_kill_9_right_after_its_acknowledgement(
    data_dir: Path,
) -> None:
    key = await issue_key(data_dir)
    for number in range(4):
        server = ServerProcess(data_dir)
        await server.start()
        async with session(server.url, key) as client:
            for before in range(number):
                status, body = await ask(client, "GET", path_of(f"NEW_{before}"))
                assert (status, body["value"]) == (200, f"value {before}")
            await put(client, f"NEW_{number}", f"value {number}")
            await server.kill()
    async with over_http(data_dir) as client:
        for number in range(4):
            status, body = await ask(client, "GET", path_of(f"NEW_{number}"))
            assert (status, body["value"]) == (200, f"value {number}")
    await check_files_are_whole(data_dir)


# A 0-byte .meta makes listing fail for the whole organisation.


@pytest.mark.parametrize("content", [b"", b'{"id": "12', b"null", b"\xff\xfe"])
@pytest.mark.parametrize("suffix", [".meta", ".secret"])
async def test_a_damaged_file_is_the_failure_of_one_secret(
    data_dir: Path, suffix: str, content: bytes
) -> None:
    names = ["A", "DAMAGED", "DELETED", "Z"]
    async with over_http(data_dir) as client:
        for name in names:
            await put(client, name, f"value of {name}")
    for name in ("DAMAGED", "DELETED"):
        stem_of(data_dir, name).with_suffix(suffix).write_bytes(content)
    # Nobody has listed before: the listing is built from what is there now.
    assert not (data_dir / "index.sqlite3").exists()
    async with over_http(data_dir) as client:
        status, listed = await ask(client, "GET", SECRETS)
        readable = ["A", "Z"] if suffix == ".meta" else names
        assert (status, [entry["name"] for entry in listed]) == (200, readable)
        for name in ("A", "Z"):
            status, body = await ask(client, "GET", path_of(name))
            assert (status, body["value"]) == (200, f"value of {name}")
        for name in ("DAMAGED", "DELETED"):
            status, problem = await ask(client, "GET", path_of(name))
            assert (status, problem["code"]) == (500, "secret_damaged")
            assert name in problem["detail"]
        status, metadata = await ask(client, "GET", path_of("DAMAGED", "/metadata"))
        assert (status, metadata.get("code")) == (
            (500, "secret_damaged") if suffix == ".meta" else (200, None)
        )
        await put(client, "DAMAGED", "set again")
        status, body = await ask(client, "GET", path_of("DAMAGED"))
        assert (status, body["value"]) == (200, "set again")
        status, _ = await ask(client, "DELETE", path_of("DELETED"))
        assert status == 200
        status, problem = await ask(client, "GET", path_of("DELETED"))
        assert (status, problem["code"]) == (404, "secret_not_found")
        _, listed = await ask(client, "GET", SECRETS)
        assert [entry["name"] for entry in listed] == ["A", "DAMAGED", "Z"]
    await check_files_are_whole(data_dir)
    assert not list(data_dir.glob(f"*/{secret_hash('DELETED')}.*"))


@pytest.mark.parametrize("suffix", [".meta", ".secret"])
async def test_a_missing_file_is_the_failure_of_one_secret(data_dir: Path, suffix: str) -> None:
    async with over_http(data_dir) as client:
        for name in ("A", "DAMAGED"):
            await put(client, name, f"value of {name}")
    stem_of(data_dir, "DAMAGED").with_suffix(suffix).unlink()
    async with over_http(data_dir) as client:
        status, problem = await ask(client, "GET", path_of("DAMAGED"))
        assert (status, problem["code"]) == (500, "secret_damaged")
        status, body = await ask(client, "GET", path_of("A"))
        assert (status, body["value"]) == (200, "value of A")
        status, _ = await ask(client, "DELETE", path_of("DAMAGED"))
        assert status == 200
        _, listed = await ask(client, "GET", SECRETS)
        assert [entry["name"] for entry in listed] == ["A"]


# An overwrite on a full disk destroys the old value.


class FullDisk(Durable):
    """A disk that gets full at a step: for that one only, or until it is freed."""

    def __init__(self, *, lasting: bool) -> None:
        self._lasting = lasting
        self._left: int | None = None
        self.hit = False

    def fill_after(self, steps: int) -> None:
        self._left = steps

    def free(self) -> None:
        self._left = None

    def _is_full(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        if self._left < 0:
            self.hit = True
            if not self._lasting:
                self._left = None
            return True
        return False

    def _step(self) -> None:
        if self._is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_directory(self, path: StrPath, mode: int = 0o700) -> None:
        self._step()
        super().make_directory(path, mode)

    def open_append(self, path: Path, mode: int) -> int:
        self._step()
        return super().open_append(path, mode)

    def open_slot(self, path: Path) -> int:
        self._step()
        return super().open_slot(path)

    def write(self, descriptor: int, data: bytes) -> None:
        if self._is_full():
            # As on a real one: what still fits is written.
            super().write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(descriptor, data)

    def put_slot(self, descriptor: int, data: bytes) -> None:
        if self._is_full():
            super().put_slot(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().put_slot(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._step()
        super().sync(descriptor)

    def sync_paths(self, paths: Sequence[StrPath], since: int | None = None) -> None:
        self._step()
        super().sync_paths(paths, since)

    def create(self, path: Path, data: bytes, mode: int, *, sync: bool) -> None:
        self._step()
        super().create(path, data, mode, sync=sync)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)


async def value_of(service: Service, caller: Caller, name: str = "TOKEN") -> str:
    return (await service.get(caller, name)).value.reveal()


async def overwrite_on_a_disk_full_after(steps: int, data_dir: Path, *, lasting: bool) -> bool:
    """Check what becomes of the old value; whether the disk got full at all."""
    caller = app.local_caller("acme", "tester")
    service = await app.open_service(settings_for(data_dir))
    await service.set(caller, Draft("TOKEN", Plaintext("old")))
    await service.close()
    disk = FullDisk(lasting=lasting)
    service = await app.open_service(settings_for(data_dir), disk)
    disk.fill_after(steps)
    try:
        await service.set(caller, Draft("TOKEN", Plaintext("new"), description="new"))
        acknowledged = True
    except LogUnavailable:
        acknowledged = False
    if lasting and disk.hit:
        # Full it is still: no value without an event.
        with pytest.raises(LogUnavailable):
            await service.get(caller, "TOKEN")
    disk.free()
    found = await value_of(service, caller)
    if acknowledged:
        assert found == "new", f"acknowledged, then lost from sight (step {steps})"
    committed = [
        line
        for line in events_of(data_dir)
        if line["action"] == "secret.create" and line["version"] == 2
    ]
    # Refused, it is the old one, unless the event came through whole: then all of it happened.
    assert found == ("new" if committed else "old")
    assert (await service.metadata(caller, "TOKEN")).description == (found if committed else "")
    # It works again.
    await service.set(caller, Draft("TOKEN", Plaintext("third")))
    assert await value_of(service, caller) == "third"
    await service.close()
    service = await app.open_service(settings_for(data_dir))
    assert await value_of(service, caller) == "third"
    await service.close()
    await check_files_are_whole(data_dir)
    return disk.hit


@pytest.mark.parametrize("lasting", [False, True])
async def test_an_overwrite_on_a_full_disk_keeps_the_old_value(
    data_dir: Path, lasting: bool
) -> None:
    for steps in itertools.count():
        place = data_dir.with_name(f"secrets-{steps}")
        if not await overwrite_on_a_disk_full_after(steps, place, lasting=lasting):
            break
    # The journal, the event and two files: fewer steps would mean that none was tried.
    assert steps > 8


async def test_a_server_on_a_full_disk_keeps_the_old_value(data_dir: Path) -> None:
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux can fill the disk for one process that runs already")
    key = await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        assert server.process is not None
        await put(client, "TOKEN", "old")
        status, _ = await ask(client, "GET", SECRETS)
        assert status == 200
        stem = stem_of(data_dir, "TOKEN")
        before = [stem.with_suffix(end).read_bytes() for end in (".meta", ".secret")]
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        document = {"name": "TOKEN", "value": "new"}
        for _ in range(3):
            status, problem = await ask(client, "POST", SECRETS, json=document)
            assert (status, problem["code"]) == (503, "log_unavailable")
            status, problem = await ask(client, "GET", path_of("TOKEN"))
            assert (status, problem["code"]) == (503, "log_unavailable")
            status, problem = await ask(client, "DELETE", path_of("TOKEN"))
            assert (status, problem["code"]) == (503, "log_unavailable")
        status, _ = await ask(client, "GET", "/readyz")
        assert status == 503
        assert [stem.with_suffix(end).read_bytes() for end in (".meta", ".secret")] == before
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        status, body = await ask(client, "GET", path_of("TOKEN"))
        assert (status, body["value"], body["version"]) == (200, "old", 1)
        assert (await put(client, "TOKEN", "new"))["version"] == 2
    async with over_http(data_dir) as client:
        status, body = await ask(client, "GET", path_of("TOKEN"))
        assert (status, body["value"]) == (200, "new")


@pytest.mark.parametrize("settled", [True, False])
async def test_what_needs_no_event_is_answered_on_a_full_disk(
    data_dir: Path, settled: bool
) -> None:
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux can fill the disk for one process that runs already")
    key = await issue_key(data_dir)
    paths = [path_of("TOKEN", "/metadata"), WHOAMI, SECRETS, AUDIT_LOG]
    async with serving(data_dir) as server, session(server.url, key) as client:
        assert server.process is not None
        await put(client, "TOKEN", "old")
        while settled and list((data_dir / "staged").iterdir()):
            await asyncio.sleep(0.01)
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        status, _ = await ask(client, "GET", path_of("TOKEN"))
        assert status == 503
        found = {path: await ask(client, "GET", path) for path in paths}
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        for path in paths:
            status, answer = await ask(client, "GET", path)
            assert (status, len(answer) > 0) == (200, True)
    assert {status for status, _ in found.values()} == {200}


# An expiry with a time zone is stored, answered with 500, and breaks every listing from then on.


@pytest.mark.parametrize(
    ("expires_at", "shown"),
    [
        ("2031-07-01T12:00:00Z", "2031-07-01T12:00:00.000000Z"),
        ("2031-07-01T12:00:00+02:00", "2031-07-01T10:00:00.000000Z"),
        ("2031-07-01T12:00:00.25-09:30", "2031-07-01T21:30:00.250000Z"),
        ("2031-07-01t12:00:00z", "2031-07-01T12:00:00.000000Z"),
        (None, None),
    ],
)
async def test_an_expiry_with_a_zone_works_and_so_does_the_listing(
    client: Client, expires_at: str | None, shown: str | None
) -> None:
    full = await client()
    written = await put(full, "TOKEN", "x", expires_at=expires_at)
    assert (written["expires_at"], written["is_expired"]) == (shown, False)
    assert await ask(full, "GET", SECRETS) == (200, [written])
    assert await ask(full, "GET", path_of("TOKEN", "/metadata")) == (200, written)
    status, body = await ask(full, "GET", path_of("TOKEN"))
    assert (status, body["value"]) == (200, "x")


@pytest.mark.parametrize(
    "expires_at",
    ["2031-07-01T12:00:00", "2031-07-01", "", "tomorrow", "2031-02-30T12:00:00Z", "1893456000"],
)
async def test_an_expiry_without_a_zone_is_refused_and_stores_nothing(
    client: Client, data_dir: Path, expires_at: str
) -> None:
    full = await client()
    document = {"name": "TOKEN", "value": "x", "expires_at": expires_at}
    status, problem = await ask(full, "POST", SECRETS, json=document)
    assert (status, problem["code"]) == (422, "invalid_input")
    assert problem["field"] == "expires_at"
    assert await ask(full, "GET", SECRETS) == (200, [])
    assert not (data_dir / org_hash("acme")).exists()
    assert [line for line in events_of(data_dir) if line["action"] == "secret.create"] == []


@pytest.mark.parametrize(
    "expires_at",
    [
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59.999999Z",
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+14:00",
    ],
)
@pytest.mark.parametrize("path", [SECRETS, API_KEYS])
async def test_an_expiry_at_the_ends_of_time_works_or_is_refused(
    client: Client, path: str, expires_at: str
) -> None:
    full = await client()
    document = {"name": "TOKEN", "expires_at": expires_at}
    if path == SECRETS:
        document["value"] = "x"
    status, answer = await ask(full, "POST", path, json=document)
    assert (status, answer.get("field")) in ((201, None), (422, "expires_at"))
    status, _ = await ask(full, "GET", path)
    assert status == 200
    if "raw_key" in answer:
        headers = {"Authorization": f"Bearer {answer['raw_key']}"}
        status, _ = await ask(full, "GET", WHOAMI, headers=headers)
        assert status in (200, 401)


# Two workers mix the value of one write with the metadata of another.


class Pairs:
    """Writes whose parts tell that they belong together, and the reads that check it."""

    def __init__(self) -> None:
        self.acked: dict[int, str] = {}
        self.seen: set[tuple[int, str]] = set()
        self.reads = 0
        self.writing = True

    async def write(self, client: aiohttp.ClientSession, worker: int, count: int) -> None:
        for number in range(count):
            category = CATEGORIES[(worker + number) % len(CATEGORIES)]
            text = f"{category} of {worker}, {number}"
            done = await put(client, "SHARED", text, description=text, category=category)
            assert done["version"] not in self.acked
            self.acked[done["version"]] = text
            self.seen.add((done["version"], done["description"]))

    async def read(self, client: aiohttp.ClientSession) -> None:
        last = 0
        while self.writing:
            status, body = await ask(client, "GET", path_of("SHARED"))
            assert status == 200
            assert body["value"].startswith(f"{body['category']} of "), body
            assert body["version"] >= last
            self.seen.add((body["version"], body["value"]))
            status, metadata = await ask(client, "GET", path_of("SHARED", "/metadata"))
            assert status == 200
            assert metadata["description"].startswith(f"{metadata['category']} of "), metadata
            assert metadata["version"] >= body["version"]
            self.seen.add((metadata["version"], metadata["description"]))
            last = metadata["version"]
            self.reads += 1


async def test_two_workers_never_mix_two_writes(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    pairs = Pairs()
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(data_dir)) for _ in range(2)]
        clients = [await stack.enter_async_context(session(s.url, key)) for s in servers]
        await pairs.write(clients[0], 9, 1)
        readers = [asyncio.create_task(pairs.read(clients[n % 2])) for n in range(4)]
        try:
            await asyncio.gather(*(pairs.write(clients[n % 2], n, 60) for n in range(4)))
        finally:
            pairs.writing = False
            await asyncio.gather(*readers)
        found = [await ask(client, "GET", path_of("SHARED")) for client in clients]
    assert pairs.reads > 20
    # Every write got a version of its own, and every read was of exactly one write.
    assert sorted(pairs.acked) == list(range(1, 242))
    assert pairs.seen == set(pairs.acked.items())
    assert [(status, body["value"]) for status, body in found] == [(200, pairs.acked[241])] * 2
    await check_files_are_whole(data_dir)
    async with over_http(data_dir) as client:
        _, metadata = await ask(client, "GET", path_of("SHARED", "/metadata"))
        _, body = await ask(client, "GET", path_of("SHARED"))
        assert metadata["description"] == body["value"] == pairs.acked[241]


# The audit query with a limit returns the oldest entries.


async def test_the_audit_log_begins_with_the_newest_entries(client: Client, data_dir: Path) -> None:
    full = await client()
    await put(full, "TOKEN", "x")
    for number in range(40):
        await ask(full, "GET", path_of("TOKEN" if number % 4 else f"ABSENT_{number}"))
    lines = [line for line in events_of(data_dir) if line["org_id"] == "acme"]
    newest = [line["id"] for line in reversed(lines)]
    assert len(newest) == 42
    for limit in (1, 5, 42, 100):
        status, entries = await ask(full, "GET", f"{AUDIT_LOG}?limit={limit}")
        assert (status, [entry["id"] for entry in entries]) == (200, newest[:limit])
    # Filtered they do, too, and the next page goes on where this one ended.
    failures = [line["id"] for line in reversed(lines) if line["outcome"] != "success"]
    assert len(failures) == 10
    url: str | URL = f"{AUDIT_LOG}?success=false&limit=4"
    pages = []
    while True:
        async with full.get(url) as response:
            pages.append([entry["id"] for entry in await response.json()])
            if "next" not in response.links:
                break
            url = response.links["next"]["url"]
    assert pages == [failures[:4], failures[4:8], failures[8:]]


# Refused and failed reads leave no trace.


async def test_refused_and_failed_reads_are_in_the_audit_log(data_dir: Path) -> None:
    async with over_http(data_dir) as client:
        await put(client, "TOKEN", "x")
        await put(client, "OLD", "x", expires_at="2020-01-01T00:00:00Z")
        await put(client, "DAMAGED", "x")
    stem_of(data_dir, "DAMAGED").with_suffix(".secret").write_bytes(b"")
    keys = {
        scope: await issue_key(data_dir, scopes=(scope,)) for scope in ("read", "execute", "deploy")
    }
    keys["full"] = await issue_key(data_dir, allow=("TOK*", "OLD", "DAMAGED", "ABSENT"))
    expected = [
        *((scope, "TOKEN", 403, "denied") for scope in ("read", "execute", "deploy")),
        ("full", "OTHER", 403, "denied"),
        ("full", "ABSENT", 404, "secret_not_found"),
        ("full", "OLD", 410, "secret_expired"),
        ("full", "DAMAGED", 500, "secret_damaged"),
    ]
    ids = {}
    async with over_http(data_dir) as client:
        for number, (scope, name, status, code) in enumerate(expected):
            headers = {
                "Authorization": f"Bearer {keys[scope]}",
                "User-Agent": "auditor/1.0",
                "X-Request-Id": f"request-{number}",
            }
            found, problem = await ask(client, "GET", path_of(name), headers=headers)
            assert (found, problem["code"]) == (status, code)
            _, who = await ask(client, "GET", WHOAMI, headers=headers)
            ids[scope] = who["api_key_id"]
        status, entries = await ask(client, "GET", f"{AUDIT_LOG}?success=false")
        assert status == 200
    assert len(entries) == len(expected)
    for number, (entry, wanted) in enumerate(zip(reversed(entries), expected, strict=True)):
        scope, name, status, code = wanted
        assert (entry["action"], entry["success"]) == ("secret.read", False)
        assert entry["error_message"] == code
        assert entry["api_key_id"] == ids[scope]
        assert entry["ip_address"] == "127.0.0.1"
        details = entry["details"]
        assert (details["name"], details["status"]) == (name, status)
        assert details["user_agent"] == "auditor/1.0"
        assert details["request_id"] == f"request-{number}"


async def test_a_read_with_the_wrong_master_key_is_in_the_audit_log(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        await put(client, "TOKEN", "x")
    other = "another master key, also of 32 characters"
    async with (
        serving(data_dir, FLOWMASON_SECRETS_KEY=other) as server,
        session(server.url, key) as client,
    ):
        status, problem = await ask(client, "GET", path_of("TOKEN"))
        assert (status, problem["code"]) == (500, "decryption_failed")
        assert problem["key_id"] == key_ids(MASTER_KEY)[0]
        assert problem["held"] == list(key_ids(other))
        status, entries = await ask(client, "GET", f"{AUDIT_LOG}?success=false")
        assert [entry["error_message"] for entry in entries] == ["decryption_failed"]
        assert entries[0]["details"]["key_id"] == problem["key_id"]


# An update loses when the secret was created, and by whom.


async def test_an_update_keeps_the_creation(client: Client) -> None:
    first, second = await client(), await client()
    created = await put(first, "TOKEN", "1")
    updates = [await put(second, "TOKEN", str(number)) for number in (2, 3)]
    _, who = await ask(first, "GET", WHOAMI)
    for number, updated in enumerate(updates, 2):
        assert updated["created_at"] == created["created_at"]
        assert updated["created_by"] == created["created_by"] == who["api_key_id"]
        assert updated["version"] == number
    times = [created["updated_at"], *(updated["updated_at"] for updated in updates)]
    assert times == sorted(set(times))
    assert await ask(first, "GET", SECRETS) == (200, [updates[-1]])


# A name that can be created can't be read or deleted.


NASTY = [
    *("", " ", "/", "a/b", ".", "..", "...", "\n", "\0", "\x7f", "\u2028", "\u200b", "\ufeff"),
    *("%", "%2F", "%2e", "%2e%2e", "%00", "+", "a b", "?", "a?b=c", "#", ";", "*", "\\", "..\\"),
    *("metadata", '"', "'", "{}", "[0]", "~", ":", "@", "é", "e\u0301", "ß", "🔑", "\uffff"),
    *("a" * 256, "a" * 257, "🔑" * 256, "🔑" * 257, "%" * 256),
]


async def check_name(client: aiohttp.ClientSession, name: str) -> bool:
    """Whether it can be created; then everything else works, too."""
    document = {"name": name, "value": f"value of {name}"}
    status, answer = await ask(client, "POST", SECRETS, json=document)
    if status == 422:
        assert (answer["code"], answer["field"]) == ("invalid_input", "name")
        return False
    assert status == 201, answer
    assert answer["name"] == name
    # As a careful client sends it, and as one does that leaves it to the library.
    for url in (URL(path_of(name), encoded=True), URL(path_of(name))):
        async with client.get(url) as response:
            body = await response.json()
            assert (response.status, body.get("value")) == (200, f"value of {name}"), url
    status, metadata = await ask(client, "GET", path_of(name, "/metadata"))
    assert (status, metadata) == (200, answer)
    assert await ask(client, "GET", SECRETS) == (200, [answer])
    status, _ = await ask(client, "DELETE", path_of(name))
    assert status == 200
    status, problem = await ask(client, "GET", path_of(name))
    assert (status, problem["code"]) == (404, "secret_not_found")
    assert await ask(client, "GET", SECRETS) == (200, [])
    return True


async def test_names_that_can_be_created_can_be_read_and_deleted(client: Client) -> None:
    full = await client()
    created = {name for name in NASTY if await check_name(full, name)}
    refused = {"", "/", "a/b", ".", "..", "\n", "\0", "\x7f", "\u2028", "a" * 257, "🔑" * 257}
    assert created == set(NASTY) - refused


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.text(st.sampled_from("./%2eEfF\\?#&=+;: ~*aé🔑"), max_size=12),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=250, max_size=260),
    )
)
async def test_any_name_that_can_be_created_can_be_read_and_deleted(
    client: Client, full: list[aiohttp.ClientSession], name: str
) -> None:
    if not full:
        full.append(await client())
    await check_name(full[0], name)


@pytest.fixture
def full() -> list[aiohttp.ClientSession]:
    """The one client of all examples of a test."""
    return []


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
async def test_a_name_that_is_no_text_is_refused(client: Client, name: str) -> None:
    full = await client()
    status, _ = await ask(full, "POST", SECRETS, json={"name": name, "value": "x"})
    assert status in (400, 422)
    assert await ask(full, "GET", SECRETS) == (200, [])


# One client that lists blocks all others.


async def test_listing_does_not_block_others(data_dir: Path) -> None:
    count = 5000
    key = await issue_key(data_dir)
    service = await app.open_service(settings_for(data_dir))
    caller = app.local_caller("acme", "tester")
    for start in range(0, count, 500):
        names = [f"SECRET_{number:05}" for number in range(start, start + 500)]
        drafts = [Draft(name, Plaintext(f"value of {name}"), "x" * 100) for name in names]
        await asyncio.gather(*(service.set(caller, draft) for draft in drafts))
    await service.close()
    lists: list[float] = []
    took: list[float] = []
    done = False

    async def keep_listing(client: aiohttp.ClientSession) -> None:
        while not done:
            began = time.perf_counter()
            async with client.get(SECRETS) as response:
                assert response.status == 200
                body = await response.read()
                assert body.count(b'"is_expired"') == count
            lists.append(time.perf_counter() - began)

    async with (
        serving(data_dir) as server,
        session(server.url, key) as client,
        session(server.url, key) as other,
    ):
        # The first one builds the index; that is not what is asked here.
        _, listed = await ask(client, "GET", SECRETS)
        assert [entry["name"] for entry in listed] == [f"SECRET_{n:05}" for n in range(count)]
        listers = [asyncio.create_task(keep_listing(client)) for _ in range(3)]
        try:
            while len(lists) < 12:
                for path in (WHOAMI, path_of(f"SECRET_{len(took):05}")):
                    began = time.perf_counter()
                    async with other.get(path) as response:
                        assert response.status == 200
                        await response.read()
                    took.append(time.perf_counter() - began)
        finally:
            done = True
            await asyncio.gather(*listers)
    assert len(took) >= 20
    p95 = statistics.quantiles(took, n=20)[-1]
    assert p95 < 0.25, (p95, statistics.median(lists))


# Anybody can make an organisation and a full-scope key for himself.


async def test_nobody_makes_keys_without_a_full_scope_key(client: Client, data_dir: Path) -> None:
    full = await client()
    revoked = await client()
    _, who = await ask(revoked, "GET", WHOAMI)
    status, _ = await ask(full, "DELETE", f"{API_KEYS}/{who['api_key_id']}")
    assert status == 200
    refused = {
        403: [
            *[await client(scopes=(scope,)) for scope in ("read", "execute", "deploy")],
            await client(scopes=("read", "execute", "deploy")),
            await client(allow=("*",)),
            await client(allow=("TOKEN",), scopes=("full", "read")),
        ],
        401: [revoked, await client(expires_at="2020-01-01T00:00:00Z")],
    }
    before = sorted((data_dir / "keys").iterdir())
    for status, sessions in refused.items():
        for number, one in enumerate(sessions):
            for scopes in (["full"], ["read"]):
                document = {"name": f"mine {number}", "scopes": scopes}
                found, problem = await ask(one, "POST", API_KEYS, json=document)
                assert (found, problem["code"]) == (
                    status,
                    {401: "unauthenticated", 403: "denied"}[status],
                )
            for method, path in (("GET", API_KEYS), ("DELETE", f"{API_KEYS}/key_1")):
                found, _ = await ask(one, method, path)
                assert found == status
    assert sorted((data_dir / "keys").iterdir()) == before
    denied = [
        line
        for line in events_of(data_dir)
        if line["action"] == "api_key.create" and line["outcome"] == "denied"
    ]
    assert len(denied) == 2 * len(refused[403])
    # Nor does a full-scope key reach beyond its own organisation.
    document = {"name": "theirs", "org_id": "globex"}
    status, problem = await ask(full, "POST", API_KEYS, json=document)
    assert (status, problem["field"]) == (422, "org_id")
    status, issued = await ask(full, "POST", API_KEYS, json={"name": "ours"})
    assert status == 201
    headers = {"Authorization": f"Bearer {issued['raw_key']}"}
    _, who = await ask(full, "GET", WHOAMI, headers=headers)
    assert who["org_id"] == "acme"


PUBLIC = {"/healthz", "/readyz"}
# The routes by which 1.0 was opened from outside, and their relatives.
OF_10 = [
    f"/api/v1/auth/{path}"
    for path in ("orgs", "orgs/acme", "orgs/acme/users", "users", "bootstrap", "api-keys")
]


async def test_no_route_makes_an_organisation_or_a_key_without_a_key(
    client: Client, data_dir: Path
) -> None:
    full = await client()
    before = sorted(data_dir.glob("keys/*")) + sorted(data_dir.glob("[0-9a-f]*/"))
    routes = [(route.method, route.template.replace("{", "").replace("}", "")) for route in ROUTES]
    routes += [(method, path) for path in OF_10 for method in ("POST", "PUT", "GET")]
    document = {"name": "mine", "slug": "mine", "value": "x", "scopes": ["full"]}
    for headers in ({}, {"X-API-Key": ""}, {"X-API-Key": "fm_live_" + "0" * 48}):
        # The session's own header would let us in.
        skip = {**headers, "Authorization": ""} if "X-API-Key" not in headers else headers
        async with aiohttp.ClientSession(full._base_url, headers=skip) as nobody:
            for method, path in routes:
                if path in PUBLIC:
                    continue
                status, problem = await ask(nobody, method, path, json=document)
                assert status in (401, 404, 405), (method, path)
                assert problem["code"] in ("unauthenticated", "no_such_route", "method_not_allowed")
    assert sorted(data_dir.glob("keys/*")) + sorted(data_dir.glob("[0-9a-f]*/")) == before
    # With the widest key there is no route to another organisation either.
    for path in OF_10[:-1]:
        status, _ = await ask(full, "POST", path, json=document)
        assert status in (404, 405)
    _, keys = await ask(full, "GET", API_KEYS)
    assert len(keys) == 1
