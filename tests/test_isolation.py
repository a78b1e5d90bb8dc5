"""Two organisations in one data directory: neither observes the other."""

import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import orjson
import pytest

from flowmason_secrets import app
from flowmason_secrets.core import names
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import DecryptionFailed, SecretNotFound
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.service import Service

from .conftest import Client
from .harness.server import settings_for

SECRETS = "/api/v1/secrets"
API_KEYS = "/api/v1/auth/api-keys"
AUDIT = "/api/v1/auth/audit-log"

# As long as each other, so that lengths can't hide behind names.
THEIRS, NOWHERE = "THEIR-SECRET", "NO-SUCH-NAME"


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
    # The same request id for all, so that answers have the same length.
    sent = {"X-Request-Id": "test"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.request(method, path, json=document, headers=sent) as answer:
        body = await answer.json(content_type=None)
        received = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(answer.status, received, body)


def comparable(reply: Reply, name_: str) -> Reply:
    """The reply without its date, seq and entity tag, and without the given name."""
    changing = {"date", "audit-seq", "audit-id", "etag"}
    body = orjson.loads(orjson.dumps(reply.body).decode().replace(name_, "<name>"))
    if isinstance(body, dict):
        body = {
            key: value
            for key, value in body.items()
            if key not in ("id", "created_at", "updated_at")
        }
    headers = {
        name: value.replace(name_, "<name>")
        for name, value in reply.headers.items()
        if name not in changing
    }
    return Reply(reply.status, headers, body)


class World(NamedTuple):
    """Clients of two organisations; the second one has a secret that the first one has not."""

    ours: aiohttp.ClientSession
    theirs: aiohttp.ClientSession


@pytest.fixture
async def world(client: Client) -> AsyncIterator[World]:
    made = World(await client(org="acme"), await client(org="globex"))
    for session, value in ((made.ours, "ours"), (made.theirs, "theirs")):
        written = await ask(session, "POST", SECRETS, {"name": "SHARED", "value": value})
        assert written.status == 201
    written = await ask(made.theirs, "POST", SECRETS, {"name": THEIRS, "value": "theirs"})
    assert written.status == 201
    yield made
    # Whatever was tried, theirs is as it was.
    read = await ask(made.theirs, "GET", f"{SECRETS}/{THEIRS}")
    assert (read.status, read.body["value"], read.body["version"]) == (200, "theirs", 1)


async def test_the_same_name_is_another_secret_in_each(world: World) -> None:
    for session, value in ((world.ours, "ours"), (world.theirs, "theirs")):
        assert (await ask(session, "GET", f"{SECRETS}/SHARED")).body["value"] == value
    update = {"name": "SHARED", "value": "new", "description": "d"}
    assert (await ask(world.ours, "POST", SECRETS, update)).status == 200
    read = await ask(world.theirs, "GET", f"{SECRETS}/SHARED")
    assert (read.body["value"], read.body["version"]) == ("theirs", 1)
    assert (await ask(world.ours, "DELETE", f"{SECRETS}/SHARED")).status == 200
    assert (await ask(world.theirs, "GET", f"{SECRETS}/SHARED")).body["value"] == "theirs"
    assert (await ask(world.ours, "GET", f"{SECRETS}/SHARED")).status == 404


@pytest.mark.parametrize(
    ("method", "suffix", "expected"),
    [("GET", "", 404), ("GET", "/metadata", 404), ("DELETE", "", 404)],
)
@pytest.mark.parametrize("precondition", [None, "*", "theirs"])
async def test_a_name_of_another_organisation_is_like_one_that_nobody_has(
    world: World, method: str, suffix: str, expected: int, precondition: str | None
) -> None:
    headers = {}
    if precondition is not None and method == "DELETE":
        etag = (await ask(world.theirs, "GET", f"{SECRETS}/{THEIRS}")).headers["etag"]
        headers["If_Match"] = etag if precondition == "theirs" else precondition
        expected = 412
    replies = [
        await ask(world.ours, method, f"{SECRETS}/{name}{suffix}", **headers)
        for name in (THEIRS, NOWHERE)
    ]
    assert replies[0].status == expected
    assert comparable(replies[0], THEIRS) == comparable(replies[1], NOWHERE)


@pytest.mark.parametrize("scopes", [("read",), ("execute",), ("deploy",)])
async def test_nor_does_a_refusal_tell(
    world: World, client: Client, scopes: tuple[str, ...]
) -> None:
    """Neither for want of a scope nor of an allowed name."""
    narrow = await client(org="acme", scopes=scopes)
    fenced = await client(org="acme", allow=("OTHER_*",))
    for session in (narrow, fenced):
        for method in ("GET", "DELETE"):
            replies = [
                await ask(session, method, f"{SECRETS}/{name}") for name in (THEIRS, NOWHERE)
            ]
            assert replies[0].status == 403
            assert comparable(replies[0], THEIRS) == comparable(replies[1], NOWHERE)


async def test_writes_tell_nothing_either(world: World) -> None:
    etag = (await ask(world.theirs, "GET", f"{SECRETS}/{THEIRS}")).headers["etag"]
    for condition in (etag, "*", f'"9-0", {etag}'):
        replies = [
            await ask(world.ours, "POST", SECRETS, {"name": name, "value": "v"}, If_Match=condition)
            for name in (THEIRS, NOWHERE)
        ]
        assert replies[0].status == 412
        assert comparable(replies[0], THEIRS) == comparable(replies[1], NOWHERE)
    replies = [
        await ask(world.ours, "POST", SECRETS, {"name": name, "value": "v"}, If_None_Match="*")
        for name in (THEIRS, NOWHERE)
    ]
    assert replies[0].status == 201
    assert replies[0].body["version"] == 1
    assert comparable(replies[0], THEIRS) == comparable(replies[1], NOWHERE)


async def test_listings_show_only_ones_own(world: World) -> None:
    listed = await ask(world.ours, "GET", SECRETS)
    assert [entry["name"] for entry in listed.body] == ["SHARED"]
    both = ["SHARED", THEIRS]
    assert [entry["name"] for entry in (await ask(world.theirs, "GET", SECRETS)).body] == both
    for query in ("prefix=THEIR", "category=token", "expired=true"):
        assert (await ask(world.ours, "GET", f"{SECRETS}?{query}")).body == []
    # A cursor names a place among names, not what is there.
    page = await ask(world.theirs, "GET", f"{SECRETS}?limit=1")
    cursor = page.headers["link"].partition("cursor=")[2].partition(">")[0]
    assert (await ask(world.ours, "GET", f"{SECRETS}?cursor={cursor}")).body == []


async def test_the_audit_log_shows_only_ones_own(world: World) -> None:
    await ask(world.ours, "GET", f"{SECRETS}/{THEIRS}")
    for session, org in ((world.ours, "acme"), (world.theirs, "globex")):
        who = (await ask(session, "GET", "/api/v1/auth/whoami")).body
        assert who["org_id"] == org
        entries = (await ask(session, "GET", f"{AUDIT}?limit=1000")).body
        assert entries
        keys = {key["id"] for key in (await ask(session, "GET", API_KEYS)).body}
        assert {entry["api_key_id"] for entry in entries} - {None} <= keys
    ours = (await ask(world.ours, "GET", f"{AUDIT}?name={THEIRS}")).body
    assert [(entry["action"], entry["success"]) for entry in ours] == [("secret.read", False)]
    theirs = (await ask(world.theirs, "GET", f"{AUDIT}?name={THEIRS}")).body
    assert [entry["action"] for entry in theirs] == ["secret.create"]
    actor = theirs[0]["api_key_id"]
    assert (await ask(world.ours, "GET", f"{AUDIT}?actor={actor}")).body == []
    for action in ("log.segment", "auth.failed"):
        assert (await ask(world.ours, "GET", f"{AUDIT}?action={action}")).body == []


async def test_a_cursor_of_another_organisation_leads_to_nothing_of_it(world: World) -> None:
    page = await ask(world.theirs, "GET", f"{AUDIT}?limit=1")
    query = page.headers["link"].partition("?")[2].partition(">")[0]
    theirs = {entry["id"] for entry in (await ask(world.theirs, "GET", f"{AUDIT}?{query}")).body}
    assert theirs
    seen = (await ask(world.ours, "GET", f"{AUDIT}?{query.replace('limit=1', 'limit=1000')}")).body
    assert not theirs & {entry["id"] for entry in seen}
    own = {entry["id"] for entry in (await ask(world.ours, "GET", f"{AUDIT}?limit=1000")).body}
    assert {entry["id"] for entry in seen} <= own


async def test_api_keys_of_another_organisation(world: World) -> None:
    theirs = (await ask(world.theirs, "GET", API_KEYS)).body
    assert theirs
    ours = (await ask(world.ours, "GET", API_KEYS)).body
    assert not {key["id"] for key in theirs} & {key["id"] for key in ours}
    known, unknown = theirs[0]["id"], "key_" + "0" * 16
    replies = [await ask(world.ours, "DELETE", f"{API_KEYS}/{id_}") for id_ in (known, unknown)]
    assert replies[0].status == 404
    assert comparable(replies[0], known) == comparable(replies[1], unknown)
    assert (await ask(world.theirs, "GET", "/api/v1/auth/whoami")).status == 200
    # Nor does the audit log of either tell whose it was.
    events = (await ask(world.ours, "GET", f"{AUDIT}?action=api_key.revoke")).body
    assert [(e["success"], e["details"].get("name")) for e in events] == [(False, None)] * 2
    assert (await ask(world.theirs, "GET", f"{AUDIT}?action=api_key.revoke")).body == []


async def test_an_api_key_belongs_to_the_organisation_of_its_creator(world: World) -> None:
    made = await ask(world.ours, "POST", API_KEYS, {"name": "new", "org_id": "globex"})
    assert made.status == 422
    made = await ask(world.ours, "POST", API_KEYS, {"name": "new"})
    bearer = {"Authorization": f"Bearer {made.body['raw_key']}"}
    for header in ({}, {"X-Org-Id": "globex"}, {"X-Organization": "globex"}):
        who = await ask(world.ours, "GET", "/api/v1/auth/whoami", **bearer, **header)
        assert who.body["org_id"] == "acme"
    assert (await ask(world.ours, "GET", f"{SECRETS}?org_id=globex")).status == 422


# FlowMason 1.0 makes an id of "<organisation>:<name>", so these have the same one.
SAME_ID = [
    (("a", "b:c"), ("a:b", "c")),
    (("org", ":x"), ("org:", "x")),
    (("o:o", "o:o:o"), ("o:o:o", "o:o")),
]


@pytest.mark.parametrize(("first", "second"), SAME_ID)
async def test_two_secrets_of_the_same_id(
    client: Client, first: tuple[str, str], second: tuple[str, str]
) -> None:
    assert names.secret_id(*first) == names.secret_id(*second)
    sessions = [await client(org=org) for org, _ in (first, second)]
    places = [f"{SECRETS}/{quote(name, safe='')}" for _, name in (first, second)]
    wanted = [name for _, name in (first, second)]
    for session, name in zip(sessions, wanted, strict=True):
        made = await ask(session, "POST", SECRETS, {"name": name, "value": f"of {name}"})
        assert made.status == 201
    for turn in range(3):
        for session, place, name in zip(sessions, places, wanted, strict=True):
            read = await ask(session, "GET", place)
            assert (read.body["value"], read.body["version"]) == (f"of {name}", turn + 1)
            updated = await ask(
                session,
                "POST",
                SECRETS,
                {"name": name, "value": f"of {name}"},
                If_Match=read.headers["etag"],
            )
            assert updated.status == 200
            assert [e["name"] for e in (await ask(session, "GET", SECRETS)).body] == [name]
    assert (await ask(sessions[0], "GET", places[1])).status == 404
    assert (await ask(sessions[0], "DELETE", places[0])).status == 200
    assert (await ask(sessions[0], "GET", SECRETS)).body == []
    assert (await ask(sessions[1], "GET", places[1])).body["value"] == f"of {wanted[1]}"
    assert [e["name"] for e in (await ask(sessions[1], "GET", SECRETS)).body] == [wanted[1]]
    resource = names.secret_id(*second)
    entries = (await ask(sessions[1], "GET", f"{AUDIT}?resource_type=secret&limit=1000")).body
    assert {e["resource_id"] for e in entries} == {resource}
    assert {e["details"]["name"] for e in entries} == {wanted[1]}


@pytest.mark.parametrize(
    "org", ["../globex", "globex/", "GLOBEX", "globex ", "glоbex", "*", "%", "globex' or '1'='1"]
)
async def test_organisations_that_look_alike(world: World, client: Client, org: str) -> None:
    alike = await client(org=org)
    assert (await ask(alike, "GET", SECRETS)).body == []
    assert (await ask(alike, "GET", f"{SECRETS}/{THEIRS}")).status == 404
    assert (await ask(alike, "DELETE", f"{SECRETS}/{THEIRS}")).status == 404
    assert {e["resource_type"] for e in (await ask(alike, "GET", AUDIT)).body} == {
        "api_key",
        "secret",
    }
    assert len((await ask(alike, "GET", API_KEYS)).body) == 1


async def test_files_that_somebody_copies_into_another_organisation(data_dir: Path) -> None:
    """The key is derived from the organisation, so what was copied opens nowhere else."""
    service = await app.open_service(settings_for(data_dir))
    ours, theirs = app.local_caller("acme"), app.local_caller("globex")
    try:
        await service.set(theirs, Draft("STOLEN", Plaintext("theirs")))
        await service.set(ours, Draft("OTHER", Plaintext("ours")))
        stem = names.secret_hash("STOLEN")
        for suffix in (".secret", ".meta"):
            source = data_dir / names.org_hash("globex") / (stem + suffix)
            shutil.copy(source, data_dir / names.org_hash("acme") / (stem + suffix))
        with pytest.raises(DecryptionFailed):
            await service.get(ours, "STOLEN")
        assert (await service.get(theirs, "STOLEN")).value.reveal() == "theirs"
        with pytest.raises(SecretNotFound):
            await service.get(theirs, "OTHER")
    finally:
        await service.close()


async def test_many_operations_in_both(client: Client, service: Service, data_dir: Path) -> None:
    """Each organisation is exactly what its own operations made of it, in a second process too."""
    dice = random.Random(20260101)
    orgs = ["acme", "globex"]
    sessions = {org: await client(org=org) for org in orgs}
    model: dict[str, dict[str, str]] = {org: {} for org in orgs}
    reads: dict[str, int] = dict.fromkeys(orgs, 0)
    for step in range(200):
        org, name = dice.choice(orgs), f"N{dice.randrange(6)}"
        session, mine = sessions[org], model[org]
        match dice.choice(["set", "set", "get", "get", "delete"]):
            case "set":
                made = await ask(session, "POST", SECRETS, {"name": name, "value": f"{org}{step}"})
                assert made.status == (200 if name in mine else 201)
                mine[name] = f"{org}{step}"
            case "get":
                read = await ask(session, "GET", f"{SECRETS}/{name}")
                reads[org] += 1
                assert read.status == (200 if name in mine else 404)
                assert read.body.get("value") == mine.get(name)
            case "delete":
                gone = await ask(session, "DELETE", f"{SECRETS}/{name}")
                assert gone.status == (200 if name in mine else 404)
                mine.pop(name, None)
    other = await app.open_service(settings_for(data_dir))
    try:
        for org in orgs:
            listed = [e["name"] for e in (await ask(sessions[org], "GET", SECRETS)).body]
            assert listed == sorted(model[org])
            path = f"{AUDIT}?limit=1000&action=secret.read"
            assert len((await ask(sessions[org], "GET", path)).body) == reads[org]
            for name, value in model[org].items():
                found = await other.get(app.local_caller(org), name)
                assert found.value.reveal() == value
    finally:
        await other.close()
