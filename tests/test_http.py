"""The HTTP contract, table by table: routes, scopes, headers, filters, conditions, problems."""

import asyncio
import base64
import hashlib
import inspect
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson
import pytest
import schemathesis
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from aiohttp.web_request import BaseRequest
from schemathesis.core.result import Ok

from flowmason_secrets import app
from flowmason_secrets.api import openapi
from flowmason_secrets.api.problems import problem_response
from flowmason_secrets.api.routes import ROUTES
from flowmason_secrets.config import Settings
from flowmason_secrets.core import errors
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import AuditQuery
from flowmason_secrets.core.status import STATUS, outcome_of
from flowmason_secrets.service import Service

from .conftest import Client
from .harness.server import MASTER_KEY, Inside, key_ids, serving, session, settings_for

SECRETS = "/api/v1/secrets"
API_KEYS = "/api/v1/auth/api-keys"
AUDIT = "/api/v1/auth/audit-log"
WHOAMI = "/api/v1/auth/whoami"
LOG = "/api/v1/log"

METADATA = {
    "id",
    "name",
    "description",
    "category",
    "created_at",
    "updated_at",
    "created_by",
    "expires_at",
    "is_expired",
    "version",
}
ENTRY = {
    "id",
    "seq",
    "timestamp",
    "user_id",
    "api_key_id",
    "action",
    "resource_type",
    "resource_id",
    "details",
    "success",
    "error_message",
    "ip_address",
}
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class Reply(NamedTuple):
    """A response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: Any


async def ask(
    client: aiohttp.ClientSession,
    method: str,
    path: str,
    document: object = None,
    **headers: str,
) -> Reply:
    """The whole answer; `If_Match` stands for the header `If-Match`."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.request(method, path, json=document, headers=sent) as answer:
        received = {name.lower(): value for name, value in answer.headers.items()}
        content = await (answer.json() if "json" in answer.content_type else answer.read())
        return Reply(answer.status, received, content)


async def put(client: aiohttp.ClientSession, name: str, value: str = "v", **more: object) -> Reply:
    """Create or update a secret, which must work."""
    reply = await ask(client, "POST", SECRETS, {"name": name, "value": value, **more})
    assert reply.status in (200, 201), reply
    return reply


def events(data_dir: Path) -> list[dict[str, Any]]:
    """All lines of the event files."""
    return [
        orjson.loads(line)
        for segment in sorted((data_dir / "events").glob("audit-*.ndjson"))
        for line in segment.read_bytes().splitlines()
    ]


def is_problem(reply: Reply, status: int, code: str) -> None:
    """RFC 9457, with the members that the specification names."""
    assert (reply.status, reply.body["code"]) == (status, code), reply
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.body["status"] == status
    assert all(reply.body[name] for name in ("title", "detail", "request_id"))
    assert reply.headers["x-request-id"] == reply.body["request_id"]


@pytest.fixture
async def full(client: Client) -> aiohttp.ClientSession:
    """A client that may do everything in `acme`."""
    return await client()


# --- routes and scopes ------------------------------------------------------------------------

F, R, E, D = "full", "read", "execute", "deploy"
TABLE = {
    f"GET {SECRETS}": {F, R, E, D},
    f"POST {SECRETS}": {F},
    f"POST {SECRETS}/resolve": {F, E},
    f"POST {SECRETS}/batch": {F, E},
    f"GET {SECRETS}/{{name}}": {F},
    f"DELETE {SECRETS}/{{name}}": {F},
    f"GET {SECRETS}/{{name}}/metadata": {F, R, E, D},
    f"GET {AUDIT}": {F, R},
    f"GET {AUDIT}/stream": {F, R},
    f"GET {AUDIT}/export": {F, R},
    f"GET {AUDIT}/summary": {F, R},
    f"POST {AUDIT}/offline": {F, E},
    f"POST {API_KEYS}": {F},
    f"GET {API_KEYS}": {F},
    f"DELETE {API_KEYS}/{{id}}": {F},
    f"GET {WHOAMI}": {F, R, E, D},
    f"GET {LOG}/checkpoint": {F, R, E, D},
    f"GET {LOG}/proof/{{seq}}": {F, R},
    f"GET {LOG}/tile/{{level}}/{{number}}": {F, R, E, D},
    "GET /healthz": set(),
    "GET /readyz": set(),
}
BODIES = {
    f"POST {SECRETS}": {"name": "NEW", "value": "v"},
    f"POST {API_KEYS}": {"name": "new"},
    f"POST {SECRETS}/resolve": {"document": "{{secrets.N}}"},
    f"POST {SECRETS}/batch": {"names": ["N"]},
}
OFFLINE_READ = {
    "number": 1,
    "id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "time": "2026-01-31T12:00:00Z",
    "name": "N",
    "version": 1,
    "uid": 1000,
    "pid": 4242,
}
BODIES[f"POST {AUDIT}/offline"] = {"ticket": "ab" * 32, "reads": [OFFLINE_READ]}
CREATES = {f"POST {SECRETS}", f"POST {API_KEYS}"}


def test_the_routes_are_those_of_the_specification() -> None:
    assert {f"{route.method} {route.template}": set(route.scopes) for route in ROUTES} == TABLE


@pytest.mark.parametrize("scope", [F, R, E, D])
@pytest.mark.parametrize("route", [route for route in TABLE if TABLE[route]])
async def test_scopes(
    service: Service, client: Client, data_dir: Path, route: str, scope: str
) -> None:
    admin, asking = await client(), await client(scopes=(scope,))
    await put(admin, "N")
    other = await ask(admin, "POST", API_KEYS, {"name": "other"})
    method, _, template = route.partition(" ")
    path = template.replace("{name}", "N").replace("{id}", other.body["api_key"]["id"])
    path = path.format(seq=other.headers["audit-seq"], level=0, number="000.p/1")
    await service.signer.open()
    await service.signer.sign()
    if scope in TABLE[route]:
        # Not every answer is JSON, and a stream has no end.
        async with asking.request(method, path, json=BODIES.get(route)) as answer:
            assert answer.status == (201 if route in CREATES else 200)
        return
    reply = await ask(asking, method, path, BODIES.get(route))
    is_problem(reply, 403, "denied")
    assert scope in reply.body["detail"]
    who = (await ask(asking, "GET", WHOAMI)).body["api_key_id"]
    refused = [line for line in events(data_dir) if line["outcome"] == "denied"]
    assert [(line["actor"], line["status"]) for line in refused] == [(who, 403)]
    # Nothing happened.
    assert (await ask(admin, "GET", f"{SECRETS}/N")).status == 200
    assert len((await ask(admin, "GET", API_KEYS)).body) == 3
    assert [entry["name"] for entry in (await ask(admin, "GET", SECRETS)).body] == ["N"]


async def test_several_scopes_add_up(client: Client) -> None:
    asking = await client(scopes=("execute", "read"))
    assert (await ask(asking, "GET", AUDIT)).status == 200
    assert (await ask(asking, "GET", WHOAMI)).body["scopes"] == ["execute", "read"]
    is_problem(await ask(asking, "GET", f"{SECRETS}/N"), 403, "denied")


