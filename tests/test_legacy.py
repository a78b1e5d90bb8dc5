"""A store that FlowMason 1.0 wrote opens in place."""

import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from flowmason_secrets import app
from flowmason_secrets.config import Settings
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.errors import DecryptionFailed, SecretExpired, SecretNotFound
from flowmason_secrets.core.events import Line
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.names import org_hash, secret_hash
from flowmason_secrets.core.ports import AuditQuery, ListQuery
from flowmason_secrets.core.records import Metadata
from flowmason_secrets.service import Service

from .harness.legacy import Legacy, LegacyStore
from .harness.server import MASTER_KEY, Inside, key_ids

OTHER_KEY = "quite another master key of 32 characters"

# A zone with daylight saving, spelled so that no zone database is needed.
NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"

# The longest request line that aiohttp accepts, in bytes.
REQUEST_LINE = 8190

NAMES = [
    "",
    " ",
    "  leading and trailing  ",
    "/",
    "//",
    "a/b",
    "/etc/passwd",
    ".",
    "..",
    "../..",
    "../" * 20 + "etc/passwd",
    "\\..\\..\\",
    "\n",
    "two\nlines",
    "\r\nX-Injected: 1",
    "\t",
    "\0",
    "a\0b",
    "\x7f\x1b[31m",
    "\x85\u2028\u2029",
    '"',
    "'",
    '{"name": "x"}',
    "`$(id)`",
    "'; drop table secret; --",
    "%",
    "%2F",
    "%2e%2e",
    "%00",
    "%%",
    "100%",
    "+",
    "a+b c",
    "?",
    "a?limit=1",
    "#",
    "a#b",
    ";",
    "a;b=c",
    "*",
    "[a-z]",
    "~",
    ":",
    "http://example.com/x",
    "metadata",
    "x/metadata",
    "api-keys",
    "../auth/whoami",
    "healthz",
    "openapi.json",
    "audit",
    "policies",
    "events",
    "index.sqlite3",
    "plain",
    "Plain",
    "PLAIN",
    "раypal",
    "paypal",
    "é",
    "e\u0301",
    "ﬁ",
    "fi",
    "Å",
    "\u212b",
    "K",
    "\u212a",
    "İ",
    "ß",
    "ss",
    "\u200b",
    "\u202egnp.exe",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "🔑",
    "👩‍👩‍👧‍👦",
    "漢字",
    "a" * 255,
    "b" * 256,
    "b" * 257,
    "b" * 258,
    "c" * 2000,
    "🔑" * 256,
    "🔑" * 257,
    "🔑" * 2000,
    "\n" * 2000,
]


@pytest.fixture(scope="module")
def legacy() -> Iterator[Legacy]:
    process = Legacy()
    yield process
    process.close()


@pytest.fixture
def store(legacy: Legacy, tmp_path: Path) -> LegacyStore:
    """An organisation of 1.0 with its master key in the environment."""
    return LegacyStore(legacy, tmp_path)


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process is in New York."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", NEW_YORK)
        time.tzset()
        yield NEW_YORK
    time.tzset()


def settings_of(store: LegacyStore, *master_keys: str) -> Settings:
    """The settings under which 1.0's store is ours; without keys, with the key that 1.0 had."""
    keys = master_keys or (() if store.master_key is None else (store.master_key,))
    return app.with_overrides(Settings(), master_keys=keys, data_dir=store.data_dir)


@contextlib.asynccontextmanager
async def opened(store: LegacyStore, *master_keys: str) -> AsyncIterator[Service]:
    """Our service over 1.0's store."""
    service = await app.open_service(settings_of(store, *master_keys))
    try:
        yield service
    finally:
        await service.close()


