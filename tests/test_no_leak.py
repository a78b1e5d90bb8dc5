"""No leak: canaries planted through every entrance turn up nowhere but in front of their caller."""

import asyncio
import base64
import binascii
import contextlib
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from msgspec import Raw
from yarl import URL

from flowmason_secrets import app
from flowmason_secrets.api import answers, shapes, vault, vaultface
from flowmason_secrets.api import server as api_server
from flowmason_secrets.api.problems import problem_response
from flowmason_secrets.config import Settings
from flowmason_secrets.core import errors
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft, IssuedKey, KeyDraft, Resolved, Revealed, Written
from flowmason_secrets.core.errors import SecretsError
from flowmason_secrets.core.events import Event, Receipt
from flowmason_secrets.core.intents import Intent
from flowmason_secrets.core.keyring import Keyring, MasterKey, Plaintext
from flowmason_secrets.core.records import ApiKey, Metadata, PutApiKey, PutSecret, SecretRecord
from flowmason_secrets.core.template import parse
from flowmason_secrets.library import AsyncSecretsService
from flowmason_secrets.service import Service
from flowmason_secrets.storage.durable import Durable

from .harness.server import Inside, issue_key, settings_for

PATIENCE = 20.0
SECRETS = "/api/v1/secrets"
API_KEYS = "/api/v1/auth/api-keys"


def canary() -> str:
    """A value that no other bytes contain: hex digits in the middle, awkward characters around."""
    return f'ca"n\\é&{os.urandom(20).hex()}%\n\U0001f511'


def core_of(secret: str) -> bytes:
    """The hex digits of a canary or a key, which JSON, URLs and `repr` leave as they are."""
    digits = re.search("[0-9a-f]{40,}", secret)
    assert digits is not None
    return digits[0].encode()


def forms(secret: str) -> dict[str, bytes]:
    """What a secret looks like in the encodings that programs use by accident."""
    core = core_of(secret)
    found = {"as it is": core, "upper": core.upper(), "hex": binascii.hexlify(core)}
    found["HEX"] = found["hex"].upper()
    found["utf-16"] = core.decode().encode("utf-16-le")
    for shift in range(3):
        # Base64 of a text depends on where in a group of three bytes it begins.
        whole = base64.b64encode(b"\0" * shift + core)
        inner = whole[4 if shift else 0 : len(whole) // 4 * 4 - 4]
        found[f"base64 shifted {shift}"] = inner
        found[f"urlsafe base64 shifted {shift}"] = inner.translate(bytes.maketrans(b"+/", b"-_"))
    return found


def found_in(data: bytes, planted: dict[str, str]) -> list[str]:
    """Which of the planted secrets are in `data`, and how they are written there."""
    return [
        f"{what} ({how})"
        for what, secret in planted.items()
        for how, form in forms(secret).items()
        if form in data
    ]


@pytest.mark.parametrize("how", ["utf-8", "json", "url", "hex", "base64", "urlsafe", "repr"])
@pytest.mark.parametrize("shift", range(4))
def test_a_leak_would_be_found(how: str, shift: int) -> None:
    for secret in (canary(), f"fm_live_{os.urandom(24).hex()}"):
        text = "x" * shift + secret + "y" * shift
        leaked = {
            "utf-8": text.encode(),
            "json": json.dumps({"value": text}).encode(),
            "url": quote(text, safe="").encode(),
            "hex": text.encode().hex().encode(),
            "base64": base64.b64encode(text.encode()),
            "urlsafe": base64.urlsafe_b64encode(text.encode()),
            "repr": repr(text).encode(),
        }[how]
        assert found_in(b"before " + leaked + b" after", {"it": secret})
        assert not found_in(b"before " + leaked + b" after", {"another": canary()})


class Answer(NamedTuple):
    """One response, header and body together in `everything`."""

    status: int
    body: bytes
    everything: bytes


class Debugging:
    """A server in a process of its own that logs all it can, under a umask that allows all."""

    def __init__(self, root: Path, master_key: str) -> None:
        self.data_dir = root / "secrets"
        self.log = root / "log"
        scratch = root / "scratch"
        scratch.mkdir(exist_ok=True)
        self.scratch = scratch
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FLOWMASON_SECRETS_")}
        clean |= {"FLOWMASON_SECRETS_KEY": master_key, "TMPDIR": str(scratch)}
        clean |= {"FLOWMASON_SECRETS_BODY_TIMEOUT": "1", "PYTHONASYNCIODEBUG": "1"}
        place = f"--data-dir={self.data_dir}"
        printed = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowmason_secrets", "-vv", "serve", "--port=0", place],
                env=clean,
                stdout=log,
                stderr=subprocess.STDOUT,
                umask=0,
                cwd=scratch,
            )
        while b"ready on " not in (ready := self.log.read_bytes()[printed:]):
            assert self.process.poll() is None, ready.decode()
            time.sleep(0.02)
        port = ready.decode().partition("ready on ")[2].split()[0].rpartition(":")[2]
        self.address = ("127.0.0.1", int(port))

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0

    def send(self, data: bytes) -> Answer:
        """The answer to these very bytes."""
        with socket.create_connection(self.address, timeout=PATIENCE) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            response = http.client.HTTPResponse(connection)
            response.begin()
            body = response.read()
        headers = "".join(f"{name}: {value}\n" for name, value in response.getheaders())
        return Answer(response.status, body, headers.encode() + body)

    def ask(self, method: str, path: str, body: bytes | None, *headers: str) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close", *headers]
        if body is not None and "Transfer-Encoding: chunked" not in headers:
            lines.append(f"Content-Length: {len(body)}")
        return self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))

    def files(self) -> dict[Path, bytes]:
        """Everything that is in the data directory or in the place for temporary files."""
        found = {}
        for root in (self.data_dir, self.scratch):
            for path in root.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file():
                        found[path] = path.read_bytes()
        return found


