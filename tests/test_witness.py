"""Witnesses cosign the log; whatever they do, nothing waits for them and nothing false is kept."""

import asyncio
import json
import logging
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tlog_scales.signing import VkeySet
from tlog_scales.tlog import Checkpoint as ScalesCheckpoint

from flowmason_secrets import app, cosigner, signer, witnesslink
from flowmason_secrets.config import PREFIX, Settings, from_environment, witnesses
from flowmason_secrets.core import checkpoint, note, tlogproof, witness
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import ConfigurationError
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.merkle import Unverified
from flowmason_secrets.core.note import Verifier
from flowmason_secrets.core.witness import WitnessState
from flowmason_secrets.service import Service

from .harness.load import read_log
from .harness.server import MASTER_KEY, issue_key, serving, session, settings_for
from .harness.signed import check_signed, key_of, newest, raw_lines, sign, until, verifier_of
from .harness.witness import FakeWitness, signed_answer, size_answer
from .test_cli import run

SECRETS = "/api/v1/secrets"
ACME = app.local_caller("acme", "tester")


@pytest.fixture
async def one() -> AsyncIterator[FakeWitness]:
    async with FakeWitness() as made:
        yield made


@pytest.fixture
async def two() -> AsyncIterator[FakeWitness]:
    async with FakeWitness("witness.example/w2") as made:
        yield made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is waited for is waited for briefly."""
    monkeypatch.setattr(signer, "INTERVAL", 0.02)
    monkeypatch.setattr(cosigner, "INTERVAL", 0.02)
    monkeypatch.setattr(cosigner, "FIRST_RETRY", 0.02)
    monkeypatch.setattr(cosigner, "LAST_RETRY", 0.1)
    monkeypatch.setattr(witnesslink, "TIMEOUT", 0.3)


def watched_by(data_dir: Path, *asked: FakeWitness, **changes: object) -> Settings:
    return settings_for(
        data_dir,
        witnesses=tuple(one.url for one in asked),
        witness_keys=tuple(one.key for one in asked),
        **changes,
    )


async def opened(data_dir: Path, *asked: FakeWitness, known: bool = True) -> Service:
    """A service that signs; the witnesses know the log unless they are not to."""
    service = await app.open_service(watched_by(data_dir, *asked), signs=True)
    for each in asked if known else ():
        each.know(verifier_of(key_of(data_dir)).encode())
    return service


async def write(service: Service, count: int = 1) -> None:
    for _ in range(count):
        await service.set(ACME, Draft("N", Plaintext("v")))


def cosigned(data_dir: Path, *by: FakeWitness) -> int:
    """The size of the newest cosigned checkpoint, which has to be by just these; 0 without one."""
    path = data_dir / "checkpoint.cosigned"
    if not path.exists():
        return 0
    found = ScalesCheckpoint.from_text(path.read_text())
    valid = VkeySet(*(each.vkey for each in by)).verify(found.signatures, found)
    assert len(valid) == len(by) == len(found.signatures) - 1
    ours = checkpoint.verify(path.read_bytes(), [verifier_of(key_of(data_dir))])
    assert ours.size == found.size
    return found.size


def size_at(data_dir: Path, one: FakeWitness) -> int:
    """What is recorded of the size that a witness has cosigned."""
    return int(states(data_dir).get(one.vkey.name, {}).get("size", 0))


def states(data_dir: Path) -> dict[str, dict[str, Any]]:
    path = data_dir / "witnesses.json"
    found = json.loads(path.read_bytes()) if path.exists() else []
    return {state["name"]: state for state in found}


# --- a server, as it is used ------------------------------------------------------------------


async def test_a_server_with_a_witness(data_dir: Path, one: FakeWitness) -> None:
    key = await issue_key(data_dir)
    # Makes the signing key, which the witness has to know.
    await (await app.open_service(settings_for(data_dir), signs=True)).close()
    log = verifier_of(key_of(data_dir))
    one.know(log.encode())
    options = (f"--witness={one.url}", f"--witness-key={one.key}", "--workers=2")
    async with serving(data_dir, *options) as server, session(server.url, key) as client:
        async with client.post(SECRETS, json={"name": "N", "value": "v"}) as answer:
            seq = int(answer.headers["Audit-Seq"])
        await until(lambda: cosigned(data_dir, one) > seq)
        # The log is idle: what is published first is cosigned as well.
        await until(lambda: newest(data_dir).size == cosigned(data_dir, one))
        stored = (data_dir / "checkpoint.cosigned").read_text()
        await until(lambda: (data_dir / "checkpoint").read_text() == stored)
        for query in ("", "?cosigned=true"):
            async with client.get(f"/api/v1/log/checkpoint{query}") as answer:
                assert await answer.text() == stored
        async with client.get(f"/api/v1/log/proof/{seq}?cosigned=true") as answer:
            proof = tlogproof.parse(await answer.read())
        assert proof.signed.decode() == stored
        tlogproof.verify(raw_lines(data_dir)[seq], proof, [log, verifier(one)])
        # Whichever process is asked.
        for _ in range(4):
            async with aiohttp.request("GET", f"{server.url}/readyz") as answer:
                health = await answer.json()
            assert health["status"] == "ready"
            (shown,) = health["witnesses"]
            assert (shown["name"], shown["error"]) == (one.vkey.name, None)
            assert shown["size"] == cosigned(data_dir, one)
            assert shown["cosigned_at"].endswith("Z")
        variables = {f"{PREFIX}DIR": str(data_dir), f"{PREFIX}KEY": MASTER_KEY}
        told = await run("status", variables=variables)
        assert (told.code, one.vkey.name in told.out) == (0, True), told
        async with client.get("/api/v1/log/checkpoint?cosigned=maybe") as answer:
            assert answer.status == 422
    # One of the two workers asks, and only for what is new: first for what it is to begin with.
    assert [asked.status for asked in one.asked] == [200] * len(one.asked)
    assert one.asked[0].old == 0
    check_signed(data_dir, key_of(data_dir))


def verifier(of: FakeWitness) -> Verifier:
    return Verifier.decode(of.key)


async def test_without_a_witness_nothing_is_cosigned(data_dir: Path) -> None:
    key = await issue_key(data_dir)
    async with serving(data_dir) as server, session(server.url, key) as client:
        await until(lambda: newest(data_dir).size > 0)
        async with client.get("/api/v1/log/checkpoint?cosigned=true") as answer:
            assert (answer.status, (await answer.json())["code"]) == (404, "not_cosigned")
        async with client.get("/api/v1/log/proof/1?cosigned=true") as answer:
            assert (answer.status, (await answer.json())["code"]) == (404, "not_cosigned")
        async with client.get("/readyz") as answer:
            assert "witnesses" not in await answer.json()
    assert not (data_dir / "checkpoint.cosigned").exists()
    assert not (data_dir / "witnesses.json").exists()


# --- whatever a witness does --------------------------------------------------------------------


async def hang() -> web.Response:
    await asyncio.sleep(3600)
    raise AssertionError


def status(code: int, text: str = "") -> Callable[[FakeWitness], Awaitable[web.Response]]:
    async def answer(_: FakeWitness) -> web.Response:
        return web.Response(status=code, text=text, headers={"Location": "/prefix/add-checkpoint"})

    return answer


async def hangs(_: FakeWitness) -> web.Response:
    return await hang()


async def hangs_up(_: FakeWitness) -> web.Response:
    # aiohttp closes the connection.
    raise asyncio.CancelledError


async def ahead(_: FakeWitness) -> web.Response:
    return size_answer(1 << 40)


async def behind(_: FakeWitness) -> web.Response:
    """Whatever is sent, it is another size."""
    return size_answer(1)


async def no_size(_: FakeWitness) -> web.Response:
    answer = size_answer(1)
    answer.body = b"01\n"
    return answer


async def other_statement(each: FakeWitness) -> web.Response:
    return signed_answer(each.cosign(ScalesCheckpoint("another/log", 7, bytes(32), [])))


async def no_time(each: FakeWitness) -> web.Response:
    return signed_answer(each.cosign(ScalesCheckpoint("another/log", 7, bytes(32), []), 0))


async def other_key(_: FakeWitness) -> web.Response:
    other = FakeWitness("witness.example/w1")
    return signed_answer(other.cosign(ScalesCheckpoint("another/log", 7, bytes(32), [])))


FAULTS: dict[str, tuple[Callable[[FakeWitness], Awaitable[web.Response]], str]] = {
    "never answers": (hangs, "has not answered within 0.3 seconds"),
    "hangs up": (hangs_up, "can't be reached"),
    "is broken": (status(500), "answers 500"),
    "redirects": (status(307), "answers 307"),
    "knows neither": (status(404), "does not know the log"),
    "knows another key": (status(403), "does not know the log's key"),
    "finds it malformed": (status(400), "malformed"),
    "finds the proof wrong": (status(422), "another log under this name"),
    "has another root": (status(409), "another log under this name"),
    "is ahead": (ahead, "cut off, or another one has its name"),
    "never agrees": (behind, "another process asks"),
    "tells no size": (no_size, "not a number"),
    "signs nothing": (status(200), "no signature of the witness's key"),
    "answers garbage": (status(200, "\u2014 garbage\n"), "not"),
    "answers without end": (status(200, "\u2014 w AAAAAAAA\n" * 20000), "too many"),
    "signs something else": (other_statement, "is not valid"),
    "gives no time": (no_time, "no time"),
    "signs with another key": (other_key, "no signature of the witness's key"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_witness_that(
    name: str, data_dir: Path, one: FakeWitness, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Signing and reading go on; nothing is kept, the reason is told once; and when it is over, the
    newest checkpoint is cosigned at once.
    """
    caplog.set_level(logging.INFO)
    fault, reason = FAULTS[name]
    one.fault = lambda: fault(one)
    service = await opened(data_dir, one)
    try:
        for _ in range(3):
            await write(service)
            async with asyncio.timeout(0.25):
                await service.get(ACME, "N")
            size = len(read_log(data_dir))
            await until(lambda size=size: newest(data_dir).size >= size)  # type: ignore[misc]
        await until(lambda: len(one.asked) >= 2)
        await until(lambda: bool(states(data_dir)))
        state = states(data_dir)[one.vkey.name]
        assert (state["size"], state["cosigned_at"]) == (0, 0.0)
        assert reason in state["error"]
        assert state["since"] > 0
        assert cosigned(data_dir) == 0
        told = [record for record in caplog.records if "does not cosign" in record.message]
        assert len(told) == 1
        size, asked = newest(data_dir).size, len(one.asked)
        one.fault = None
        await until(lambda: cosigned(data_dir, one) == size)
        # None of those that were missed.
        assert {late.size for late in one.asked[asked:] if late.status == 200} == {size}
        await until(lambda: states(data_dir)[one.vkey.name]["error"] is None)
        assert "cosigns again" in caplog.text
    finally:
        await service.close()
    check_signed(data_dir, key_of(data_dir))


