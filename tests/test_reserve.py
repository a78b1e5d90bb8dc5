"""Before the disk is full there is a warning; when it is, refusals and deletions are recorded."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmason_secrets import app, space
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import LogUnavailable
from flowmason_secrets.core.events import Line
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.library import AsyncSecretsService
from flowmason_secrets.service import Service
from flowmason_secrets.storage.durable import Durable

from .harness.disk import FileSizeLimit, SmallFileSystem
from .harness.faults import Call, Failing, Watched, no_space
from .harness.load import Grown, check_pairs, read_log
from .harness.server import MASTER_KEY, ServerProcess, issue_key, serving, session, settings_for
from .harness.signed import until
from .harness.workers import one_each
from .test_cli import run
from .test_disk_full import (
    check_audit_is_served,
    check_refusal,
    idle,
    make_limit,
    make_small_file_system,
    processes,
    use_up,
)
from .test_unaudited import KEYS, VALUE, ask, check_metadata_are_served

SECRETS = "/api/v1/secrets"
ACME = app.local_caller("acme", "tester")
MIB = 1 << 20
# Three times what is given back at once.
RESERVE = 12 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallFileSystem]:
    made = make_small_file_system(tmp_path / "disk", 32 * MIB)
    yield made
    made.unmount()


def with_reserve(size: int = RESERVE) -> dict[str, str]:
    return {"FLOWMASON_SECRETS_RESERVE_BYTES": str(size)}


def reserve(data_dir: Path) -> tuple[str | None, int]:
    """Its file, and how much room that takes."""
    for name in ("reserve", "reserve.in-use"):
        if (data_dir / name).exists():
            return name, (data_dir / name).stat().st_blocks * 512
    return None, 0


def of_acme(data_dir: Path) -> list[Line]:
    return [line for line in read_log(data_dir) if line["org_id"] == "acme"]


def actions(data_dir: Path, prefix: str = "log.space") -> list[str]:
    return [line["action"] for line in read_log(data_dir) if line["action"].startswith(prefix)]


# --- the disk is full ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
async def test_what_the_reserve_is_for(disk: SmallFileSystem, count: int) -> None:
    data_dir = disk.data_dir
    key, limited = await issue_key(data_dir), await issue_key(data_dir, scopes=("read",))
    grown = Grown(data_dir)
    async with (
        serving(data_dir, f"--workers={count}", **with_reserve()) as server,
        one_each(server.url, key, count) as clients,
        session(server.url, limited) as denied,
    ):
        assert reserve(data_dir) == ("reserve", RESERVE)
        for name in ("TOKEN", "OTHER", *(f"GONE-{number}" for number in range(9))):
            document = {"name": name, "value": VALUE}
            assert (await ask(clients[0], "POST", SECRETS, json=document)).status == 201
        await idle(data_dir, server)
        disk.fill()
        await use_up(clients[0])
        assert reserve(data_dir) == ("reserve.in-use", RESERVE - 4 * MIB)
        for client in clients:
            # Also those who did not meet the full disk themselves.
            await check_reads_and_changes_are_refused(client)
            await check_metadata_are_served(client)
            await check_audit_is_served(client, data_dir)
        for number in range(2):
            before = len(of_acme(data_dir))
            await check_refusals_are_recorded(clients[-1], denied, data_dir)
            answer = await ask(clients[number % count], "DELETE", f"{SECRETS}/GONE-{number}")
            assert answer.status == 200, answer.text
            assert len(of_acme(data_dir)) == before + 3
            # Somebody else takes what was given back: then there is more.
            await idle(data_dir, server)
            disk.fill()
        answer = await ask(clients[0], "POST", KEYS, json={"name": "more"})
        check_refusal(answer)
        await check_a_key_can_be_revoked(clients[0], data_dir, limited, denied)
        await check_operators(data_dir)
        # In the midst of it, everything ends, and begins again.
    check_pairs(data_dir)
    assert reserve(data_dir)[0] == "reserve.in-use"
    again = ServerProcess(data_dir, f"--workers={count}", **with_reserve())
    await again.start()
    async with one_each(again.url, key, count) as clients:
        await check_reads_and_changes_are_refused(clients[0])
        disk.free()
        for client in clients:
            answer = await ask(client, "GET", f"{SECRETS}/TOKEN")
            assert (answer.status, VALUE in answer.text) == (200, True), answer.text
        assert reserve(data_dir) == ("reserve", RESERVE)
        assert (await ask(clients[0], "GET", "/readyz")).status == 200
    await again.stop()
    grown.check()
    check_pairs(data_dir)
    ids = [line["id"] for line in read_log(data_dir)]
    assert len(ids) == len(set(ids))


async def check_reads_and_changes_are_refused(client: Any) -> None:
    answers = (
        await ask(client, "GET", f"{SECRETS}/TOKEN"),
        await ask(client, "POST", SECRETS, json={"name": "NEW", "value": VALUE}),
        await ask(client, "POST", SECRETS, json={"name": "TOKEN", "value": VALUE}),
        await ask(client, "POST", KEYS, json={"name": "more"}),
    )
    for answer in answers:
        check_refusal(answer)
        assert VALUE not in answer.text
    ready = await ask(client, "GET", "/readyz")
    assert ready.status == 503
    assert "the reserve is kept for refusals" in json.loads(ready.text)["reason"]


async def check_refusals_are_recorded(client: Any, denied: Any, data_dir: Path) -> None:
    answer = await ask(denied, "GET", f"{SECRETS}/TOKEN")
    assert answer.status == 403, answer.text
    answer = await ask(client, "GET", f"{SECRETS}/MISSING")
    assert answer.status == 404, answer.text
    newest = read_log(data_dir)[-2:]
    assert [line["outcome"] for line in newest] == ["denied", "not_found"]


async def check_a_key_can_be_revoked(client: Any, data_dir: Path, raw: str, holder: Any) -> None:
    who = json.loads((await ask(holder, "GET", "/api/v1/auth/whoami")).text)["api_key_id"]
    answer = await ask(client, "DELETE", f"{KEYS}/{who}")
    assert answer.status == 200, answer.text
    assert (await ask(holder, "GET", "/api/v1/auth/whoami")).status == 401
    assert "api_key.revoke" in actions(data_dir, "api_key")


async def check_operators(data_dir: Path) -> None:
    """The command line and the library see the same disk."""
    variables = {"FLOWMASON_SECRETS_DIR": str(data_dir), "FLOWMASON_SECRETS_KEY": MASTER_KEY}
    deleted = await run("delete", "GONE-8", "--org=acme", variables=variables)
    assert deleted.code == 0, deleted.err
    assert read_log(data_dir)[-1]["action"] == "secret.delete"
    got = await run("get", "TOKEN", "--org=acme", variables=variables)
    assert (got.code, got.out) == (1, "")
    assert "the reserve is kept for refusals" in got.err
    status = await run("status", variables=variables)
    assert status.code == 1
    secrets = AsyncSecretsService("acme", MASTER_KEY, data_dir)
    async with secrets:
        with pytest.raises(LogUnavailable):
            await secrets.get("TOKEN")
        await secrets.delete("GONE-7")


async def test_when_nothing_is_left_everything_is_refused(disk: SmallFileSystem) -> None:
    data_dir = disk.data_dir
    async with watching(data_dir, reserve_bytes=4 * MIB) as service:
        await service.set(ACME, Draft("A", Plaintext(VALUE)))
        for _ in range(2):
            disk.fill()
            await fill_log(service)
        assert reserve(data_dir) == ("reserve.in-use", 0)
        log = read_log(data_dir)
        with pytest.raises(LogUnavailable):
            await service.get(ACME, "A")
        with pytest.raises(LogUnavailable):
            await service.delete(ACME, "A")
        assert read_log(data_dir) == log
        disk.free()
        assert (await service.get(ACME, "A")).value.reveal() == VALUE
        assert reserve(data_dir) == ("reserve", 4 * MIB)


async def fill_log(service: Service) -> None:
    """Use the room within the log's last block; ends with the first refusal."""
    for _ in range(60):
        try:
            await service.delete(ACME, "MISSING")
        except LookupError:
            continue
        except LogUnavailable:
            return