def command_lines() -> bytes:
    """What `ps` shows of every process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return b"\n".join(found)


class Planted:
    """Canaries by where they were planted, and the answers that came back."""

    def __init__(self, root: Path) -> None:
        self.secrets: dict[str, str] = {}
        self.answers: list[tuple[str, Answer]] = []
        self.master_key = os.urandom(24).hex()
        self.key = asyncio.run(_first_key(root / "secrets", self.master_key))
        self.secrets["the master key"] = self.master_key
        self.secrets["the API key"] = self.key
        self.server = Debugging(root, self.master_key)

    def new(self, where: str) -> str:
        """A new canary that is about to be planted there."""
        self.secrets[where] = canary()
        return self.secrets[where]

    def plant(
        self,
        where: str,
        status: int,
        body: Callable[[str], bytes],
        *headers: str,
        path: str = SECRETS,
        method: str = "POST",
    ) -> Answer:
        """Plant a canary in a body and keep the answer, which must not show it."""
        sent = body(self.new(where))
        live = [f"Authorization: Bearer {self.key}", "Content-Type: application/json"]
        answer = self.server.ask(method, path, sent, *live, *headers)
        assert answer.status == status, (where, answer)
        self.answers.append((where, answer))
        return answer

    def unknown_key(self, where: str, *headers: str) -> None:
        """Show a key that nobody knows; `{}` in the headers stands for it."""
        self.secrets[where] = key = f"fm_live_{os.urandom(24).hex()}"
        sent = [header.replace("{}", key) for header in headers]
        answer = self.server.ask("GET", f"{SECRETS}/KEPT", None, *sent)
        assert answer.status in (400, 401), (where, answer)
        self.answers.append((where, answer))


async def _first_key(data_dir: Path, master_key: str) -> str:
    settings = app.with_overrides(Settings(), master_keys=(master_key,), data_dir=data_dir)
    before = os.umask(0)
    service = await app.open_service(settings)
    try:
        return (await service.keys.issue(app.local_caller("acme"), KeyDraft("first"))).raw.reveal()
    finally:
        await service.close()
        os.umask(before)


def _document(**more: object) -> Callable[[str], bytes]:
    return lambda value: json.dumps({"name": "KEPT", "value": value, **more}).encode()


def _through_bodies(planted: Planted) -> None:
    plant = planted.plant
    plant("a new secret", 201, _document())
    plant("an update", 200, _document(description="d", category="token"))
    plant("a chunked body", 200, _chunks, "Transfer-Encoding: chunked")
    plant("a wrong category", 422, _document(category="nonsense"))
    plant("a wrong time", 422, _document(expires_at="nonsense"))
    plant("a wrong name", 422, _document(name="a/b"))
    plant("a wrong description", 422, _document(description=["x"]))
    plant("an unknown field", 422, _document(unknown=1))
    plant("a value too long", 422, lambda value: _document()(value + "x" * 65536))
    plant("a body too long", 413, lambda value: _document()(value * 10_000))
    plant("a list for a value", 422, lambda value: b'{"name":"x","value":%b}' % _json([value]))
    plant("an object", 422, lambda value: b'{"name":"x","value":%b}' % _json({"secret": value}))
    plant("a bare string", 422, _json)
    plant("a list", 422, lambda value: _json([{"name": "x", "value": value}]))
    plant("malformed JSON behind it", 400, lambda value: _document()(value) + b"}")
    plant("malformed JSON around it", 400, lambda value: _document()(value)[:-1])
    plant("a broken string", 400, lambda value: b'{"name":"x","value":"%b\xff"}' % value.encode())
    plant("a surrogate", 400, lambda value: _document()(value)[:-2] + b'\\ud800"}')
    plant("no JSON at all", 400, str.encode)
    plant("a duplicate", 200, lambda value: b'{"value":%b,' % _json(value) + _document()("y")[1:])
    plant("a failing condition", 412, _document(), 'If-Match: "0-0"')
    plant("a creation of what is there", 412, _document(), "If-None-Match: *")
    plant("a wrong condition", 400, _document(), "If-Match: nonsense")
    plant("a wrong route", 404, _document(), path="/api/v2/secrets")
    plant("a wrong method", 405, _document(), method="PUT")
    plant("a wrong query", 422, _document(), path=f"{SECRETS}?x=1")
    plant("a body for an API key", 422, _document(), path=API_KEYS)
    plant("a document without its secret", 422, _with_absent, path=f"{SECRETS}/resolve")
    plant("a body of a deletion", 404, _document(), path=f"{SECRETS}/ABSENT", method="DELETE")


def _with_absent(value: str) -> bytes:
    return _json({"document": [value, "{{secrets.ABSENT}}"]})


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


def _chunks(value: str) -> bytes:
    body = _document()(value)
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def _through_the_framing(planted: Planted) -> None:
    live = f"POST {SECRETS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {planted.key}\r\n"
    live += "Connection: close\r\nContent-Type: application/json\r\n"
    framings = {
        "a broken chunk": "Transfer-Encoding: chunked\r\n\r\nZZ{}\r\n",
        "a body that is cut": "Content-Length: 5000\r\n\r\n{}",
        "a body that is not gzip": "Content-Encoding: gzip\r\nContent-Length: 56\r\n\r\n{}",
        "two lengths": "Content-Length: 1\r\nContent-Length: 56\r\n\r\n{}",
        "a second request": "Content-Length: 0\r\n\r\n{} HTTP/1.1\r\n\r\n",
    }
    for where, framing in framings.items():
        planted.secrets[where] = value = os.urandom(28).hex()
        sent = (live + framing.replace("{}", value)).encode()
        planted.answers.append((where, planted.server.send(sent)))
    planted.secrets["an unknown method"] = value = os.urandom(28).hex()
    planted.answers.append(
        ("an unknown method", planted.server.send(f"{value} / HTTP/1.1\r\n\r\n".encode()))
    )


def _through_headers(planted: Planted) -> None:
    unknown = planted.unknown_key
    unknown("an unknown key", "Authorization: Bearer {}")
    unknown("an unknown X-API-Key", "X-API-Key: {}")
    unknown("another scheme", "Authorization: Token {}")
    unknown("no scheme", "Authorization: {}")
    unknown("basic", "Authorization: Basic {}")
    unknown("a key with text behind it", "Authorization: Bearer {} and more")
    unknown("two keys", "Authorization: Bearer {}", "Authorization: Bearer {}")
    unknown("a key and another one", "Authorization: Bearer {}", "X-API-Key: {}")
    unknown("a header that is too long", "Authorization: Bearer {}" + "x" * 9000)
    unknown("a header with a control character", "Authorization: Bearer {}\x01\0")
    unknown("a header whose name is broken", "Authorization\x01: Bearer {}")
    unknown("a header without a colon", "Authorization Bearer {}")


def _through_paths(planted: Planted) -> None:
    """A raw API key where its id belongs, which somebody who wants to revoke it may try."""
    live = f"Authorization: Bearer {planted.key}"
    planted.secrets["the place of an id"] = key = f"fm_live_{os.urandom(24).hex()}"
    answer = planted.server.ask("DELETE", f"{API_KEYS}/{key}", None, live)
    assert answer.status in (404, 422)
    planted.answers.append(("the place of an id", answer))
    planted.secrets["a query"] = key = f"fm_live_{os.urandom(24).hex()}"
    answer = planted.server.ask("GET", f"{SECRETS}?api_key={key}", None)
    assert answer.status in (401, 422)
    planted.answers.append(("a query", answer))


def _through_a_narrow_key(planted: Planted) -> None:
    live = f"Authorization: Bearer {planted.key}"
    body = _json({"name": "narrow", "scopes": ["read"]})
    made = planted.server.ask("POST", API_KEYS, body, live, "Content-Type: application/json")
    assert made.status == 201
    narrow = json.loads(made.body)["raw_key"]
    planted.secrets["a key that was made"] = narrow
    refused = planted.server.ask(
        "POST",
        SECRETS,
        _document()(planted.new("a refused write")),
        f"X-API-Key: {narrow}",
        "Content-Type: application/json",
    )
    assert refused.status == 403
    planted.answers.append(("a refused write", refused))
    assert planted.server.ask("GET", f"{SECRETS}/KEPT", None, f"X-API-Key: {narrow}").status == 403


async def _through_the_library(planted: Planted) -> None:
    data_dir = planted.server.data_dir
    async with AsyncSecretsService("acme", planted.master_key, data_dir) as secrets:
        await secrets.set("LIBRARY", planted.new("the library"))
        assert await secrets.get("LIBRARY") == planted.secrets["the library"]
        with pytest.raises(errors.InvalidInput):
            await secrets.set("a/b", planted.new("a refused library call"))


def _read_back(planted: Planted) -> None:
    """Where a value may go: to a caller who asks for it."""
    live = f"Authorization: Bearer {planted.key}"
    body = _document()(planted.new("the last update"))
    answer = planted.server.ask("POST", SECRETS, body, live, "Content-Type: application/json")
    assert answer.status == 200
    read = planted.server.ask("GET", f"{SECRETS}/KEPT", None, live)
    assert json.loads(read.body)["value"] == planted.secrets["the last update"]
    for path in (SECRETS, f"{SECRETS}/KEPT/metadata", "/api/v1/auth/audit-log?limit=1000"):
        answer = planted.server.ask("GET", path, None, live)
        assert answer.status == 200
        planted.answers.append((path, answer))
    for path in (API_KEYS, "/api/v1/auth/whoami", "/readyz"):
        planted.answers.append((path, planted.server.ask("GET", path, None, live)))


def _under_another_master_key(planted: Planted, root: Path) -> None:
    planted.server.stop()
    other = planted.secrets["another master key"] = os.urandom(24).hex()
    planted.server = Debugging(root, other)
    live = f"Authorization: Bearer {planted.key}"
    answer = planted.server.ask("GET", f"{SECRETS}/KEPT", None, live)
    assert (answer.status, json.loads(answer.body)["code"]) == (500, "decryption_failed")
    planted.answers.append(("undecryptable", answer))


class Aftermath(NamedTuple):
    """What was left of all the planting: while the server ran, and after it stopped."""

    planted: Planted
    running: dict[Path, bytes]
    stopped: dict[Path, bytes]
    log: bytes
    processes: bytes


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """Canaries through every entrance of a server that logs all it can."""
    root = tmp_path_factory.mktemp("leak")
    planted = Planted(root)
    try:
        _through_bodies(planted)
        _through_the_framing(planted)
        _through_headers(planted)
        _through_paths(planted)
        _through_a_narrow_key(planted)
        asyncio.run(_through_the_library(planted))
        _read_back(planted)
        running = planted.server.files()
        processes = command_lines()
        _under_another_master_key(planted, root)
    finally:
        planted.server.stop()
    stopped = planted.server.files()
    return Aftermath(planted, running, stopped, planted.server.log.read_bytes(), processes)


def test_nothing_is_in_the_log(aftermath: Aftermath) -> None:
    # What it prints is here; that it prints all it can, `-vv`, the process list shows.
    assert aftermath.log.count(b"ready on ") == 2
    assert found_in(aftermath.log, aftermath.planted.secrets) == []


def test_nothing_is_in_an_answer_but_the_values_that_were_asked_for(aftermath: Aftermath) -> None:
    assert len(aftermath.planted.answers) > 50
    leaks = [
        (where, leak)
        for where, answer in aftermath.planted.answers
        for leak in found_in(answer.everything, aftermath.planted.secrets)
    ]
    assert leaks == []


@pytest.mark.parametrize("when", ["running", "stopped"])
def test_nothing_is_in_a_file(aftermath: Aftermath, when: str) -> None:
    files = aftermath.running if when == "running" else aftermath.stopped
    kinds = {path.suffix for path in files}
    assert {".secret", ".meta", ".ndjson", ".json", ".sqlite3"} <= kinds
    assert b"auth.failed" in b"".join(aftermath.stopped.values())
    leaks = [
        (path.name, leak)
        for path, data in files.items()
        for leak in found_in(data, aftermath.planted.secrets)
    ]
    assert leaks == []


def test_nothing_is_in_the_process_list(aftermath: Aftermath) -> None:
    assert b"flowmason_secrets\0-vv" in aftermath.processes
    assert found_in(aftermath.processes, aftermath.planted.secrets) == []


def test_the_modes_of_all_files_under_a_umask_that_allows_all(aftermath: Aftermath) -> None:
    root = aftermath.planted.server.data_dir
    seen: dict[str, set[str]] = {}
    for path in [root, *root.rglob("*")]:
        public = path.suffix == ".ndjson" or path.name == "checkpoint"
        kind = "directory" if path.is_dir() else "for shippers" if public else "file"
        mode = f"{stat.S_IMODE(path.stat().st_mode):o}"
        seen.setdefault(f"{kind} {mode}", set()).add(path.name)
    assert seen.keys() == {"directory 700", "file 600", "for shippers 640"}, seen


class Watching(Durable):
    """Keeps everything that is written, whoever writes it."""

    def __init__(self) -> None:
        self.written: list[tuple[str, bytes]] = []

    def write(self, descriptor: int, data: bytes) -> None:
        self.written.append((os.readlink(f"/proc/self/fd/{descriptor}"), data))
        super().write(descriptor, data)

    def put_slot(self, descriptor: int, data: bytes) -> None:
        self.written.append((os.readlink(f"/proc/self/fd/{descriptor}"), data))
        super().put_slot(descriptor, data)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names descriptors through /proc")
async def test_nothing_is_written_in_clear_on_its_way(data_dir: Path) -> None:
    durable = Watching()
    service = await app.open_service(settings_for(data_dir), durable)
    caller = app.local_caller("acme")
    planted: dict[str, str] = {}
    try:
        drafts = []
        for number in range(40):
            planted[f"secret {number}"] = value = canary()
            drafts.append(Draft(f"N{number % 25}", Plaintext(value), "description"))
        await asyncio.gather(*(service.set(caller, draft) for draft in drafts))
        issued = await service.keys.issue(caller, KeyDraft("key"))
        planted["API key"] = issued.raw.reveal()
        await service.keys.revoke(caller, issued.key.id)
    finally:
        await service.close()
    staged = [data for name, data in durable.written if "/staged/" in name]
    assert sum(data.count(b'"token":"gAAAA') for data in staged) == 40
    assert any(b"put_api_key" in data for data in staged)
    assert [leak for _, data in durable.written for leak in found_in(data, planted)] == []


VALUE = canary()
RAW_KEY = f"fm_live_{os.urandom(24).hex()}"
MASTER = os.urandom(24).hex()


def _objects() -> list[object]:
    value, receipt = Plaintext(VALUE), Receipt(1, "id")
    metadata = Metadata("i", "N", "", "other", "", "", None, None, 1, "r", "k")
    digest = os.urandom(32).hex()
    key = ApiKey("key_1", "acme", "n", digest, ("full",), (), "", None, None)
    event = Event("i", "secret.create", "success", "acme", "secret", "i")
    keyring = Keyring([MasterKey.of(MASTER)])
    keyring.derive("acme", keyring.active)
    token = keyring.encrypt("acme", value)
    put = PutSecret("acme", metadata, token)
    return [
        value,
        Draft("N", value),
        Revealed(metadata, value, receipt),
        Written(metadata, True, receipt),
        IssuedKey(key, Plaintext(RAW_KEY), receipt),
        put,
        PutApiKey(key),
        Intent(event, (), put),
        SecretRecord(metadata, token, 1),
        shapes.SecretIn("N", VALUE),
        vault.Entry(Raw(json.dumps({"a": VALUE}))),
        shapes.SecretValue("N", VALUE, "other", False, 1),
        Resolved(value, {"N": receipt}),
        parse(Plaintext(f'["{RAW_KEY}", "{{{{secrets.N}}}}"]')),
        shapes.ResolveIn(Raw(json.dumps(VALUE).encode())),
        shapes.resolved_out(Resolved(value, {"N": receipt})),
        shapes.batch_out([Revealed(metadata, value, receipt)]),
        shapes.ApiKeyIssued(shapes.api_key_out(key, 0.0), RAW_KEY),
        MasterKey.of(MASTER),
        keyring,
        Settings(master_keys=(MASTER,)),
        AsyncSecretsService("acme", MASTER),
    ]


@pytest.mark.parametrize("thing", _objects(), ids=lambda thing: type(thing).__name__)
def test_no_object_shows_what_it_carries(thing: object) -> None:
    planted = {"value": VALUE, "API key": RAW_KEY, "master key": MASTER}
    shown = f"{thing!r} {thing} {[thing]!r}"
    assert found_in(shown.encode(), planted) == []
    # A token is encrypted, but it has no place in a log either.
    assert "gAAAA" not in shown or isinstance(thing, SecretRecord)
    if hasattr(thing, "__dict__"):
        assert found_in(repr(vars(thing)).encode(), planted) == []


Tracebacks = list[str]


@pytest.fixture
def tracebacks(monkeypatch: pytest.MonkeyPatch) -> Tracebacks:
    """The tracebacks of all refusals, with the local variables of all frames."""
    seen: Tracebacks = []

    def observed(error: SecretsError, request_id: str) -> web.StreamResponse:
        with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
        seen.append("".join(with_locals.format()))
        return problem_response(error, request_id)

    monkeypatch.setattr(api_server, "problem_response", observed)
    return seen


async def _refused(
    service: Service, body: bytes, status: int, path: str = SECRETS, **headers: str
) -> None:
    sent = {"Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        Inside(service) as server,
        aiohttp.ClientSession() as client,
        client.post(server.make_url(path), data=body, headers=sent) as answer,
    ):
        assert answer.status == status, await answer.text()


REFUSALS: dict[str, tuple[Callable[[str], bytes], int, dict[str, str]]] = {
    "wrong category": (_document(category="nonsense"), 422, {}),
    "wrong name": (_document(name="a/b"), 422, {}),
    "wrong time": (_document(expires_at="nonsense"), 422, {}),
    "too long": (lambda value: _document()(value + "x" * 65536), 422, {}),
    "too long in bytes": (lambda value: _document()(value + "é" * 40_000), 422, {}),
    "body too long": (lambda value: _document()(value * 10_000), 413, {}),
    "malformed": (lambda value: _document()(value) + b"}", 400, {}),
    "broken utf-8": (lambda value: value.encode() + b"\xff", 400, {}),
    "other condition": (_document(), 412, {"If_Match": '"0-0"'}),
    "wrong condition": (_document(), 400, {"If_Match": "nonsense"}),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_no_traceback_shows_a_value(
    service: Service, data_dir: Path, tracebacks: Tracebacks, what: str
) -> None:
    """Error reporters send the local variables of every frame to somebody else."""
    body, status, headers = REFUSALS[what]
    key = await issue_key(data_dir)
    await _refused(service, body(VALUE), status, Authorization=f"Bearer {key}", **headers)
    assert len(tracebacks) == 1
    assert "Traceback" in tracebacks[0]
    assert found_in(tracebacks[0].encode(), {"value": VALUE}) == []


RESOLVING: dict[str, tuple[str, Callable[[str], object], int]] = {
    "not found": ("resolve", lambda text: [text, "{{secrets.N}}{{secrets.ABSENT}}"], 422),
    "too large": ("resolve", lambda text: [text, "{{secrets.L0}}" * 9000], 422),
    "too many": (
        "resolve",
        lambda text: [text, *(f"{{{{secrets.{n}}}}}" for n in range(200))],
        422,
    ),
    "not found by name": ("batch", lambda text: ["N", "ABSENT"], 422),
    "too large by name": ("batch", lambda text: ["N", *(f"L{n}" for n in range(6))], 422),
}


@pytest.mark.parametrize("what", RESOLVING)
async def test_no_traceback_of_several_secrets_shows_a_value(
    service: Service, caller: Caller, data_dir: Path, tracebacks: Tracebacks, what: str
) -> None:
    path, wanted, status = RESOLVING[what]
    await service.set(caller, Draft("N", Plaintext(VALUE)))
    for number in range(6):
        await service.set(caller, Draft(f"L{number}", Plaintext(VALUE + "\0" * 65000)))
    in_document = canary()
    body = {"document" if path == "resolve" else "names": wanted(in_document)}
    key = await issue_key(data_dir)
    sent = json.dumps(body).encode()
    await _refused(service, sent, status, f"{SECRETS}/{path}", Authorization=f"Bearer {key}")
    assert len(tracebacks) == 1
    assert "Traceback" in tracebacks[0]
    planted = {"value": VALUE, "document": in_document}
    assert found_in(tracebacks[0].encode(), planted) == []


VAULT_REFUSALS: dict[str, tuple[str, str]] = {
    "no object": ("N", '{"data": "%s"}'),
    "no JSON in it": ("N", '{"data": {"a": "%s\\x"}}'),
    "half a character": ("N", '{"data": {"a": "%s\\ud800"}}'),
    "malformed": ("N", '{"data": {"a": "%s"}}}'),
    "too long": ("N", '{"data": {"a": "%s' + "x" * 65536 + '"}}'),
    "other version": ("N", '{"data": {"a": "%s"}, "options": {"cas": 7}}'),
    "no version": ("N", '{"options": {"cas": "x"}, "data": {"a": "%s"}}'),
    "wrong name": ("a%0ab", '{"data": {"a": "%s"}}'),
    "two tokens": ("N", '{"data": {"a": "%s"}}'),
}


@pytest.mark.parametrize("what", VAULT_REFUSALS)
async def test_no_traceback_of_the_face_for_vault_shows_anything(
    service: Service, data_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, body = VAULT_REFUSALS[what]
    key = await issue_key(data_dir)
    more = {"Authorization": f"Bearer {key}"} if what == "two tokens" else {}
    seen: Tracebacks = []

    def observed(error: SecretsError, request_id: str) -> answers.Answer:
        with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
        seen.append("".join(with_locals.format()))
        return vaultface.problem(error, request_id)

    monkeypatch.setattr(vaultface, "FACE", replace(vaultface.FACE, problem=observed))
    async with (
        Inside(service, vault=True) as server,
        aiohttp.ClientSession(headers={"X-Vault-Token": key} | more) as client,
        client.post(
            URL(f"{server.make_url('/v1/secret/data/')}{path}", encoded=True),
            data=(body % VALUE).encode(),
        ) as answer,
    ):
        assert answer.status == 400, await answer.text()
    assert len(seen) == 1
    assert found_in(seen[0].encode(), {"value": VALUE, "API key": key}) == []


@pytest.mark.parametrize("kind", ["unknown", "live"])
@pytest.mark.parametrize("header", ["Authorization", "X_API_Key"])
async def test_no_traceback_shows_an_api_key(
    service: Service, data_dir: Path, tracebacks: Tracebacks, kind: str, header: str
) -> None:
    key = RAW_KEY if kind == "unknown" else await issue_key(data_dir, scopes=("read",))
    sent = key if header == "X_API_Key" else f"Bearer {key}"
    status = 401 if kind == "unknown" else 403
    await _refused(service, _document()(VALUE), status, **{header: sent})
    assert len(tracebacks) == 1
    assert found_in(tracebacks[0].encode(), {"API key": key, "value": VALUE}) == []


async def test_no_traceback_of_a_failed_decryption_shows_anything(
    service: Service, caller: Caller, data_dir: Path
) -> None:
    await service.set(caller, Draft("N", Plaintext(VALUE)))
    settings = app.with_overrides(settings_for(data_dir), master_keys=(MASTER,))
    other = await app.open_service(settings)
    try:
        with pytest.raises(errors.DecryptionFailed) as caught:
            await other.get(caller, "N")
    finally:
        await other.close()
    with_locals = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = "".join(with_locals.format())
    assert found_in(shown.encode(), {"value": VALUE, "master key": MASTER}) == []
