"""Bad input against a running server: no 500, no traceback, no hang, and all is well afterwards."""

import asyncio
import contextlib
import gzip
import hashlib
import http.client
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

# Now: pytest parses what it loads, which Python 3.11 can't do in two threads at once.
from schemathesis.specs.openapi import schemas as _loaded_now  # noqa: F401
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from flowmason_secrets import app
from flowmason_secrets.api.routes import ROUTES
from flowmason_secrets.service import Service

from .conftest import Client
from .harness.server import MASTER_KEY, issue_key, settings_for

# Nothing that is asked here takes longer than this, in seconds; what takes longer hangs.
PATIENCE = 20.0

SECRETS = "/api/v1/secrets"
API_KEYS = "/api/v1/auth/api-keys"

quick = hypothesis_settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Answer(NamedTuple):
    """One response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A server process whose output goes to a file, so that it never waits for a reader."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.data_dir = root / "secrets"
        self.key = asyncio.run(issue_key(self.data_dir))
        self._log = root / "output"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FLOWMASON_SECRETS_")}
        place = f"--data-dir={self.data_dir}"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowmason_secrets", "serve", "--port=0", place],
                env=clean | {"FLOWMASON_SECRETS_KEY": MASTER_KEY} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        while b"ready on " not in self.output():
            assert self.process.poll() is None, self.output().decode()
            time.sleep(0.02)
        url = self.output().decode().partition("ready on ")[2].split()[0]
        self.url = url
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.address = (host, int(port))
        assert self.set("KNOWN", "known value").status == 201

    def output(self) -> bytes:
        """All that it has printed so far."""
        return self._log.read_bytes()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE)

    def send(self, data: bytes) -> Answer:
        """The answer to these very bytes."""
        with self.connect() as connection:
            return _exchange(connection, data)

    def request(
        self, method: str, path: str | bytes, body: bytes | None = None, *headers: bytes
    ) -> Answer:
        """The answer to a request with a live API key, whatever bytes path and headers are."""
        return self.send(self.compose(method, path, body, *headers))

    def compose(
        self, method: str, path: str | bytes, body: bytes | None = None, *headers: bytes
    ) -> bytes:
        target = path if isinstance(path, bytes) else path.encode()
        lines = [method.encode() + b" " + target + b" HTTP/1.1", b"Host: test"]
        lines += [f"Authorization: Bearer {self.key}".encode(), b"Connection: close", *headers]
        if body is not None:
            lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
        return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")

    def post(self, path: str, document: object) -> Answer:
        return self.request("POST", path, json.dumps(document).encode())

    def set(self, name: str, value: str, **more: object) -> Answer:
        return self.post(SECRETS, {"name": name, "value": value, **more})

    def get(self, name: str) -> Answer:
        return self.request("GET", f"{SECRETS}/{quote(name, safe='')}")


def _exchange(connection: socket.socket, data: bytes) -> Answer:
    # A server may answer and close before it has read everything.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)
    return _read(connection, data[:5] == b"HEAD ")


def _read(connection: socket.socket, head: bool = False) -> Answer:
    response = http.client.HTTPResponse(connection, method="HEAD" if head else "GET")
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def problem(answer: Answer, *statuses: int) -> dict[str, Any]:
    """Assert that an answer is a problem of one of these statuses, and return it."""
    assert answer.status in statuses, answer
    assert answer.headers["content-type"] == "application/problem+json", answer
    document: dict[str, Any] = answer.json()
    assert document["status"] == answer.status
    assert {"code", "title", "detail", "request_id"} <= document.keys()
    assert b"Traceback" not in answer.body
    assert "aiohttp" not in answer.headers["server"]
    return document


def _in_order(server: Server, printed: int) -> None:
    assert server.process.poll() is None
    assert b"Traceback" not in server.output()[printed:], server.output()[printed:].decode()
    answer = server.get("KNOWN")
    assert (answer.status, answer.json()["value"]) == (200, "known value")
    assert server.request("GET", SECRETS).status == 200
    assert server.request("GET", API_KEYS).status == 200
    assert server.request("GET", "/api/v1/auth/audit-log").status == 200
    assert server.request("GET", "/readyz").json()["status"] == "ready"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests here that can share it."""
    started = Server(tmp_path_factory.mktemp("bad-input"))
    yield started
    started.stop()


