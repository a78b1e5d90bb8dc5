"""Exports of the audit log: the bytes of the log, CSV and OCSF, whole and in little memory."""

import asyncio
import csv
import io
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema_rs
import orjson
import pytest
from ocsf_json_schema import (  # type: ignore[import-untyped] # it ships no annotations
    OcsfJsonSchemaEmbedded,
    get_ocsf_schema,
)

from flowmason_secrets import app
from flowmason_secrets.api import ocsf
from flowmason_secrets.api.formats import COLUMNS, FORMATS
from flowmason_secrets.core import times
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import SecretsError
from flowmason_secrets.core.events import Entry, Line
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.service import Service

from .conftest import Client
from .harness.following import AUDIT, fill, resident, shown, until
from .harness.server import issue_key, serving, session, settings_for
from .test_cli import local, remote, run

EXPORT = f"{AUDIT}/export"
SECRETS = "/api/v1/secrets"


def logged(data_dir: Path, org: str | None = None) -> list[bytes]:
    """The lines of the log that are about an organisation, or all of them, with their newlines."""
    return [
        line
        for segment in sorted((data_dir / "events").glob("audit-*.ndjson"))
        for line in segment.read_bytes().splitlines(keepends=True)
        if org is None or orjson.loads(line)["org_id"] == org
    ]


async def exported(client: aiohttp.ClientSession, **query: str) -> bytes:
    async with client.get(EXPORT, params=query) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.read()


async def everything_happens(service: Service, client: Client) -> None:
    """Events of nearly all kinds, in two organisations."""
    for org in ("acme", "globex"):
        full = await client(org)
        limited = await client(org, scopes=("execute",), allow=("APP_*",))
        for number in range(3):
            body = {"name": f"ключ {number}", "value": "v"}
            await (await full.post(SECRETS, json=body)).read()
            await (await full.post(SECRETS, json=body)).read()
        for path in ("ключ 0", "none", "ключ 0/metadata"):
            await (await full.get(f"{SECRETS}/{path}")).read()
        await (await full.delete(f"{SECRETS}/ключ 1")).read()
        for path in (f"{SECRETS}/ключ 0", AUDIT, "/api/v1/auth/api-keys"):
            await (await limited.get(path)).read()
        caller = app.local_caller(org, "somebody")
        past = times.render(time.time() - 5)
        await service.set(caller, Draft("old", Plaintext("v"), expires_at=past))
        with pytest.raises(SecretsError):
            await service.get(caller, "old")
        for key in await service.keys.all(caller):
            if key.scopes == ("execute",):
                await service.keys.revoke(caller, key.id)
    service.failures.note("2001:db8::1")
    await service.failures.flush()


# --- formats ----------------------------------------------------------------------------------


