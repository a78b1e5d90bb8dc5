"""The face for clients of HashiCorp Vault, as hvac and node-vault see it: both as they come."""

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hvac  # type: ignore[import-untyped] # it has no annotations
import orjson
import pytest
import requests
from hvac import exceptions

from flowmason_secrets import app
from flowmason_secrets.api import vaultface
from flowmason_secrets.config import PREFIX
from flowmason_secrets.core import errors, names
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft, KeyDraft, Precondition
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import AuditQuery
from flowmason_secrets.core.status import STATUS
from flowmason_secrets.service import Service

from .harness.node import node_vault
from .harness.pressed import Pressed, pressed
from .harness.server import issue_key, serving
from .test_http import RAISED

ORG = app.local_caller("acme", "tester")
MISMATCH = "check-and-set parameter did not match the current version"

Step = Callable[[], Any]

_FORM = "application/x-www-form-urlencoded"
_NO_OBJECT = "data must be a JSON object in UTF-8"
_NO_JSON = "The body is not JSON in UTF-8."
_TOO_LONG = "value: has 65545 bytes, at most 65536 are allowed"
_SEGMENTS = "path: must not have empty segments, '.' or '..' between its '/'"
_CONTROL = "name: must not contain control characters or line separators"
_LENGTH = "name: must have 1 to 256 characters, has 257"
_ONE_TOKEN = "There must be one token, in X-Vault-Token or in Authorization."

# What hvac says to everybody who calls it as its documentation does.
pytestmark = pytest.mark.filterwarnings("ignore:The raise_on_deleted:DeprecationWarning")


class Site:
    """A server with the face, its service, and clients of it."""

    def __init__(self, opened: Pressed) -> None:
        self.service = opened.service
        self.key = opened.key
        self.url = f"http://127.0.0.1:{opened.port}"
        self._server = opened.server
        self._clients: list[Any] = []

    def client(self, token: str | None = None) -> Any:
        """hvac's client."""
        self._clients.append(hvac.Client(url=self.url, token=self.key if token is None else token))
        return self._clients[-1]

    def leave(self) -> None:
        """Its clients go."""
        for one in self._clients:
            one.adapter.close()
        # urllib3 closes what it keeps open only once nobody has one of its errors any more.
        for connection in list(self._server._open):
            connection.force_close()


@contextlib.asynccontextmanager
async def opened(data_dir: Path) -> AsyncIterator[Site]:
    """A server with the face, and a secret `A` that is no JSON object."""
    async with pressed(data_dir, vault_compat=True) as server:
        site = Site(server)
        try:
            yield site
        finally:
            site.leave()


@pytest.fixture
async def site(data_dir: Path) -> AsyncIterator[Site]:
    """The same for a whole test."""
    async with opened(data_dir) as one:
        yield one


async def key(site: Site, org: str = "acme", **draft: object) -> str:
    """An API key."""
    draft_of = KeyDraft("test", **draft)  # type: ignore[arg-type] # tests name fields
    return (await site.service.keys.issue(app.local_caller(org), draft_of)).raw.reveal()


async def refused(kind: type[Exception], step: Step, *texts: str) -> Any:
    """Assert that hvac raises exactly this error, with these texts of Vault's."""
    with pytest.raises(exceptions.VaultError) as caught:
        await asyncio.to_thread(step)
    error: Any = caught.value
    assert (error.errors or []) == list(texts)
    assert type(error) is kind
    return error


async def events(
    service: Service, caller: Caller = ORG
) -> list[tuple[str, str | None, str, int | None]]:
    """What is in the log: action, name, outcome and status, the oldest first."""
    entries = await service.audit(caller, AuditQuery("acme"))
    return [
        (line["action"], line["name"], line["outcome"], line["status"])
        for line in (entry.line for entry in reversed(entries))
    ]