@pytest.fixture
def server(process: Server) -> Iterator[Server]:
    """The shared server; after each test it must be in order and have printed no traceback."""
    printed = len(process.output())
    yield process
    _in_order(process, printed)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits a second for a body and two for the next request."""
    started = Server(
        tmp_path_factory.mktemp("impatient"),
        FLOWMASON_SECRETS_BODY_TIMEOUT="1",
        FLOWMASON_SECRETS_KEEPALIVE_TIMEOUT="2",
    )
    yield started
    _in_order(started, 0)
    started.stop()


# --- from the OpenAPI document --------------------------------------------------------------


@pytest.fixture(scope="module")
def document(process: Server) -> Any:
    return schemathesis.openapi.from_url(f"{process.url}/api/v1/openapi.json")


PROBES = [
    pytest.param(route, mode, id=f"{route.method} {route.template} {mode.value}")
    for route in ROUTES
    # A stream has no end.
    if "text/event-stream" not in route.media
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # What takes no input can't be given a wrong one.
    if mode is GenerationMode.POSITIVE or "{" in route.template or route.query or route.body
]


@pytest.mark.parametrize(("route", "mode"), PROBES)
def test_every_answer_is_one_that_the_document_describes(
    server: Server, document: Any, route: Any, mode: GenerationMode
) -> None:
    operation = document[route.template][route.method]
    cases = operation.as_strategy(generation_mode=mode)
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    statuses: list[int] = []

    @hypothesis_settings(
        max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def probe(case: Any) -> None:
        if isinstance(case.query, dict) and case.query.get("wait") in range(2, 61):
            # It would be waited for.
            case.query["wait"] = 1
        answer = case.call_and_validate(
            headers={"Authorization": f"Bearer {server.key}"}, checks=checks, timeout=PATIENCE
        )
        statuses.append(answer.status_code)
        assert "Traceback" not in answer.text

    probe()
    assert statuses


# --- names ----------------------------------------------------------------------------------

NAMES = [
    '"quoted"',
    "it's",
    "back\\slash",
    ".hidden",
    "a.b.c",
    "...",
    "100%",
    "%41",
    "%2F",
    "%00",
    "a b",
    "a+b",
    "a&b=c?d#e",
    "semi;colon",
    "metadata",
    "<script>alert(1)<script>",
    "${jndi:ldap:x}",
    "'; drop table secret; --",
    "*",
    "[a-z]?*",
    "ключ",
    "密钥" * 128,
    "\U0001f511" * 256,
    "PAYPAL",
    "РAYPAL",  # the first letter is Cyrillic
    "é",
    "e\u0301",
    "\u200bzero",
    "\u202eoverride",
    "\ufeffbom",
    "\U0010ffff",
]

BAD_NAMES = [
    "",
    "a" * 257,
    "a/b",
    "/",
    ".",
    "..",
    "line\nbreak",
    "carriage\rreturn",
    "tab\t",
    "nul\0",
    "del\x7f",
    "c1\x85",
    "ls\u2028",
    "ps\u2029",
]


def _listed(server: Server) -> list[str]:
    return [entry["name"] for entry in server.request("GET", SECRETS).json()]


def _round_trip(server: Server, name: str) -> None:
    value = secrets.token_hex(8)
    created = server.set(name, value)
    assert created.status == 201, created
    path = created.headers["location"]
    assert path.isascii()
    read = server.request("GET", path)
    assert (read.status, read.json()["name"], read.json()["value"]) == (200, name, value)
    metadata = server.request("GET", f"{path}/metadata")
    assert (metadata.status, metadata.json()["name"]) == (200, name)
    audit = server.request("GET", f"/api/v1/auth/audit-log?limit=2&name={quote(name, safe='')}")
    assert [entry["details"]["name"] for entry in audit.json()] == [name, name]
    assert name in _listed(server)
    assert server.request("DELETE", path).status == 200
    problem(server.request("GET", path), 404)
    assert name not in _listed(server)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_can_be_created_can_be_read_listed_and_deleted(
    server: Server, name: str
) -> None:
    _round_trip(server, name)


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_could_not_be_used_is_refused(server: Server, name: str) -> None:
    assert problem(server.set(name, "value"), 422)["field"] == "name"
    assert name not in _listed(server)


@given(name=st.text(min_size=1, max_size=300))
@quick
def test_any_name_is_either_refused_or_works(server: Server, name: str) -> None:
    answer = server.set(name, "value")
    if answer.status == 422:
        assert answer.json()["field"] == "name"
        return
    assert answer.status == 201, answer
    path = answer.headers["location"]
    assert server.request("GET", path).json()["name"] == name
    assert server.request("DELETE", path).status == 200


def test_names_that_look_alike_are_different_secrets(server: Server) -> None:
    alike = ["ADMIN", "АDMIN", "ADMIN\u200b", "ＡDMIN", "admin", "ADMIN ", " ADMIN"]
    for number, name in enumerate(alike):
        assert server.set(name, f"value {number}").status == 201
    for number, name in enumerate(alike):
        assert server.get(name).json()["value"] == f"value {number}"
    for name in alike:
        assert server.request("DELETE", f"{SECRETS}/{quote(name, safe='')}").status == 200


# --- paths, queries, headers ------------------------------------------------------------------

PATHS: list[tuple[bytes, tuple[int, ...]]] = [
    (b"/api/v1/secrets/%", (400, 404)),
    (b"/api/v1/secrets/%zz", (400, 404)),
    (b"/api/v1/secrets/%2", (400, 404)),
    (b"/api/v1/secrets/%ff", (400,)),
    (b"/api/v1/secrets/%c3%28", (400,)),
    (b"/api/v1/secrets/%ed%a0%80", (400,)),
    (b"/api/v1/secrets/%c0%af", (400,)),
    (b"/api/v1/secrets/\xff\xfe", (400,)),
    (b"/api/v1/secrets/\xc3\xa9", (400, 404)),
    (b"/api/v1/secrets/%00", (404, 422)),
    (b"/api/v1/secrets/%0d%0aX-Injected:%201", (404, 422)),
    (b"/api/v1/secrets/..%2f..%2fevents", (404, 422)),
    (b"/api/v1/secrets/%2e%2e/%2e%2e/healthz", (404,)),
    (b"/api/v1/secrets/../../healthz", (404,)),
    (b"/api/v1/secrets/", (404, 422)),
    (b"/api/v1/secrets//metadata", (404, 422)),
    (b"//api/v1/secrets", (404,)),
    (b"/api/v1/secrets/" + b"x" * 8000, (404, 414, 422)),
    (b"/api/v1/secrets/" + b"%01" * 2600, (404, 414, 422)),
    (b"/api/v1/secrets/" + b"%f0%9f%94%91" * 600, (404, 414, 422)),
    (b"/" + b"/" * 8000, (404, 414)),
    (b"/api/v1/secrets?limit=%ff", (400,)),
    (b"/api/v1/secrets?prefix=\xff", (400,)),
    (b"/api/v1/secrets?%ff=1", (400, 422)),
    (b"/api/v1/secrets?limit=1&limit=2", (422,)),
    (b"/api/v1/secrets?limit=", (422,)),
    (b"/api/v1/secrets?limit=-1", (422,)),
    (b"/api/v1/secrets?limit=1e2", (422,)),
    (b"/api/v1/secrets?limit=%D9%A1", (422,)),
    (b"/api/v1/secrets?limit=" + b"9" * 5000, (422,)),
    (b"/api/v1/secrets?cursor=%00", (422,)),
    (b"/api/v1/secrets?cursor=%C3%A9", (422,)),
    (b"/api/v1/secrets?cursor=_w", (422,)),
    (b"/api/v1/secrets?expired=yes", (422,)),
    (b"/api/v1/secrets?category=API_KEY", (422,)),
    (b"/api/v1/secrets?unknown=1", (422,)),
    (b"/api/v1/secrets?" + b"&".join(b"a%d=1" % n for n in range(200)), (400, 422)),
    (b"/api/v1/auth/audit-log?since=yesterday", (422,)),
    (b"/api/v1/auth/audit-log?since=2026-01-01T00:00:00", (422,)),
    (b"/api/v1/auth/audit-log?until=2026-02-30T00:00:00Z", (422,)),
    (b"/api/v1/auth/audit-log?since=9999-12-31T23:59:59-23:59", (200, 422)),
    (b"/api/v1/auth/audit-log?since=0001-01-01T00:00:00%2B23:59", (200, 422)),
    (b"/api/v1/auth/audit-log?offset=9007199254740992", (200,)),
    (b"/api/v1/auth/audit-log?offset=999999999999999999", (422,)),
    (b"/api/v1/auth/audit-log?cursor=OTk5OTk5OTk5OTk5OTk5OTk5", (200, 422)),
    (b"/api/v1/auth/audit-log?cursor=LTE", (422,)),
    (b"/api/v1/auth/audit-log?name=%00&actor=%01", (200,)),
    (b"/api/v1/secrets?prefix=%00", (200,)),
    (b"/api/v1/secrets?prefix=%F4%8F%BF%BF", (200,)),
]


@pytest.mark.parametrize(("path", "statuses"), PATHS, ids=[ascii(path[:60]) for path, _ in PATHS])
def test_a_path_or_query_that_makes_no_sense(
    server: Server, path: bytes, statuses: tuple[int, ...]
) -> None:
    answer = server.request("GET", path)
    if answer.status == 200:
        assert 200 in statuses
        assert isinstance(answer.json(), list)
    else:
        problem(answer, *statuses)
    assert "x-injected" not in answer.headers


@given(tail=st.binary(max_size=60))
@quick
def test_any_bytes_as_a_path(server: Server, tail: bytes) -> None:
    target = tail.translate(None, b" \r\n\0\t\x0b\x0c#?")
    with server.connect() as connection:
        answer = _exchange(connection, server.compose("GET", SECRETS.encode() + b"/" + target))
    # Some bytes are no URL at all: then the parser answers.
    problem(answer, 400, 404, 422)


@given(query=st.binary(max_size=60))
@quick
def test_any_bytes_as_a_query(server: Server, query: bytes) -> None:
    target = query.translate(None, b" \r\n\0\t\x0b\x0c#")
    answer = server.request("GET", SECRETS.encode() + b"?" + target)
    if answer.status != 200:
        problem(answer, 400, 422)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("size", [1000, 7900, 8100])
def test_a_long_id_of_an_api_key(server: Server, method: str, size: int) -> None:
    answer = server.request(method, f"{API_KEYS}/{'k' * size}")
    problem(answer, 404 if method == "DELETE" else 405, 414, 422)


def test_a_long_id_disturbs_nobody_else(server: Server) -> None:
    """What is committed together with a refusal that is hard to record is committed."""
    stop = threading.Event()
    answers: list[int] = []

    def disturb() -> None:
        while not stop.is_set():
            server.request("DELETE", f"{API_KEYS}/{'k' * 7900}")

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        answers.extend(server.set(f"N{number % 5}", "value").status for number in range(150))
    finally:
        stop.set()
        disturber.join()
    assert set(answers) == {200, 201}


HEADERS: list[tuple[bytes, tuple[int, ...]]] = [
    (b"If-Match: nonsense", (400,)),
    (b'If-Match: "unfinished', (400,)),
    (b"If-Match:", (400, 412)),
    (b"If-Match: \xff\xfe", (400,)),
    (b'If-Match: "\xff"', (400, 412)),
    (b'If-Match: "a" "b"', (400,)),
    (b'If-Match: ,,,"a",,', (400, 412)),
    (b"If-Match: " + b'"x",' * 1500 + b'"y"', (400, 412)),
    (b'If-None-Match: "1"', (400,)),
    (b"If-None-Match: *, *", (400,)),
    (b'If-Match: *\r\nIf-None-Match: "1"', (400,)),
    (b"If-None-Match: *\r\nIf-None-Match: *", (400, 412)),
    (b"Accept: text/plain", (200,)),
    (b"X-Request-Id: " + b"x" * 5000, (200,)),
    (b"X-Request-Id: \xff\xfe", (200,)),
    (b"User-Agent: \xff\xfe" + b"\xf0\x9f\x94\x91" * 300, (200,)),
    (b"User-Agent: " + b'"' * 4000, (200,)),
    (b"User-Agent:", (200,)),
    (b"Cookie: " + b"a=b; " * 1000, (200,)),
    (b"X-Forwarded-For: nonsense, \xff", (200,)),
    (b"Range: bytes=0-1", (200,)),
    (b"If-Modified-Since: nonsense", (200,)),
]


@pytest.mark.parametrize(
    ("header", "statuses"), HEADERS, ids=[ascii(header[:40]) for header, _ in HEADERS]
)
def test_a_header_that_makes_no_sense(
    server: Server, header: bytes, statuses: tuple[int, ...]
) -> None:
    body = json.dumps({"name": "KNOWN", "value": "known value"}).encode()
    answer = server.request("POST", SECRETS, body, header)
    if answer.status != 200:
        problem(answer, *statuses)
    assert answer.status in statuses
    # Whatever the header was, it does not spoil the event that records it.
    audit = server.request("GET", "/api/v1/auth/audit-log?name=KNOWN&limit=5")
    assert audit.status == 200


@pytest.mark.parametrize(
    "header",
    [
        b"Authorization: Bearer \xff\xfe\xfd",
        b"Authorization: Bearer",
        b"Authorization: Bearer  ",
        b"Authorization:",
        b"Authorization: Basic dTpw",
        b"Authorization: Bearer " + b"x" * 7000,
        b"Authorization: Bearer fm_live_" + b"0" * 48 + b", Bearer fm_live_" + b"1" * 48,
        b"X-API-Key: \xf0\x28\x8c\x28",
        b"X-API-Key: ../../commit.lock",
        b"X-API-Key:",
        b"Authorization: Bearer a\r\nAuthorization: Bearer b",
        b"X-API-Key: a\r\nX-API-Key: b",
    ],
    ids=ascii,
)
def test_an_api_key_that_makes_no_sense(server: Server, header: bytes) -> None:
    request = b"GET /api/v1/secrets/KNOWN HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert problem(server.send(request + header + b"\r\n\r\n"), 400, 401)["code"]


def test_whitespace_in_if_match_does_not_block_everybody(server: Server) -> None:
    """Matching takes time linear in the header's size."""
    body = json.dumps({"name": "KNOWN", "value": "known value"}).encode()
    field = b"If-Match: x" + b" " * 8000 + b"x"
    started = time.monotonic()
    answer = server.request("POST", SECRETS, body, *[field] * 4)
    problem(answer, 400)
    assert time.monotonic() - started < 1.0