async def test_what_needs_no_key(full: aiohttp.ClientSession) -> None:
    nobody = {"Authorization": ""}
    keys = [{"key_id": key_ids(MASTER_KEY)[0], "secrets": 0, "state": "active"}]
    for path, expected in (
        ("/healthz", {"status": "alive"}),
        ("/readyz", {"status": "ready", "keys": keys}),
    ):
        async with full.get(path, headers=nobody) as answer:
            assert (answer.status, await answer.json()) == (200, expected)
    async with full.get("/api/v1/openapi.json", headers=nobody) as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert (await answer.json())["openapi"] == "3.1.0"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (SECRETS, {"GET", "POST"}),
        (f"{SECRETS}/N", {"GET", "DELETE"}),
        (f"{SECRETS}/N/metadata", {"GET"}),
        (AUDIT, {"GET"}),
        (API_KEYS, {"GET", "POST"}),
        (f"{API_KEYS}/key_1", {"DELETE"}),
        (WHOAMI, {"GET"}),
        ("/healthz", {"GET"}),
        ("/readyz", {"GET"}),
        ("/api/v1/openapi.json", {"GET"}),
    ],
)
async def test_other_methods(full: aiohttp.ClientSession, path: str, methods: set[str]) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - methods:
        reply = await ask(full, method, path)
        is_problem(reply, 405, "method_not_allowed")
        assert set(reply.headers["allow"].split(", ")) == methods


@pytest.mark.parametrize("path", ["/", "/api/v1", "/api/v1/secrets/a/b", "/api/v1/secrets/a/", ""])
async def test_other_paths(full: aiohttp.ClientSession, path: str) -> None:
    is_problem(await ask(full, "GET", path), 404, "no_such_route")


# --- one secret's life ------------------------------------------------------------------------


async def test_create_read_update_delete(full: aiohttp.ClientSession, data_dir: Path) -> None:
    sent = {
        "name": "OPENAI KEY-é",
        "value": "sk-1",
        "description": "an API key",
        "category": "api_key",
        "expires_at": "2099-01-31T13:00:00.5+01:00",
    }
    created = await ask(full, "POST", SECRETS, sent)
    assert created.status == 201
    assert created.headers["location"] == f"{SECRETS}/OPENAI%20KEY-%C3%A9"
    assert created.headers["cache-control"] == "no-store"
    metadata = created.body
    assert metadata.keys() == METADATA
    who = (await ask(full, "GET", WHOAMI)).body["api_key_id"]
    identity = hashlib.sha256(f"acme:{sent['name']}".encode()).hexdigest()[:16]
    assert metadata == {
        "id": identity,
        "name": sent["name"],
        "description": "an API key",
        "category": "api_key",
        "created_at": metadata["updated_at"],
        "updated_at": metadata["created_at"],
        "created_by": who,
        "expires_at": "2099-01-31T12:00:00.500000Z",
        "is_expired": False,
        "version": 1,
    }
    assert RFC3339.fullmatch(metadata["created_at"])
    path = created.headers["location"]
    read = await ask(full, "GET", path)
    assert read.body == {
        "name": sent["name"],
        "value": "sk-1",
        "category": "api_key",
        "is_expired": False,
        "version": 1,
    }
    assert read.headers["etag"] == created.headers["etag"]
    assert read.headers["cache-control"] == "no-store"
    assert read.headers["content-type"] == "application/json"
    shown = await ask(full, "GET", f"{path}/metadata")
    assert (shown.body, shown.headers["etag"]) == (metadata, created.headers["etag"])
    assert "audit-seq" not in shown.headers
    assert (await ask(full, "GET", SECRETS)).body == [metadata]
    # An update replaces all of it but its creation.
    updated = await ask(full, "POST", SECRETS, {"name": sent["name"], "value": "sk-2"})
    assert updated.status == 200
    assert "location" not in updated.headers
    assert updated.headers["etag"] != created.headers["etag"]
    assert updated.body["updated_at"] > metadata["updated_at"]
    assert updated.body == metadata | {
        "description": "",
        "category": "other",
        "expires_at": None,
        "updated_at": updated.body["updated_at"],
        "version": 2,
    }
    assert (await ask(full, "GET", path)).body["value"] == "sk-2"
    deleted = await ask(full, "DELETE", path)
    assert (deleted.status, list(deleted.body)) == (200, ["message"])
    for method, suffix in (("GET", ""), ("GET", "/metadata"), ("DELETE", "")):
        is_problem(await ask(full, method, path + suffix), 404, "secret_not_found")


async def test_receipts_are_those_of_the_event_file(
    full: aiohttp.ClientSession, data_dir: Path
) -> None:
    replies = [
        ("secret.create", 201, await put(full, "N")),
        ("secret.create", 200, await put(full, "N", "other")),
        ("secret.read", 200, await ask(full, "GET", f"{SECRETS}/N")),
        ("secret.delete", 200, await ask(full, "DELETE", f"{SECRETS}/N")),
        ("api_key.create", 200, made := await ask(full, "POST", API_KEYS, {"name": "n"})),
        (
            "api_key.revoke",
            200,
            await ask(full, "DELETE", f"{API_KEYS}/{made.body['api_key']['id']}"),
        ),
    ]
    written = events(data_dir)
    assert [line["seq"] for line in written] == list(range(len(written)))
    for action, status, reply in replies:
        line = written[int(reply.headers["audit-seq"])]
        assert line["id"] == reply.headers["audit-id"]
        assert (line["action"], line["outcome"]) == (action, "success")
        if action.startswith("secret."):
            assert (line["name"], line["status"]) == ("N", status)
            assert line["resource_id"] == hashlib.sha256(b"acme:N").hexdigest()[:16]
        assert line["org_id"] == "acme"
        assert line["client_ip"] == "127.0.0.1"
    kinds = [line["details"]["kind"] for line in written if line["action"] == "secret.create"]
    assert kinds == ["create", "update"]
    assert [line["version"] for line in written if line["resource_type"] == "secret"] == [
        1,
        2,
        2,
        2,
    ]


async def test_what_the_client_says_of_itself_is_in_the_event(
    full: aiohttp.ClientSession, data_dir: Path
) -> None:
    await put(full, "N")
    said = {"User_Agent": "pipeline/1.0", "X_Request_Id": "run-7"}
    await ask(full, "GET", f"{SECRETS}/N", **said)
    line = events(data_dir)[-1]
    assert (line["user_agent"], line["request_id"]) == ("pipeline/1.0", "run-7")
    missing = await ask(full, "GET", f"{SECRETS}/M", **said)
    assert missing.body["request_id"] == "run-7"
    entry = (await ask(full, "GET", f"{AUDIT}?limit=1")).body[0]
    assert entry["details"]["request_id"] == "run-7"


async def test_an_expired_secret(full: aiohttp.ClientSession) -> None:
    expired = await put(full, "OLD", expires_at="2020-01-01T00:00:00Z")
    assert expired.body["is_expired"] is True
    is_problem(await ask(full, "GET", f"{SECRETS}/OLD"), 410, "secret_expired")
    shown = await ask(full, "GET", f"{SECRETS}/OLD/metadata")
    assert (shown.status, shown.body["is_expired"]) == (200, True)
    await put(full, "OLD")
    assert (await ask(full, "GET", f"{SECRETS}/OLD")).status == 200
    await put(full, "OLD", expires_at="2020-01-01T00:00:00Z")
    assert (await ask(full, "DELETE", f"{SECRETS}/OLD")).status == 200


