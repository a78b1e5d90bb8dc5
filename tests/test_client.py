"""The clients against real servers, and against a peer that fails at chosen moments."""

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from aiohttp.web_request import BaseRequest

from flowmason_secrets.api.problems import malformed, problem_response
from flowmason_secrets.client import (
    AsyncSecretsClient,
    Filters,
    Options,
    OutcomeUnknown,
    Refused,
    SecretsClient,
    UnexpectedAnswer,
    Unreachable,
)
from flowmason_secrets.core import errors
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.status import STATUS

from .harness.between import FAULTS, Between, between
from .harness.server import ServerProcess, issue_key, serving
from .test_cli_serve import Certificate

# Impatient, so that the tables are quick.
QUICK = Options(timeout=0.5, connect_timeout=0.5, deadline=5.0, retries=3, first_pause=0.001)
PATIENT = Options(deadline=40.0, retries=400, longest_pause=0.2)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def server(data_dir: Path) -> AsyncIterator[ServerProcess]:
    """A server of this test."""
    async with serving(data_dir) as process:
        yield process


# --- what it does -------------------------------------------------------------------------------


async def test_life_of_a_secret(server: ServerProcess, data_dir: Path) -> None:
    async with AsyncSecretsClient(server.url, await issue_key(data_dir)) as secrets:
        made = await secrets.set("A b?%ü", "v1", "for tests", "token", "2990-01-01T00:00:00Z")
        assert (made.version, made.created, made.category) == (1, True, "token")
        read = await secrets.read("A b?%ü")
        assert (read.value, read.version, read.etag) == ("v1", 1, made.etag)
        assert made.receipt is not None
        assert read.receipt.seq == made.receipt.seq + 1
        with pytest.raises(errors.PreconditionFailed) as failed:
            await secrets.set("A b?%ü", "v2", if_absent=True)
        assert (failed.value.name, failed.value.current) == ("A b?%ü", made.etag)
        again = await secrets.set("A b?%ü", "v2", if_match=made.etag)
        assert (again.version, again.created) == (2, False)
        assert await secrets.get_metadata("A b?%ü") == await secrets.get_metadata("A b?%ü")
        assert (await secrets.get_metadata("A b?%ü")).etag == again.etag
        with pytest.raises(errors.PreconditionFailed):
            await secrets.delete("A b?%ü", if_match=made.etag)
        assert await secrets.delete("A b?%ü", if_match=again.etag)
        assert not await secrets.exists("A b?%ü")
        assert await secrets.get("A b?%ü", None) is None
        with pytest.raises(errors.SecretNotFound, match="A b"):
            await secrets.get("A b?%ü")
        entries = await secrets.audit(Filters(name="A b?%ü", success=True))
        assert [entry.action.rpartition(".")[2] for entry in entries] == [
            *("delete", "create", "read", "create")
        ]
        proof = await secrets.proof(made.receipt.seq)
        assert proof.startswith(b"c2sp.org/tlog-proof@v1\n")


async def test_many_at_once_or_none(server: ServerProcess, data_dir: Path) -> None:
    api_key = await issue_key(data_dir)
    async with AsyncSecretsClient(server.url, api_key) as secrets:
        await secrets.set("A", "{{secrets.B}}")
        await secrets.set("B", "b", expires_at="1990-01-01T00:00:00Z")
        document = {"x": ["{{ secrets.A }}", 1.5, "{{env.A}}"]}
        filled = {"x": ["{{secrets.B}}", 1.5, "{{env.A}}"]}
        assert await secrets.resolve(document, "p", "s") == filled
        (entry,) = await secrets.audit(Filters(action="secret.read"))
        assert entry.details.items() >= {"pipeline": "p", "stage": "s"}.items()
        assert await secrets.batch(["A", "A"]) == {"A": "{{secrets.B}}"}
        for call in (secrets.batch(["A", "B", "C"]), secrets.resolve("{{secrets.B}}{{secrets.C}}")):
            with pytest.raises(errors.UnresolvedReferences) as failed:
                await call
            expected = (
                errors.Unresolved("B", "secret_expired"),
                errors.Unresolved("C", "secret_not_found"),
            )
            assert failed.value.errors == expected
        with pytest.raises(errors.InvalidInput, match="document"):
            await secrets.resolve_json(Plaintext('1, "pipeline": "other"'))
    with SecretsClient(server.url, api_key) as blocking:
        assert blocking.resolve(document) == filled
        assert blocking.batch(["A"]) == {"A": "{{secrets.B}}"}
        text = Plaintext('{"a" :1.0,"b":"{{secrets.A}}"}')
        found = blocking.resolve_json(text)
        assert bytes(found.document) == b'{"a" :1.0,"b":"{{secrets.B}}"}'