async def test_hvac_reads_what_it_wrote(site: Site) -> None:
    def use() -> None:
        kv = site.client().secrets.kv.v2
        for version, secret in enumerate(({"user": "ann", "n": 1}, {}, {"ü": ["ß", None]}), 1):
            written = kv.create_or_update_secret("team/db", secret)["data"]
            read = kv.read_secret_version("team/db", raise_on_deleted_version=True)
            assert read["data"]["data"] == secret
            assert read["data"]["metadata"] == written
            assert written["version"] == version
            assert datetime.datetime.fromisoformat(written["created_time"]).tzinfo is not None
            assert (written["destroyed"], written["deletion_time"]) == (False, "")
            assert written["custom_metadata"] is None
            assert set(read) == {
                *("request_id", "lease_id", "renewable", "lease_duration"),
                *("data", "wrap_info", "warnings", "auth"),
            }

    await asyncio.to_thread(use)
    assert await events(site.service) == [
        ("api_key.create", "test", "success", 200),
        ("secret.create", "A", "success", 201),
        ("secret.create", "team/db", "success", 201),
        ("secret.read", "team/db", "success", 200),
        *[
            ("secret.create", "team/db", "success", 200),
            ("secret.read", "team/db", "success", 200),
        ]
        * 2,
    ]


async def test_older_versions_are_destroyed(site: Site) -> None:
    kv = site.client().secrets.kv.v2

    def read(version: int | None) -> Step:
        return lambda: kv.read_secret_version("N", version, raise_on_deleted_version=True)

    for value in ("one", "two"):
        await asyncio.to_thread(kv.create_or_update_secret, "N", {"v": value})
    for wanted in (None, 0, 2):
        shown = await asyncio.to_thread(read(wanted))
        assert shown["data"]["data"] == {"v": "two"}
    before = await events(site.service)
    gone = await refused(exceptions.InvalidPath, read(1))
    body = gone.json["data"]
    assert body["data"] is None
    assert body["metadata"]["version"] == 1
    assert body["metadata"]["destroyed"] is True
    assert body["metadata"]["deletion_time"] == ""
    await refused(exceptions.InvalidPath, read(3))
    # Nothing was revealed, and no read is told of.
    assert await events(site.service) == before
    await refused(exceptions.InvalidRequest, lambda: kv.read_secret_version("N", "x"), *_VERSION)


async def test_a_version_that_ends_while_it_is_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.service.set(ORG, Draft("N", Plaintext('{"v": 1}')))
    get = site.service.get

    async def late(caller: Caller, name: str) -> object:
        await site.service.set(ORG, Draft("N", Plaintext('{"v": 2}')))
        return await get(caller, name)

    monkeypatch.setattr(site.service, "get", late)
    shown = await ask(site, "GET", f"{DATA}/N?version=1")
    assert shown.status_code == 404
    assert shown.json()["data"]["data"] is None
    assert shown.json()["data"]["metadata"]["version"] == 1


_VERSION = ("version: must be a number",)


async def test_cas(site: Site) -> None:
    kv = site.client().secrets.kv.v2

    def put(cas: int | None) -> Step:
        return lambda: kv.create_or_update_secret("N", {"cas": cas}, cas=cas)

    async def current() -> tuple[int, object]:
        read = await asyncio.to_thread(kv.read_secret, "N")
        return read["data"]["metadata"]["version"], read["data"]["data"]["cas"]

    await refused(exceptions.InvalidRequest, put(1), MISMATCH)
    await asyncio.to_thread(put(0))
    assert await current() == (1, 0)
    for wrong in (0, 2, -1):
        await refused(exceptions.InvalidRequest, put(wrong), MISMATCH)
        assert await current() == (1, 0)
    await asyncio.to_thread(put(1))
    await refused(exceptions.InvalidRequest, put(1), MISMATCH)
    assert await current() == (2, 1)
    await asyncio.to_thread(put(None))
    assert await current() == (3, None)
    await asyncio.to_thread(kv.delete_latest_version_of_secret, "N")
    await refused(exceptions.InvalidRequest, put(3), MISMATCH)
    await asyncio.to_thread(put(0))
    assert await current() == (1, 0)
    outcomes = [row[2:] for row in await events(site.service) if row[:2] == ("secret.create", "N")]
    assert outcomes.count(("failed", 412)) == 6