# --- allowed names ----------------------------------------------------------------------------

PATTERNS = [
    (("OPENAI_*",), ["OPENAI_", "OPENAI_KEY"], ["OPENAI", "openai_KEY", "XOPENAI_KEY"]),
    (("A?C",), ["ABC", "A?C", "AéC"], ["AC", "ABBC"]),
    (("A", "B*"), ["A", "B", "BB"], ["AA", "C"]),
    (("[A]*", "a.c"), ["[A]x", "a.c"], ["A", "abc"]),
    (("*_KEY",), ["X_KEY", "_KEY"], ["X_KEYS", "KEY"]),
]


@pytest.mark.parametrize(("allow", "allowed", "refused"), PATTERNS)
async def test_a_key_for_some_names(
    client: Client, allow: tuple[str, ...], allowed: list[str], refused: list[str]
) -> None:
    admin, fenced = await client(), await client(allow=allow)
    for name in allowed + refused:
        await put(admin, name)
    for name in refused:
        for method, suffix in (("GET", ""), ("GET", "/metadata"), ("DELETE", "")):
            reply = await ask(fenced, method, f"{SECRETS}/{name.replace('?', '%3F')}{suffix}")
            is_problem(reply, 403, "denied")
        is_problem(await ask(fenced, "POST", SECRETS, {"name": name, "value": "x"}), 403, "denied")
    for name in allowed:
        place = f"{SECRETS}/{name.replace('?', '%3F')}"
        assert (await ask(fenced, "GET", place)).body["name"] == name
        assert (await ask(fenced, "GET", f"{place}/metadata")).status == 200
        await put(fenced, name)
    listed = [entry["name"] for entry in (await ask(fenced, "GET", SECRETS)).body]
    assert listed == sorted(allowed)
    entries = (await ask(fenced, "GET", f"{AUDIT}?limit=1000")).body
    assert {entry["details"]["name"] for entry in entries} == set(allowed)
    assert {entry["resource_type"] for entry in entries} == {"secret"}
    assert (await ask(fenced, "GET", f"{AUDIT}?name={refused[0]}")).body == []
    assert (await ask(fenced, "GET", f"{AUDIT}?resource_type=api_key")).body == []
    for name in allowed:
        reply = await ask(fenced, "DELETE", f"{SECRETS}/{name.replace('?', '%3F')}")
        assert reply.status == 200
    left = [entry["name"] for entry in (await ask(admin, "GET", SECRETS)).body]
    assert left == sorted(refused)


async def test_a_key_for_some_names_makes_no_keys(client: Client) -> None:
    fenced = await client(allow=("A_*",))
    is_problem(await ask(fenced, "POST", API_KEYS, {"name": "wider"}), 403, "denied")
    is_problem(await ask(fenced, "GET", API_KEYS), 403, "denied")
    who = (await ask(fenced, "GET", WHOAMI)).body
    is_problem(await ask(fenced, "DELETE", f"{API_KEYS}/{who['api_key_id']}"), 403, "denied")
    assert who["allow"] == ["A_*"]


# --- conditions -------------------------------------------------------------------------------


async def test_create_only(full: aiohttp.ClientSession) -> None:
    new = {"name": "N", "value": "first"}
    created = await ask(full, "POST", SECRETS, new, If_None_Match="*")
    assert created.status == 201
    again = await ask(full, "POST", SECRETS, new | {"value": "second"}, If_None_Match="*")
    is_problem(again, 412, "precondition_failed")
    assert (await ask(full, "GET", f"{SECRETS}/N")).body["value"] == "first"
    refused = await ask(full, "DELETE", f"{SECRETS}/N", If_None_Match="*")
    is_problem(refused, 412, "precondition_failed")
    assert (await ask(full, "DELETE", f"{SECRETS}/N")).status == 200
    assert (await ask(full, "POST", SECRETS, new, If_None_Match="*")).status == 201


MATCHES: list[tuple[Callable[[str], str], bool]] = [
    (lambda etag: etag, True),
    (lambda etag: "*", True),
    (lambda etag: f'"0-0", {etag}', True),
    (lambda etag: f'{etag},"0-0"', True),
    (lambda etag: f'"0-0" , {etag} , "1-1"', True),
    (lambda etag: '"0-0"', False),
    (lambda etag: '"0-0", "1-1"', False),
    (lambda etag: etag.upper().replace("-", "_"), False),
    # RFC 9110 §13.1.1: the comparison is strong, so a weak tag never matches.
    (lambda etag: f"W/{etag}", False),
]


@pytest.mark.parametrize(("condition", "matches"), MATCHES)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_this_version_only(
    full: aiohttp.ClientSession, method: str, condition: Callable[[str], str], matches: bool
) -> None:
    etag = (await put(full, "N", "first")).headers["etag"]
    document = {"name": "N", "value": "second"} if method == "POST" else None
    path = SECRETS if method == "POST" else f"{SECRETS}/N"
    reply = await ask(full, method, path, document, If_Match=condition(etag))
    if matches:
        assert reply.status == 200
        # The same condition does not hold twice.
        if condition(etag) != "*":
            again = await ask(full, method, path, document, If_Match=condition(etag))
            is_problem(again, 412, "precondition_failed")
    else:
        is_problem(reply, 412, "precondition_failed")
        read = await ask(full, "GET", f"{SECRETS}/N")
        assert (read.body["value"], read.headers["etag"]) == ("first", etag)


async def test_no_condition_holds_for_what_is_absent(full: aiohttp.ClientSession) -> None:
    for condition in ("*", '"1-00000000"'):
        reply = await ask(full, "POST", SECRETS, {"name": "N", "value": "v"}, If_Match=condition)
        is_problem(reply, 412, "precondition_failed")
        reply = await ask(full, "DELETE", f"{SECRETS}/N", If_Match=condition)
        is_problem(reply, 412, "precondition_failed")
    assert (await ask(full, "GET", SECRETS)).body == []


async def test_an_etag_of_before_a_deletion_matches_nothing(full: aiohttp.ClientSession) -> None:
    before = (await put(full, "N", "same")).headers["etag"]
    await ask(full, "DELETE", f"{SECRETS}/N")
    created = await put(full, "N", "same")
    assert created.body["version"] == 1
    assert created.headers["etag"] != before
    for _ in range(2):
        reply = await ask(full, "POST", SECRETS, {"name": "N", "value": "x"}, If_Match=before)
        is_problem(reply, 412, "precondition_failed")
    assert (await ask(full, "GET", f"{SECRETS}/N")).body["value"] == "same"