async def test_little_room_is_not_enough_to_fill_it(disk: SmallFileSystem) -> None:
    """It would be used up at once."""
    data_dir = disk.data_dir
    async with watching(data_dir, reserve_bytes=4 * MIB) as service:
        await service.set(ACME, Draft("A", Plaintext(VALUE)))
        disk.fill()
        await used_up(service)
        assert reserve(data_dir)[0] == "reserve.in-use"
        disk.free()
        for pages, name in ((1200, "reserve.in-use"), (1300, "reserve")):
            disk.leave(pages)
            if name == "reserve":
                disk.free()
                disk.leave(pages)
            with contextlib.suppress(LogUnavailable):
                await service.get(ACME, "A")
            assert reserve(data_dir)[0] == name, pages


async def used_up(service: Service) -> None:
    for _ in range(60):
        try:
            await service.get(ACME, "A")
        except LogUnavailable:
            return
    raise AssertionError("the disk does not get full")


async def test_a_limit_is_no_full_disk(tmp_path: Path) -> None:
    """No reserve helps against it, and none is used."""
    limit: FileSizeLimit = make_limit(tmp_path / "disk")
    data_dir = limit.data_dir
    key = await issue_key(data_dir)
    async with serving(data_dir, **with_reserve()) as server, session(server.url, key) as client:
        answer = await ask(client, "POST", SECRETS, json={"name": "TOKEN", "value": VALUE})
        assert answer.status == 201
        limit.fill(*processes(server))
        check_refusal(await ask(client, "GET", f"{SECRETS}/TOKEN"))
        check_refusal(await ask(client, "DELETE", f"{SECRETS}/TOKEN"))
        assert reserve(data_dir) == ("reserve", RESERVE)
        limit.free(*processes(server))
        assert (await ask(client, "GET", f"{SECRETS}/TOKEN")).status == 200


