"""Nothing is served unaudited: without an event there is no value and no change, only a reason."""

import asyncio
import errno
import os
import resource
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flowmason_secrets import app
from flowmason_secrets.core.drafts import KeyDraft
from flowmason_secrets.core.errors import LogUnavailable
from flowmason_secrets.storage import wire

from .harness.faults import Faulty, io_error, no_space, short_write
from .harness.server import Inside, issue_key, serving, session, settings_for

SECRETS = "/api/v1/secrets"
KEYS = "/api/v1/auth/api-keys"
VALUE = "canary-4f1d9c"

FAULTS: dict[str, tuple[Collection[str], Callable[[], OSError]]] = {
    "write: disk full": (("write",), no_space),
    "write: input/output error": (("write",), io_error),
    "write: a part only": (("write",), short_write),
    "sync: input/output error": (("sync",), io_error),
    "sync: disk full": (("sync",), no_space),
    "new segments: create": (("create",), no_space),
    "new segments: rename": (("rename",), io_error),
    "new segments: open": (("open_existing",), io_error),
    "new segments: the directory": (("sync_paths",), io_error),
    "all of it": (("write", "sync", "create", "rename", "sync_paths", "open_append"), io_error),
}


class Answer:
    """One answer, with its whole body as text."""

    def __init__(self, response: aiohttp.ClientResponse, text: str) -> None:
        self.status, self.headers, self.text = response.status, response.headers, text


async def ask(client: aiohttp.ClientSession, method: str, path: str, **kwargs: Any) -> Answer:
    async with client.request(method, path, **kwargs) as response:
        return Answer(response, await response.text())


def published(data_dir: Path) -> dict[str, bytes]:
    """Every file that a change would touch."""
    return {
        str(path.relative_to(data_dir)): path.read_bytes()
        for pattern in ("keys/*", "[0-9a-f]*/*.secret", "[0-9a-f]*/*.meta")
        for path in data_dir.glob(pattern)
    }


def log_of(data_dir: Path) -> list[dict[str, Any]]:
    """All events; they have to continue each other. Only a segment's tail may be torn."""
    lines: list[dict[str, Any]] = []
    for path in sorted((data_dir / "events").iterdir()):
        assert int(path.name[6:18]) == len(lines)
        for raw in path.read_bytes().splitlines():
            try:
                line = wire.decode_line(raw)
            except wire.Malformed:
                break
            if line["seq"] != len(lines):
                break
            lines.append(dict(line))
    return lines


def check_unavailable(answer: Answer) -> None:
    assert answer.status == 503, answer.text
    assert '"code":"log_unavailable"' in answer.text.replace(": ", ":")
    assert int(answer.headers["Retry-After"]) >= 1
    assert VALUE not in answer.text
    assert "Audit-Seq" not in answer.headers


async def check_nothing_is_served(client: aiohttp.ClientSession, key_id: str) -> None:
    """Values and changes are refused, whatever else happens."""
    document = {"name": "TOKEN", "value": f"{VALUE}-new"}
    check_unavailable(await ask(client, "GET", f"{SECRETS}/TOKEN"))
    check_unavailable(await ask(client, "POST", SECRETS, json=document))
    check_unavailable(await ask(client, "POST", SECRETS, json={**document, "name": "NEW"}))
    check_unavailable(await ask(client, "DELETE", f"{SECRETS}/TOKEN"))
    check_unavailable(await ask(client, "POST", KEYS, json={"name": "new"}))
    check_unavailable(await ask(client, "DELETE", f"{KEYS}/{key_id}"))
    # A refusal is an event, too: without it, not even whether there is such a secret.
    check_unavailable(await ask(client, "GET", f"{SECRETS}/NONE"))
    together = await asyncio.gather(
        *(ask(client, "GET", f"{SECRETS}/{name}") for name in ("TOKEN", "OTHER") * 8)
    )
    for answer in together:
        check_unavailable(answer)


async def check_metadata_are_served(client: aiohttp.ClientSession) -> None:
    answer = await ask(client, "GET", f"{SECRETS}/TOKEN/metadata")
    assert (answer.status, '"version":1' in answer.text) == (200, True), answer.text
    answer = await ask(client, "GET", SECRETS)
    assert (answer.status, '"TOKEN"' in answer.text) == (200, True), answer.text
    assert (await ask(client, "GET", "/api/v1/auth/whoami")).status == 200
    assert (await ask(client, "GET", "/healthz")).status == 200


async def check_works(client: aiohttp.ClientSession, data_dir: Path) -> None:
    """Everything is served again, and each receipt is found in the log."""
    answer = await ask(client, "GET", f"{SECRETS}/TOKEN")
    assert answer.status == 200, answer.text
    assert VALUE in answer.text
    created = await ask(client, "POST", SECRETS, json={"name": "AFTER", "value": VALUE})
    assert created.status == 201, created.text
    log = log_of(data_dir)
    for one, action in ((answer, "secret.read"), (created, "secret.create")):
        line = log[int(one.headers["Audit-Seq"])]
        assert (line["id"], line["action"]) == (one.headers["Audit-Id"], action)
    assert (await ask(client, "DELETE", f"{SECRETS}/AFTER")).status == 200
    assert VALUE not in str(log)


class Serving:
    """A server over a disk that can be broken, in this process."""

    def __init__(
        self, client: aiohttp.ClientSession, disk: Faulty, data_dir: Path, key_id: str
    ) -> None:
        self.client, self.disk, self.data_dir, self.key_id = client, disk, data_dir, key_id