async def test_of_racing_cas_writes_one_wins_each_version(site: Site) -> None:
    kv = site.client().secrets.kv.v2
    won: list[tuple[int, int]] = []
    await asyncio.to_thread(kv.create_or_update_secret, "N", {"who": -1})

    def race(who: int) -> None:
        own = site.client().secrets.kv.v2
        for version in range(1, 11):
            with contextlib.suppress(exceptions.InvalidRequest):
                written = own.create_or_update_secret("N", {"who": who}, cas=version)
                assert written["data"]["version"] == version + 1
                won.append((version, who))
            while own.read_secret("N")["data"]["metadata"]["version"] <= version:
                pass

    await asyncio.gather(*(asyncio.to_thread(race, who) for who in range(4)))
    assert sorted(version for version, _ in won) == list(range(1, 11))
    last = await asyncio.to_thread(kv.read_secret, "N")
    assert last["data"]["data"] == {"who": dict(won)[10]}


async def test_hvac_patches_by_cas(site: Site) -> None:
    kv = site.client().secrets.kv.v2
    await refused(exceptions.InvalidPath, lambda: kv.patch("N", {"a": 1}), *_NO_PATCH)
    await asyncio.to_thread(kv.create_or_update_secret, "N", {"a": 1, "b": 2})
    await asyncio.to_thread(kv.patch, "N", {"b": 3})
    read = await asyncio.to_thread(kv.read_secret, "N")
    assert read["data"]["data"] == {"a": 1, "b": 3}


# hvac's own words.
_NO_PATCH = ()


@pytest.mark.parametrize("strict", [False, True], ids=["LIST", "GET"])
async def test_lists(site: Site, strict: bool) -> None:
    http = site.client()
    http.adapter.strict_http = strict
    kv = http.secrets.kv.v2
    paths = ("b/c", "b/d/e", "b/d/f", "b-", "b", "c/d", "ü/x y%2F", "b/")
    for path in paths[:-1]:
        await asyncio.to_thread(kv.create_or_update_secret, path, {})
    for folder, keys in {
        "": ["A", "b", "b-", "b/", "c/", "ü/"],
        "b": ["c", "d/"],
        "b/": ["c", "d/"],
        "b/d": ["e", "f"],
        "c": ["d"],
    }.items():
        found = await asyncio.to_thread(kv.list_secrets, folder)
        assert found["data"] == {"keys": keys}, folder
    for empty in ("nope", "b/c", "b/d/e", "B"):
        await refused(exceptions.InvalidPath, partial(kv.list_secrets, empty))


async def test_what_lists_show_is_what_may_be_used(site: Site) -> None:
    for path in ("team/a", "team/b/c", "other/a", "team"):
        await asyncio.to_thread(site.client().secrets.kv.v2.create_or_update_secret, path, {"v": 1})
    few = site.client(await key(site, allow=("team/*",))).secrets.kv.v2
    assert (await asyncio.to_thread(few.list_secrets, ""))["data"] == {"keys": ["team/"]}
    assert (await asyncio.to_thread(few.list_secrets, "team"))["data"] == {"keys": ["a", "b/"]}
    await asyncio.to_thread(few.read_secret, "team/b/c")
    await asyncio.to_thread(few.create_or_update_secret, "team/new", {})
    await refused(exceptions.InvalidPath, lambda: few.list_secrets("other"))
    for name in ("team", "other/a", "absent"):
        texts = ("permission denied", f"This API key may not use the name '{name}'.")
        for call in (
            few.read_secret,
            few.read_secret_metadata,
            few.delete_latest_version_of_secret,
            lambda path: few.create_or_update_secret(path, {}),
        ):
            await refused(exceptions.Forbidden, partial(call, name), *texts)
    stranger = site.client(await key(site, org="other")).secrets.kv.v2
    await refused(exceptions.InvalidPath, lambda: stranger.list_secrets(""))
    await refused(exceptions.InvalidPath, lambda: stranger.read_secret("team/a"))