class Http:
    """A client of our server over 1.0's store. Nothing in it rewrites the path it is given."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """The status and the decoded body."""
        url = URL(self._url + path, encoded=True)
        async with self._session.request(method, url, **options) as response:
            text = await response.text()
            is_json = response.content_type in ("application/json", "application/problem+json")
            return response.status, json.loads(text) if is_json else text


@contextlib.asynccontextmanager
async def over_http(store: LegacyStore, *master_keys: str) -> AsyncIterator[Http]:
    """A server over 1.0's store, and a client with a full-scope key."""
    async with (
        opened(store, *master_keys) as service,
        Inside(service) as server,
    ):
        issued = await service.keys.issue(app.local_caller(store.org), KeyDraft("test"))
        headers = {"Authorization": f"Bearer {issued.raw.reveal()}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            yield Http(str(server.make_url("")).rstrip("/"), session)


def path_of(name: str, rest: str = "") -> str:
    """The path of a secret. Dots are encoded too: alone they would be a relative path."""
    return "/api/v1/secrets/" + quote(name, safe="").replace(".", "%2E") + rest


async def list_all(service: Service, caller: Caller) -> list[Metadata]:
    query = ListQuery(caller.principal.org_id, time.time(), limit=1 << 62)
    return [entry async for page in service.listing(caller, query) for entry in page]


def events_of(data_dir: Path) -> list[Line]:
    """All events, from the files and not from any index."""
    segments = sorted((data_dir / "events").iterdir())
    return [json.loads(line) for path in segments for line in path.read_bytes().splitlines()]


def files_of(store: LegacyStore) -> dict[str, tuple[bytes, int]]:
    """The content and the time of modification of every file of the organisation."""
    folder = store.data_dir / org_hash(store.org)
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def utc(local: str) -> str:
    """A time that 1.0 wrote, with a zone or in local time, as we show it."""
    return datetime.fromisoformat(local).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


VALUES = {
    "EMPTY": "",
    "OPENAI_API_KEY": "sk-1234",
    "UNICODE": "pässwörd 🔑\r\n\0\u2028",
    "LARGE": "x" * 200_000,
}


@pytest.mark.parametrize("master_key", [MASTER_KEY, "short", "ключ 🔑", None])
async def test_values_are_read(legacy: Legacy, tmp_path: Path, master_key: str | None) -> None:
    store = LegacyStore(legacy, tmp_path, "Acme & Söhne GmbH", master_key)
    store.set_all(VALUES)
    before = files_of(store)
    caller = app.local_caller(store.org)
    async with opened(store) as service:
        found = {name: (await service.get(caller, name)).value.reveal() for name in VALUES}
    assert found == VALUES
    async with over_http(store) as http:
        for name, value in VALUES.items():
            status, body = await http.ask("GET", path_of(name))
            assert (status, body["value"], body["version"]) == (200, value, 1)
    assert files_of(store) == before


async def test_the_documented_default_key_comes_with_a_warning(
    legacy: Legacy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LegacyStore(legacy, tmp_path, master_key=None)
    store.set("TOKEN", "of the default key")
    async with opened(store) as service:
        revealed = await service.get(app.local_caller("acme"), "TOKEN")
    assert revealed.value.reveal() == "of the default key"
    assert revealed.metadata.key_id == "default"
    assert app.DEFAULT_KEY_WARNING in caplog.messages


async def test_organisations_stay_apart(legacy: Legacy, tmp_path: Path) -> None:
    stores = [LegacyStore(legacy, tmp_path, org) for org in ("acme", "Acme", "globex")]
    for store in stores:
        store.set("TOKEN", f"of {store.org}")
        store.set(f"ONLY_{store.org}", "x")
    async with opened(stores[0]) as service:
        for store in stores:
            caller = app.local_caller(store.org)
            revealed = await service.get(caller, "TOKEN")
            assert revealed.value.reveal() == f"of {store.org}"
            listed = [entry.name for entry in await list_all(service, caller)]
            assert listed == sorted(["TOKEN", f"ONLY_{store.org}"])


async def test_the_master_key_of_10_may_be_the_oldest_of_several(store: LegacyStore) -> None:
    store.set("TOKEN", "old")
    caller = app.local_caller("acme")
    async with opened(store, OTHER_KEY, MASTER_KEY) as service:
        assert (await service.get(caller, "TOKEN")).value.reveal() == "old"
        written = await service.set(caller, Draft("TOKEN", Plaintext("new")))
        assert written.metadata.version == 2
    # Written anew, it is under the newest key and needs the old one no more.
    async with opened(store, OTHER_KEY) as service:
        assert (await service.get(caller, "TOKEN")).value.reveal() == "new"


@pytest.mark.parametrize(
    ("expires_at", "shown"),
    [
        ("2031-07-01T12:00:00", "2031-07-01T16:00:00.000000Z"),
        ("2031-01-01T12:00:00.000001", "2031-01-01T17:00:00.000001Z"),
        ("2031-07-01T12:00:00+02:00", "2031-07-01T10:00:00.000000Z"),
        ("2031-07-01T12:00:00+00:00", "2031-07-01T12:00:00.000000Z"),
        ("2031-07-01T12:00:00.5-09:30", "2031-07-01T21:30:00.500000Z"),
        (None, None),
    ],
)
async def test_metadata_are_shown_in_utc(
    legacy: Legacy, tmp_path: Path, new_york: str, expires_at: str | None, shown: str | None
) -> None:
    store = LegacyStore(legacy, tmp_path, zone=new_york)
    fields = {"description": "für 🔑", "category": "api_key", "created_by": "user-7"}
    # 1.0 stores a time with a zone and fails only then, as it does in every listing afterwards.
    store.run(("set", {"name": "TOKEN", "value": "x", "expires_at": expires_at, **fields}))
    meta = store.data_dir / org_hash("acme") / f"{secret_hash('TOKEN')}.meta"
    wrote = json.loads(meta.read_bytes())
    expected: dict[str, Any] = {
        **fields,
        "id": hashlib.sha256(b"acme:TOKEN").hexdigest()[:16],
        "name": "TOKEN",
        "created_at": utc(wrote["created_at"]),
        "updated_at": utc(wrote["updated_at"]),
        "expires_at": shown,
        "is_expired": False,
        "version": 1,
    }
    assert datetime.fromisoformat(wrote["created_at"]).tzinfo is None
    async with over_http(store) as http:
        assert await http.ask("GET", path_of("TOKEN", "/metadata")) == (200, expected)
        assert await http.ask("GET", "/api/v1/secrets") == (200, [expected])
        status, body = await http.ask("GET", path_of("TOKEN"))
        assert (status, body["value"]) == (200, "x")
    seconds = datetime.fromisoformat(expected["created_at"]).timestamp()
    assert abs(seconds - time.time()) < 60


@pytest.mark.parametrize("expired", [True, False])
async def test_a_naive_expiry_is_local_time(
    legacy: Legacy, tmp_path: Path, new_york: str, expired: bool
) -> None:
    # Four or five hours from UTC, so that one hour decides.
    hour = timedelta(hours=-1 if expired else 1)
    naive = (datetime.now().astimezone().replace(tzinfo=None) + hour).isoformat()
    store = LegacyStore(legacy, tmp_path, zone=new_york)
    assert store.set("TOKEN", "x", expires_at=naive)["is_expired"] is expired
    caller = app.local_caller("acme")
    async with opened(store) as service:
        (listed,) = await list_all(service, caller)
        assert listed.is_expired(time.time()) is expired
        if expired:
            with pytest.raises(SecretExpired):
                await service.get(caller, "TOKEN")
        else:
            assert (await service.get(caller, "TOKEN")).value.reveal() == "x"


@pytest.mark.parametrize("expires_at", ["9999-12-31T23:59:59.999999", "9999-12-31T23:59:59-05:00"])
async def test_a_secret_that_expires_at_the_end_of_time_is_read(
    store: LegacyStore, expires_at: str
) -> None:
    """`datetime.max` is a usual way to say "never"."""
    store.run(("set", {"name": "TOKEN", "value": "x", "expires_at": expires_at}))
    caller = app.local_caller("acme")
    async with opened(store) as service:
        assert (await service.get(caller, "TOKEN")).value.reveal() == "x"
        assert [entry.name for entry in await list_all(service, caller)] == ["TOKEN"]


@pytest.mark.parametrize("field", ["description", "category", "created_by"])
async def test_metadata_with_text_that_has_no_utf8_form_are_read(
    store: LegacyStore, field: str
) -> None:
    """1.0 escapes everything beyond ASCII, so a lone surrogate gets into its `.meta`."""
    store.set("TOKEN", "x", **{field: "before \ud83d after"})
    async with over_http(store) as http:
        status, body = await http.ask("GET", path_of("TOKEN"))
        assert (status, body.get("value")) == (200, "x")
        status, body = await http.ask("GET", "/api/v1/secrets")
        assert (status, [entry["name"] for entry in body]) == (200, ["TOKEN"])


async def test_an_update_writes_our_format_and_keeps_the_creation(store: LegacyStore) -> None:
    old = store.set("TOKEN", "old", description="old", category="token", created_by="user-7")
    async with over_http(store) as http:
        draft = {"name": "TOKEN", "value": "new", "description": "new"}
        status, written = await http.ask("POST", "/api/v1/secrets", json=draft)
        assert status == 200
        status, read = await http.ask("GET", path_of("TOKEN"))
        assert (status, read["value"], read["version"]) == (200, "new", 2)
        assert await http.ask("GET", "/api/v1/secrets") == (200, [written])
    assert written["version"] == 2
    assert written["created_at"] == utc(old["created_at"])
    assert written["created_by"] == "user-7"
    assert written["updated_at"] > written["created_at"]
    stem = store.data_dir / org_hash("acme") / secret_hash("TOKEN")
    token = stem.with_suffix(".secret").read_bytes().rstrip(b"\n")
    meta = json.loads(stem.with_suffix(".meta").read_bytes())
    assert meta["token_sha256"] == hashlib.sha256(token).hexdigest()
    assert meta["key_id"] == key_ids(MASTER_KEY)[0]
    shown = {name: meta[name] for name in written if name != "is_expired"}
    assert shown == {name: value for name, value in written.items() if name != "is_expired"}
    event = next(line for line in events_of(store.data_dir) if line["action"] == "secret.create")
    assert (event["version"], event["details"]["kind"]) == (2, "update")
    assert meta["revision"] == event["id"]


@pytest.mark.parametrize("wrong", [(OTHER_KEY,), ()])
async def test_a_wrong_key_changes_nothing(store: LegacyStore, wrong: tuple[str, ...]) -> None:
    store.set("TOKEN", "hidden value", created_by="user-7")
    before = files_of(store)
    caller = app.local_caller("acme")
    keys = app.with_overrides(settings_of(store, OTHER_KEY), master_keys=wrong)
    held = key_ids(*wrong)
    service = await app.open_service(keys)
    try:
        with pytest.raises(DecryptionFailed) as failed:
            await service.get(caller, "TOKEN")
        assert failed.value.held == held
        assert "hidden value" not in str(failed.value)
        async with Inside(service) as server:
            issued = await service.keys.issue(caller, KeyDraft("test"))
            headers = {"X-API-Key": issued.raw.reveal()}
            async with aiohttp.ClientSession(headers=headers) as session:
                http = Http(str(server.make_url("")).rstrip("/"), session)
                status, problem = await http.ask("GET", path_of("TOKEN"))
                assert (status, problem["code"]) == (500, "decryption_failed")
                assert problem["key_id"] == failed.value.key_id
                assert problem["held"] == list(held)
                assert all(key in problem["detail"] for key in held)
                status, _ = await http.ask("GET", path_of("TOKEN", "/metadata"))
                assert status == 200
    finally:
        await service.close()
    assert files_of(store) == before
    reads = [line for line in events_of(store.data_dir) if line["action"] == "secret.read"]
    assert [(line["outcome"], line["status"]) for line in reads] == [("failed", 500)] * 2
    assert all(line["details"]["held"] == list(held) for line in reads)
    # With the right key it is there as if nothing had been.
    async with opened(store) as service:
        assert (await service.get(caller, "TOKEN")).value.reveal() == "hidden value"


async def test_a_wrong_key_is_not_said_to_be_the_one_that_is_needed(store: LegacyStore) -> None:
    """1.0 doesn't name its key, so nobody can know that it is one of those that are held."""
    store.set("TOKEN", "x")
    async with opened(store, OTHER_KEY) as service:
        with pytest.raises(DecryptionFailed) as failed:
            await service.get(app.local_caller("acme"), "TOKEN")
    assert not [
        key for key in failed.value.held if f"needs the master key {key}" in str(failed.value)
    ]


async def check_names(store: LegacyStore, names: list[str]) -> None:
    """Everything works with these names that 1.0 has stored, through the library."""
    values = {name: f"value of {index}" for index, name in enumerate(names)}
    store.set_all(values)
    caller = app.local_caller(store.org)
    async with opened(store) as service:
        # Sorted as UTF-8, which is also the order of the code points.
        assert [entry.name for entry in await list_all(service, caller)] == sorted(values)
        for name, value in values.items():
            assert (await service.get(caller, name)).value.reveal() == value
            assert (await service.metadata(caller, name)).name == name
            await service.delete(caller, name)
            with pytest.raises(SecretNotFound):
                await service.get(caller, name)
        assert await list_all(service, caller) == []
        query = AuditQuery(store.org, action="secret.delete", success=True, limit=len(names) + 1)
        deleted = [entry.line["name"] for entry in await service.audit(caller, query)]
        assert deleted == [name[:256] for name in reversed(values)]
    folder = store.data_dir / org_hash(store.org)
    assert [path.name for path in folder.iterdir() if path.is_file()] == []


async def check_names_over_http(store: LegacyStore, names: list[str]) -> None:
    """Everything works with these names that 1.0 has stored, over HTTP."""
    values = {name: f"value of {index}" for index, name in enumerate(names)}
    store.set_all(values)
    left = set(values)
    async with over_http(store) as http:
        status, listed = await http.ask("GET", "/api/v1/secrets")
        assert (status, [entry["name"] for entry in listed]) == (200, sorted(values))
        for name, value in values.items():
            if len(f"DELETE {path_of(name, '/metadata')} HTTP/1.1") >= REQUEST_LINE:
                status, _ = await http.ask("GET", path_of(name))
                assert status in (400, 414, 431)
                continue
            status, body = await http.ask("GET", path_of(name))
            assert (status, body.get("name"), body.get("value")) == (200, name, value)
            status, body = await http.ask("GET", path_of(name, "/metadata"))
            assert (status, body.get("name")) == (200, name)
            status, _ = await http.ask("DELETE", path_of(name))
            assert status == 200
            left.remove(name)
            for rest in ("", "/metadata"):
                status, body = await http.ask("GET", path_of(name, rest))
                assert (status, body["code"]) == (404, "secret_not_found")
        status, listed = await http.ask("GET", "/api/v1/secrets")
        assert (status, [entry["name"] for entry in listed]) == (200, sorted(left))


async def test_names_are_arbitrary_text(store: LegacyStore) -> None:
    await check_names(store, NAMES)


async def test_names_are_arbitrary_text_over_http(store: LegacyStore) -> None:
    await check_names_over_http(store, NAMES)


# Lone surrogates have no hash: 1.0 could not store them either.
ANY_NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300), max_size=12, unique=True
)