# --- bodies -----------------------------------------------------------------------------------

MALFORMED = [
    b"",
    b" ",
    b"{",
    b"nonsense",
    b"{'name': 'x', 'value': 'y'}",
    b'{"name":"x","value":"y"}}',
    b'{"name":"x","value":"y",}',
    b'{"name":"x","value":NaN}',
    b'{"name":"x","value":"\xff"}',
    b'{"name":"\xc3","value":"y"}',
    b'{"name":"x","value":"\xed\xa0\x80"}',
    b'{"name":"x","value":"\\ud800"}',
    b'{"name":"x","value":"\\udc00\\ud800"}',
    b'{"name":"\\ud800","value":"y"}',
    b'{"name":"x","value":"line\nbreak"}',
    b'{"name":"x","value":"\\x41"}',
    b'\xef\xbb\xbf{"name":"x","value":"y"}',
    '{"name":"x","value":"y"}'.encode("utf-16"),
    b"\x00" * 1000,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"name":"x","value":' + b"[" * 100_000,
]


@pytest.mark.parametrize("body", MALFORMED, ids=[ascii(body[:40]) for body in MALFORMED])
@pytest.mark.parametrize("path", [SECRETS, API_KEYS])
def test_a_body_that_is_not_json(server: Server, path: str, body: bytes) -> None:
    # Some of these are JSON up to the place where they already have the wrong type.
    problem(server.request("POST", path, body), 400, 422)
    assert "x" not in _listed(server)


