"""Several secrets at once: over HTTP, in the library, on the command line. All of them or none."""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flowmason_secrets import app
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft, KeyDraft, Usage
from flowmason_secrets.core.intents import Changes, Intent
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import Verdict
from flowmason_secrets.service import Service
from flowmason_studio.services.secrets import (
    AsyncSecretsService,
    InvalidInput,
    LogUnavailable,
    SecretsService,
    Unauthenticated,
    Unresolved,
    UnresolvedReferences,
    resolve,
    resolve_async,
)

from .conftest import Client
from .harness.faults import Faulty, no_space
from .harness.server import MASTER_KEY, settings_for
from .test_cli import Place, place  # noqa: F401 - a fixture
from .test_http import Reply, ask, is_problem, put
from .test_unaudited import log_of

SECRETS = "/api/v1/secrets"
RESOLVE, BATCH = f"{SECRETS}/resolve", f"{SECRETS}/batch"
PAST = "2001-01-01T00:00:00Z"
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def reads(data_dir: Path) -> list[dict[str, Any]]:
    """The events of reads."""
    return [line for line in log_of(data_dir) if line["action"] == "secret.read"]


async def post(client: aiohttp.ClientSession, path: str, text: str) -> tuple[int, str]:
    """The answer to a body that is sent as it is, as text."""
    headers = {"Content-Type": "application/json"}
    async with client.post(path, data=text.encode(), headers=headers) as answer:
        return answer.status, await answer.text()


# --- over HTTP -----------------------------------------------------------------------------------


async def test_a_document_is_resolved_and_each_read_is_an_event(
    client: Client, data_dir: Path
) -> None:
    full, execute = await client(), await client(scopes=("execute",))
    await put(full, "A", "one")
    await put(full, "B", '"}, {{secrets.A}}')
    document = {"x": ["{{secrets.A}}-{{ secrets.B }}", {"{{secrets.A}}": "{{input.x}}"}, 1, None]}
    body = {"document": document, "pipeline": "daily", "stage": "ask"}
    reply = await ask(execute, "POST", RESOLVE, body)
    assert reply.status == 200, reply
    assert reply.headers["cache-control"] == "no-store"
    expected = ['one-"}, {{secrets.A}}', {"{{secrets.A}}": "{{input.x}}"}, 1, None]
    assert reply.body["document"] == {"x": expected}
    found = reads(data_dir)
    assert [(line["name"], line["outcome"], line["version"]) for line in found] == [
        ("A", "success", 1),
        ("B", "success", 1),
    ]
    for line in found:
        assert line["details"] == {"pipeline": "daily", "stage": "ask"}
        assert line["status"] == 200
    # In one batch: one time, and nothing in between.
    assert found[0]["time"] == found[1]["time"]
    assert reply.body["receipts"] == [
        {"name": line["name"], "seq": line["seq"], "id": line["id"]} for line in found
    ]
    assert found[1]["seq"] == found[0]["seq"] + 1


async def test_the_document_is_copied_byte_by_byte(client: Client) -> None:
    full = await client()
    await put(full, "A", "1")
    written = '{"a": 1e400,\n "a":12345678901234567890123, "b" : -0.0, "\\u00e9": "\\/ %s"}'
    status, text = await post(full, RESOLVE, '{"document": ' + written % "{{secrets.A}}" + "}")
    assert status == 200, text
    assert text.startswith('{"document":' + written.replace("\\/ %s", "/ 1") + ',"receipts":[{')
    status, text = await post(full, RESOLVE, '{"document":' + written + "}")
    assert text == '{"document":' + written + ',"receipts":[]}'


async def test_several_secrets_by_name(client: Client, data_dir: Path) -> None:
    full, execute = await client(), await client(scopes=("execute",))
    await put(full, "A", "one", category="token")
    await put(full, "B", "two")
    await put(full, "B", "three")
    body = {"names": ["B", "A", "B"], "pipeline": "daily"}
    reply = await ask(execute, "POST", BATCH, body)
    assert reply.status == 200
    assert reply.body["secrets"] == [
        {"name": "B", "value": "three", "category": "other", "is_expired": False, "version": 2},
        {"name": "A", "value": "one", "category": "token", "is_expired": False, "version": 1},
    ]
    found = reads(data_dir)
    assert [line["details"] for line in found] == [{"pipeline": "daily"}] * 2
    assert reply.body["receipts"] == [
        {"name": line["name"], "seq": line["seq"], "id": line["id"]} for line in found
    ]
    assert (await ask(execute, "GET", f"{SECRETS}/A")).status == 403