async def test_ndjson_is_the_bytes_of_the_log(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    service = await app.open_service(settings_for(data_dir, segment_bytes=20_000))
    # More than a page, over many segments.
    for _ in range(12):
        await fill(service, 200, ("acme", "globex"))
    await service.close()
    assert len(list((data_dir / "events").glob("*.ndjson"))) > 5
    async with serving(data_dir) as server, session(server.url, key) as client:
        async with client.get(EXPORT) as answer:
            assert answer.content_type == "application/x-ndjson"
            assert answer.headers["Cache-Control"] == "no-store"
            assert await answer.read() == b"".join(logged(data_dir, "acme"))
        # Reading it is no event, as with the audit endpoint.
        assert await exported(client) == b"".join(logged(data_dir, "acme"))


async def test_csv(service: Service, client: Client, data_dir: Path) -> None:
    await everything_happens(service, client)
    full = await client()
    async with full.get(EXPORT, params={"format": "csv"}) as answer:
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8; header=present"
        text = (await answer.read()).decode()
    # RFC 4180: every line ends so, and no cell here has a line break.
    assert text.count("\r\n") == text.count("\n") == len(logged(data_dir, "acme")) + 1
    header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[Any] = [orjson.loads(line) for line in logged(data_dir, "acme")]
    assert header == list(COLUMNS)
    assert set(header) == lines[0].keys() - {"v"}
    for row, line in zip(rows, lines, strict=True):
        for name, cell in zip(header, row, strict=True):
            value = line[name]
            if name == "details":
                assert orjson.loads(cell) == value
            else:
                assert cell == ("" if value is None else str(value))


CELLS = {
    "=1+1": "'=1+1",
    "+1": "'+1",
    "-1": "'-1",
    "@SUM(A1)": "'@SUM(A1)",
    "\t=1": "'\t=1",
    "\r=1": "'\r=1",
    "\n=1": "'\n=1",
    "=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0",
    "a=1": "a=1",
    "": "",
    '"quoted", and more': '"quoted", and more',
    "two\r\nlines": "two\r\nlines",
    "'=1": "'=1",
}


def a_line(**fields: object) -> Line:
    line: Any = {
        "v": 1,
        "id": "i",
        "seq": 7,
        "time": "2026-01-31T12:00:00.123456Z",
        "action": "secret.read",
        "outcome": "success",
        "org_id": "acme",
        "resource_type": "secret",
        "resource_id": "r",
        "name": "N",
        "version": 1,
        "actor": "key_1",
        "actor_type": "api_key",
        "client_ip": "192.0.2.1",
        "user_agent": "a",
        "request_id": "q",
        "status": 200,
        "details": {},
    }
    assert fields.keys() <= line.keys()
    changed: Line = line | fields
    return changed


@pytest.mark.parametrize("text", CELLS, ids=ascii)
def test_no_cell_is_a_formula(text: str) -> None:
    line = a_line(name=text, user_agent=text)
    written = FORMATS["csv"].render([Entry(orjson.dumps(line), orjson.loads)]).decode()
    (row,) = csv.reader(io.StringIO(written, newline=""), strict=True)
    cells = dict(zip(COLUMNS, row, strict=True))
    assert cells["name"] == cells["user_agent"] == CELLS[text]
    assert cells["seq"] == "7"


async def test_a_name_that_is_a_formula_is_none_in_the_export(client: Client) -> None:
    full = await client()
    await (await full.post(SECRETS, json={"name": "=1+1", "value": "v"})).read()
    assert b",'=1+1," in await exported(full, format="csv")
    assert b'"name":"=1+1"' in await exported(full)


def published(version: str) -> jsonschema_rs.Validator:
    """A validator of API Activity in a published version of OCSF."""
    schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version=version))
    name = schema.lookup_class_name_from_uid(class_uid=6003)
    assert name == "api_activity"
    return jsonschema_rs.validator_for(schema.get_class_schema(class_name=name, profiles=[]))


# The version that is stated, and the newest one.
VERSIONS = (ocsf.VERSION, "1.8.0")


@pytest.mark.parametrize("version", VERSIONS)
async def test_ocsf_is_valid(
    service: Service, client: Client, data_dir: Path, version: str
) -> None:
    await everything_happens(service, client)
    validator = published(version)
    full = await client()
    found = [orjson.loads(one) for one in (await exported(full, format="ocsf")).splitlines()]
    lines: list[Any] = [orjson.loads(line) for line in logged(data_dir, "acme")]
    assert [one["metadata"]["uid"] for one in found] == [line["id"] for line in lines]
    # Those of no organisation too: they are exported from a data directory.
    rest = [orjson.loads(line) for line in logged(data_dir)]
    outside = [ocsf.activity(line) for line in rest if line["org_id"] is None]
    assert {one["api"]["operation"] for one in outside} == {"log.segment", "auth.failed"}
    for one in found + outside:
        assert one["metadata"]["version"] == ocsf.VERSION
        problems = [error.message for error in validator.iter_errors(one)]
        assert problems == []
    kinds = {(one["api"]["operation"], one["activity_id"], one["status_id"]) for one in found}
    assert {
        ("secret.create", 1, 1),
        ("secret.create", 3, 1),
        ("secret.read", 2, 1),
        ("secret.read", 2, 2),
        ("secret.delete", 4, 1),
        ("api_key.create", 1, 1),
        ("api_key.revoke", 4, 1),
        ("audit.read", 2, 2),
        ("api_key.list", 2, 2),
    } <= kinds


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_would_find_mistakes(version: str) -> None:
    validator, good = published(version), ocsf.activity(a_line())
    assert validator.is_valid(good)
    for name in ("activity_id", "actor", "api", "metadata", "severity_id", "src_endpoint", "time"):
        assert not validator.is_valid({key: good[key] for key in good if key != name})
    assert not validator.is_valid(good | {"made_up": 1})
    assert not validator.is_valid(good | {"activity_id": 7})
    assert not validator.is_valid(good | {"time": "2026-01-31T12:00:00Z"})