WRONG: list[tuple[str, object, str]] = [
    (SECRETS, {"value": "y"}, "name"),
    (SECRETS, {"name": "x"}, "value"),
    (SECRETS, {"name": 1, "value": "y"}, "name"),
    (SECRETS, {"name": None, "value": "y"}, "name"),
    (SECRETS, {"name": ["x"], "value": "y"}, "name"),
    (SECRETS, {"name": "x", "value": 1}, "value"),
    (SECRETS, {"name": "x", "value": None}, "value"),
    (SECRETS, {"name": "x", "value": True}, "value"),
    (SECRETS, {"name": "x", "value": {"a": 1}}, "value"),
    (SECRETS, {"name": "x", "value": 10**400}, "value"),
    (SECRETS, {"name": "x", "value": "y" * 65537}, "value"),
    (SECRETS, {"name": "x", "value": "é" * 32769}, "value"),
    (SECRETS, {"name": "x", "value": "y", "description": "d" * 1025}, "description"),
    (SECRETS, {"name": "x", "value": "y", "description": None}, "description"),
    (SECRETS, {"name": "x", "value": "y", "category": "secret"}, "category"),
    (SECRETS, {"name": "x", "value": "y", "category": 0}, "category"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": 0}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": ""}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": "2030-01-01"}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": "2030-01-01T00:00:00"}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": "2030-02-30T00:00:00Z"}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": "2030-01-01T24:01:00Z"}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": "２030-01-01T00:00:00Z"}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "expires_at": "2030-01-01T00:00:00+99:99"}, "expires_at"),
    (SECRETS, {"name": "x", "value": "y", "org_id": "other"}, "org_id"),
    (API_KEYS, {}, "name"),
    (API_KEYS, {"name": ""}, "name"),
    (API_KEYS, {"name": "x" * 129}, "name"),
    (API_KEYS, {"name": "x\n"}, "name"),
    (API_KEYS, {"name": "x", "scopes": []}, "scopes"),
    (API_KEYS, {"name": "x", "scopes": ["root"]}, "scopes"),
    (API_KEYS, {"name": "x", "scopes": "full"}, "scopes"),
    (API_KEYS, {"name": "x", "allow": [""]}, "allow"),
    (API_KEYS, {"name": "x", "allow": ["a"] * 65}, "allow"),
    (API_KEYS, {"name": "x", "allow": ["a" * 257]}, "allow"),
    (API_KEYS, {"name": "x", "allow": "A_*"}, "allow"),
    (API_KEYS, {"name": "x", "expires_at": "never"}, "expires_at"),
    (API_KEYS, {"name": "x", "raw_key": "fm_live_1"}, "raw_key"),
]