async def broken_secrets(service: Service, client: Client, data_dir: Path) -> dict[str, str]:
    """Makes secrets that can't be read by a key that may use `X*` only: codes by name."""
    full = await client()
    await put(full, "X ok", "canary-7d1e")
    await put(full, "denied", "canary-7d1e")
    await put(full, "X expired", "canary-7d1e", expires_at=PAST)
    await put(full, "X lost", "canary-7d1e")
    await put(full, "X torn", "canary-7d1e")
    for name in ("X lost", "X torn"):
        files = {path.suffix: path for path in data_dir.glob("*/*") if _is_of(path, name)}
        metadata = json.loads(files[".meta"].read_text())
        if name == "X lost":
            metadata["key_id"] = "00000000"
        else:
            metadata["token_sha256"] = "0" * 64
        files[".meta"].write_text(json.dumps(metadata))
        service._store.forget("acme", name)
    return {
        "X expired": "secret_expired",
        "X lost": "decryption_failed",
        "X torn": "secret_damaged",
        "X none": "secret_not_found",
        "denied": "denied",
        "also denied": "denied",
    }


def _is_of(path: Path, name: str) -> bool:
    meta = path.with_suffix(".meta")
    return path.suffix in (".meta", ".secret") and json.loads(meta.read_text())["name"] == name


OUTCOMES = {
    "secret_expired": ("expired", 410),
    "decryption_failed": ("failed", 500),
    "secret_damaged": ("failed", 500),
    "secret_not_found": ("not_found", 404),
    "denied": ("denied", 403),
}


@pytest.mark.parametrize("path", [RESOLVE, BATCH])
async def test_all_or_nothing(path: str, service: Service, client: Client, data_dir: Path) -> None:
    codes = await broken_secrets(service, client, data_dir)
    limited = await client(allow=("X*",))
    for broken in ([name] for name in codes):
        await _refused(limited, path, [*broken, "X ok"], codes, data_dir)
    await _refused(limited, path, ["X ok", *codes], codes, data_dir)
    document = await ask(limited, "POST", path, _body(path, ["X ok"]))
    assert document.status == 200
    assert [line["name"] for line in reads(data_dir)][-1] == "X ok"


async def _refused(
    client: aiohttp.ClientSession,
    path: str,
    wanted: list[str],
    codes: dict[str, str],
    data_dir: Path,
) -> None:
    before = len(log_of(data_dir))
    reply = await ask(client, "POST", path, _body(path, wanted))
    is_problem(reply, 422, "unresolved_references")
    expected = [(name, codes[name]) for name in wanted if name in codes]
    assert [(one["name"], one["code"]) for one in reply.body["errors"]] == expected
    assert f"{len(expected)} of {len(wanted)} secrets" in reply.body["detail"]
    assert all(repr(name) in reply.body["detail"] for name, _ in expected)
    assert "canary" not in str(reply.body)
    # What could have been read was not revealed, so no event says that it was.
    found = log_of(data_dir)[before:]
    assert [(line["action"], line["name"], line["outcome"], line["status"]) for line in found] == [
        ("secret.read", name, *OUTCOMES[code]) for name, code in expected
    ]
    for line, (_, code) in zip(found, expected, strict=True):
        assert line["details"]["error"] == code
        assert line["details"]["stage"] == "s"


def _body(path: str, wanted: list[str]) -> dict[str, object]:
    if path == BATCH:
        return {"names": wanted, "stage": "s"}
    return {"document": [f"{{{{secrets.{name}}}}}" for name in wanted], "stage": "s"}


@pytest.mark.parametrize("path", [RESOLVE, BATCH])
async def test_a_missing_scope_is_one_refusal(path: str, client: Client, data_dir: Path) -> None:
    full, reader = await client(), await client(scopes=("read", "deploy"))
    await put(full, "A")
    for wanted in (["A", "B"], []):
        before = len(log_of(data_dir))
        is_problem(await ask(reader, "POST", path, _body(path, wanted)), 403, "denied")
        (line,) = log_of(data_dir)[before:]
        assert (line["action"], line["outcome"], line["name"]) == ("secret.read", "denied", None)