async def test_of_many_conditional_writes_one_wins(full: aiohttp.ClientSession) -> None:
    etag = (await put(full, "N")).headers["etag"]
    writes = [
        ask(full, "POST", SECRETS, {"name": "N", "value": f"{n}"}, If_Match=etag) for n in range(20)
    ]
    creations = [
        ask(full, "POST", SECRETS, {"name": "M", "value": f"{n}"}, If_None_Match="*")
        for n in range(20)
    ]
    replies = await asyncio.gather(*writes, *creations)
    assert sorted(reply.status for reply in replies[:20]) == [200] + [412] * 19
    assert sorted(reply.status for reply in replies[20:]) == [201] + [412] * 19
    for name, some in (("N", replies[:20]), ("M", replies[20:])):
        winner = next(n for n, reply in enumerate(some) if reply.status < 400)
        read = await ask(full, "GET", f"{SECRETS}/{name}")
        assert read.body["value"] == str(winner)
        assert read.headers["etag"] == some[winner].headers["etag"]


# --- listing ----------------------------------------------------------------------------------


def next_page(reply: Reply) -> str | None:
    """The path of the next page (RFC 8288)."""
    link = reply.headers.get("link")
    if link is None:
        return None
    found = re.fullmatch(r'<([^>]+)>; rel="next"', link)
    assert found is not None
    return found[1]


async def pages(client: aiohttp.ClientSession, path: str | None) -> list[list[Any]]:
    found = []
    while path is not None:
        reply = await ask(client, "GET", path)
        assert reply.status == 200
        found.append(reply.body)
        path = next_page(reply)
    return found


ODD_NAMES = ["a", "A", "é", "e", "z", "_", "100%", "a b", "a+b", "a&b=c", "\U0001f511", "ａ", "~"]


async def test_listing_is_sorted_and_pages_put_it_together(full: aiohttp.ClientSession) -> None:
    for name in ODD_NAMES:
        await put(full, name)
    whole = await ask(full, "GET", SECRETS)
    names = [entry["name"] for entry in whole.body]
    assert names == sorted(ODD_NAMES)
    assert "link" not in whole.headers
    assert all(entry.keys() == METADATA for entry in whole.body)
    for limit in (1, 2, 3, 12, 13, 14, 1000):
        found = await pages(full, f"{SECRETS}?limit={limit}")
        assert list(itertools.chain(*found)) == whole.body
        assert all(len(page) == limit for page in found[:-1])
        assert 0 < len(found[-1]) <= limit


async def test_filters_of_the_listing(full: aiohttp.ClientSession) -> None:
    categories = ["api_key", "token", "credential", "other"]
    for number, category in enumerate(categories * 3):
        past = "2020-01-01T00:00:00Z" if number % 2 else "2099-01-01T00:00:00Z"
        name = f"{'AB'[number % 2]}_{number:02d}"
        await put(full, name, category=category, expires_at=past if number % 3 else None)
    everything = (await ask(full, "GET", SECRETS)).body
    assert len(everything) == 12
    for kind, prefix, expired in itertools.product(
        [None, *categories], [None, "A_", "B_0", "", "a"], [None, True, False]
    ):
        flag = None if expired is None else str(expired).lower()
        query = {"category": kind, "prefix": prefix, "expired": flag}
        sent = "&".join(f"{key}={value}" for key, value in query.items() if value is not None)
        wanted = [
            entry
            for entry in everything
            if kind in (None, entry["category"])
            and entry["name"].startswith(prefix or "")
            and expired in (None, entry["is_expired"])
        ]
        assert (await ask(full, "GET", f"{SECRETS}?{sent}")).body == wanted
        found = await pages(full, f"{SECRETS}?limit=2&{sent}")
        assert list(itertools.chain(*found)) == wanted


async def test_pages_while_secrets_come_and_go(full: aiohttp.ClientSession) -> None:
    """What was there all the time is there exactly once, in order."""
    lasting = [f"M{number:02d}" for number in range(20)]
    for name in lasting:
        await put(full, name)
    await put(full, "M05-gone")
    seen: list[str] = []
    path: str | None = f"{SECRETS}?limit=3"
    for turn in itertools.count():
        reply = await ask(full, "GET", path or "")
        seen += [entry["name"] for entry in reply.body]
        path = next_page(reply)
        if path is None:
            break
        await put(full, f"A{turn}")
        await put(full, f"M{turn:02d}-new")
        await put(full, lasting[turn])
        if turn == 1:
            await ask(full, "DELETE", f"{SECRETS}/{seen[-1]}")
            lasting.remove(seen[-1])
    assert seen == sorted(set(seen))
    assert set(lasting) <= set(seen)
    assert not any(name.startswith("A") for name in seen)


async def test_more_than_a_thousand(service: Service, full: aiohttp.ClientSession) -> None:
    caller = app.local_caller("acme")
    names = [f"N{number:04d}" for number in range(2005)]
    await asyncio.gather(*(service.set(caller, Draft(name, Plaintext("v"))) for name in names))
    assert [entry["name"] for entry in (await ask(full, "GET", SECRETS)).body] == names
    found = await pages(full, f"{SECRETS}?limit=1000")
    assert [len(page) for page in found] == [1000, 1000, 5]
    # A cursor alone asks for pages as well.
    cursor = base64.urlsafe_b64encode(b"N0001").decode().rstrip("=")
    assert len((await ask(full, "GET", f"{SECRETS}?cursor={cursor}")).body) == 1000


# --- audit ------------------------------------------------------------------------------------


async def test_the_audit_log_is_the_event_file_newest_first(
    full: aiohttp.ClientSession, data_dir: Path
) -> None:
    await put(full, "N")
    await ask(full, "GET", f"{SECRETS}/N")
    await ask(full, "GET", f"{SECRETS}/MISSING")
    entries = (await ask(full, "GET", AUDIT)).body
    lines = [line for line in reversed(events(data_dir)) if line["org_id"] == "acme"]
    assert [entry["seq"] for entry in entries] == [line["seq"] for line in lines]
    for entry, line in zip(entries, lines, strict=True):
        assert entry.keys() == ENTRY
        assert entry["id"] == line["id"]
        assert entry["timestamp"] == line["time"]
        assert RFC3339.fullmatch(entry["timestamp"])
        assert entry["success"] == (line["outcome"] == "success")
        assert entry["ip_address"] == line["client_ip"]
        is_key = line["actor_type"] == "api_key"
        assert entry["api_key_id"] == (line["actor"] if is_key else None)
        assert entry["user_id"] == (None if is_key else line["actor"])
        for name in ("action", "resource_type", "resource_id"):
            assert entry[name] == line[name]
    assert [entry["error_message"] for entry in entries] == ["secret_not_found", None, None, None]


async def _history(client: Client) -> list[aiohttp.ClientSession]:
    """Something of every kind."""
    admin, reader = await client(), await client(scopes=("read",))
    for number in range(4):
        await put(admin, f"N{number}")
        await ask(admin, "GET", f"{SECRETS}/N{number}")
        await ask(reader, "GET", f"{SECRETS}/N{number}")
        await ask(admin, "GET", f"{SECRETS}/M{number}")
    await ask(admin, "DELETE", f"{SECRETS}/N0")
    await ask(admin, "DELETE", f"{API_KEYS}/key_none")
    return [admin, reader]