@pytest.mark.parametrize(
    ("path", "document", "field"), WRONG, ids=[ascii(sent)[:60] for _, sent, _ in WRONG]
)
def test_json_of_the_wrong_shape_names_the_field(
    server: Server, path: str, document: object, field: str
) -> None:
    assert problem(server.post(path, document), 422)["field"] == field
    assert "x" not in _listed(server)


@pytest.mark.parametrize("document", [[], "x", 1, None, True, [{"name": "x", "value": "y"}]])
def test_json_that_is_no_object(server: Server, document: object) -> None:
    problem(server.post(SECRETS, document), 422)


def test_a_key_given_twice_has_one_meaning(server: Server) -> None:
    answer = server.request("POST", SECRETS, b'{"name":"x1","name":"x2","value":"a","value":"b"}')
    if answer.status == 201:
        name = answer.json()["name"]
        assert name == "x2"
        assert server.get(name).json()["value"] == "b"
        assert server.request("DELETE", f"{SECRETS}/{name}").status == 200
    else:
        problem(answer, 400, 422)
    assert not {"x1", "x2"} & set(_listed(server))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
fields = st.sampled_from(
    ["name", "value", "description", "category", "expires_at", "scopes", "allow", "x"]
)


@given(document=st.dictionaries(fields, json_values, max_size=6))
@quick
def test_any_json_object(server: Server, document: dict[str, object]) -> None:
    body = json.dumps(document).encode("utf-8", "surrogatepass")
    for path in (SECRETS, API_KEYS):
        answer = server.request("POST", path, body)
        if answer.status not in (200, 201):
            problem(answer, 400, 422)


@given(body=st.binary(max_size=200))
@quick
def test_any_bytes_as_a_body(server: Server, body: bytes) -> None:
    problem(server.request("POST", SECRETS, body), 400, 422)


@given(value=st.text(max_size=200))
@quick
def test_any_text_as_a_value_comes_back_as_it_was(server: Server, value: str) -> None:
    assert server.set("ROUND", value, description=value).status in (200, 201)
    assert server.get("ROUND").json()["value"] == value
    described = server.request("GET", f"{SECRETS}/ROUND/metadata").json()["description"]
    assert described == value


@pytest.mark.parametrize(
    "value", ["", "x" * 65536, "\0" * 65536, "\U0001f511" * 16384, '"\\' * 32768]
)
def test_the_largest_values(server: Server, value: str) -> None:
    assert server.set("LARGE", value).status in (200, 201)
    assert server.get("LARGE").json()["value"] == value


# What RFC 3339 allows, the year 1 to the year 9999, in any zone.
TIMES = [
    ("0001-01-01T00:00:00Z", True),
    ("0999-12-31T23:59:59Z", True),
    ("0001-01-01T00:00:00-23:59", True),
    ("0001-01-01T00:00:00+23:59", True),
    ("1969-12-31T23:59:59.999999999Z", True),
    ("2000-01-01t00:00:00z", True),
    ("2000-01-01 00:00:00+00:00", True),
    ("2030-01-01t00:00:00z", False),
    ("2030-06-30T23:59:60Z", False),
    ("2030-01-01T00:00:00.123456789+05:30", False),
    ("9999-12-31T23:59:59Z", False),
    ("9999-12-31T23:59:59.999999Z", False),
    ("9999-12-31T23:59:59.999999999Z", False),
    ("9999-12-31T23:59:59-23:59", False),
    ("9999-12-31T23:59:59+23:59", False),
]