async def test_deletes(site: Site) -> None:
    http = site.client()
    kv = http.secrets.kv.v2

    async def left() -> list[str]:
        return list((await asyncio.to_thread(kv.list_secrets, ""))["data"]["keys"])

    async def fresh() -> None:
        for _ in range(2):
            await asyncio.to_thread(kv.create_or_update_secret, "N", {})

    for delete, gone in (
        (lambda: kv.delete_latest_version_of_secret("N"), True),
        (lambda: kv.delete_metadata_and_all_versions("N"), True),
        (lambda: kv.delete_secret_versions("N", [1, 2]), True),
        (lambda: kv.destroy_secret_versions("N", [2, 2]), True),
        (lambda: kv.destroy_secret_versions("N", [1, 3, -1]), False),
        (lambda: kv.delete_secret_versions("N", [1]), False),
    ):
        await fresh()
        for _ in range(2):
            # The second time nothing may be there any more.
            assert (await asyncio.to_thread(delete)).status_code == 204
        assert await left() == (["A"] if gone else ["A", "N"])
        if gone:
            await refused(exceptions.InvalidPath, lambda: kv.read_secret("N"))
            await refused(exceptions.InvalidPath, lambda: kv.read_secret_metadata("N"))
    # hvac refuses empty lists itself.
    for way in ("delete", "destroy"):
        empty = partial(http.adapter.post, f"/v1/secret/{way}/N", json={"versions": []})
        await refused(exceptions.InvalidRequest, empty, "No version number provided")
    undelete = partial(kv.undelete_secret_versions, "N", [1])
    text = "What was deleted is not kept here: it can't be undeleted."
    await refused(exceptions.InvalidRequest, undelete, text)


async def test_metadata(site: Site) -> None:
    kv = site.client().secrets.kv.v2
    first = (await asyncio.to_thread(kv.create_or_update_secret, "N", {}))["data"]
    second = (await asyncio.to_thread(kv.create_or_update_secret, "N", {}))["data"]
    shown = (await asyncio.to_thread(kv.read_secret_metadata, "N"))["data"]
    assert shown == {
        "cas_required": False,
        "created_time": first["created_time"],
        "current_version": 2,
        "custom_metadata": None,
        "delete_version_after": "0s",
        "max_versions": 1,
        "oldest_version": 2,
        "updated_time": second["created_time"],
        "versions": {
            "2": {
                "created_time": second["created_time"],
                "deletion_time": "",
                "destroyed": False,
            }
        },
    }
    await refused(exceptions.InvalidPath, lambda: kv.read_secret_metadata("absent"))
    unchanged = await asyncio.to_thread(kv.update_metadata, "N", max_versions=1, cas_required=False)
    assert unchanged.status_code == 204
    text = "Metadata can't be set here: only the current version is kept."
    for change in (
        {"custom_metadata": {"a": "b"}},
        {"max_versions": 10},
        {"cas_required": True},
        {"delete_version_after": "3h"},
    ):
        await refused(
            exceptions.InvalidRequest,
            partial(kv.update_metadata, "N", **change),
            text,
        )


async def test_who_hvac_is(site: Site) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    brief = await key(site, scopes=("read", "deploy"), expires_at=soon.isoformat())

    def look(token: str) -> dict[str, Any]:
        http = site.client(token)
        assert http.is_authenticated()
        return dict(http.lookup_token()["data"])

    forever, limited = await asyncio.gather(
        asyncio.to_thread(look, site.key), asyncio.to_thread(look, brief)
    )
    assert (forever["ttl"], forever["expire_time"], forever["type"]) == (0, None, "service")
    assert 3590 <= limited["ttl"] <= 3600
    assert datetime.datetime.fromisoformat(limited["expire_time"]) == soon
    assert limited["policies"] == ["deploy", "read"]
    assert limited["meta"] == {"org_id": "acme"}
    assert brief not in str(limited)
    texts = ("permission denied", "This needs the scope full; the API key has deploy, read.")
    kv = site.client(brief).secrets.kv.v2
    await refused(exceptions.Forbidden, lambda: kv.read_secret("A"), *texts)
    assert (await asyncio.to_thread(kv.list_secrets, ""))["data"] == {"keys": ["A"]}