async def test_filters_of_the_audit_log(client: Client) -> None:
    admin, reader = await _history(client)
    actors = [(await ask(who, "GET", WHOAMI)).body["api_key_id"] for who in (admin, reader)]
    whole = (await ask(admin, "GET", f"{AUDIT}?limit=1000")).body
    times = sorted({entry["timestamp"] for entry in whole})
    middle = times[len(times) // 2]
    choices: dict[str, list[str | None]] = {
        "resource_type": [None, "secret", "api_key", "none"],
        "action": [None, "secret.read", "secret.create", "api_key.create"],
        "name": [None, "N1", "M1"],
        "actor": [None, *actors],
        "success": [None, "true", "false"],
        "since": [None, middle],
        "until": [None, middle],
    }
    tests: dict[str, Callable[[Any, str], bool]] = {
        "resource_type": lambda entry, value: entry["resource_type"] == value,
        "action": lambda entry, value: entry["action"] == value,
        "name": lambda entry, value: entry["details"].get("name") == value,
        "actor": lambda entry, value: value in (entry["api_key_id"], entry["user_id"]),
        "success": lambda entry, value: entry["success"] == (value == "true"),
        "since": lambda entry, value: entry["timestamp"] >= value,
        "until": lambda entry, value: entry["timestamp"] < value,
    }
    sizes = set()
    for combination in itertools.product(*choices.values()):
        given = {
            name: value
            for name, value in zip(choices, combination, strict=True)
            if value is not None
        }
        # All pairs of filters; more of them at once would only take longer.
        if len(given) > 2:
            continue
        wanted = [entry for entry in whole if all(tests[n](entry, v) for n, v in given.items())]
        sent = "&".join(f"{name}={value}" for name, value in given.items())
        assert (await ask(admin, "GET", f"{AUDIT}?limit=1000&{sent}")).body == wanted, given
        sizes.add(len(wanted))
    assert {0, 1, len(whole)} < sizes


async def test_pages_of_the_audit_log_while_it_grows(client: Client) -> None:
    admin, _ = await _history(client)
    whole = (await ask(admin, "GET", f"{AUDIT}?limit=1000")).body
    for limit in (1, 4, 5):
        seen: list[Any] = []
        newest = (await ask(admin, "GET", f"{AUDIT}?limit=1")).body[0]["seq"]
        path: str | None = f"{AUDIT}?limit={limit}"
        while path is not None:
            reply = await ask(admin, "GET", path)
            assert len(reply.body) <= limit
            seen += reply.body
            path = next_page(reply)
            # More comes in while somebody reads.
            await ask(admin, "GET", f"{SECRETS}/N1")
        assert [entry["seq"] for entry in seen] == sorted(
            (entry["seq"] for entry in seen), reverse=True
        )
        assert seen[0]["seq"] == newest
        assert seen[-len(whole) :] == whole


async def test_limit_and_offset_of_the_audit_log(full: aiohttp.ClientSession) -> None:
    await asyncio.gather(*(ask(full, "GET", f"{SECRETS}/M{n}") for n in range(120)))
    whole = (await ask(full, "GET", f"{AUDIT}?limit=1000")).body
    assert len(whole) == 121
    default = await ask(full, "GET", AUDIT)
    assert default.body == whole[:100]
    assert (await ask(full, "GET", next_page(default) or "")).body == whole[100:]
    assert (await ask(full, "GET", f"{AUDIT}?limit=7&offset=9")).body == whole[9:16]
    assert (await ask(full, "GET", f"{AUDIT}?offset=120")).body == whole[120:]
    assert (await ask(full, "GET", f"{AUDIT}?offset=121")).body == []
    # The next page of one with an offset goes on where that one ended.
    begun = await pages(full, f"{AUDIT}?limit=50&offset=9")
    assert list(itertools.chain(*begun)) == whole[9:]
    filtered = await pages(full, f"{AUDIT}?limit=50&success=false&name=M7")
    assert [entry["details"]["name"] for entry in itertools.chain(*filtered)] == ["M7"]


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        (path, f"{field}={value}", field)
        for path, field, values in (
            (SECRETS, "limit", ["0", "1001", "-1", "x", "1.5", "", "%D9%A1"]),
            (SECRETS, "category", ["x", "", "TOKEN"]),
            (SECRETS, "expired", ["1", "True", ""]),
            (SECRETS, "cursor", ["é", "!", "_w"]),
            (SECRETS, "offset", ["1"]),
            (AUDIT, "limit", ["0", "1001"]),
            (AUDIT, "offset", ["-1", "x"]),
            (AUDIT, "success", ["yes"]),
            (AUDIT, "since", ["2026-01-01", "2026-01-01T00:00:00", "1767225600", ""]),
            (AUDIT, "until", ["2026-13-01T00:00:00Z"]),
            (AUDIT, "cursor", ["TjE", "LTE", ""]),
            (AUDIT, "category", ["token"]),
            (WHOAMI, "x", ["1"]),
        )
        for value in values
    ],
)
async def test_a_wrong_parameter_is_named(
    full: aiohttp.ClientSession, path: str, query: str, field: str
) -> None:
    reply = await ask(full, "GET", f"{path}?{query}")
    is_problem(reply, 422, "invalid_input")
    assert reply.body["field"] == field


# --- API keys ---------------------------------------------------------------------------------


async def test_the_life_of_an_api_key(full: aiohttp.ClientSession, data_dir: Path) -> None:
    sent = {
        "name": "ci",
        "scopes": ["read", "execute"],
        "allow": ["A_*"],
        "expires_at": "2099-01-01T00:00:00Z",
    }
    made = await ask(full, "POST", API_KEYS, sent)
    assert made.status == 201
    assert made.body.keys() == {"api_key", "raw_key"}
    raw, key = made.body["raw_key"], made.body["api_key"]
    assert re.fullmatch(r"fm_live_[0-9a-f]{48}", raw)
    assert (key["name"], set(key["scopes"]), key["allow"]) == ("ci", {"read", "execute"}, ["A_*"])
    assert (key["is_active"], key["revoked_at"]) == (True, None)
    listed = (await ask(full, "GET", API_KEYS)).body
    assert listed[-1] == key
    assert len(listed) == 2
    # Only its SHA-256 is kept.
    stored = (data_dir / "keys" / f"{hashlib.sha256(raw.encode()).hexdigest()}.json").read_bytes()
    assert raw.encode() not in stored
    bearer = {"Authorization": f"Bearer {raw}"}
    who = await ask(full, "GET", WHOAMI, **bearer)
    assert (who.body["org_id"], who.body["api_key_id"]) == ("acme", key["id"])
    assert set(who.body["scopes"]) == {"read", "execute"}
    revoked = await ask(full, "DELETE", f"{API_KEYS}/{key['id']}")
    assert (revoked.status, list(revoked.body)) == (200, ["message"])
    is_problem(await ask(full, "GET", WHOAMI, **bearer), 401, "unauthenticated")
    after = (await ask(full, "GET", API_KEYS)).body[-1]
    assert (after["id"], after["is_active"]) == (key["id"], False)
    assert RFC3339.fullmatch(after["revoked_at"])
    again = await ask(full, "DELETE", f"{API_KEYS}/{key['id']}")
    is_problem(again, 404, "api_key_not_found")