@pytest.mark.parametrize(("moment", "past"), TIMES)
def test_a_secret_with_an_unusual_expiry(server: Server, moment: str, past: bool) -> None:
    """It is refused, or it is what it says in every process."""
    answer = server.set("TIMED", "value", expires_at=moment)
    if answer.status == 422:
        assert problem(answer, 422)["field"] == "expires_at"
        return
    try:
        assert answer.status in (200, 201), answer
        assert answer.json()["is_expired"] == past
        assert server.get("TIMED").status == (410 if past else 200)
        assert "TIMED" in _listed(server)
        assert asyncio.run(_metadata(server.data_dir, "TIMED")) == answer.json()["expires_at"]
    finally:
        assert server.request("DELETE", f"{SECRETS}/TIMED").status == 200


async def _metadata(data_dir: Path, name: str) -> str | None:
    """The expiry of a secret as another process finds it on disk."""
    opened = await app.open_service(settings_for(data_dir))
    try:
        return (await opened.metadata(app.local_caller("acme"), name)).expires_at
    finally:
        await opened.close()


@pytest.mark.parametrize(("moment", "past"), TIMES)
async def test_an_api_key_with_an_unusual_expiry(
    service: Service, client: Client, data_dir: Path, moment: str, past: bool
) -> None:
    """It is refused, or it can be used and listed, in every process."""
    admin = await client()
    async with admin.post(API_KEYS, json={"name": "timed", "expires_at": moment}) as answer:
        document = await answer.json()
    if answer.status == 422:
        assert document["field"] == "expires_at"
        return
    assert answer.status == 201
    assert document["api_key"]["is_active"] != past
    bearer = {"Authorization": f"Bearer {document['raw_key']}"}
    async with admin.get("/api/v1/auth/whoami", headers=bearer) as answer:
        assert answer.status == (401 if past else 200)
    async with admin.get(API_KEYS) as answer:
        assert answer.status == 200
        assert document["api_key"] in await answer.json()
    other = await app.open_service(settings_for(data_dir))
    try:
        keys = await other.keys.all(app.local_caller("acme"))
        assert [key.name for key in keys] == ["test", "timed"]
    finally:
        await other.close()


async def test_the_largest_grants_of_an_api_key(client: Client) -> None:
    """All that the limits allow can be recorded in one event."""
    admin = await client()
    allow = ["\U0001f511" * 255 + "*"] * 64
    async with admin.post(API_KEYS, json={"name": "k" * 128, "allow": allow}) as answer:
        assert answer.status in (201, 422), await answer.text()
    async with admin.get(API_KEYS) as answer:
        assert answer.status == 200


async def test_a_damaged_api_key_is_refused_and_harms_no_other(
    service: Service, client: Client, data_dir: Path
) -> None:
    admin, damaged = await client(), await client(org="globex")
    digest = hashlib.sha256(damaged.headers["Authorization"][7:].encode()).hexdigest()
    (data_dir / "keys" / f"{digest}.json").write_bytes(b"")
    async with damaged.get("/api/v1/auth/whoami") as answer:
        assert answer.status in (401, 503)
    async with admin.get(API_KEYS) as answer:
        assert answer.status == 200
        keys = await answer.json()
    async with admin.delete(f"{API_KEYS}/{keys[0]['id']}") as answer:
        assert answer.status == 200


# --- sizes, encodings, framing ------------------------------------------------------------------


def _chunked(server: Server, chunk: bytes, count: int, path: str = SECRETS) -> bytes:
    head = server.compose("POST", path).removesuffix(b"\r\n")
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + (b"%x\r\n%b\r\n" % (len(chunk), chunk)) * count + b"0\r\n\r\n"


@pytest.mark.parametrize("path", [SECRETS, API_KEYS])
def test_ten_megabytes(server: Server, path: str) -> None:
    started = time.monotonic()
    body = json.dumps({"name": "x", "value": "y" * 10_000_000}).encode()
    assert problem(server.request("POST", path, body), 413)["code"] == "body_too_large"
    problem(server.send(_chunked(server, b" " * 65536, 160, path)), 413)
    assert time.monotonic() - started < 5.0
    assert "x" not in _listed(server)


def test_ten_megabytes_from_nobody(server: Server) -> None:
    request = b"POST /api/v1/secrets HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    request += b"Content-Type: application/json\r\nContent-Length: 10000000\r\n\r\n"
    problem(server.send(request + b" " * 10_000_000), 401)


def test_a_length_beyond_every_number(server: Server) -> None:
    for length in (b"9" * 30, b"-1", b"1e3", b"0x10", b"+5", b"1, 2"):
        head = server.compose("POST", SECRETS).removesuffix(b"\r\n")
        head += b"Content-Type: application/json\r\nContent-Length: " + length + b"\r\n\r\n"
        problem(server.send(head + b'{"name":"x","value":"y"}'), 400, 413)


def test_small_chunks_are_put_together(server: Server) -> None:
    body = json.dumps({"name": "CHUNKED", "value": "é" * 500}, ensure_ascii=False).encode()
    head = server.compose("POST", SECRETS).removesuffix(b"\r\n")
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert server.send(head + chunks + b"0\r\n\r\n").status == 201
    assert server.get("CHUNKED").json()["value"] == "é" * 500
    assert server.request("DELETE", f"{SECRETS}/CHUNKED").status == 200


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"zstd", b"nonsense", b"\xff"])
def test_a_body_in_an_encoding_that_it_does_not_have(server: Server, encoding: bytes) -> None:
    body = b'{"name":"x","value":"y"}'
    answer = server.request("POST", SECRETS, body, b"Content-Encoding: " + encoding)
    if answer.status == 201:
        # An unknown encoding may be ignored, since the body is what it claims to be.
        assert encoding in (b"nonsense", b"\xff")
        assert server.request("DELETE", f"{SECRETS}/x").status == 200
        return
    problem(answer, 400, 415)


