"""Changing the master key: nothing is lost, nothing but the key changes, everybody follows."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

from flowmason_secrets import app, rotation
from flowmason_secrets.config import Settings, from_environment
from flowmason_secrets.core.access import Caller, Principal
from flowmason_secrets.core.drafts import Draft, Precondition
from flowmason_secrets.core.errors import (
    ConfigurationError,
    DecryptionFailed,
    Denied,
    RotationIncomplete,
    SecretNotFound,
)
from flowmason_secrets.core.events import Line
from flowmason_secrets.core.keyring import DEFAULT_KEY_ID, MasterKey, Plaintext
from flowmason_secrets.core.names import org_hash, secret_hash, secret_id
from flowmason_secrets.core.records import Inventory
from flowmason_secrets.service import Service
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.files import FilesStore
from flowmason_secrets.storage.keysources import KeyFile
from flowmason_studio.services.secrets import SecretsService

from .harness.load import read_log
from .harness.server import key_ids

ONE = "the first master key, of 32 characters or more"
TWO = "the second master key, of 32 characters or more"
THREE = "the third master key, of 32 characters or more"
ID_1, ID_2, ID_3 = key_ids(ONE, TWO, THREE)
ACME = app.local_caller("acme", "tester")
OTHER = app.local_caller("other", "tester")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key file with one key."""
    path = tmp_path / "master.key"
    path.write_text(f"{ONE}\n")
    path.chmod(0o600)
    return path


@contextlib.asynccontextmanager
async def opened(data_dir: Path, keys: Path | tuple[str, ...]) -> AsyncIterator[Service]:
    """A service, as a process of its own would have it, over a key file or fixed keys."""
    where = {"key_file": keys} if isinstance(keys, Path) else {"master_keys": keys}
    service = await app.open_service(app.with_overrides(Settings(), data_dir=data_dir, **where))
    try:
        yield service
    finally:
        await service.close()


async def put(service: Service, name: str, value: str, caller: Caller = ACME) -> None:
    await service.set(caller, Draft(name, Plaintext(value)))


async def get(service: Service, name: str, caller: Caller = ACME) -> str:
    return (await service.get(caller, name)).value.reveal()


def meta_of(data_dir: Path, org: str, name: str) -> dict[str, object]:
    """What the metadata file says."""
    path = data_dir / org_hash(org) / f"{secret_hash(name)}.meta"
    found: dict[str, object] = json.loads(path.read_bytes())
    return found


def rotations(data_dir: Path) -> list[Line]:
    """The events of rotations, in order."""
    return [line for line in read_log(data_dir) if line["action"] == "key.rotate"]


async def usage(service: Service) -> dict[str, tuple[int, str]]:
    return {key.key_id: (key.secrets, key.state) for key in await service.key_usage()}


async def test_only_the_key_changes(data_dir: Path, key_file: Path) -> None:
    count = 2 * rotation.BATCH + 3
    async with opened(data_dir, key_file) as service:
        for n in range(count):
            await put(service, f"S{n:03}", f"value {n}")
        await put(service, "S000", "value 0")
        await put(service, "THEIRS", "their value", OTHER)
        before = [await service.metadata(ACME, f"S{n:03}") for n in range(count)]
        await service.rotation.use(ACME, TWO)
        assert await service.rotation.finish(ACME) == count
        for n, old in enumerate(before):
            new = await service.metadata(ACME, old.name)
            assert (old.key_id, new.key_id) == (ID_1, ID_2)
            assert asdict(new) | {"key_id": ID_1} == asdict(old)
            assert new.etag == old.etag
            assert await get(service, old.name) == f"value {n}"
        assert meta_of(data_dir, "other", "THEIRS")["key_id"] == ID_1
        assert await usage(service) == {ID_2: (count, "active"), ID_1: (1, "held")}
        assert await service.rotation.finish(ACME) == 0
    assert key_file.read_text() == f"{TWO}\n{ONE}\n"
    begin, *batches = rotations(data_dir)
    assert (begin["org_id"], begin["resource_id"], begin["actor"]) == (None, ID_2, "tester")
    assert begin["details"] == {"kind": "begin", "to": ID_2}
    named: list[str] = []
    for line in batches:
        details = line["details"]
        secrets = details["secrets"]
        assert isinstance(secrets, list)
        named += secrets
        assert (line["org_id"], line["resource_type"], line["resource_id"]) == (
            *("acme", "master_key"),
            ID_2,
        )
        assert details == {
            "kind": "batch",
            "count": len(secrets),
            "failed": 0,
            "from": [ID_1],
            "to": ID_2,
            "secrets": secrets,
        }
    sizes = [line["details"]["count"] for line in batches]
    assert sizes == [rotation.BATCH, rotation.BATCH, 3]
    assert sorted(named) == sorted(secret_id("acme", old.name) for old in before)
    # Nothing is under the old key alone.
    async with opened(data_dir, (ONE,)) as service:
        with pytest.raises(DecryptionFailed):
            await service.get(ACME, "S000")
        assert await get(service, "THEIRS", OTHER) == "their value"