@pytest.mark.parametrize(
    ("header", "template"),
    [
        ("Authorization", "Bearer {}"),
        ("Authorization", "bearer {}"),
        ("Authorization", "Bearer   {}"),
        ("X-API-Key", "{}"),
    ],
)
async def test_ways_to_show_an_api_key(service: Service, header: str, template: str) -> None:
    issued = await service.keys.issue(app.local_caller("acme"), KeyDraft("n"))
    async with Inside(service) as server, aiohttp.ClientSession() as client:
        sent = {header: template.format(issued.raw.reveal())}
        async with client.get(server.make_url(WHOAMI), headers=sent) as answer:
            assert (await answer.json())["api_key_id"] == issued.key.id


async def test_each_request_of_a_connection_is_whose_key_it_carries(service: Service) -> None:
    """What one request said of its sender is nothing that a later one has said."""
    keys = {}
    for org in ("acme", "globex"):
        await service.set(app.local_caller(org), Draft("N", Plaintext(f"of {org}")))
        issued = await service.keys.issue(app.local_caller(org), KeyDraft("n"))
        keys[org] = issued.raw.reveal()
    one, other = ({"Authorization": f"Bearer {keys[org]}"} for org in ("acme", "globex"))
    plain, vault = f"{SECRETS}/N", "/v1/secret/data/N"
    vaults = {"X-Vault-Token": keys["acme"]}
    requests: list[tuple[str, dict[str, str], int, str, object]] = [
        (plain, one, 200, "of acme", None),
        (plain, one, 200, "of acme", None),
        (plain, other, 200, "of globex", None),
        (plain, {}, 401, "", None),
        (plain, one | {"User-Agent": "another"}, 200, "of acme", None),
        (plain, one | {"X-FlowMason-Peer": "uid=1;pid=2"}, 200, "of acme", 2),
        (plain, one, 200, "of acme", None),
        (plain, one | {"X-API-Key": keys["globex"]}, 200, "of acme", None),
        (plain, {"X-API-Key": keys["globex"]}, 200, "of globex", None),
        (vault, vaults, 200, "of acme", None),
        (plain, vaults, 401, "", None),
        (vault, vaults, 200, "of acme", None),
        (vault, {"X-API-Key": keys["globex"]}, 200, "of globex", None),
    ]
    connections: list[object] = []

    async def connected(*about: object) -> None:
        connections.append(about)

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(connected)
    async with (
        Inside(service, vault=True) as server,
        aiohttp.ClientSession(trace_configs=[trace]) as client,
    ):
        for path, headers, status, value, pid in requests:
            async with client.get(server.make_url(path), headers=headers) as answer:
                text = await answer.text()
                assert (answer.status, value in text) == (status, True), (path, headers, text)
            if status == 200:
                org = value.removeprefix("of ")
                query = AuditQuery(org, limit=1)
                (entry,) = await service.audit(app.local_caller(org), query)
                agent = headers.get("User-Agent", aiohttp.http.SERVER_SOFTWARE)
                line = entry.line
                assert (line["user_agent"], line["details"].get("peer_pid")) == (agent, pid)
    assert len(connections) == 1
    await service.failures.flush()


async def test_one_answer_for_every_key_that_is_not_live(service: Service) -> None:
    caller = app.local_caller("acme")
    expired = await service.keys.issue(caller, KeyDraft("n", expires_at="2020-01-01T00:00:00Z"))
    revoked = await service.keys.issue(caller, KeyDraft("n"))
    live = await service.keys.issue(caller, KeyDraft("n"))
    await service.keys.revoke(caller, revoked.key.id)
    raw = live.raw.reveal()
    attempts: list[dict[str, str]] = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer fm_live_" + "0" * 48},
        {"Authorization": f"Bearer {raw[:-1]}"},
        {"Authorization": f"Bearer {raw.upper()}"},
        {"Authorization": f"Basic {raw}"},
        {"Authorization": raw},
        {"Authorization": f"Bearer {expired.raw.reveal()}"},
        {"Authorization": f"Bearer {revoked.raw.reveal()}"},
        {"Authorization": f"Bearer {live.key.id}"},
        {"Authorization": f"Bearer {live.key.digest}"},
        {"X-API-Key": ""},
        {"X-API-Key": "fm_live_" + "0" * 48},
        {"X-API-Key": expired.raw.reveal()},
        {"X-API-Key": revoked.raw.reveal()},
    ]
    await service.set(caller, Draft("N", Plaintext("v")))
    async with Inside(service) as server, aiohttp.ClientSession() as client:
        for route in (route for route in ROUTES if route.scopes):
            path = route.template.replace("{name}", "N").replace("{id}", live.key.id)
            seen = set()
            for headers in attempts:
                sent = headers | {"X-Request-Id": "same"}
                url = server.make_url(path)
                async with client.request(route.method, url, headers=sent) as answer:
                    told = {k: v for k, v in answer.headers.items() if k.lower() != "date"}
                    seen.add((answer.status, str(sorted(told.items())), await answer.text()))
            assert len(seen) == 1, seen
            status, told_, _ = seen.pop()
            assert status == 401
            assert "Bearer realm=" in told_
    await service.failures.flush()


async def test_failed_authentications_are_one_event_for_each_address(
    service: Service, client: Client, data_dir: Path
) -> None:
    admin = await client()
    before = len(events(data_dir))
    for number in range(60):
        key = {"Authorization": f"Bearer fm_live_{number:048x}"}
        is_problem(await ask(admin, "GET", f"{SECRETS}/N", **key), 401, "unauthenticated")
    assert len(events(data_dir)) == before
    service.failures.note("192.0.2.1")
    await service.failures.flush()
    written = events(data_dir)[before:]
    assert {(line["client_ip"], line["details"]["count"]) for line in written} == {
        ("127.0.0.1", 60),
        ("192.0.2.1", 1),
    }
    for line in written:
        assert (line["action"], line["outcome"], line["status"]) == ("auth.failed", "denied", 401)
        assert (line["org_id"], line["actor"]) == (None, None)
    await service.failures.flush()
    assert len(events(data_dir)) == before + 2
    # However many addresses there are, the events of a minute stay bounded.
    for number in range(5000):
        service.failures.note(f"198.51.{number // 250}.{number % 250}")
    await service.failures.flush()
    counts = [line["details"]["count"] for line in events(data_dir)[before + 2 :]]
    assert (sum(counts), len(counts)) == (5000, 1001)


async def test_a_revoked_key_is_counted_from_its_first_use_on(
    service: Service, client: Client, data_dir: Path
) -> None:
    admin = await client()
    raw = (await ask(admin, "POST", API_KEYS, {"name": "n"})).body
    bearer = {"Authorization": f"Bearer {raw['raw_key']}"}
    assert (await ask(admin, "GET", WHOAMI, **bearer)).status == 200
    await ask(admin, "DELETE", f"{API_KEYS}/{raw['api_key']['id']}")
    for _ in range(3):
        assert (await ask(admin, "GET", WHOAMI, **bearer)).status == 401
    await service.failures.flush()
    assert events(data_dir)[-1]["details"].get("count") == 3