async def test_what_may_be_in_the_log_is_not_written_twice(tmp_path: Path) -> None:
    """The disk gets full when whole lines are synced: nobody knows whether they stay."""
    sound = Watched()
    await delete_with_reserve(tmp_path / "sound" / "data", sound)
    staged, logged = (call.number for call in sound.calls if call.name == "fdatasync")
    for number, deleted in ((staged, True), (logged, False)):
        data_dir = tmp_path / str(number) / "data"
        disk = Failing(number, full_after, lasting=False)
        disk.broken = False
        if deleted:
            # Nothing was in the log: the reserve has room.
            await delete_with_reserve(data_dir, disk)
        else:
            with pytest.raises(LogUnavailable):
                await delete_with_reserve(data_dir, disk)
        assert (disk.failed, reserve(data_dir)[0]) == (1, "reserve.in-use")
        ids = [line["id"] for line in read_log(data_dir)]
        assert len(ids) == len(set(ids)) == 3
        check_pairs(data_dir)


def full_after(call: Call) -> Any:
    call.do()
    raise no_space()


async def delete_with_reserve(data_dir: Path, disk: Watched) -> None:
    """Delete a secret on this disk, where a server has made the reserve."""
    async with watching(data_dir, reserve_bytes=MIB) as service:
        await service.set(ACME, Draft("A", Plaintext(VALUE)))
    service = await app.open_service(settings_for(data_dir, reserve_bytes=MIB), disk)
    try:
        disk.calls.clear()
        disk.numbers = itertools.count()
        if isinstance(disk, Failing):
            disk.broken = True
        await service.delete(ACME, "A")
    finally:
        calls = list(disk.calls)
        await service.close()
        disk.calls[:] = calls


# --- the reserve itself -------------------------------------------------------------------------


async def test_a_server_makes_it_and_nobody_else(data_dir: Path) -> None:
    async with AsyncSecretsService("acme", MASTER_KEY, data_dir) as secrets:
        await secrets.set("A", "v")
    assert reserve(data_dir) == (None, 0)
    for size in (MIB, 3 * MIB, MIB):
        async with serving(data_dir, **with_reserve(size)):
            # It does not get smaller.
            assert reserve(data_dir) == ("reserve", max(size, reserve(data_dir)[1]))
    assert reserve(data_dir)[1] == 3 * MIB
    assert (data_dir / "reserve").stat().st_mode & 0o777 == 0o600
    async with serving(data_dir, **with_reserve(0)):
        assert reserve(data_dir) == (None, 0)