@pytest.fixture(params=FAULTS)
async def broken(request: pytest.FixtureRequest, data_dir: Path) -> AsyncIterator[Serving]:
    kinds, error = FAULTS[request.param]
    disk = Faulty(kinds, error)
    # Where only beginning a segment fails, each event begins one.
    size = 1 if "segments" in request.param else 64 << 20
    service = await app.open_service(settings_for(data_dir, segment_bytes=size), disk)
    issued = await service.keys.issue(app.local_caller("acme"), KeyDraft("test"))
    headers = {"Authorization": f"Bearer {issued.raw.reveal()}"}
    async with (
        Inside(service) as server,
        aiohttp.ClientSession(server.make_url("/"), headers=headers) as client,
    ):
        for name in ("TOKEN", "OTHER"):
            created = await ask(client, "POST", SECRETS, json={"name": name, "value": VALUE})
            assert created.status == 201
        # The listing is at hand: the index is not what fails here.
        assert (await ask(client, "GET", SECRETS)).status == 200
        yield Serving(client, disk, data_dir, issued.key.id)
        disk.broken = False
    await service.close()


async def test_without_events_no_values_and_no_changes(broken: Serving) -> None:
    client, disk, data_dir = broken.client, broken.disk, broken.data_dir
    before = published(data_dir)
    log = log_of(data_dir)
    disk.broken = True
    await check_nothing_is_served(client, broken.key_id)
    assert disk.failed
    assert published(data_dir) == before
    ready = await ask(client, "GET", "/readyz")
    assert (ready.status, ready.headers["Retry-After"]) == (503, "1")
    assert any(os.strerror(number) in ready.text for number in (errno.ENOSPC, errno.EIO)) or (
        "wrote 1 of 2 bytes" in ready.text
    )
    # Ready again by itself: nobody but the readiness check asks for anything.
    disk.broken = False
    assert (await ask(client, "GET", "/readyz")).status == 200
    assert (await ask(client, "GET", "/readyz")).status == 200
    after = log_of(data_dir)
    assert after[: len(log)] == log
    assert after[-1]["action"] == "log.resume"
    # A change whose event reached the log although nobody could say so happened whole; then
    # it is the newest that counts.
    changes = [
        line for line in after[len(log) :] if line["action"] in ("secret.create", "secret.delete")
    ]
    if not changes:
        assert published(data_dir) == before
        await check_works(client, data_dir)
    else:
        assert "sync" in disk._kinds


async def test_without_events_metadata_are_served(broken: Serving) -> None:
    client, disk = broken.client, broken.disk
    disk.broken = True
    await check_metadata_are_served(client)
    check_unavailable(await ask(client, "GET", f"{SECRETS}/TOKEN"))
    check_unavailable(await ask(client, "GET", f"{SECRETS}/OTHER"))
    if disk._kinds.isdisjoint({"sync", "open_existing", "sync_paths"}):
        # Where even what is there already can't be made durable, or be opened, nothing is certain.
        await check_metadata_are_served(client)
    disk.broken = False
    # No readiness check, no restart: the next request is served.
    await check_works(client, broken.data_dir)
    await check_metadata_are_served(client)


async def test_it_stays_unready_as_long_as_it_lasts(broken: Serving) -> None:
    client, disk = broken.client, broken.disk
    disk.broken = True
    check_unavailable(await ask(client, "GET", f"{SECRETS}/TOKEN"))
    for _ in range(4):
        assert (await ask(client, "GET", "/readyz")).status == 503
        await ask(client, "GET", f"{SECRETS}/TOKEN/metadata")
        await ask(client, "GET", f"{SECRETS}/NONE/metadata")
    disk.broken = False
    assert (await ask(client, "GET", "/readyz")).status == 200


async def test_a_clean_stop_after_the_fault(data_dir: Path) -> None:
    disk = Faulty({"write", "sync"}, io_error)
    service = await app.open_service(settings_for(data_dir), disk)
    caller = app.local_caller("acme")
    issued = await service.keys.issue(caller, KeyDraft("test"))
    disk.broken = True
    for _ in range(3):
        with pytest.raises(LogUnavailable, match="can't be written"):
            await service.keys.issue(caller, KeyDraft("lost"))
    disk.broken = False
    assert [key.id for key in await service.keys.all(caller)] == [issued.key.id]
    await service.close()
    assert list((data_dir / "staged").iterdir()) == []


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits other processes")
async def test_a_server_that_may_write_nothing(data_dir: Path) -> None:
    key, other = await issue_key(data_dir), await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        assert server.process is not None
        pid = server.process.pid
        for name in ("TOKEN", "OTHER"):
            created = await ask(client, "POST", SECRETS, json={"name": name, "value": VALUE})
            assert created.status == 201
        assert (await ask(client, "GET", SECRETS)).status == 200
        async with session(server.url, other) as second:
            who = await ask(second, "GET", "/api/v1/auth/whoami")
        key_id = who.text.partition('"api_key_id":"')[2].partition('"')[0]
        assert key_id.startswith("key_")
        before, log = published(data_dir), log_of(data_dir)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        for limit in (0, 1100):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
            await check_nothing_is_served(client, key_id)
            await check_metadata_are_served(client)
            ready = await ask(client, "GET", "/readyz")
            assert (ready.status, os.strerror(errno.EFBIG) in ready.text) == (503, True)
            assert published(data_dir) == before
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
            assert (await ask(client, "GET", "/readyz")).status == 200
            assert server.process.returncode is None
        after = log_of(data_dir)
        assert after[: len(log)] == log
        assert [line["action"] for line in after[len(log) :] if line["action"][:4] != "log."] == []
        await check_works(client, data_dir)
        assert published(data_dir) == before
    assert list((data_dir / "staged").iterdir()) == []
    assert VALUE not in b"".join(server.output).decode()