@pytest.mark.parametrize("revoker", ["this process", "another service", "the other server"])
async def test_a_revoked_key_is_refused_at_once(
    service: Service, client: Client, data_dir: Path, revoker: str
) -> None:
    admin = await client()
    await put(admin, "N")
    other = await app.open_service(settings_for(data_dir))
    try:
        async with Inside(other) as second:
            for _ in range(5):
                made = (await ask(admin, "POST", API_KEYS, {"name": "n"})).body
                bearer = {"Authorization": f"Bearer {made['raw_key']}"}
                place = f"{API_KEYS}/{made['api_key']['id']}"
                paths = [f"{SECRETS}/N", SECRETS, WHOAMI, AUDIT, f"{SECRETS}/N/metadata"]
                # Both know the key and the secret by now.
                for path in paths:
                    assert (await ask(admin, "GET", path, **bearer)).status == 200
                    url = str(second.make_url(path))
                    assert (await ask(admin, "GET", url, **bearer)).status == 200
                if revoker == "this process":
                    await ask(admin, "DELETE", place)
                elif revoker == "another service":
                    await other.keys.revoke(app.local_caller("acme"), made["api_key"]["id"])
                else:
                    url = str(second.make_url(place))
                    assert (await ask(admin, "DELETE", url)).status == 200
                for path in paths:
                    assert (await ask(admin, "GET", path, **bearer)).status == 401
                    url = str(second.make_url(path))
                    assert (await ask(admin, "GET", url, **bearer)).status == 401
    finally:
        await other.close()


async def test_api_keys_are_listed_while_another_process_makes_some(
    client: Client, data_dir: Path
) -> None:
    """Of whichever organisation."""
    admin = await client()
    other = await app.open_service(settings_for(data_dir))
    made = 0

    async def make() -> None:
        nonlocal made
        for number in range(60):
            caller = app.local_caller("globex" if number % 2 else "acme")
            issued = await other.keys.issue(caller, KeyDraft(f"n{number}"))
            await other.keys.revoke(caller, issued.key.id)
            made += 1

    making = asyncio.create_task(make())
    try:
        while not making.done():
            reply = await ask(admin, "GET", API_KEYS)
            assert reply.status == 200, reply
            assert {key["name"] for key in reply.body} <= {"test", *(f"n{n}" for n in range(60))}
        await making
    finally:
        making.cancel()
        await asyncio.wait([making])
        await other.close()
    assert made == 60
    assert len((await ask(admin, "GET", API_KEYS)).body) == 31


async def test_a_key_that_expires_while_it_is_used(service: Service, client: Client) -> None:
    admin = await client()
    moment = time.time() + 1.0
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f"{moment % 1:.6f}Z"[1:]
    made = (await ask(admin, "POST", API_KEYS, {"name": "n", "expires_at": text})).body
    bearer = {"Authorization": f"Bearer {made['raw_key']}"}
    statuses: list[tuple[float, int]] = []
    while not statuses or statuses[-1][1] == 200:
        asked = time.time()
        statuses.append((asked, (await ask(admin, "GET", WHOAMI, **bearer)).status))
        assert asked < moment + 1.0
    assert statuses[0][1] == 200
    assert statuses[-1][1] == 401
    assert time.time() >= moment
    assert all(asked < moment + 0.001 for asked, status in statuses if status == 200)


# --- problems ---------------------------------------------------------------------------------


def _errors() -> list[type[errors.SecretsError]]:
    return [
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, errors.SecretsError) and member is not errors.SecretsError
    ]


def test_every_error_has_its_row_and_its_code() -> None:
    assert set(STATUS) == set(_errors())
    codes = [kind.code for kind in _errors()]
    assert len(set(codes)) == len(codes)
    assert errors.SecretsError.code not in codes
    for kind in _errors():
        assert re.fullmatch("[a-z]+(_[a-z]+)*", kind.code)
        assert kind.title
        assert kind.__doc__


RAISED: list[tuple[errors.SecretsError, int, str, dict[str, object], dict[str, str]]] = [
    (
        errors.InvalidInput("name", "is bad"),
        422,
        "invalid_input",
        {"field": "name", "reason": "is bad"},
        {},
    ),
    (
        errors.Unauthenticated(),
        401,
        "unauthenticated",
        {},
        {"WWW-Authenticate": 'Bearer realm="flowmason-secrets"'},
    ),
    (errors.Denied("No."), 403, "denied", {}, {}),
    (errors.SecretNotFound("N"), 404, "secret_not_found", {"name": "N"}, {}),
    (errors.ApiKeyNotFound("k"), 404, "api_key_not_found", {}, {}),
    (errors.EventNotFound(7), 404, "event_not_found", {"seq": 7}, {}),
    (errors.TileNotFound(), 404, "tile_not_found", {}, {}),
    (errors.NotCosigned(), 404, "not_cosigned", {}, {}),
    (errors.CheckpointPending(), 503, "checkpoint_pending", {}, {"Retry-After": "1"}),
    (
        errors.UnresolvedReferences([errors.Unresolved("N", "denied")], 2),
        422,
        "unresolved_references",
        {"errors": [{"name": "N", "code": "denied"}], "asked": 2},
        {},
    ),
    (
        errors.SecretExpired("N", "2020"),
        410,
        "secret_expired",
        {"name": "N", "expires_at": "2020"},
        {},
    ),
    (errors.EventArchived(7), 410, "event_archived", {"minimum": 7}, {}),
    (errors.PreconditionFailed("N", None), 412, "precondition_failed", {"name": "N"}, {}),
    (
        errors.DecryptionFailed("N", "k1", ("k2", "k3")),
        500,
        "decryption_failed",
        {"name": "N", "key_id": "k1", "held": ["k2", "k3"]},
        {},
    ),
    (errors.SecretDamaged("N", "r"), 500, "secret_damaged", {"name": "N", "reason": "r"}, {}),
    (
        errors.LogUnavailable("full"),
        503,
        "log_unavailable",
        {"reason": "full"},
        {"Retry-After": "1"},
    ),
    (errors.Overloaded("Full"), 503, "overloaded", {"reason": "Full"}, {"Retry-After": "1"}),
    (
        errors.IndexUnavailable("full"),
        503,
        "index_unavailable",
        {"reason": "full"},
        {"Retry-After": "1"},
    ),
    (errors.LogDamaged("d"), 503, "log_damaged", {}, {}),
    (errors.AnotherLog("a"), 500, "another_log", {}, {}),
    (errors.ConfigurationError("c"), 500, "configuration", {}, {}),
    (errors.RotationIncomplete(["N"], 3), 500, "rotation_incomplete", {}, {}),
]


async def _sent(response: web.StreamResponse) -> Reply:
    """A response as it arrives at a client."""

    async def answer(request: BaseRequest) -> web.StreamResponse:
        return response

    async with RawTestServer(answer) as server, aiohttp.ClientSession() as client:
        return await ask(client, "GET", str(server.make_url("/")))


@pytest.mark.parametrize(
    ("error", "status", "code", "more", "headers"), RAISED, ids=[row[2] for row in RAISED]
)
async def test_errors_as_problems(
    error: errors.SecretsError,
    status: int,
    code: str,
    more: dict[str, object],
    headers: dict[str, str],
) -> None:
    shown = await _sent(problem_response(error, "r1"))
    is_problem(shown, status, code)
    said = {"title": type(error).title, "detail": str(error), "request_id": "r1"}
    assert shown.body == {"code": code, "status": status} | said | more
    assert {name: shown.headers[name.lower()] for name in headers} == headers