async def test_node_vault(site: Site) -> None:
    told = await asyncio.to_thread(node_vault, site.url, site.key)
    failures = {name: one for name, one in told.items() if "ok" not in one}
    assert failures == {
        "mismatch": {"status": 400, "errors": [MISMATCH]},
        "exists": {"status": 400, "errors": [MISMATCH]},
        "older": {"status": 404, "errors": "Status 404"},
        "nobody": {"status": 403, "errors": ["permission denied"]},
        "lookup": {"status": 403, "errors": ["permission denied"]},
        "patch": {"status": 405, "errors": ["unsupported operation"]},
        "absent": {"status": 404, "errors": []},
        "none": {"status": 404, "errors": []},
    }
    worked = {name: one["ok"] for name, one in told.items() if "ok" in one}
    assert worked["health"]["sealed"] is False
    assert worked["write"]["data"]["version"] == 1
    assert worked["read"]["data"]["data"] == {"user": "ann", "n": 1}
    assert worked["read"]["data"]["metadata"] == worked["write"]["data"]
    assert worked["cas"]["data"]["version"] == 2
    assert worked["list"]["data"] == {"keys": ["A", "team/"]}
    assert worked["below"]["data"] == worked["get"]["data"] == {"keys": ["db"]}
    assert worked["metadata"]["data"]["current_version"] == 2
    assert worked["self"]["data"]["meta"] == {"org_id": "acme"}
    assert worked["remove"] is worked["again"] is None


async def test_bad_tokens_are_403(site: Site, data_dir: Path) -> None:
    revoked = await key(site)
    (live,) = [one for one in await site.service.keys.all(ORG) if one.revoked_at is None][-1:]
    await site.service.keys.revoke(ORG, live.id)
    for token in ("hvs.unknown", revoked, "ü".encode().decode("latin-1")):
        http = site.client(token)
        assert await asyncio.to_thread(http.is_authenticated) is False
        kv = http.secrets.kv.v2
        for step in (
            http.lookup_token,
            partial(kv.read_secret, "A"),
            partial(kv.list_secrets, ""),
            partial(kv.create_or_update_secret, "A", {}),
        ):
            await refused(exceptions.Forbidden, step, "permission denied")
    await site.service.failures.flush()
    (segment,) = (data_dir / "events").iterdir()
    last = orjson.loads(segment.read_bytes().splitlines()[-1])
    assert (last["action"], last["details"]["count"]) == ("auth.failed", 3 * 5)


async def test_health(site: Site, data_dir: Path) -> None:
    sys = site.client("").sys
    head = await asyncio.to_thread(sys.read_health_status)
    assert (head.status_code, head.content) == (200, b"")
    shown = await asyncio.to_thread(sys.read_health_status, method="GET", standby_ok=True)
    assert shown["initialized"] is True
    assert shown["sealed"] is False
    kv = site.client().secrets.kv.v2
    # Nobody can lock a directory of this kind.
    (data_dir / "commit.lock").unlink()
    (data_dir / "commit.lock").mkdir()
    assert (await asyncio.to_thread(sys.read_health_status)).status_code == 503
    assert (await asyncio.to_thread(sys.read_health_status, method="GET")).json()["sealed"] is True
    for step in (
        lambda: kv.read_secret("A"),
        lambda: kv.create_or_update_secret("A", {}),
        lambda: kv.read_secret("absent"),
        lambda: kv.list_secrets(""),
        site.client().is_authenticated,
    ):
        with pytest.raises(exceptions.VaultDown):
            await asyncio.to_thread(step)
    (data_dir / "commit.lock").rmdir()
    assert (await asyncio.to_thread(sys.read_health_status)).status_code == 200
    await asyncio.to_thread(kv.read_secret, "A")