def test_a_body_that_grows_when_it_is_unpacked(server: Server) -> None:
    bomb = gzip.compress(b'{"name":"x","value":"' + b"y" * 50_000_000 + b'"}')
    assert len(bomb) < 100_000
    problem(server.request("POST", SECRETS, bomb, b"Content-Encoding: gzip"), 413, 415)


def test_broken_chunks(server: Server, impatient: Server) -> None:
    head = server.compose("POST", SECRETS).removesuffix(b"\r\n")
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for rest in (
        b"ZZ\r\n{}\r\n0\r\n\r\n",
        b"-1\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}XX0\r\n\r\n",
        b"f" * 40 + b"\r\n",
        b'5\r\n{"a"\r\nZZ\r\n',
    ):
        problem(server.send(head + rest), 400, 413)
    # The same when the head has been read before the chunk arrives: aiohttp's parser doesn't tell
    # who waits for the rest, so he gives up when the body's time is over.
    head = impatient.compose("POST", SECRETS).removesuffix(b"\r\n")
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with impatient.connect() as connection:
        connection.sendall(head + b"2\r\n{ \r\n")
        assert impatient.request("GET", "/healthz").status == 200
        problem(_exchange(connection, b"ZZ\r\n"), 400, 408)


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 3\r\nContent-Length: 24",
        b"Content-Length: 24\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 24",
        b"Transfer-Encoding: nonsense",
        b"Transfer-Encoding: chunked, identity",
        b"Content-Length : 24",
        b"Content-Length: 24\n X: y",
    ],
    ids=ascii,
)
def test_framing_that_two_servers_could_read_differently(server: Server, framing: bytes) -> None:
    head = server.compose("POST", SECRETS).removesuffix(b"\r\n")
    head += b"Content-Type: application/json\r\n" + framing + b"\r\n\r\n"
    problem(server.send(head + b'{"name":"x","value":"y"}'), 400, 501)
    assert "x" not in _listed(server)


@pytest.mark.parametrize(
    "first", [True, False], ids=["live and then unknown", "unknown and then live"]
)
def test_two_authorizations(server: Server, first: bool) -> None:
    keys = [server.key, "fm_live_" + "0" * 48]
    lines = [f"Authorization: Bearer {key}" for key in (keys if first else keys[::-1])]
    request = f"GET {SECRETS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    answer = server.send((request + "\r\n".join(lines) + "\r\n\r\n").encode())
    # What a proxy in front took for the key may be the other one.
    problem(answer, 400, 401)


# --- the protocol ---------------------------------------------------------------------------------

GARBAGE = [
    b"\r\n\r\n\r\n nonsense\r\n\r\n",
    b"\x00\x01\x02\x03\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET  /healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET /healthz HTPP/1.1\r\nHost: x\r\n\r\n",
    b"GET /heal thz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"G\xffT /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n: empty\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nna me: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nA: nul\x00\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"A" * 9000 + b": x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nA: " + b"x" * 9000 + b"\r\n\r\n",
    b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"".join(b"A%d: x\r\n" % n for n in range(1000)) + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
]


@pytest.mark.parametrize("request_", GARBAGE, ids=[ascii(garbage[:40]) for garbage in GARBAGE])
def test_what_is_not_http(server: Server, request_: bytes) -> None:
    problem(server.send(request_), 400, 414, 431, 505)


@given(garbage=st.binary(max_size=100))
@quick
def test_any_bytes_as_a_request(server: Server, garbage: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(garbage + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
    assert b" 500 " not in answer.partition(b"\r\n")[0]
    assert b"Traceback" not in answer


def test_http_1_0(server: Server) -> None:
    assert server.send(b"GET /healthz HTTP/1.0\r\n\r\n").json() == {"status": "alive"}
    request = f"GET {SECRETS}/KNOWN HTTP/1.0\r\nX-API-Key: {server.key}\r\n\r\n"
    assert server.send(request.encode()).json()["value"] == "known value"


def test_an_absolute_uri(server: Server) -> None:
    """RFC 9112 §3.2.2: a server must accept it."""
    answer = server.request("GET", f"http://test{SECRETS}/KNOWN")
    assert answer.status == 200, answer
    assert answer.json()["value"] == "known value"
    problem(server.request("GET", "http://test/nowhere"), 404)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "HEAD", "BREW", "CONNECT"])
def test_methods_that_are_not_there(server: Server, method: str) -> None:
    answer = server.request(method, SECRETS)
    assert answer.status in (400, 405), answer
    if answer.status == 405:
        assert answer.headers["allow"] == "GET, POST"


def test_an_upgrade_is_not_made(server: Server) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
    for protocol in (b"websocket", b"h2c"):
        answer = server.send(request + b"Upgrade: " + protocol + b"\r\n\r\n")
        assert answer.status in (200, 400)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    live = f"Host: x\r\nAuthorization: Bearer {server.key}\r\n"
    body = json.dumps({"name": "PIPED", "value": "piped"})
    requests = [
        f"POST {SECRETS} HTTP/1.1\r\n{live}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}",
        f"GET {SECRETS}/PIPED HTTP/1.1\r\n{live}\r\n",
        f"GET {SECRETS}/ABSENT HTTP/1.1\r\n{live}\r\n",
        f"DELETE {SECRETS}/PIPED HTTP/1.1\r\n{live}\r\n",
        f"GET {SECRETS}/PIPED HTTP/1.1\r\n{live}Connection: close\r\n\r\n",
    ]
    with server.connect() as connection:
        connection.sendall("".join(requests).encode())
        received = b""
        while data := connection.recv(65536):
            received += data
    statuses = [int(part[1:4]) for part in received.split(b"HTTP/1.1")[1:]]
    assert statuses == [201, 200, 404, 200, 404]