def test_what_an_ocsf_event_says() -> None:
    refused = ocsf.activity(
        a_line(outcome="denied", status=403, details={"error": "denied"}, version=None)
    )
    assert (refused["class_uid"], refused["type_uid"]) == (6003, 600302)
    assert refused["time"] == 1769860800123
    assert (refused["status_id"], refused["status_code"]) == (2, "403")
    assert refused["status_detail"] == refused["api"]["response"]["error"] == "denied"
    assert refused["actor"]["user"]["uid"] == "key_1"
    assert refused["src_endpoint"] == {"ip": "192.0.2.1"}
    assert refused["resources"] == [{"type": "secret", "uid": "r", "name": "N"}]
    assert refused["metadata"]["sequence"] == 7
    assert refused["unmapped"] == {"outcome": "denied", "details": {"error": "denied"}}


# --- what is in it ----------------------------------------------------------------------------


async def test_filters_are_those_of_the_audit_endpoint(service: Service, client: Client) -> None:
    await everything_happens(service, client)
    full = await client()
    middle = (await shown(full))[8]["timestamp"]
    for query in (
        {},
        {"action": "secret.create"},
        {"name": "ключ 0", "success": "true"},
        {"success": "false"},
        {"actor": "somebody"},
        {"resource_type": "api_key"},
        {"since": middle},
        {"until": middle, "action": "secret.create"},
        {"name": "no such name"},
    ):
        found = (await exported(full, **query)).splitlines()
        expected = [entry["id"] for entry in await shown(full, **query)]
        assert [orjson.loads(line)["id"] for line in found] == expected, query
        assert bool(expected) == (query != {"name": "no such name"})


async def test_limited_keys_export_what_they_see(service: Service, client: Client) -> None:
    full, limited = await client(), await client(scopes=("read",), allow=("APP_*",))
    for name in ("APP_1", "OTHER", "APP_2"):
        await (await full.post(SECRETS, json={"name": name, "value": "v"})).read()
    lines = (await exported(limited)).splitlines()
    assert [orjson.loads(line)["name"] for line in lines] == ["APP_1", "APP_2"]


async def test_it_is_complete_up_to_its_beginning_and_ends_while_others_write(
    service: Service, client: Client, data_dir: Path
) -> None:
    full = await client()
    await fill(service, 5000)
    over = asyncio.Event()
    acknowledged = 0

    async def write_on(caller: Caller) -> None:
        nonlocal acknowledged
        while not over.is_set():
            written = await service.set(caller, Draft("A", Plaintext("v")))
            acknowledged = max(acknowledged, written.receipt.seq)

    writing = asyncio.create_task(write_on(app.local_caller("acme")))
    for _ in range(3):
        before = acknowledged
        found = await exported(full)
        last = orjson.loads(found.splitlines()[-1])["seq"]
        assert before <= last
        # Without a gap, and in order.
        assert b"".join(logged(data_dir, "acme")).startswith(found)
    over.set()
    await writing