async def test_failures_of_ours(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(data_dir) as site:
        kv = site.client().secrets.kv.v2
        await asyncio.to_thread(kv.create_or_update_secret, "team/db", {"a": "canary"})
    for path in data_dir.rglob("*.secret"):
        path.write_bytes(b"")
    async with opened(data_dir) as site:
        kv = site.client().secrets.kv.v2
        damaged = await failed(lambda: kv.read_secret("team/db"))
        assert "The stored files of secret 'team/db' are damaged" in damaged

        async def broken(*_: object) -> None:
            raise RuntimeError("a defect with a canary")

        monkeypatch.setattr(site.service, "get", broken)
        assert "canary" not in await failed(lambda: kv.read_secret("team/db"))
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def failed(step: Step) -> str:
    """What hvac says of a 500."""
    with pytest.raises(exceptions.InternalServerError) as caught:
        await asyncio.to_thread(step)
    return str(caught.value)


@contextlib.contextmanager
def session(site: Site) -> Iterator[requests.Session]:
    """A client without opinions."""
    with requests.Session() as one:
        one.headers["X-Vault-Token"] = site.key
        yield one


async def ask(site: Site, method: str, path: str, **more: Any) -> requests.Response:
    """One request with the API key."""
    with session(site) as one:
        return await asyncio.to_thread(one.request, method, f"{site.url}{path}", **more)


DATA = "/v1/secret/data"
META = "/v1/secret/metadata"
OBJECT = b'{"data": {}}'

WIRE: tuple[tuple[str, str, dict[str, Any], int, list[str] | None], ...] = (
    ("PUT", f"{DATA}/N", {"json": {"data": {"a": 1}}}, 200, None),
    # As the examples of Vault's documentation have it: curl says that it is a form.
    ("POST", f"{DATA}/N", {"data": OBJECT, "headers": {"Content-Type": _FORM}}, 200, None),
    ("POST", f"{DATA}/N", {"json": {"data": {}, "options": None}}, 200, None),
    ("POST", f"{DATA}/N", {"json": {"data": {}, "options": {"x": 1}, "y": 2}}, 200, None),
    ("POST", f"{DATA}/N", {"json": {}}, 400, ["no data provided"]),
    ("POST", f"{DATA}/N", {"json": {"data": None}}, 400, ["no data provided"]),
    ("POST", f"{DATA}/N", {"json": {"data": "x"}}, 400, [_NO_OBJECT]),
    ("POST", f"{DATA}/N", {"data": b'{"data": {"a": "\xff"}}'}, 400, [_NO_OBJECT]),
    ("POST", f"{DATA}/N", {"data": b'{"data": {"a": "\\ud800"}}'}, 400, [_NO_JSON]),
    ("POST", f"{DATA}/N", {"data": b'{"data": {"a": 1}'}, 400, [_NO_JSON]),
    ("POST", f"{DATA}/N", {"data": b""}, 400, [_NO_JSON]),
    ("POST", f"{DATA}/N", {"data": b"[]"}, 400, ["body: Expected `object`, got `array`"]),
    ("POST", f"{DATA}/N", {"json": {"data": {"a": "x" * 65536}}}, 400, [_TOO_LONG]),
    ("GET", f"{DATA}/N/", {}, 400, [_SEGMENTS]),
    ("GET", f"{DATA}/a//b", {}, 400, [_SEGMENTS]),
    ("GET", f"{DATA}/", {}, 400, [_SEGMENTS]),
    ("POST", f"{DATA}/a/%2e%2e/b", {"data": OBJECT}, 400, [_SEGMENTS]),
    ("POST", f"{DATA}/a%0ab", {"data": OBJECT}, 400, [_CONTROL]),
    ("POST", f"{DATA}/{'a/' * 128}b", {"data": OBJECT}, 400, [_LENGTH]),
    ("GET", f"{DATA}/%ff", {}, 400, ["The path is not percent-encoded UTF-8."]),
    ("GET", f"{DATA}/A?version=%ff", {}, 400, ["The query is not percent-encoded UTF-8."]),
    ("GET", f"{DATA}/A?version=&version=9&x=1", {}, 200, None),
    ("GET", f"{DATA}/absent?version=1", {}, 404, []),
    ("GET", f"{DATA}/absent", {}, 404, []),
    ("PATCH", f"{DATA}/A", {"data": OBJECT}, 405, ["unsupported operation"]),
    ("LIST", f"{DATA}/A", {}, 405, ["unsupported operation"]),
    ("GET", f"{META}/?list=1", {}, 200, None),
    ("GET", f"{META}?list=true", {}, 200, None),
    ("LIST", META, {}, 200, None),
    ("LIST", f"{META}/absent/", {}, 404, []),
    ("LIST", f"{META}/a//b", {}, 400, [_SEGMENTS]),
    ("GET", f"{META}/absent?list=false", {}, 404, []),
    ("GET", "/v1/sys/internal/ui/mounts/secret", {}, 200, None),
    ("GET", "/v1/sys/internal/ui/mounts/secret/a/b", {}, 200, None),
    # Only what is absent is 404: others may delete what they have because of it.
    ("GET", "/v1/sys/internal/ui/mounts/kv", {}, 403, ["permission denied"]),
    ("GET", "/v1/kv/data/A", {}, 403, ["permission denied"]),
    ("LIST", "/v1/secret/A", {}, 403, ["permission denied"]),
    ("GET", "/v1/", {}, 403, ["permission denied"]),
    ("GET", f"{DATA}/A", {"headers": {"X-Vault-Token": ""}}, 403, ["permission denied"]),
    ("GET", f"{DATA}/A", {"headers": {"Authorization": "Bearer x"}}, 400, [_ONE_TOKEN]),
    ("GET", "/v1/auth/token/lookup-self", {}, 200, None),
)


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "texts"),
    WIRE,
    ids=[f"{row[0]} {row[1][:40]} {row[3]}" for row in WIRE],
)
async def test_on_the_wire(
    site: Site, method: str, path: str, more: dict[str, Any], status: int, texts: list[str] | None
) -> None:
    shown = await ask(site, method, path, **more)
    assert (shown.status_code, shown.json().get("errors")) == (status, texts)
    # hvac compares the whole of it.
    assert shown.headers["Content-Type"] == "application/json"
    assert shown.headers["Cache-Control"] == "no-store"
    assert "WWW-Authenticate" not in shown.headers