async def test_a_server_starts_without_room_for_it(disk: SmallFileSystem) -> None:
    data_dir = disk.data_dir
    key = await issue_key(data_dir)
    async with serving(data_dir, **with_reserve(64 * MIB)) as server:
        assert reserve(data_dir) == (None, 0)
        async with session(server.url, key) as client:
            answer = await ask(client, "POST", SECRETS, json={"name": "A", "value": VALUE})
            assert answer.status == 201
            ready = await ask(client, "GET", "/readyz")
        health = json.loads(ready.text)
        assert (ready.status, health["status"]) == (200, "warning")
        (warning,) = health["warnings"]
        assert "The reserve of 64 MiB could not be made" in warning


# --- the warning --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def watching(data_dir: Path, **changes: object) -> AsyncIterator[Service]:
    """What a server does, with little patience."""
    service = await app.open_service(settings_for(data_dir, **changes))
    await service.space.start()
    try:
        yield service
    finally:
        await service.close()


async def test_little_room_is_told_once(
    disk: SmallFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of several; not again after a restart, nor while the room is about the limit."""
    monkeypatch.setattr(space, "INTERVAL", 0.02)
    data_dir = disk.data_dir
    below: dict[str, Any] = {"free_space_warning": 8 * MIB, "reserve_bytes": MIB}
    low = ["log.space_low"]
    async with watching(data_dir, **below) as one, watching(data_dir, **below) as two:
        assert await one.space.warnings() == await two.space.warnings() == []
        assert actions(data_dir) == []
        disk.leave(7 * MIB // 4096)
        await until(lambda: actions(data_dir) == low)
        for each in (one, two):
            (warning,) = await each.space.warnings()
            assert "Make room" in warning
        # Each of them has looked again.
        await asyncio.sleep(0.2)
        assert actions(data_dir) == low
        await one.space.close()
        disk.free()
        disk.leave(9 * MIB // 4096)
        await asyncio.sleep(0.2)
        assert len(await two.space.warnings()) == 1
    async with watching(data_dir, **below):
        await asyncio.sleep(0.2)
        assert actions(data_dir) in (low, [*low, "log.space_ok"])
        disk.free()
        await until(lambda: actions(data_dir) == [*low, "log.space_ok"])
        disk.leave(5 * MIB // 4096)
        await until(lambda: actions(data_dir) == [*low, "log.space_ok", *low])
    event = next(line for line in read_log(data_dir) if line["action"] == "log.space_low")
    free, limit = event["details"]["free"], event["details"]["warn_below"]
    assert isinstance(free, int)
    assert (0 < free < 8 * MIB, limit) == (True, 8 * MIB)


async def test_a_warning_is_yellow_and_served(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    variables = {
        "FLOWMASON_SECRETS_DIR": str(data_dir),
        "FLOWMASON_SECRETS_KEY": MASTER_KEY,
        "FLOWMASON_SECRETS_FREE_SPACE_WARNING": str(1 << 60),
    }
    async with (
        serving(data_dir, "--workers=2", **variables) as server,
        session(server.url, key) as client,
    ):
        for _ in range(4):
            ready = await ask(client, "GET", "/readyz")
            health = json.loads(ready.text)
            assert (ready.status, health["status"]) == (200, "warning")
            assert "are free on the disk" in health["warnings"][0]
        answer = await ask(client, "POST", SECRETS, json={"name": "A", "value": VALUE})
        assert answer.status == 201
        await until(lambda: actions(data_dir) == ["log.space_low"])
        status = await run("status", variables=variables)
        assert (status.code, "are free on the disk" in status.err) == (0, True)


async def test_durable_allocates_all_or_nothing(disk: SmallFileSystem) -> None:
    durable, path = Durable(), disk.data_dir.with_name("file")
    durable.allocate(path, MIB)
    assert path.stat().st_blocks * 512 == MIB
    with pytest.raises(OSError, match="No space"):
        durable.allocate(path, 64 * MIB)
    assert path.stat().st_blocks * 512 == path.stat().st_size == MIB
    durable.allocate(path, 4096)
    assert path.stat().st_size == MIB
    durable.shrink(path, 4096)
    assert path.stat().st_blocks * 512 == 4096