def test_a_thousand_pipelined_requests(server: Server) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with server.connect() as connection:
        sender = threading.Thread(target=connection.sendall, args=(request * 999 + last,))
        sender.start()
        received = b""
        while data := connection.recv(65536):
            received += data
        sender.join()
    assert received.count(b"HTTP/1.1 200 OK") == 1000


def test_an_answer_to_head_has_no_body(server: Server) -> None:
    """Or the client takes the body for the next answer (RFC 9112 §6.3)."""
    request = "{} /healthz HTTP/1.1\r\nHost: x\r\nConnection: {}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(request.format("HEAD", "keep-alive").encode())
        connection.sendall(request.format("GET", "close").encode())
        received = b""
        while data := connection.recv(65536):
            received += data
    first, second, third = received.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 405 ")
    assert second.startswith(b"HTTP/1.1 200 ")
    assert json.loads(third) == {"status": "alive"}


def _resident(server: Server) -> int:
    """Resident memory of the server in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_client_that_asks_and_does_not_read(server: Server) -> None:
    """What it does not take is not made: anybody may ask, and a question is shorter than an
    answer.
    """
    request = b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    before = most = _resident(server)
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        # The server stops to read: that is what the client should notice.
        with contextlib.suppress(TimeoutError):
            connection.sendall(request * 20_000)
        asked = time.monotonic()
        while time.monotonic() - asked < 2.0:
            assert server.get("KNOWN").status == 200
            most = max(most, _resident(server))
    assert most - before < 48 << 20, f"grew by {(most - before) >> 20} MiB"


def test_a_client_that_waits_to_be_told_to_continue(impatient: Server) -> None:
    """RFC 9110 §10.1.1: it gets `100 Continue`, or an answer at once."""
    body = b'{"name":"CONTINUED","value":"y"}'
    head = impatient.compose("POST", SECRETS, body, b"Expect: 100-continue").removesuffix(body)
    with impatient.connect() as connection:
        connection.sendall(head)
        interim = connection.recv(65536)
        assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert _exchange(connection, body).status == 201
    assert impatient.request("DELETE", f"{SECRETS}/CONTINUED").status == 200


# --- slow senders ------------------------------------------------------------------------------


def _body_that_never_ends(server: Server) -> Iterator[bytes]:
    head = server.compose("POST", SECRETS, b" " * 500_000).rstrip(b" ")
    return itertools.chain([head], itertools.repeat(b" "))


def _chunks_that_never_end(server: Server) -> Iterator[bytes]:
    head = _chunked(server, b" ", 1).removesuffix(b"0\r\n\r\n")
    return itertools.chain([head], itertools.repeat(b"1\r\n \r\n"))


@pytest.mark.parametrize("trickle", [True, False], ids=["trickle", "silence"])
@pytest.mark.parametrize("sending", [_body_that_never_ends, _chunks_that_never_end])
def test_a_body_that_never_ends(
    impatient: Server, sending: Callable[[Server], Iterator[bytes]], trickle: bool
) -> None:
    """It is answered 408 in time, and others are served meanwhile."""
    slow = [impatient.connect() for _ in range(20)]
    pieces = sending(impatient)
    first = next(pieces)
    started = time.monotonic()
    for connection in slow:
        connection.sendall(first)
    waits: list[float] = []
    # The body timeout is a second.
    while time.monotonic() - started < 1.5:
        begun = time.monotonic()
        assert impatient.get("KNOWN").status == 200
        waits.append(time.monotonic() - begun)
        if trickle:
            piece = next(pieces)
            for connection in slow:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(piece)
    for connection in slow:
        problem(_read(connection), 408)
        connection.close()
    assert time.monotonic() - started < 6.0
    assert len(waits) > 3
    assert max(waits) < 1.0


@pytest.mark.parametrize(
    "beginning", [b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: x", b"\r\n"], ids=ascii
)
def test_a_head_that_never_ends(impatient: Server, beginning: bytes) -> None:
    """The connection is closed: otherwise they would add up until there are none left."""
    started = time.monotonic()
    with impatient.connect() as connection:
        connection.sendall(beginning)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(65536):
                pass
    assert time.monotonic() - started < 8.0


def test_a_head_that_trickles(impatient: Server) -> None:
    started = time.monotonic()
    with impatient.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        connection.settimeout(0.3)
        closed = False
        while not closed and time.monotonic() - started < 8.0:
            try:
                connection.sendall(b"A: b\r\n")
                closed = not connection.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                closed = True
    assert closed


def test_a_client_that_goes_away_in_the_middle(server: Server) -> None:
    head = server.compose("POST", SECRETS, b" " * 100)[:-50]
    for size in range(0, len(head), 7):
        with server.connect() as connection:
            connection.sendall(head[:size])
            # Reset instead of an orderly close.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert server.get("KNOWN").status == 200