async def test_nothing_has_no_length(site: Site) -> None:
    shown = await ask(site, "DELETE", f"{DATA}/absent")
    assert (shown.status_code, shown.content) == (204, b"")
    # RFC 9110 §8.6, and there is no type either.
    assert not {"Content-Length", "Content-Type"} & set(shown.headers)


async def test_names_that_urls_cannot_carry_are_not_listed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FlowMason 1.0 took any.
    monkeypatch.setattr(names, "check_new_path", lambda name: name)
    for name in ("a//b", "/a", "a/", "a/../b", ".", "a/b"):
        await site.service.set(ORG, Draft(name, Plaintext(""), nested=True))
    for folder, keys in (("", ["A", "a/"]), ("a", ["b"])):
        shown = await ask(site, "LIST", f"{META}/{folder}")
        assert shown.json()["data"] == {"keys": keys}


async def test_a_bearer_token_will_do(site: Site) -> None:
    with requests.Session() as one:
        one.headers["Authorization"] = f"Bearer {site.key}"
        shown = await asyncio.to_thread(one.get, f"{site.url}{DATA}/A")
    assert shown.status_code == 200
    assert shown.headers["Audit-Seq"].isdigit()


async def test_values_are_kept_as_they_were_sent(site: Site) -> None:
    exact = '{"n": 12345678901234567890123, "f": 1.0e40,  "ü": "\\u00fc</script>"}'
    await ask(site, "POST", f"{DATA}/N", data=f'{{"data": {exact}}}'.encode())
    assert (await site.service.get(ORG, "N")).value.reveal() == exact
    assert exact in (await ask(site, "GET", f"{DATA}/N")).text


@pytest.mark.parametrize("value", ["the value", "", "[1]", '"x"', "{", "{}{}", '{"a": 01}', "ü\n"])
async def test_values_that_are_no_objects(site: Site, value: str) -> None:
    await site.service.set(ORG, Draft("PLAIN", Plaintext(value)))
    shown = await ask(site, "GET", f"{DATA}/PLAIN")
    assert shown.json()["data"]["data"] == {"value": value}


async def test_expired_ones_are_deleted(site: Site) -> None:
    past = "2020-01-01T00:00:00.000000Z"
    await site.service.set(ORG, Draft("OLD", Plaintext("{}"), expires_at=past))
    shown = await ask(site, "GET", f"{DATA}/OLD")
    assert shown.status_code == 404
    assert shown.json()["data"]["data"] is None
    about = shown.json()["data"]["metadata"]
    assert (about["deletion_time"], about["destroyed"], about["version"]) == (past, False, 1)
    kv = site.client().secrets.kv.v2
    # hvac knows such answers.
    told = await asyncio.to_thread(
        lambda: kv.read_secret_version("OLD", raise_on_deleted_version=False)
    )
    assert told["data"]["metadata"] == about
    assert ("secret.read", "OLD", "expired", 410) in await events(site.service)


