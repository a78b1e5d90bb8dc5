"""The method LIST, in whatever pieces and behind whatever requests it comes."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmason_secrets.api.framing import MAX_HEAD, Framing

from .harness.pressed import Peer, Pressed, Reply, pressed

# What looks like a request, in a body that has any bytes.
_BODIES = st.lists(
    st.sampled_from(
        [b"", b"L", b"LIST", b"LIST /v1/ HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"\0{}"]
    ),
    max_size=4,
).map(b"".join)
_METHODS = st.sampled_from(["GET", "LIST", "POST", "LOCK", "HEAD", "L"])
_EXTRA = st.sampled_from(["X: LIST /", "x:y\r\nLIST: LIST", "Transfer: chunked", "Length: 5"])


def head(method: str, *lines: str, path: str = "/v1/secret/metadata") -> bytes:
    """The head of a request."""
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *lines, "", "")).encode()


def chunked(body: bytes, cut: int, trailer: str = "") -> bytes:
    """A body in chunks of so many bytes."""
    pieces = [body[place : place + cut] for place in range(0, len(body), cut)]
    framed = b"".join(b"%X;LIST=x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return framed + b"00\r\n" + trailer.encode() + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """One request, with a body in one of the ways that there are, or without."""
    method, extra, body = draw(_METHODS), draw(st.lists(_EXTRA, max_size=2)), draw(_BODIES)
    start = draw(st.sampled_from([b"", b"\r\n", b"\r\n\r\n"]))
    match draw(st.sampled_from(["none", "length", "chunks"])):
        case "length":
            name = draw(st.sampled_from(["Content-Length", "CONTENT-LENGTH", "content-length"]))
            return start + head(method, *extra, f"{name}:  {len(body)} ") + body
        case "chunks":
            coding = draw(st.sampled_from(["chunked", "gzip, Chunked"]))
            trailer = draw(st.sampled_from(["", "LIST: x\r\n", "a: b\r\nLIST: c\r\n"]))
            framed = chunked(body, draw(st.integers(1, 9)), trailer)
            return start + head(method, *extra, f"Transfer-Encoding: {coding}") + framed
    return start + head(method, *extra)


def seen(request: bytes) -> bytes:
    """What the parser is to see of one request."""
    lead = len(request) - len(request.lstrip(b"\r\n"))
    rest = request[lead:]
    return request[:lead] + (b"LINK" + rest[4:] if rest.startswith(b"LIST ") else rest)


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The pieces between those places, each taken modulo the length."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


@settings(max_examples=500, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=6), st.lists(st.integers(0, 9999), max_size=9))
def test_only_methods_are_replaced(pipeline: list[bytes], cuts: list[int]) -> None:
    framing = Framing()
    pieces = split(b"".join(pipeline), cuts)
    passed = [framing.translated(piece) for piece in pieces]
    assert [len(piece) for piece in passed] == [len(piece) for piece in pieces]
    assert b"".join(passed) == b"".join(map(seen, pipeline))


@settings(max_examples=50, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=3))
def test_byte_by_byte(pipeline: list[bytes]) -> None:
    framing = Framing()
    data = b"".join(pipeline)
    passed = b"".join(framing.translated(data[at : at + 1]) for at in range(len(data)))
    assert passed == b"".join(map(seen, pipeline))


# One of each kind, with a body that looks like a request.
_FAKE = b"LIST / HTTP/1.1\r\n\r\n"
_EACH = (
    head("LIST"),
    head("POST", f"Content-Length: {len(_FAKE)}") + _FAKE,
    b"\r\n" + head("LIST", "X: LIST"),
    head("PUT", "Transfer-Encoding: chunked") + chunked(_FAKE, 12),
    head("LIST"),
)


def test_every_two_cuts() -> None:
    data, expected = b"".join(_EACH), b"".join(map(seen, _EACH))
    for first, second in itertools.combinations_with_replacement(range(len(data) + 1), 2):
        framing = Framing()
        pieces = (data[:first], data[first:second], data[second:])
        assert b"".join(map(framing.translated, pieces)) == expected, (first, second)


def test_every_request_on_its_own() -> None:
    framing = Framing()
    for request in _EACH * 2:
        assert framing.translated(request) == seen(request)


# What no parser takes for a request must not become one.
@pytest.mark.parametrize("method", [b"LINK", b"LISK", b"LINT", b"LIN", b"LIS", b"LISTS"])
def test_what_is_not_list(method: bytes) -> None:
    for cut in range(len(method) + 1):
        framing = Framing()
        data = method + b" / HTTP/1.1\r\n\r\n"
        passed = framing.translated(data[:cut]) + framing.translated(data[cut:])
        assert not passed.startswith(b"LINK ")


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: x",),
        ("Content-Length: -1",),
        ("Content-Length: " + "9" * 30,),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Transfer-Encoding: gzip",),
    ],
)
def test_what_it_does_not_understand_it_passes_on(lines: tuple[str, ...]) -> None:
    framing = Framing()
    data = head("POST", *lines) + head("LIST") * 2
    assert framing.translated(data) == data
    assert framing.translated(data) == data


def test_it_keeps_no_more_than_a_head() -> None:
    for start in (b"GET / HTTP/1.1\r\n", head("POST", "Transfer-Encoding: chunked") + b"1;"):
        framing = Framing()
        framing.translated(start)
        for _ in range(100):
            assert framing.translated(b"x" * 1000) == b"x" * 1000
        assert len(framing._kept) <= MAX_HEAD


# And through the server.


async def answers(peer: Peer, pieces: Sequence[bytes], count: int) -> list[Reply]:
    """The answers to what is sent in these pieces, each of its own arrival."""
    got: list[Reply] = []

    async def read() -> None:
        while len(got) < count:
            got.append(await peer.reply())

    reading = asyncio.create_task(read())
    for piece in pieces:
        await peer.sent(piece)
        # So that the next piece is another one for the server as well.
        await asyncio.sleep(0.001)
    await reading
    return got


def about(reply: Reply) -> tuple[int, object]:
    """What must not depend on how it was sent."""
    body = json.loads(reply.body) if reply.body else None
    return reply.status, body


def traffic(site: Pressed, random: Random) -> list[bytes]:
    """Requests whose answers are always the same."""
    auth = (f"X-Vault-Token: {site.key}", "X-Request-Id: same")
    body = b'{"versions": [], "LIST /v1/": "' + b"LIST" * random.randrange(200) + b'"}'
    length = f"Content-Length: {len(body)}"
    chunks = chunked(body, random.randrange(1, 99), "LIST: x\r\n")
    post = {"path": "/v1/secret/delete/A"}
    return random.choices(
        [
            head("LIST", *auth),
            head("LIST", *auth, path="/v1/secret/metadata/none/"),
            head("LIST", path="/v1/secret/metadata"),
            head("LIST", *auth, path="/v1/secret/data/A"),
            head("LIST", *auth, length) + body,
            head("LIST", *auth, "Transfer-Encoding: chunked") + chunks,
            head("GET", *auth, path="/v1/secret/metadata/A"),
            head("GET", *auth, path="/v1/secret/data/A"),
            head("GET", *auth, "X-LIST: LIST /", path="/api/v1/openapi.json?x"),
            head("POST", *auth, length, **post) + body,
            head("POST", *auth, "Transfer-Encoding: chunked", **post) + chunks,
        ],
        k=random.randrange(1, 50),
    )


async def test_pipelines_are_answered_as_if_sent_alone(data_dir: Path) -> None:
    async with pressed(data_dir, vault_compat=True) as site:
        alone: dict[bytes, tuple[int, object]] = {}
        statuses = set()
        for seed in range(40):
            random = Random(seed)
            sent = traffic(site, random)
            for request in set(sent) - set(alone):
                peer = await site.connect()
                (reply,) = await answers(peer, [request], 1)
                alone[request] = about(reply)
                peer.leave()
            data = b"".join(sent)
            cuts = [random.randrange(len(data)) for _ in range(random.choice((0, 1, 5, 40)))]
            peer = await site.connect()
            got = await answers(peer, split(data, cuts), len(sent))
            assert [about(reply) for reply in got] == [alone[request] for request in sent], seed
            statuses |= {reply.status for reply in got}
            peer.leave()
        assert statuses == {200, 400, 403, 404, 405, 422}


async def test_only_lists_are_lists(data_dir: Path) -> None:
    async with pressed(data_dir, vault_compat=True) as site:
        auth = f"X-Vault-Token: {site.key}"
        for method, status in (("LIST", 200), ("LINK", 400), ("LISK", 400), ("LISTS", 400)):
            peer = await site.connect()
            peer.send(head(method, auth))
            assert (await peer.reply()).status == status
            peer.leave()
        # Elsewhere there is no such method.
        peer = await site.connect()
        peer.send(head("LIST", auth, path="/api/v1/secrets"))
        refused = await peer.reply()
        assert (refused.status, refused.headers["allow"]) == (405, "GET, POST")


async def test_without_the_face_nothing_changes(data_dir: Path) -> None:
    async with pressed(data_dir) as site:
        for method, status in (("LIST", 400), ("LINK", 405)):
            peer = await site.connect()
            peer.send(head(method, path="/api/v1/secrets"))
            assert (await peer.reply()).status == status
            peer.leave()