@pytest.mark.parametrize("path", [RESOLVE, BATCH])
async def test_without_secrets_there_is_no_event(
    path: str, client: Client, service: Service, caller: Caller, data_dir: Path
) -> None:
    full = await client()
    before = len(log_of(data_dir))
    reply = await ask(full, "POST", path, _body(path, []))
    assert (reply.status, reply.body["receipts"]) == (200, [])
    assert len(log_of(data_dir)) == before
    # Not even then for a key that isn't live any more.
    (key,) = await service.keys.all(caller)
    await service.keys.revoke(caller, key.id)
    is_problem(await ask(full, "POST", path, _body(path, [])), 401, "unauthenticated")


BAD = {
    "no document": (RESOLVE, "{}", 422, "document"),
    "unknown member": (RESOLVE, '{"document": 1, "x": 1}', 422, "x"),
    "an empty pipeline": (RESOLVE, '{"document": 1, "pipeline": ""}', 422, "pipeline"),
    "a long stage": (RESOLVE, json.dumps({"document": 1, "stage": "s" * 129}), 422, "stage"),
    "control characters": (RESOLVE, '{"document": 1, "stage": "a\\nb"}', 422, "stage"),
    "not JSON": (RESOLVE, '{"document": nul}', 400, None),
    "a lone surrogate": (RESOLVE, '{"document": "{{secrets.\\ud800}}"}', 400, None),
    "too deep": (RESOLVE, '{"document": ' + "[" * 9999 + "]" * 9999 + "}", 400, None),
    "too many secrets": (
        RESOLVE,
        json.dumps({"document": [f"{{{{secrets.{n}}}}}" for n in range(101)]}),
        422,
        "document",
    ),
    "too many names": (BATCH, json.dumps({"names": ["A"] * 101}), 422, "names"),
    "names that are none": (BATCH, '{"names": [1]}', 422, "names"),
    "no names": (BATCH, "{}", 422, "names"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_are_refused_and_not_recorded(
    case: str, client: Client, data_dir: Path
) -> None:
    path, text, status, field = BAD[case]
    full = await client()
    before = len(log_of(data_dir))
    answered, body = await post(full, path, text)
    assert (answered, json.loads(body).get("field")) == (status, field), body
    assert len(log_of(data_dir)) == before


async def test_bytes_that_are_no_text(client: Client) -> None:
    full = await client()
    headers = {"Content-Type": "application/json"}
    async with full.post(RESOLVE, data=b'{"document": "\xff"}', headers=headers) as answer:
        assert answer.status == 400


async def test_a_small_document_cannot_become_a_huge_one(client: Client, data_dir: Path) -> None:
    full = await client()
    await put(full, "A", "x" * 65536)
    await put(full, "B", "\x00" * 65536)
    for path, body in (
        (RESOLVE, {"document": "{{secrets.A}}" * 10_000}),
        (BATCH, {"names": [await _copy(full, n) for n in range(6)]}),
    ):
        before = len(log_of(data_dir))
        reply = await ask(full, "POST", path, body)
        is_problem(reply, 422, "invalid_input")
        assert "2097152" in reply.body["detail"]
        # Asked for, and not handed out.
        found = log_of(data_dir)[before:]
        assert {(line["outcome"], line["details"]["error"]) for line in found} == {
            ("failed", "invalid_input")
        }
        assert len(found) == (1 if path == RESOLVE else 6)


async def _copy(client: aiohttp.ClientSession, number: int) -> str:
    await put(client, f"large-{number}", "\x01" * 65536)
    return f"large-{number}"


@pytest.mark.parametrize("name", ["resolve", "batch"])
async def test_a_secret_can_be_called_like_an_operation(name: str, client: Client) -> None:
    full = await client()
    await put(full, name, "v")
    path = f"{SECRETS}/{name}"
    assert (await ask(full, "GET", path)).body["value"] == "v"
    assert (await ask(full, "POST", path, _body(path, []))).status == 200
    refused = await ask(full, "PUT", path, {})
    assert refused.status == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "DELETE", "POST"}
    assert (await ask(full, "DELETE", path)).status == 200
    assert (await ask(full, "POST", f"{SECRETS}/other", {})).status == 405


# --- one moment ----------------------------------------------------------------------------------

Act = Callable[[Service, Caller], Awaitable[object]]


def setting(name: str, expires_at: str | None = None) -> Act:
    """Sets a secret."""
    draft = Draft(name, Plaintext("new"), expires_at=expires_at)
    return lambda other, who: other.set(who, draft)


async def revoke(other: Service, who: Caller) -> None:
    """Revokes the only API key."""
    (key,) = await other.keys.all(who)
    await other.keys.revoke(who, key.id)


CHANGES: dict[str, tuple[list[str], Act, Any]] = {
    "the first one is updated": (["A", "B"], setting("A"), ["new", "old"]),
    "the last one is updated": (["A", "B"], setting("B"), ["old", "new"]),
    "one is deleted": (["A", "B"], lambda other, who: other.delete(who, "B"), ("B",)),
    "one appears": (["A", "C"], setting("C"), ["old", "new"]),
    "one of two appears": (["C", "D"], setting("C"), ("D",)),
    "one appears as expired": (["C"], setting("C", PAST), ("C",)),
    "the API key is revoked": (["A", "B"], revoke, Unauthenticated),
    "the API key is revoked, and one is missing": (["A", "C"], revoke, Unauthenticated),
}


@pytest.mark.parametrize("case", CHANGES)
async def test_what_changes_between_reading_and_commit_counts(
    case: str, service: Service, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is done with its change before the commit: so all is read anew."""
    wanted, change, expected = CHANGES[case]
    local = app.local_caller("acme")
    issued = await service.keys.issue(local, KeyDraft("test"))
    caller = Caller(*await service.authentication.authenticate(issued.raw))
    for name in ("A", "B"):
        await service.set(local, Draft(name, Plaintext("old")))
        await service.get(local, name)
    other = await app.open_service(settings_for(data_dir))
    submit = service.gate.submit

    def late(intent: Intent, *prepare: Any) -> Any:
        monkeypatch.undo()
        assert not reads(data_dir)[2:]

        async def then() -> Verdict:
            await change(other, local)
            return await submit(intent, *prepare)

        return asyncio.ensure_future(then())

    try:
        monkeypatch.setattr(service.gate, "submit", late)
        if isinstance(expected, list):
            found = await service.references.read(caller, wanted, Usage())
            assert [one.value.reveal() for one in found] == expected
            recorded = [(name, "success") for name in wanted]
        elif isinstance(expected, tuple):
            with pytest.raises(UnresolvedReferences) as raised:
                await service.references.read(caller, wanted, Usage())
            assert tuple(one.name for one in raised.value.errors) == expected
            outcome = "expired" if "expired" in case else "not_found"
            recorded = [(name, outcome) for name in expected]
        else:
            with pytest.raises(expected):
                await service.references.read(caller, wanted, Usage())
            recorded = []
    finally:
        await other.close()
    assert [(line["name"], line["outcome"]) for line in reads(data_dir)[2:]] == recorded


async def test_what_is_not_known_to_be_current_is_read_anew(
    service: Service, caller: Caller
) -> None:
    """As after very many changes: the store has forgotten which were before what was read."""
    for name in ("A", "B"):
        await service.set(caller, Draft(name, Plaintext(name)))
    store: Any = service._store
    await service.get(caller, "A")
    store._engine._changes = Changes(store.position)
    found = await asyncio.wait_for(service.references.read(caller, ["A", "B"], Usage()), 20)
    assert [one.value.reveal() for one in found] == ["A", "B"]


async def test_all_values_are_those_of_one_moment(service: Service, data_dir: Path) -> None:
    """Another process sets A, then B, again and again: B is never newer than A, nor two behind, and
    neither is older than what was written when it was asked for.
    """
    caller = app.local_caller("acme")
    other = await app.open_service(settings_for(data_dir))
    done, looked = asyncio.Event(), asyncio.Event()
    seen: set[tuple[int, int]] = set()
    written = {"A": -1, "B": -1}

    async def write() -> None:
        for number in range(60):
            for name in ("A", "B"):
                await other.set(caller, Draft(name, Plaintext(str(number))))
                written[name] = number
            # A writer that never rests would make everything outdated that anybody has read.
            looked.clear()
            await looked.wait()
        done.set()

    async def look() -> None:
        while not done.is_set():
            before = dict(written)
            found = await service.references.resolve(
                caller, Plaintext('["{{secrets.B}}", "{{secrets.A}}"]'), Usage()
            )
            b, a = map(int, json.loads(found.document.reveal()))
            assert a >= before["A"]
            assert b >= before["B"]
            seen.add((a, b))
            looked.set()

    try:
        for name in ("A", "B"):
            await other.set(caller, Draft(name, Plaintext("-1")))
        await asyncio.wait_for(asyncio.gather(write(), look(), look(), look()), 60)
    finally:
        await other.close()
    assert len(seen) > 20
    assert {a - b for a, b in seen} <= {0, 1}


async def test_a_refusal_is_of_the_same_moment(service: Service, data_dir: Path) -> None:
    """A and B are never both missing, and none is that was there before it was asked for."""
    caller = app.local_caller("acme")
    other = await app.open_service(settings_for(data_dir))
    done, looked = asyncio.Event(), asyncio.Event()
    missing: list[tuple[str, ...]] = []
    settled: str | None = "B"

    async def write() -> None:
        nonlocal settled
        for _ in range(40):
            for here, there in (("A", "B"), ("B", "A")):
                settled = None
                await other.set(caller, Draft(there, Plaintext("v")))
                await other.delete(caller, here)
                settled = here
                looked.clear()
                await looked.wait()
        done.set()

    async def look() -> None:
        while not done.is_set():
            before = settled
            try:
                await service.references.read(caller, ["A", "B"], Usage())
            except UnresolvedReferences as error:
                missing.append(tuple(one.name for one in error.errors))
                assert before is None or settled != before or missing[-1] == (before,)
                looked.set()

    try:
        await other.set(caller, Draft("A", Plaintext("v")))
        await asyncio.wait_for(asyncio.gather(write(), look(), look()), 60)
    finally:
        await other.close()
    assert {("A",), ("B",)} == set(missing)


async def test_nothing_is_revealed_without_the_events(data_dir: Path, caller: Caller) -> None:
    disk = Faulty({"write"}, no_space)
    service = await app.open_service(settings_for(data_dir), durable=disk)
    try:
        for name in ("A", "B"):
            await service.set(caller, Draft(name, Plaintext("v")))
        disk.broken = True
        with pytest.raises(LogUnavailable):
            await service.references.read(caller, ["A", "B"], Usage())
        disk.broken = False
        assert disk.failed
        assert len(await service.references.read(caller, ["A", "B"], Usage())) == 2
    finally:
        await service.close()


# --- the library ---------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    for name in os.environ:
        if name.startswith("FLOWMASON_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLOWMASON_SECRETS_KEY", MASTER_KEY)
    monkeypatch.setenv("FLOWMASON_SECRETS_DIR", str(data_dir))


@pytest.fixture
def secrets(data_dir: Path) -> Any:
    made = SecretsService("acme", MASTER_KEY, data_dir)
    yield made
    made.close()


async def test_functions_beside_the_service(environment: None, data_dir: Path) -> None:
    # Its own organisation: the function's service is one per process, and finds this directory.
    org = f"org of {data_dir}"
    async with AsyncSecretsService(org) as service:
        await service.set("A", "one")
        document: dict[str, Any] = {
            "a": ["Bearer {{secrets.A}}", 1, 2.5, 10**30, True, None],
            "b": {},
        }
        expected = {"a": ["Bearer one", 1, 2.5, 10**30, True, None], "b": {}}
        assert await asyncio.to_thread(resolve, document, org_id=org) == expected
        assert await resolve_async(document, org_id=org, pipeline="p", stage="s") == expected
        assert await service.resolve(document) == expected
        # Inside a running loop too, which it blocks.
        assert resolve("{{secrets.A}}", org_id=org) == "one"
        assert document["a"][0] == "Bearer {{secrets.A}}"
        expected_errors = (Unresolved("N", "secret_not_found"),)
        with pytest.raises(UnresolvedReferences) as raised:
            await resolve_async(["{{secrets.N}}"], org)
        assert raised.value.errors == expected_errors
        with pytest.raises(UnresolvedReferences) as raised:
            resolve(["{{secrets.N}}"], org)
        assert raised.value.errors == expected_errors
    assert [line["details"] for line in reads(data_dir) if line["outcome"] == "success"] == [
        {},
        {"pipeline": "p", "stage": "s"},
        {},
        {},
    ]


@pytest.mark.parametrize(
    "document",
    [float("nan"), float("inf"), {1, 2}, b"x", object(), {("a",): 1}, [10**5000], Path()],
    ids=lambda one: type(one).__name__,
)
def test_what_is_no_json(document: Any, secrets: SecretsService) -> None:
    with pytest.raises(InvalidInput) as raised:
        secrets.resolve(document)
    assert raised.value.field == "document"


def test_documents_without_an_end(secrets: SecretsService) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for document in (circle, deep):
        with pytest.raises(InvalidInput):
            secrets.resolve(document)
    with pytest.raises(InvalidInput):
        secrets.resolve("{{secrets.\ud800}}")
    assert secrets.resolve(["\ud83d", "\ud83d\udd11"]) == ["\ud83d", "\ud83d\udd11"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.sampled_from("ABC"), JSON), max_size=4), st.data())
@hypothesis_settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_documents_with_random_secrets(
    secrets: SecretsService, parts: list[tuple[str, Any]], data: st.DataObject
) -> None:
    """As `str.replace` would do it at once; values look like references."""
    value = st.text() | st.sampled_from(["{{secrets.A}}", "{{secrets.B}}", "\\", '"', "{{"])
    values = {name: data.draw(value) for name in "ABC"}
    for name, text in values.items():
        secrets.set(name, text)
    document = [[f"-{{{{ secrets.{name} }}}}-", rest, "{{env.A}}"] for name, rest in parts]
    expected = [[f"-{values[name]}-", rest, "{{env.A}}"] for name, rest in parts]
    assert secrets.resolve(document) == expected


# --- the command line ----------------------------------------------------------------------------


async def test_render(place: Place, tmp_path: Path) -> None:  # noqa: F811
    written = '{\n  "h": "Bearer {{secrets.A}}\x9b",\n\t"n": 1.50e+400, "o": "{{input.x}}"\n}\n'
    file = tmp_path / "pipeline.json"
    file.write_text(written)
    await place.run("set", "A", stdin=b'"one"')
    ended = await place.run("render", str(file), "--pipeline", "daily", "--stage", "ask")
    expected = written.replace("{{secrets.A}}", '\\"one\\"').replace("\x9b", "\\u009b")
    assert (ended.code, ended.out, ended.err) == (0, expected, "")
    assert (await place.run("render", "-", stdin=b"[1e999]")).out == "[1e999]\n"
    line = reads(place.data_dir)[-1]
    assert line["details"] == {"pipeline": "daily", "stage": "ask"}
    assert line["actor"] == place.actor
    file.write_text('["{{secrets.A}}", "{{secrets.N}}", "{{secrets.M}}"]')
    failed = await place.run("render", str(file))
    failed.failed(1, "2 of 3 secrets", "'N' (secret_not_found)", "'M' (secret_not_found)")
    assert "one" not in failed.err.replace("none", "")
    (await place.run("render", "-", stdin=b"\xff")).failed(2, "UTF-8")
    (await place.run("render", "-", stdin=b" " * 600_000)).failed(2, "524288 bytes")
    (await place.run("render", str(tmp_path / "none"))).failed(2, "No such file")
    assert (await place.run("render", "-", stdin=b"{")).code != 0


# --- the README's pipeline -----------------------------------------------------------------------


async def test_the_pipeline_of_the_readme(client: Client) -> None:
    """Its `http_request` stage is sent to a real server, which looks at the header it received."""
    section = README[README.index("### References in pipelines") :]
    found = re.search(r"```json\n(.*?)```", section, re.DOTALL)
    assert found is not None
    key = 'sk-"quoted" \\ {{secrets.OTHER}}'
    full, worker = await client(), await client(scopes=("execute",))
    await put(full, "OPENAI_API_KEY", key)
    received: list[tuple[str, bytes]] = []

    async def answer(request: web.Request) -> web.Response:
        received.append((request.headers["Authorization"], await request.read()))
        return web.json_response({})

    other = web.Application()
    other.router.add_post("/v1/chat/completions", answer)
    async with TestServer(other) as server:
        status, text = await post(worker, RESOLVE, '{"document": ' + found[1] + "}")
        assert status == 200, text
        # What a runner does for the other braces.
        text = text.replace("{{input.base_url}}", str(server.make_url("")).rstrip("/"))
        config = json.loads(text)["document"]["stages"][0]["config"]
        async with aiohttp.ClientSession() as session:
            sent = session.request(
                config["method"], config["url"], headers=config["headers"], json=config["body"]
            )
            async with sent as response:
                assert response.status == 200
    assert received[0][0] == f"Bearer {key}"
    assert json.loads(received[0][1]) == {
        "prompt": "{{upstream.fetch.text}}",
        "temperature": 0.2,
        "seed": 12345678901234567890,
    }
    reply: Reply = await ask(worker, "GET", f"{SECRETS}/OPENAI_API_KEY")
    is_problem(reply, 403, "denied")