@settings(max_examples=25, deadline=None)
@given(names=ANY_NAMES)
async def test_any_name_is_served(legacy: Legacy, names: list[str]) -> None:
    with TemporaryDirectory() as home:
        await check_names(LegacyStore(legacy, Path(home)), names)


@settings(max_examples=25, deadline=None)
@given(names=ANY_NAMES)
async def test_any_name_is_served_over_http(legacy: Legacy, names: list[str]) -> None:
    with TemporaryDirectory() as home:
        await check_names_over_http(LegacyStore(legacy, Path(home)), names)


async def test_the_other_folders_of_10_are_left_alone(store: LegacyStore) -> None:
    for name in ("A", "B"):
        store.set(name, f"value of {name}")
        store.call("set_rotation_policy", secret_name=name, rotation_interval_days=30)
        assert store.call("get", name=name) == f"value of {name}"

    def of_10() -> dict[str, tuple[bytes, int]]:
        return {name: content for name, content in files_of(store).items() if "/" in name}

    before = of_10()
    assert {name.split("/")[0] for name in before} == {"audit", "policies"}
    caller = app.local_caller("acme")
    async with opened(store) as service:
        assert [entry.name for entry in await list_all(service, caller)] == ["A", "B"]
        await service.set(caller, Draft("A", Plaintext("new")))
        await service.delete(caller, "B")
        await service.set(caller, Draft("audit", Plaintext("not the folder")))
    async with opened(store) as service:
        assert [entry.name for entry in await list_all(service, caller)] == ["A", "audit"]
        assert (await service.get(caller, "audit")).value.reveal() == "not the folder"
    assert of_10() == before


async def test_reads_of_what_10_wrote_are_events(store: LegacyStore) -> None:
    store.set("TOKEN", "x")
    async with over_http(store) as http:
        await http.ask("GET", path_of("TOKEN"))
        await http.ask("GET", path_of("ABSENT"))
        status, listed = await http.ask("GET", "/api/v1/auth/audit-log?action=secret.read")
        assert status == 200
    absent, read = [line for line in reversed(events_of(store.data_dir)) if line["name"]][:2]
    assert (read["action"], read["outcome"], read["status"]) == ("secret.read", "success", 200)
    assert (read["name"], read["version"]) == ("TOKEN", 1)
    assert read["resource_id"] == hashlib.sha256(b"acme:TOKEN").hexdigest()[:16]
    assert read["org_id"] == "acme"
    assert (absent["name"], absent["outcome"], absent["status"]) == ("ABSENT", "not_found", 404)
    assert [entry["id"] for entry in listed] == [absent["id"], read["id"]]