async def test_the_plain_api_reads_and_deletes_what_has_a_path(site: Site) -> None:
    await asyncio.to_thread(site.client().secrets.kv.v2.create_or_update_secret, "a/b", {"v": 1})
    await asyncio.to_thread(site.client().secrets.kv.v2.create_or_update_secret, "a%2Fb", {"v": 2})
    plain = {"headers": {"X-API-Key": site.key}}
    listed = await ask(site, "GET", "/api/v1/secrets", **plain)
    assert [entry["name"] for entry in listed.json()] == ["A", "a%2Fb", "a/b"]
    for segment, value in (("a%2Fb", '{"v": 1}'), ("a%252Fb", '{"v": 2}')):
        shown = await ask(site, "GET", f"/api/v1/secrets/{segment}", **plain)
        assert shown.json()["value"] == value
    named = {"name": "a/b", "value": "x"}
    refused_there = await ask(site, "POST", "/api/v1/secrets", json=named, **plain)
    assert refused_there.status_code == 422
    assert (await ask(site, "DELETE", "/api/v1/secrets/a%2Fb", **plain)).status_code == 200
    assert (await ask(site, "GET", f"{DATA}/a/b")).status_code == 404
    assert (await ask(site, "GET", f"{DATA}/a%252Fb")).status_code == 200


@pytest.mark.parametrize("how", ["--vault-compat", "VAULT_COMPAT"])
async def test_the_program_has_the_face(data_dir: Path, how: str) -> None:
    token = await issue_key(data_dir)
    arguments = (how,) if how.startswith("-") else ()
    environment = {} if arguments else {f"{PREFIX}{how}": "true"}

    def use(url: str) -> None:
        for number in range(8):
            # Each time it is whichever worker that answers.
            with contextlib.closing(hvac.Client(url=url, token=token).adapter) as adapter:
                kv = hvac.api.secrets_engines.KvV2(adapter)
                kv.create_or_update_secret("team/db", {"n": number}, cas=number)
                assert kv.read_secret("team/db")["data"]["data"] == {"n": number}
                assert kv.list_secrets("team")["data"] == {"keys": ["db"]}

    async with serving(data_dir, "--workers=2", *arguments, **environment) as server:
        await asyncio.to_thread(use, server.url)


async def test_without_the_option_there_is_no_face(data_dir: Path) -> None:
    async with pressed(data_dir) as server:
        site = Site(server)
        assert (await ask(site, "GET", f"{DATA}/A")).json()["code"] == "no_such_route"
        assert (await ask(site, "LIST", f"{META}/")).json()["code"] == "malformed_request"
        site.leave()


# Vault's own clients send 412 and 429 again, and hvac knows no 401, 409 or 410.
OTHERWISE = {
    errors.InvalidInput: 400,
    errors.Unauthenticated: 403,
    errors.SecretExpired: 404,
    errors.PreconditionFailed: 400,
}


@pytest.mark.parametrize("error", [row[0] for row in RAISED], ids=lambda error: error.code)
def test_every_error_has_its_words(error: errors.SecretsError) -> None:
    answer = vaultface.problem(error, "r1")
    assert answer.status == OTHERWISE.get(type(error), STATUS[type(error)])
    (told,) = orjson.loads(answer._content).values()
    assert (told == []) is (type(error) in (errors.SecretNotFound, errors.SecretExpired))


async def test_conditions_on_versions(service: Service) -> None:
    for wanted in (0, 1):
        with pytest.raises(errors.PreconditionFailed):
            await service.set(ORG, Draft("N", Plaintext("")), Precondition(version=wanted))
    await service.set(ORG, Draft("N", Plaintext("")))
    for wanted in (0, 2):
        with pytest.raises(errors.PreconditionFailed):
            await service.delete(ORG, "N", Precondition(version=wanted))
    await service.delete(ORG, "N", Precondition(version=1))