async def test_half_of_the_time_it_leaves_the_machine_to_others(
    data_dir: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each batch it pauses as long as that took."""
    slow, sync = 0.02, Durable.sync
    synced: list[float] = []

    def slowly(durable: Durable, descriptor: int) -> None:
        time.sleep(slow)
        sync(durable, descriptor)
        if threading.current_thread().name.startswith("flowmason-commit"):
            synced.append(time.monotonic())

    async with opened(data_dir, key_file) as service:
        names = [f"S{n:03}" for n in range(3 * rotation.BATCH)]
        await asyncio.gather(*(put(service, name, "value") for name in names))
        await service.rotation.use(ACME, TWO)
        monkeypatch.setattr(Durable, "sync", slowly)
        batches = service.rotation.reencrypt(ACME, names)
        pauses = [time.monotonic() - synced[-1] async for _ in batches]
    # A batch syncs its changes and its event.
    assert len(pauses) == 3
    assert min(pauses) >= 2 * slow


async def test_no_key_material_leaves(
    data_dir: Path, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with opened(data_dir, key_file) as service:
        await put(service, "S", "canary-value")
        await service.rotation.use(ACME, TWO)
        await service.rotation.finish(ACME)
        await service.rotation.retire(ACME, ())
    for path in data_dir.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(text.encode() in data for text in (ONE, TWO, "canary-value")), path
    assert not any(text in caplog.text for text in (ONE, TWO, "canary-value"))


# --- other processes ------------------------------------------------------------------------


async def test_others_read_the_key_file_when_they_meet_an_unknown_key(
    data_dir: Path, key_file: Path
) -> None:
    async with opened(data_dir, key_file) as one, opened(data_dir, key_file) as two:
        await put(one, "S", "value")
        assert await get(two, "S") == "value"
        await one.rotation.use(ACME, TWO)
        await one.rotation.finish(ACME)
        assert await get(two, "S") == "value"
        assert await usage(two) == {ID_2: (1, "active"), ID_1: (0, "held")}
        # With what they have in memory, too, once the old key is gone.
        await one.rotation.retire(ACME, ())
        assert await get(two, "S") == "value"
        await put(two, "T", "another")
        assert await usage(two) == {ID_2: (2, "active")}
        assert rotations(data_dir)[-1]["details"] == {"kind": "retire", "to": ID_2, "from": [ID_1]}


async def test_others_let_go_of_a_retired_key(data_dir: Path, key_file: Path) -> None:
    async with opened(data_dir, key_file) as one, opened(data_dir, key_file) as two:
        await put(one, "NAME", "value")
        await one.rotation.use(ACME, TWO)
        await one.rotation.finish(ACME)
        assert await get(two, "NAME") == "value"
        await one.rotation.retire(ACME, ())
        assert await usage(two) == {ID_2: (1, "active")}


async def test_nothing_is_written_under_the_old_key_once_it_has_begun(
    data_dir: Path, key_file: Path
) -> None:
    async with opened(data_dir, key_file) as one, opened(data_dir, key_file) as two:
        await put(two, "BEFORE", "value")
        await one.rotation.use(ACME, TWO)
        # It has not met the new key anywhere.
        await put(two, "AFTER", "value")
        await put(two, "BEFORE", "value")
        assert await usage(one) == {ID_2: (2, "active"), ID_1: (0, "held")}


async def test_writing_goes_on_during_a_rotation(data_dir: Path, key_file: Path) -> None:
    """Updates, deletions and creations by another process at random moments: none is undone."""
    random = Random(5)
    names = [f"S{n:03}" for n in range(150)]
    async with opened(data_dir, key_file) as one, opened(data_dir, key_file) as two:
        await asyncio.gather(*(put(one, name, "old") for name in names))
        truth = dict.fromkeys(names, "old")
        versions = dict.fromkeys(names, 1)

        async def write() -> None:
            for count in range(100):
                name = random.choice(names)
                if name in truth and random.random() < 0.3:
                    await two.delete(ACME, name)
                    del truth[name]
                else:
                    value = f"value {count}"
                    written = await two.set(ACME, Draft(name, Plaintext(value)))
                    versions[name] = written.metadata.version
                    truth[name] = value

        writing = asyncio.create_task(write())
        for material in itertools.cycle((THREE, ONE, TWO)):
            await one.rotation.use(ACME, material)
            await one.rotation.finish(ACME)
            if writing.done() and material == TWO:
                break
        await writing
        assert len(rotations(data_dir)) > 9
        for service in (one, two):
            for name in names:
                if name not in truth:
                    with pytest.raises(SecretNotFound):
                        await service.get(ACME, name)
                    continue
                assert await get(service, name) == truth[name]
                assert (await service.metadata(ACME, name)).version == versions[name]
        assert (await usage(one))[ID_2] == (len(truth), "active")
        assert await two.rotation.retire(ACME, ()) == [ID_1, ID_3]


async def test_a_conditional_write_is_not_disturbed(data_dir: Path, key_file: Path) -> None:
    async with opened(data_dir, key_file) as one, opened(data_dir, key_file) as two:
        await put(one, "S", "value")
        etag = (await one.metadata(ACME, "S")).etag
        await two.rotation.use(ACME, TWO)
        await two.rotation.finish(ACME)
        draft = Draft("S", Plaintext("new"))
        written = await one.set(ACME, draft, Precondition(etags=(etag,)))
        assert (written.metadata.version, written.metadata.key_id) == (2, ID_2)


async def test_two_rotations_at_once(data_dir: Path, key_file: Path) -> None:
    async with opened(data_dir, key_file) as one, opened(data_dir, key_file) as two:
        await asyncio.gather(*(put(one, f"S{n}", f"value {n}") for n in range(200)))

        async def rotate(service: Service, material: str) -> None:
            await service.rotation.use(ACME, material)
            await service.rotation.finish(ACME)

        await asyncio.gather(rotate(one, TWO), rotate(two, THREE))
        # Whatever the order was: all keys are there, and the last one is the active one.
        assert set(key_file.read_text().splitlines()) == {ONE, TWO, THREE}
        await one.reload_keys()
        await one.rotation.finish(ACME)
        active = key_ids(key_file.read_text().splitlines()[0])[0]
        assert (await usage(one))[active] == (200, "active")
        for n in range(200):
            assert await get(two, f"S{n}") == f"value {n}"


# --- what can't be re-encrypted -------------------------------------------------------------


async def test_what_cannot_be_decrypted_stays_and_is_named(data_dir: Path, key_file: Path) -> None:
    async with opened(data_dir, (THREE,)) as service:
        await put(service, "STRANGE", "value")
    async with opened(data_dir, key_file) as service:
        await put(service, "S", "value")
        before = meta_of(data_dir, "acme", "STRANGE")
        await service.rotation.use(ACME, TWO)
        with pytest.raises(RotationIncomplete) as caught:
            await service.rotation.finish(ACME)
        assert (caught.value.failed, caught.value.done) == (("STRANGE",), 1)
        assert meta_of(data_dir, "acme", "STRANGE") == before
        assert rotations(data_dir)[-1]["details"]["failed"] == 1
        with pytest.raises(ConfigurationError, match="1 secrets"):
            await service.rotation.retire(ACME, ())
        assert key_file.read_text() == f"{TWO}\n{ONE}\n"
        # With its key at hand it goes on.
        key_file.write_text(f"{TWO}\n{ONE}\n{THREE}\n")
        assert await service.rotation.finish(ACME) == 1
        assert await service.rotation.retire(ACME, ()) == [ID_1, ID_3]
        assert await get(service, "STRANGE") == "value"


@pytest.mark.parametrize("kind", ["secret", "meta"])
async def test_damaged_files_keep_the_old_keys(kind: str, data_dir: Path, key_file: Path) -> None:
    async with opened(data_dir, key_file) as service:
        await put(service, "HALF", "value")
        await put(service, "S", "value")
    stem = data_dir / org_hash("acme") / secret_hash("HALF")
    stem.with_suffix(f".{kind}").unlink()
    async with opened(data_dir, key_file) as service:
        await service.rotation.use(ACME, TWO)
        await service.rotation.finish(ACME)
        with pytest.raises(ConfigurationError, match="1 damaged"):
            await service.rotation.retire(ACME, ())
        await service.delete(ACME, "HALF")
        assert await service.rotation.retire(ACME, ()) == [ID_1]


async def test_half_a_secret_for_a_moment_keeps_no_key(
    data_dir: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process is publishing it just then."""
    async with opened(data_dir, key_file) as service:
        await put(service, "NAME", "value")
        await service.rotation.use(ACME, TWO)
        await service.rotation.finish(ACME)
        look, looks = FilesStore.inventory, itertools.count()

        async def inventory(store: FilesStore, org: str) -> Inventory:
            found = await look(store, org)
            return found._replace(damaged=[secret_hash("NEW")]) if next(looks) == 0 else found

        monkeypatch.setattr(FilesStore, "inventory", inventory)
        assert await service.rotation.retire(ACME, ()) == [ID_1]


async def test_an_organisation_that_no_event_names(data_dir: Path, key_file: Path) -> None:
    """As FlowMason 1.0 leaves them: the directory has only the hash of its name."""
    async with opened(data_dir, key_file) as service:
        await put(service, "S", "value")
    for path in (data_dir / "events").iterdir():
        path.unlink()
    async with opened(data_dir, key_file) as service:
        survey = await service.rotation.survey(())
        assert (survey.secrets, survey.nameless) == ({}, [org_hash("acme")])
        await service.rotation.use(OTHER, TWO)
        with pytest.raises(ConfigurationError, match="1 organisations"):
            await service.rotation.retire(OTHER, ())
        survey = await service.rotation.survey(("acme",))
        assert survey.left(ID_2) == {"acme": ["S"]}
        assert await service.rotation.finish(ACME) == 1
        assert await service.rotation.retire(ACME, ("acme",)) == [ID_1]


async def test_an_api_key_cannot_change_master_keys(data_dir: Path, key_file: Path) -> None:
    principal = Principal("acme", "key_1", "api_key", frozenset({"full"}), digest="0" * 64)
    async with opened(data_dir, key_file) as service:
        with pytest.raises(Denied):
            await service.rotation.use(Caller(principal), TWO)
    assert key_file.read_text() == f"{ONE}\n"


async def test_from_the_default_key(data_dir: Path, tmp_path: Path) -> None:
    async with opened(data_dir, ()) as service:
        await put(service, "S", "value")
    key_file = tmp_path / "begun.key"
    key_file.write_text("default\n")
    key_file.chmod(0o600)
    async with opened(data_dir, key_file) as service:
        assert await usage(service) == {DEFAULT_KEY_ID: (1, "active")}
        await service.rotation.use(ACME, TWO)
        await service.rotation.finish(ACME)
        assert await service.rotation.retire(ACME, ()) == [DEFAULT_KEY_ID]
    assert key_file.read_text() == f"{TWO}\n"
    async with opened(data_dir, (TWO,)) as service:
        assert await get(service, "S") == "value"


# --- the library ----------------------------------------------------------------------------


def test_the_library_with_a_key_file(
    data_dir: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMASON_SECRETS_KEY_FILE", str(key_file))
    secrets = SecretsService("my-org", storage_path=data_dir)
    for n in range(3):
        secrets.set(f"S{n}", f"value {n}")
    assert secrets.rotate_key("new-master-key") == 3
    assert secrets.get("S1") == "value 1"
    assert key_file.read_text() == f"new-master-key\n{ONE}\n"
    secrets.close()


def test_the_library_with_a_key_from_the_environment(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLOWMASON_SECRETS_KEY", ONE)
    secrets = SecretsService("my-org", storage_path=data_dir)
    secrets.set("S", "value")
    assert secrets.rotate_key("new-master-key") == 1
    for word in ("FLOWMASON_SECRETS_KEY", "FLOWMASON_SECRETS_OLD_KEYS"):
        assert word in caplog.text
    assert "new-master-key" not in caplog.text
    assert secrets.get("S") == "value"
    secrets.set("T", "another")
    secrets.close()
    for variables, found in (
        ({"KEY": "new-master-key"}, "value another"),
        ({"KEY": ONE, "OLD_KEYS": "new-master-key"}, "value another"),
        ({"KEY": ONE}, "DecryptionFailed"),
    ):
        assert found in _in_another_process(data_dir, variables)


def _in_another_process(data_dir: Path, variables: dict[str, str]) -> str:
    program = (
        "import sys; from flowmason_studio.services.secrets import SecretsService\n"
        "secrets = SecretsService('my-org', storage_path=sys.argv[1])\n"
        "print(secrets.get('S'), secrets.get('T'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(data_dir)],
        env={f"FLOWMASON_SECRETS_{name}": text for name, text in variables.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


# --- the key file ---------------------------------------------------------------------------


def test_a_key_file_is_replaced_as_a_whole(key_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file)
    source = KeyFile(link, (), Durable())
    before = key_file.stat()
    source.put_first(TWO)
    source.put_first(TWO)
    assert link.is_symlink()
    after = key_file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert after.st_ino != before.st_ino
    assert key_file.read_text() == f"{TWO}\n{ONE}\n"
    source.put_first(ONE)
    assert key_file.read_text() == f"{ONE}\n{TWO}\n"
    # The one that encrypts stays, whatever is asked for.
    source.drop([ID_1, ID_2])
    assert key_file.read_text() == f"{ONE}\n"
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_key_file_stays_its_owners(key_file: Path) -> None:
    os.chown(key_file, 12345, 23456)
    KeyFile(key_file, (), Durable()).put_first(TWO)
    status = key_file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 23456, 0o600)


def test_no_key_is_lost_when_many_change_the_file(key_file: Path) -> None:
    keys = [f"key number {n}" for n in range(12)]

    def add(key: str) -> None:
        KeyFile(key_file, (), Durable()).put_first(key)

    threads = [threading.Thread(target=add, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key_file.read_text().splitlines()) == sorted([ONE, *keys])


@pytest.mark.parametrize(
    "material", ["two\nlines", " white", "white\t", "default", "\u2028", "a\r"]
)
def test_what_a_key_file_cannot_hold(material: str, key_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="one line"):
        KeyFile(key_file, (), Durable()).put_first(material)
    assert key_file.read_text() == f"{ONE}\n"


async def test_a_key_file_that_vanished(
    data_dir: Path, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is held goes on; what is not held says why; changes are refused until it is back."""
    async with opened(data_dir, (TWO,)) as service:
        await put(service, "NEWER", "value")
    async with opened(data_dir, key_file) as service:
        await put(service, "S", "value")
        key_file.rename(key_file.with_suffix(".away"))
        assert await get(service, "S") == "value"
        with pytest.raises(DecryptionFailed):
            await service.get(ACME, "NEWER")
        assert "master.key can't be read" in caplog.text
        with pytest.raises(ConfigurationError):
            await service.reload_keys()
        await put(service, "S", "value")


def test_the_environment_is_told_apart(key_file: Path) -> None:
    settings = from_environment(
        {"FLOWMASON_SECRETS_KEY_FILE": str(key_file), "FLOWMASON_SECRETS_OLD_KEYS": TWO}
    )
    keys = app.key_source(settings, Durable()).load()
    assert list(keys) == [MasterKey.of(ONE), MasterKey.of(TWO)]
