"""The command line with a server, with others than ours, and beside one."""

import asyncio
from pathlib import Path

import pytest

from flowmason_secrets import app
from flowmason_secrets.core.ports import AuditQuery

from .harness.server import serving, settings_for
from .test_cli import local, remote, run


async def test_audit_of_a_server_goes_on_past_its_pages(data_dir: Path) -> None:
    service = await app.open_service(settings_for(data_dir))
    try:
        caller = app.local_caller("acme")
        refused = [service.get(caller, f"none-{number}") for number in range(1100)]
        await asyncio.gather(*refused, return_exceptions=True)
        entries = await service.audit(caller, AuditQuery("acme", limit=2000))
        expected = [entry.line["id"] for entry in entries]
        assert len(expected) == 1100
    finally:
        await service.close()
    async with serving(data_dir) as server:
        there = await remote(server, data_dir)
        found = await there.run("audit", "--limit", "1050", "--failed", "--json")
        assert [entry["id"] for entry in found.json] == expected[:1050]


async def test_works_beside_a_server(data_dir: Path) -> None:
    async with serving(data_dir) as server:
        there, here = await remote(server, data_dir), local(data_dir)
        await there.run("set", "A", stdin=b"from there")
        assert (await here.run("get", "A")).out == "from there\n"
        await here.run("set", "A", stdin=b"from here")
        assert (await there.run("get", "A")).out == "from here\n"


async def test_servers_refuse_as_directories_do(data_dir: Path) -> None:
    async with serving(data_dir) as server:
        full = await remote(server, data_dir)
        limited = await remote(server, data_dir, allow=("app-*",))
        reader = await remote(server, data_dir, scopes=("read",))
        (await full.run("set", "A", "--expires-at", "tomorrow", stdin=b"1")).failed(2, "RFC 3339")
        (await limited.run("get", "A")).failed(1, "may not use the name 'A'")
        (await limited.run("keys", "list")).failed(1, "can't manage API keys")
        (await reader.run("get", "A")).failed(1, "scope full")
        (await full.run("set", "old", "--expires-at", "2001-01-01T00:00:00Z", stdin=b"1"))
        (await full.run("get", "old")).failed(1, "has expired")
        assert "(expired)" in (await full.run("list", "--expired")).out
        assert "old" not in (await full.run("list", "--not-expired")).out
        wrong = await run(
            "list", "--url", server.url, variables={"FLOWMASON_API_KEY": "fm_live_wrong"}
        )
        wrong.failed(1, "FLOWMASON_API_KEY")
        assert "fm_live_wrong" not in wrong.err
    (await full.run("get", "A")).failed(1, "can't be reached")


ANSWERS = {
    "html": (b"200 OK\r\nContent-Length: 6\r\n", b"<html>", "did not answer as"),
    "bad gateway": (b"502 Bad Gateway\r\nContent-Length: 6\r\n", b"<html>", "HTTP 502"),
    "redirect": (b"302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n", b"", "HTTP 302"),
    "cut off": (b"200 OK\r\nContent-Length: 99\r\n", b'{"value": "s3cret"', "can't be reached"),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_others_than_our_server(answer: str) -> None:
    head, body, words = ANSWERS[answer]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + head + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as other:
        url = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        ended = await run("get", "A", "--url", url, variables={"FLOWMASON_API_KEY": "fm_live_k"})
    ended.failed(1, words, url)
    assert "s3cret" not in ended.err
    assert "fm_live_k" not in ended.err