async def test_lists_and_queries_go_on_past_their_pages(
    server: ServerProcess, data_dir: Path
) -> None:
    async with AsyncSecretsClient(server.url, await issue_key(data_dir)) as secrets:
        names = [f"{number:04}" for number in range(1100)]
        await asyncio.gather(*(secrets.set(name, "v") for name in names))
        assert [found.name for found in await secrets.list()] == names
        assert [found.name for found in await secrets.list(prefix="109")] == names[1090:]
        assert await secrets.list(expired=True) == []
        entries = await secrets.audit(Filters(action="secret.create"), limit=1050)
        assert len({entry.seq for entry in entries}) == 1050
        lines = b"".join([piece async for piece in secrets.export("ndjson")])
        assert lines.count(b'"secret.create"') == 1100


async def test_api_keys(server: ServerProcess, data_dir: Path) -> None:
    async with AsyncSecretsClient(server.url, await issue_key(data_dir)) as secrets:
        issued = await secrets.create_api_key("ci", ("read",), ("A*",), "2990-01-01T00:00:00Z")
        assert issued.api_key in await secrets.list_api_keys()
        async with AsyncSecretsClient(server.url, issued.raw_key) as other:
            who = await other.whoami()
            assert (who.org_id, who.scopes, who.allow) == ("acme", ["read"], ["A*"])
            with pytest.raises(errors.Denied, match="scope full"):
                await other.get("A")
            assert await secrets.revoke_api_key(issued.api_key.id)
            with pytest.raises(errors.Unauthenticated):
                await other.whoami()
        with pytest.raises(errors.ApiKeyNotFound) as missing:
            await secrets.revoke_api_key(issued.api_key.id)
        assert missing.value.key_id == issued.api_key.id
        assert (await secrets.status()).status == "ready"


def shape(method: Callable[..., object]) -> list[object]:
    """How a method may be called."""
    parameters = inspect.signature(method).parameters.values()
    return [(one.name, one.kind, one.default) for one in parameters]


async def test_the_synchronous_one_does_the_same(server: ServerProcess, data_dir: Path) -> None:
    methods = dict(inspect.getmembers(AsyncSecretsClient, inspect.isfunction))
    twins = dict(inspect.getmembers(SecretsClient, inspect.isfunction))
    for name in methods:
        if not name.startswith("_"):
            assert shape(twins[name]) == shape(methods[name]), name
    api_key = await issue_key(data_dir)

    # In a running event loop, too.
    with SecretsClient(server.url, api_key) as secrets:
        made = secrets.set("A", "v", if_absent=True)
        assert secrets.get("A") == secrets.read("A").value == "v"
        assert secrets.get_metadata("A").etag == made.etag
        assert (secrets.exists("A"), secrets.exists("B")) == (True, False)
        assert [found.name for found in secrets.list()] == ["A"]
        assert secrets.audit(Filters(name="A"), 1)[0].action == "secret.read"
        assert made.receipt is not None
        follower = secrets.follow(after=made.receipt.seq)
        assert [next(follower).action for _ in range(2)] == ["secret.read"] * 2
        follower.close()  # type: ignore[attr-defined] # it is a generator
        assert b"secret.create" in b"".join(secrets.export("csv"))
        issued = secrets.create_api_key("x")
        assert len(secrets.list_api_keys()) == 2
        assert secrets.revoke_api_key(issued.api_key.id)
        assert secrets.whoami().org_id == "acme"
        assert secrets.proof(made.receipt.seq)
        assert secrets.status().status == "ready"
        found: list[object] = []
        threads = [
            threading.Thread(target=lambda: found.append(secrets.get("A"))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["v"] * 8
        assert secrets.delete("A")


async def test_the_synchronous_one_after_a_fork_and_at_the_end(
    server: ServerProcess, data_dir: Path
) -> None:
    program = """
        import os, sys
        from flowmason_secrets.client import SecretsClient
        secrets = SecretsClient(sys.argv[1], os.environ["KEY"])
        secrets.set("A", "v")
        child = os.fork()
        assert secrets.get("A") == "v"
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert secrets.get("A") == "v"
    """
    done = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program), server.url),
        env=os.environ | {"KEY": await issue_key(data_dir)},
        stderr=subprocess.PIPE,
    )
    assert (await done.communicate())[1] == b""
    assert done.returncode == 0