def test_all_errors_are_in_the_table_above() -> None:
    assert {type(row[0]) for row in RAISED} == set(_errors())


async def test_refusals_and_failures_are_events(
    full: aiohttp.ClientSession, client: Client, data_dir: Path
) -> None:
    reader = await client(scopes=("read",))
    await put(full, "N")
    await put(full, "OLD", expires_at="2020-01-01T00:00:00Z")
    settings = app.with_overrides(settings_for(data_dir), master_keys=("another" * 6,))
    stranger = await app.open_service(settings)
    try:
        async with Inside(stranger) as server:
            attempts = [
                (403, "secret.read", "denied", ask(reader, "GET", f"{SECRETS}/N")),
                (403, "secret.delete", "denied", ask(reader, "DELETE", f"{SECRETS}/N")),
                (403, "api_key.list", "denied", ask(reader, "GET", API_KEYS)),
                (404, "secret.read", "not_found", ask(full, "GET", f"{SECRETS}/M")),
                (404, "secret.metadata", "not_found", ask(full, "GET", f"{SECRETS}/M/metadata")),
                (404, "secret.delete", "not_found", ask(full, "DELETE", f"{SECRETS}/M")),
                (404, "api_key.revoke", "not_found", ask(full, "DELETE", f"{API_KEYS}/key_x")),
                (410, "secret.read", "expired", ask(full, "GET", f"{SECRETS}/OLD")),
                (
                    412,
                    "secret.delete",
                    "failed",
                    ask(full, "DELETE", f"{SECRETS}/N", If_Match='"x"'),
                ),
                (
                    412,
                    "secret.create",
                    "failed",
                    ask(full, "POST", SECRETS, {"name": "N", "value": "v"}, If_None_Match="*"),
                ),
                (
                    500,
                    "secret.read",
                    "failed",
                    ask(full, "GET", str(server.make_url(f"{SECRETS}/N"))),
                ),
            ]
            for status, action, outcome, asking in attempts:
                reply = await asking
                is_problem(reply, status, reply.body["code"])
                line = events(data_dir)[-1]
                assert (line["action"], line["outcome"], line["status"]) == (
                    action,
                    outcome,
                    status,
                )
                assert line["details"]["error"] == reply.body["code"]
                assert line["request_id"] == reply.body["request_id"]
                entry = (await ask(full, "GET", f"{AUDIT}?limit=1")).body[0]
                assert entry["seq"] == line["seq"]
                assert entry["success"] is False
                assert entry["error_message"] == reply.body["code"]
    finally:
        await stranger.close()
    assert reply.body["code"] == "decryption_failed"
    assert reply.body["key_id"] not in reply.body["held"]
    assert all(key in reply.body["detail"] for key in (reply.body["key_id"], *reply.body["held"]))
    assert (await ask(full, "GET", f"{SECRETS}/N")).body["value"] == "v"


def test_outcomes() -> None:
    assert outcome_of(errors.Denied("x")) == "denied"
    assert outcome_of(errors.SecretNotFound("x")) == "not_found"
    assert outcome_of(errors.SecretExpired("x", "")) == "expired"
    assert outcome_of(errors.SecretDamaged("x", "")) == "failed"


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({"Content-Type": "application/json"}, b"{", 400, "malformed_request"),
        ({"Content-Type": "application/json"}, b"", 400, "malformed_request"),
        ({"Content-Type": "application/json"}, b" " * (600 << 10), 413, "body_too_large"),
        ({"Content-Type": "text/plain"}, b"{}", 415, "unsupported_media_type"),
        (
            {"Content-Type": "application/x-www-form-urlencoded"},
            b"name=N&value=v",
            415,
            "unsupported_media_type",
        ),
        ({"Content-Type": "application/json"}, b"[]", 422, "invalid_input"),
    ],
)
@pytest.mark.parametrize("path", [SECRETS, API_KEYS])
async def test_bodies_that_are_refused(
    full: aiohttp.ClientSession,
    path: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    code: str,
) -> None:
    async with full.post(path, data=body, headers=headers) as answer:
        received = {name.lower(): value for name, value in answer.headers.items()}
        is_problem(
            Reply(answer.status, received, await answer.json(content_type=None)), status, code
        )


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"]
)
async def test_json_by_any_spelling(full: aiohttp.ClientSession, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    body = b'{"name":"N","value":"v"}'
    async with full.post(SECRETS, data=body, headers=headers) as answer:
        assert answer.status == 201


# --- the OpenAPI document ------------------------------------------------------------------------


def _document() -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(openapi.document())
    return document


def test_the_document_lists_the_routes_and_no_others() -> None:
    listed = {
        f"{method.upper()} {path}": operation
        for path, item in _document()["paths"].items()
        for method, operation in item.items()
    }
    assert listed.keys() == TABLE.keys()
    for route in ROUTES:
        operation = listed[f"{route.method} {route.template}"]
        assert bool(operation.get("security")) == bool(route.scopes)
        # Any request may be malformed, too slow, too large, or one too many.
        stated = {str(status) for status in (*route.answers, *route.problems, 400, 408, 431, 503)}
        assert operation["responses"].keys() == stated
        in_path = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", route.template))
        assert ("requestBody" in operation) == (route.method == "POST")
    ids = [operation["operationId"] for operation in listed.values()]
    assert len(set(ids)) == len(ids)


def test_the_document_is_valid() -> None:
    document = _document()
    loaded = schemathesis.openapi.from_dict(document)
    loaded.validate()
    operations = list(loaded.get_all_operations())
    assert all(isinstance(found, Ok) for found in operations)
    assert len(operations) == len(ROUTES)
    references = re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', openapi.document().decode())
    assert set(references) == set(document["components"]["schemas"])


# --- as users run it -----------------------------------------------------------------------------


async def test_a_server_process(data_dir: Path) -> None:
    service = await app.open_service(settings_for(data_dir))
    issued = await service.keys.issue(app.local_caller("acme"), KeyDraft("n"))
    async with (
        serving(data_dir) as server,
        session(server.url, issued.raw.reveal()) as client,
    ):
        created = await put(client, "N", "value")
        assert (await ask(client, "GET", f"{SECRETS}/N")).body["value"] == "value"
        # What the server writes, a process beside it sees, and the other way round.
        found = await service.get(app.local_caller("acme"), "N")
        assert found.value.reveal() == "value"
        await service.set(app.local_caller("acme"), Draft("N", Plaintext("newer")))
        read = await ask(client, "GET", f"{SECRETS}/N")
        assert (read.body["value"], read.body["version"]) == ("newer", 2)
        reply = await ask(
            client,
            "POST",
            SECRETS,
            {"name": "N", "value": "x"},
            If_Match=created.headers["etag"],
        )
        is_problem(reply, 412, "precondition_failed")
        await service.keys.revoke(app.local_caller("acme"), issued.key.id)
        is_problem(await ask(client, "GET", f"{SECRETS}/N"), 401, "unauthenticated")
    await service.close()
    assert Settings().master_keys == ()
    assert b"value" not in b"".join(server.output)