async def test_a_witness_that_is_down_and_comes_back(data_dir: Path, quick: None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = FakeWitness().key
    settings = settings_for(
        data_dir, witnesses=(f"http://u:canary@127.0.0.1:{port}/",), witness_keys=(key,)
    )
    service = await app.open_service(settings, signs=True)
    await write(service)
    await until(lambda: any(state["error"] for state in states(data_dir).values()))
    await service.close()
    (state,) = states(data_dir).values()
    assert "can't be reached" in state["error"]
    assert "canary" not in state["error"]
    assert newest(data_dir).size == len(read_log(data_dir))


# --- what it knows ------------------------------------------------------------------------------


async def test_it_is_asked_from_where_it_is(data_dir: Path, one: FakeWitness, quick: None) -> None:
    """Also by another process; and if nobody knows any more where that is, it tells."""
    for lose in (False, False, True):
        if lose:
            (data_dir / "witnesses.json").unlink()
        service = await opened(data_dir, one)
        for _ in range(3):
            await write(service, 7)
            size = len(read_log(data_dir))
            # An answer that came while it closed would not be remembered.
            await until(lambda size=size: size_at(data_dir, one) == size)  # type: ignore[misc]
            assert cosigned(data_dir, one) == size
        await service.close()
    steps = [(asked.old, asked.size, asked.status) for asked in one.asked]
    conflicts = [step for step in steps if step[2] != 200]
    # At the very first it has cosigned nothing, and that is what it is asked from.
    assert [(old, code) for old, _, code in conflicts] == [(0, 409)]
    done = [step for step in steps if step[2] == 200]
    assert len(done) >= 9
    # Each goes on from the one before.
    assert [old for old, _, _ in done] == [0, *(size for _, size, _ in done[:-1])]


async def test_tiles_that_are_wrong_do_not_spoil_the_proof(
    data_dir: Path, one: FakeWitness, quick: None
) -> None:
    service = await opened(data_dir, one)
    await write(service, 20)
    size = len(read_log(data_dir))
    await until(lambda: cosigned(data_dir, one) == size)
    tile = data_dir / "tree/tile/0/000"
    one.fault = hang
    await write(service, 3)
    await until(lambda: newest(data_dir).size == size + 3)
    tile.write_bytes(bytes(tile.stat().st_size))
    one.fault = None
    await until(lambda: cosigned(data_dir, one) == size + 3)
    assert all(asked.status in (0, 200) for asked in one.asked)
    await service.close()


async def test_a_log_that_was_put_back_is_found_out(
    data_dir: Path, one: FakeWitness, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """All of an older state, the key and the checkpoints too: only the witness knows better."""
    older = data_dir.with_name("older")

    async def goes_on(place: Path, count: int) -> None:
        service = await app.open_service(watched_by(place, one), signs=True)
        one.know(verifier_of(key_of(place)).encode())
        await write(service, count)
        size = len(read_log(place))
        await until(lambda: newest(place).size == size)
        await until(lambda: size_at(place, one) == size)
        await service.close()

    await goes_on(data_dir, 3)
    shutil.copytree(data_dir, older)
    shutil.copy(key_of(data_dir), key_of(older))
    await goes_on(data_dir, 5)
    # It is behind the witness, and then no more, but another log.
    for count, reason in ((1, "the log was cut off"), (9, "another log under this name")):
        caplog.clear()
        service = await app.open_service(watched_by(older, one), signs=True)
        await write(service, count)
        await until(lambda reason=reason: reason in caplog.text)  # type: ignore[misc]
        await until(lambda reason=reason: reason in states(older)[one.vkey.name]["error"])  # type: ignore[misc]
        await service.close()


# --- several ------------------------------------------------------------------------------------


async def test_one_of_two_is_away(
    data_dir: Path, one: FakeWitness, two: FakeWitness, quick: None
) -> None:
    """The other one's cosignatures are kept; when it is back, both are, though nothing is new."""
    two.fault = hang
    service = await opened(data_dir, one, two)
    for _ in range(3):
        await write(service)
        size = len(read_log(data_dir))
        await until(lambda size=size: cosigned(data_dir, one) == size)  # type: ignore[misc]
    two.fault = None
    await until(lambda: size_at(data_dir, two) == size)
    assert cosigned(data_dir, one, two) == size
    assert (data_dir / "checkpoint").read_bytes() == (data_dir / "checkpoint.cosigned").read_bytes()
    # A witness that is not asked any more is not shown any more.
    await service.close()
    service = await opened(data_dir, two)
    await until(lambda: list(states(data_dir)) == [two.vkey.name])
    await service.close()
    service = await opened(data_dir)
    await until(lambda: not states(data_dir))
    await service.close()


async def test_who_does_not_sign_any_more_keeps_nothing(data_dir: Path, one: FakeWitness) -> None:
    service = await app.open_service(settings_for(data_dir))
    await write(service)
    await sign(service)
    note_before = (data_dir / "checkpoint").read_bytes()
    parsed = ScalesCheckpoint.from_text(note_before.decode())
    signature = note.parse_signatures(f"{one.cosign(parsed).serialize()}\n")
    await service.signer.close()
    service.signer._tree.cosign(note_before, signature)
    service.signer._tree.record_witnesses([WitnessState("w", 1)])
    assert not (data_dir / "checkpoint.cosigned").exists()
    assert not (data_dir / "witnesses.json").exists()
    service.trail.close()


# --- what is set --------------------------------------------------------------------------------

W1, W2 = FakeWitness("w.example/1").key, FakeWitness("w.example/2").key
PLAIN = note.Signer("w.example/1", bytes(32)).verifier.encode()
LONG = FakeWitness("w" * 129).key
MANY = [FakeWitness(f"w{number}").key for number in range(9)]

WRONG: dict[str, tuple[str, str, str]] = {
    "no key": ("http://a/", "", "Give each --witness its --witness-key"),
    "no witness": ("", W1, "0 witnesses and 1 keys"),
    "one key for two": ("http://a http://b", W1, "2 witnesses and 1 keys"),
    "no URL": ("canary", W1, "is not one of http or https"),
    "another scheme": ("ftp://canary/", W1, "is not one of http or https"),
    "a port that is none": ("http://canary:x/", W1, "is not one of http or https"),
    "no host": ("http:///canary", W1, "is not one of http or https"),
    "a query": ("http://a/?canary", W1, "is not one of http or https"),
    "not a key": ("http://a/", "w.example+12345678", "is not the verifier key of a witness"),
    "a damaged key": ("http://a/", W1[:-6] + "AAAAA=", "is not the verifier key of a witness"),
    "a key of a log": ("http://a/", PLAIN, "type 4"),
    "a long name": ("http://a/", LONG, "at most 128 bytes"),
    "twice the same": ("http://a/ http://b/", f"{W1} {W1}", "the same name"),
    "too many": ("http://a/ " * 9, " ".join(MANY), "More than 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_a_witness(name: str) -> None:
    urls, keys, reason = WRONG[name]
    settings = from_environment({f"{PREFIX}WITNESS": urls, f"{PREFIX}WITNESS_KEY": keys})
    with pytest.raises(ConfigurationError) as caught:
        witnesses(settings)
    assert reason in str(caught.value)
    assert "canary" not in str(caught.value)


def test_what_can_be_witnesses() -> None:
    settings = from_environment(
        {f"{PREFIX}WITNESS": "http://a/x\nhttps://[::1]:4", f"{PREFIX}WITNESS_KEY": f"{W1}\t{W2}"}
    )
    found = witnesses(settings)
    assert [each.url for each in found] == ["http://a/x", "https://[::1]:4"]
    assert [each.verifier.name for each in found] == ["w.example/1", "w.example/2"]


async def test_a_server_does_not_start_with_a_witness_that_has_no_key(data_dir: Path) -> None:
    variables = {f"{PREFIX}DIR": str(data_dir)}
    found = await run("serve", "--witness=http://127.0.0.1:1/", "--port=0", variables=variables)
    assert found.code == 2
    assert "--witness-key" in found.err


# --- the words ----------------------------------------------------------------------------------


def test_a_checkpoint_with_all_cosignatures_fits_into_a_line() -> None:
    """Of eight witnesses with the longest names, of a log with the longest one."""
    log = note.Signer("l" * 320, bytes(32))
    statement = Checkpoint(log.name, (1 << 62) + 1, bytes(32))
    lines = [note.Signature("w" * 127 + str(n), bytes(4), bytes(72)) for n in range(8)]
    signed = witness.merge(statement.sign(log), None, lines)
    assert len(signed) <= 4096


@pytest.mark.parametrize("answer", [b"", b"1", b"1\r\n", b"-1\n", b"01\n", b"1\n\n", b"\xff\n"])
def test_what_is_no_size(answer: bytes) -> None:
    with pytest.raises(Unverified):
        witness.parse_size(answer)


def test_no_proof_is_longer_than_63_hashes() -> None:
    assert witness.request(5, [bytes(32)] * 63, b"x\n").count(b"\n") == 66
    with pytest.raises(Unverified):
        witness.request(5, [bytes(32)] * 64, b"x\n")