async def test_what_is_cut_off_does_not_pass_for_whole(client: Client, service: Service) -> None:
    full, admin = await client(), await client()
    await fill(service, 30_000)
    async with full.get("/api/v1/auth/whoami") as answer:
        key_id = (await answer.json())["api_key_id"]
    connector = aiohttp.TCPConnector(socket_factory=_small)
    async with (
        aiohttp.ClientSession(full._base_url, headers=full.headers, connector=connector) as slow,
        slow.get(EXPORT) as answer,
    ):
        assert answer.status == 200
        async with admin.delete(f"/api/v1/auth/api-keys/{key_id}") as revoked:
            assert revoked.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    await until(lambda: not service.following._places)


def _small(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that holds little that is not read."""
    one = socket.socket(address[0], address[1], address[2])
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return one


async def test_it_takes_little_memory_however_much_it_is(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    service = await app.open_service(settings_for(data_dir))
    await fill(service, 200_000)
    await service.close()
    async with serving(data_dir) as server, session(server.url, key) as client:
        # The index is there, and everything was used once.
        for form in FORMATS:
            await exported(client, format=form, name="NAME_1")
        before = resident(server)
        most = size = lines = 0
        async with client.get(EXPORT, params={"format": "csv"}) as answer:
            async for piece in answer.content.iter_any():
                if size >> 20 != (size + len(piece)) >> 20:
                    most = max(most, resident(server))
                size += len(piece)
                lines += piece.count(b"\n")
        assert lines == 200_002
        assert size > 24 << 20
        assert most - before < 8 << 10


# --- on the command line ----------------------------------------------------------------------


async def test_the_command_line_exports_the_same_here_and_there(data_dir: Path) -> None:
    here = local(data_dir)
    await here.run("set", "A", stdin=b"v")
    (await here.run("get", "none")).failed(1, "not found")
    out = data_dir.with_name("out")
    out.write_text("an older one")
    async with serving(data_dir) as server:
        there = await remote(server, data_dir)
        expected = b"".join(logged(data_dir, "acme")).decode()
        for place in (here, there):
            assert (await place.run("audit", "export")).out == expected
            failed = await place.run("audit", "export", "--failed", "--format", "csv")
            assert failed.out.count("\n") == 2
            assert ",secret.read,not_found," in failed.out
            written = await place.run("audit", "export", "--format=ocsf", "--out", str(out))
            assert (written.code, written.out, written.err) == (0, "", "")
            assert out.read_bytes().count(b'"class_uid":6003') == expected.count("\n")
            assert out.stat().st_mode & 0o777 == 0o600
            # What showed events before shows them still.
            assert (await place.run("audit", "show", "--json")).json == (
                await place.run("audit", "--json")
            ).json
    every = await run("audit", "export", "--data-dir", str(data_dir), variables=here.variables)
    assert every.out.encode() == b"".join(logged(data_dir))
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "out",
        "secrets",
        "secrets-signing.key",
    ]


async def test_a_file_that_can_not_be_written_whole_is_not_there(data_dir: Path) -> None:
    out = data_dir.with_name("out")
    out.write_text("an older one")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
        writer.write(head + b'Transfer-Encoding: chunked\r\n\r\n9\r\n{"v": 1}\n\r\n')
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as other:
        url = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        variables = {"FLOWMASON_API_KEY": "fm_live_k"}
        cut_off = await run("audit", "export", "--url", url, "--out", str(out), variables=variables)
        cut_off.failed(1, "can't be reached")
        shown_ = await run("audit", "export", "--url", url, variables=variables)
        assert (shown_.code, shown_.out) == (1, '{"v": 1}\n')
    assert out.read_text() == "an older one"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    here = local(data_dir)
    await here.run("set", "A", stdin=b"v")
    missing = out.parent / "none" / "out"
    (await here.run("audit", "export", "--out", str(missing))).failed(1, "No such file")