# --- what is tried again ------------------------------------------------------------------------


class Case(NamedTuple):
    """One operation, made ready for: `run` does it, `events` finds the events of it."""

    run: Callable[[], Awaitable[object]]
    events: Callable[[], Awaitable[int]]


Ready = Callable[[AsyncSecretsClient, AsyncSecretsClient, str], Awaitable[Case]]


async def _case(
    direct: AsyncSecretsClient, filters: Filters, run: Callable[[], Awaitable[object]]
) -> Case:
    async def events() -> int:
        return len(await direct.audit(filters, 1000))

    before = await events()

    async def since() -> int:
        return await events() - before

    return Case(run, since)


def _written(name: str) -> Filters:
    return Filters(action="secret.create", name=name, success=True)


def _deleted(name: str) -> Filters:
    return Filters(action="secret.delete", name=name, success=True)


async def _get(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    await direct.set(name, "v")
    return await _case(direct, Filters(action="never"), lambda: secrets.get(name))


async def _list(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    return await _case(direct, Filters(action="never"), lambda: secrets.list(prefix=name))


async def _create(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    return await _case(direct, _written(name), lambda: secrets.set(name, "v", if_absent=True))


async def _replace(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    etag = (await direct.set(name, "v")).etag
    return await _case(direct, _written(name), lambda: secrets.set(name, "w", if_match=etag))


async def _drop(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    etag = (await direct.set(name, "v")).etag
    return await _case(direct, _deleted(name), lambda: secrets.delete(name, if_match=etag))


async def _revoke(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    key_id = (await direct.create_api_key(name)).api_key.id
    filters = Filters(action="api_key.revoke", success=True)
    return await _case(direct, filters, lambda: secrets.revoke_api_key(key_id))


async def _set(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    return await _case(direct, _written(name), lambda: secrets.set(name, "v"))


async def _set_any(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    await direct.set(name, "v")
    return await _case(direct, _written(name), lambda: secrets.set(name, "w", if_match="*"))


async def _delete(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    await direct.set(name, "v")
    return await _case(direct, _deleted(name), lambda: secrets.delete(name))


async def _issue(direct: AsyncSecretsClient, secrets: AsyncSecretsClient, name: str) -> Case:
    filters = Filters(action="api_key.create", success=True)
    return await _case(direct, filters, lambda: secrets.create_api_key(name))


OPERATIONS: dict[str, tuple[Ready, ...]] = {
    "read": (_get, _list),
    "once": (_create, _replace, _drop, _revoke),
    "change": (_set, _set_any, _delete, _issue),
}

# After one fault: how many requests there are, what comes of it, and how many events.
DONE = None
Outcome = tuple[int, type[Exception] | None, int]
TABLE: dict[str, dict[str, Outcome]] = {
    "reset before": {"read": (2, DONE, 0), "once": (2, DONE, 1), "change": (1, OutcomeUnknown, 0)},
    "reset after": {
        "read": (2, DONE, 0),
        "once": (2, OutcomeUnknown, 1),
        "change": (1, OutcomeUnknown, 1),
    },
    "cut after": {
        "read": (2, DONE, 0),
        "once": (2, OutcomeUnknown, 1),
        "change": (1, OutcomeUnknown, 1),
    },
    "silent after": {
        "read": (2, DONE, 0),
        "once": (2, OutcomeUnknown, 1),
        "change": (1, OutcomeUnknown, 1),
    },
    "overloaded before": {"read": (2, DONE, 0), "once": (2, DONE, 1), "change": (2, DONE, 1)},
    "unavailable before": {
        "read": (2, DONE, 0),
        "once": (2, DONE, 1),
        "change": (1, errors.LogUnavailable, 0),
    },
    "proxy's 503 after": {
        "read": (2, DONE, 0),
        "once": (2, OutcomeUnknown, 1),
        "change": (1, OutcomeUnknown, 1),
    },
    "proxy's 504 after": {
        "read": (1, UnexpectedAnswer, 0),
        "once": (1, OutcomeUnknown, 1),
        "change": (1, OutcomeUnknown, 1),
    },
    "redirect before": {
        "read": (1, UnexpectedAnswer, 0),
        "once": (1, UnexpectedAnswer, 0),
        "change": (1, UnexpectedAnswer, 0),
    },
}


async def test_what_is_tried_again_after_which_fault(server: ServerProcess, data_dir: Path) -> None:
    assert set(TABLE) == set(FAULTS)
    api_key = await issue_key(data_dir)
    async with (
        between(server.url) as peer,
        AsyncSecretsClient(server.url, api_key) as direct,
        AsyncSecretsClient(peer.url, api_key, QUICK) as secrets,
    ):
        for fault in FAULTS:
            for effect, operations in OPERATIONS.items():
                for number, ready in enumerate(operations):
                    case = await ready(direct, secrets, f"{fault} {effect} {number}")
                    # So that the request goes over a connection that was used before.
                    await secrets.whoami()
                    assert await _under(peer, fault, case) == TABLE[fault][effect], (fault, ready)


async def _under(peer: Between, fault: str, case: Case) -> Outcome:
    peer.seen.clear()
    peer.faults = [fault]
    kind: type[Exception] | None = None
    try:
        await case.run()
    except errors.SecretsError as error:
        kind = type(error)
    assert not peer.faults
    return len(peer.seen), kind, await case.events()


async def test_how_often_and_when(server: ServerProcess, data_dir: Path) -> None:
    api_key = await issue_key(data_dir)
    async with (
        between(server.url) as peer,
        AsyncSecretsClient(peer.url, api_key, QUICK) as secrets,
    ):
        peer.faults = ["overloaded before"] * 10
        with pytest.raises(errors.Overloaded):
            await secrets.set("A", "v")
        assert len(peer.seen) == 1 + QUICK.retries
        peer.faults, peer.retry_after = ["unavailable before"], "1"
        peer.seen.clear()
        assert await secrets.exists("A") is False
        assert peer.seen[1].at - peer.seen[0].at >= 1.0
        # Longer than it has: no use to wait.
        peer.faults, peer.retry_after = ["overloaded before"], "30"
        peer.seen.clear()
        with pytest.raises(errors.Overloaded) as refused:
            await secrets.list()
        assert (len(peer.seen), refused.value.retry_after) == (1, 30)
        peer.faults = ["silent after"] * 20
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable, match="did not answer in time"):
            await secrets.list()
        assert asyncio.get_running_loop().time() - began < QUICK.timeout * (QUICK.retries + 2)


def test_pauses() -> None:
    options = Options(first_pause=1.0, longest_pause=5.0)
    ceilings = [options.pause(retry, 0.0, lambda: 1.0) for retry in range(5)]
    assert ceilings == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert options.pause(2, 3.0, lambda: 0.5) == 5.0
    assert options.pause(1000, 0.0, lambda: 0.0) == 0.0


async def test_connections_are_reused(server: ServerProcess, data_dir: Path) -> None:
    api_key = await issue_key(data_dir)
    async with between(server.url) as peer:
        async with AsyncSecretsClient(peer.url, api_key) as secrets:
            await secrets.set("A", "v")
            for _ in range(30):
                await secrets.get("A")
            assert peer.connections == 1
        options = Options(connections=4)
        async with AsyncSecretsClient(peer.url, api_key, options) as secrets:
            await asyncio.gather(*(secrets.get("A") for _ in range(40)))
        assert 2 <= peer.connections - 1 <= 4


async def test_a_write_waits_for_a_server_that_is_not_there_yet(data_dir: Path) -> None:
    port, api_key = free_port(), await issue_key(data_dir)
    url = f"http://127.0.0.1:{port}"
    async with AsyncSecretsClient(url, api_key, QUICK) as secrets:
        with pytest.raises(Unreachable) as nobody:
            await secrets.set("A", "v")
        assert nobody.value.url == url
    async with AsyncSecretsClient(url, api_key, PATIENT) as secrets:
        writing = asyncio.create_task(secrets.set("A", "v"))
        async with serving(data_dir, f"--port={port}"):
            assert (await writing).version == 1


async def test_a_server_that_is_killed_and_comes_back(data_dir: Path) -> None:
    """Readers notice nothing; no write happens twice, and none that was acknowledged is missing."""
    port, api_key = free_port(), await issue_key(data_dir)
    process = ServerProcess(data_dir, f"--port={port}")
    await process.start()
    acknowledged: list[str] = []
    unknown: list[str] = []
    stop = asyncio.Event()
    async with AsyncSecretsClient(process.url, api_key, PATIENT) as secrets:
        begin = (await secrets.set("A", "v")).receipt
        assert begin is not None

        async def read() -> int:
            count = 0
            while not stop.is_set():
                assert await secrets.get("A") == "v"
                count += 1
            return count

        async def write(writer: int) -> None:
            number = 0
            while not stop.is_set():
                name, number = f"{writer}-{number}", number + 1
                try:
                    await secrets.set(name, "v", if_absent=bool(writer % 2))
                    acknowledged.append(name)
                except OutcomeUnknown:
                    unknown.append(name)

        async def follow() -> list[int]:
            seqs: list[int] = []
            filters = Filters(action="secret.create", success=True)
            async with contextlib.aclosing(secrets.follow(filters, begin.seq)) as events:
                async for entry in events:
                    seqs.append(entry.seq)
                    if entry.details["name"] == "last":
                        break
            return seqs

        follower = asyncio.create_task(follow())
        readers = [asyncio.create_task(read()) for _ in range(20)]
        writers = [asyncio.create_task(write(number)) for number in range(4)]
        for _ in range(2):
            before = len(acknowledged)
            while len(acknowledged) < before + 20:
                await asyncio.sleep(0.01)
            await process.kill()
            await process.start()
        stop.set()
        counts = await asyncio.gather(*readers)
        await asyncio.gather(*writers)
        await secrets.set("last", "v")
        seqs = await asyncio.wait_for(follower, 20)
        entries = await secrets.audit(Filters(action="secret.create", success=True), 100_000)
    await process.stop()
    assert min(counts) > 0
    assert unknown
    made = [str(entry.details["name"]) for entry in entries]
    assert len(set(made)) == len(made)
    assert set(acknowledged) <= set(made) <= {*acknowledged, *unknown, "A", "last"}
    assert seqs == sorted(entry.seq for entry in entries if entry.seq > begin.seq)


# --- errors -------------------------------------------------------------------------------------

RAISED: tuple[errors.SecretsError, ...] = (
    errors.InvalidInput("name", "is bad"),
    errors.Unauthenticated(),
    errors.Denied("No."),
    errors.UnresolvedReferences([errors.Unresolved("N", "denied")], 2),
    errors.SecretNotFound("N"),
    errors.EventNotFound(7),
    errors.TileNotFound(),
    errors.NotCosigned(),
    errors.EventArchived(7),
    errors.AnotherLog("a"),
    errors.CheckpointPending(3),
    errors.SecretExpired("N", "2020"),
    errors.PreconditionFailed("N", None),
    errors.PreconditionFailed("N", '"3-1f00ba5e"'),
    errors.DecryptionFailed("N", "k1", ("k2", "k3")),
    errors.DecryptionFailed("N", "k1", ("k1",)),
    errors.SecretDamaged("N", "r"),
    errors.LogUnavailable("full", 2),
    errors.Overloaded("Full", 4),
    errors.IndexUnavailable("full"),
    errors.LogDamaged("d"),
    errors.ConfigurationError("c"),
)
ONCE = Options(timeout=0.5, retries=0)


@contextlib.asynccontextmanager
async def answering(response: Callable[[], web.StreamResponse]) -> AsyncIterator[str]:
    """A server that gives one answer to everything; its URL."""

    async def answer(request: BaseRequest) -> web.StreamResponse:
        return response()

    async with RawTestServer(answer) as other:
        yield str(other.make_url("/"))


@pytest.mark.parametrize("error", RAISED, ids=lambda error: error.code)
async def test_errors_come_over_the_wire_as_they_were(error: errors.SecretsError) -> None:
    async with (
        answering(lambda: problem_response(error, "r1")) as url,
        AsyncSecretsClient(url, "fm_live_k", ONCE) as secrets,
    ):
        with pytest.raises(type(error)) as caught:
            await secrets.get("N")
    assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))


def test_all_errors_are_above() -> None:
    # The one is raised with what was asked for, the other never over HTTP.
    rest = {errors.ApiKeyNotFound, errors.RotationIncomplete}
    assert {type(error) for error in RAISED} == set(STATUS) - rest


async def test_answers_say_what_was_archived() -> None:
    since = "2026-01-01T00:00:00.000000Z"
    for headers, expected in (({"Audit-Complete-Since": since}, since), ({}, None)):
        async with (
            answering(lambda given=headers: web.Response(text="[]", headers=given)) as url,  # type: ignore[misc]
            AsyncSecretsClient(url, "fm_live_k", ONCE) as secrets,
        ):
            assert (await secrets.audit()).complete_since == expected
            export = secrets.export("ndjson")
            assert [piece async for piece in export] == [b"[]"]
            assert export.complete_since == expected


async def test_other_refusals_and_other_servers() -> None:
    async with (
        answering(lambda: problem_response(malformed("Bad."), "r1")) as url,
        AsyncSecretsClient(url, "fm_live_k", ONCE) as secrets,
    ):
        with pytest.raises(Refused) as refused:
            await secrets.get("N")
        told = refused.value
        assert (told.status, told.problem_code, told.request_id) == (400, "malformed_request", "r1")
    for status, body in ((200, '{"value": "s3cret"'), (200, "[]"), (404, "<html>s3cret")):
        async with (
            answering(lambda s=status, b=body: web.Response(status=s, text=b)) as url,  # type: ignore[misc]
            AsyncSecretsClient(url, "fm_live_k", ONCE) as secrets,
        ):
            with pytest.raises(UnexpectedAnswer) as other:
                await secrets.get("N")
            assert other.value.status == status
            assert "s3cret" not in str(other.value)
            with pytest.raises((OutcomeUnknown, UnexpectedAnswer)) as lost:
                await secrets.set("N", "v")
            assert isinstance(lost.value, OutcomeUnknown) == (status == 200)


BAD: dict[str, tuple[str, str, str]] = {
    "scheme": ("ftp://example.org", "k", "url"),
    "no url": ("example.org", "k", "url"),
    "password": ("https://u:p@example.org", "k", "url"),
    "query": ("https://example.org/?a=b", "k", "url"),
    "in clear": ("http://192.0.2.1", "k", "url"),
    "no key": ("https://example.org", "", "api_key"),
    "line break": ("https://example.org", "k\r\nX: y", "api_key"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_a_client_is_not_made_of(bad: str) -> None:
    url, api_key, field = BAD[bad]
    for kind in (AsyncSecretsClient, SecretsClient):
        with pytest.raises(errors.InvalidInput) as refused:
            kind(url, api_key)
        assert refused.value.field == field


# --- where the API key goes ---------------------------------------------------------------------


async def test_the_api_key_and_values_are_nowhere_else(
    server: ServerProcess, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    api_key, value = await issue_key(data_dir), "a-value-of-no-one-else"
    texts: list[str] = []
    async with between(server.url) as peer:
        secrets = AsyncSecretsClient(peer.url, api_key, ONCE)
        texts += [repr(secrets), repr(SecretsClient(peer.url, api_key)), repr(vars(secrets))]
        await secrets.set("A", value)
        texts.append(repr(await secrets.read("A")))
        for fault in FAULTS:
            for call in (secrets.get, secrets.delete):
                peer.faults = [fault]
                try:
                    await call("A")
                except errors.SecretsError as error:
                    texts.append(_shown(error))
        await secrets.close()
    assert len(texts) > 15
    everything = "\n".join([*texts, caplog.text])
    assert api_key not in everything
    assert value not in everything


def _shown(error: BaseException) -> str:
    """All that a debugger shows of an error: the variables of every frame, and what led to it."""
    texts = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None:
            # Without this test's own frame, which has the key.
            frames = one.__traceback__.tb_next if one is error and one.__traceback__ else None
            frames = frames if one is error else one.__traceback__
            shown = traceback.TracebackException(type(one), one, frames, capture_locals=True)
            texts += [*shown.format(), repr(one), repr(vars(one))]
            pending += [one.__cause__, one.__context__]
    return "".join(texts)


async def test_tls(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mine, other = Certificate(tmp_path), Certificate(tmp_path / "other")
    async with serving(data_dir, f"--tls-cert={mine.path}", f"--tls-key={mine.key}") as server:
        api_key = await issue_key(data_dir)
        options = Options(ca_file=mine.path)
        async with AsyncSecretsClient(server.url, api_key, options) as secrets:
            assert (await secrets.whoami()).org_id == "acme"
        # It does not get better by being tried again: this would take long.
        for distrusting in (Options(first_pause=60.0), Options(60.0, ca_file=other.path)):
            async with AsyncSecretsClient(server.url, api_key, distrusting) as secrets:
                with pytest.raises(Unreachable, match="certificate"):
                    await asyncio.wait_for(secrets.whoami(), 10)


async def test_unix_sockets(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    api_key = await issue_key(data_dir)
    async with serving(data_dir, f"--unix-socket={path}"):
        for url in (f"unix://{path}", f"unix:{path}"):
            async with AsyncSecretsClient(url, api_key) as secrets:
                assert (await secrets.whoami()).org_id == "acme"
    async with AsyncSecretsClient(f"unix://{path}", api_key, QUICK) as secrets:
        with pytest.raises(Unreachable):
            await secrets.whoami()


async def test_proxies_are_used_only_if_asked_for(
    server: ServerProcess, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api_key = await issue_key(data_dir)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with between(server.url) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        async with AsyncSecretsClient(server.url, api_key) as secrets:
            assert await secrets.whoami()
        assert proxy.seen == []
        options = Options(environment_proxies=True)
        async with AsyncSecretsClient(server.url, api_key, options) as secrets:
            assert await secrets.whoami()
        assert [seen.line for seen in proxy.seen] == [
            f"GET {server.url}/api/v1/auth/whoami HTTP/1.1"
        ]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with AsyncSecretsClient(server.url, api_key, options) as secrets:
            assert await secrets.whoami()
        assert len(proxy.seen) == 1
