"""What the command line prints, and what it does not."""

import asyncio
import contextlib
import fcntl
import io
import os
import re
import struct
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from flowmason_secrets.cli import progress
from flowmason_secrets.core.ports import Building

from .harness.server import serving, session
from .test_cli import PROGRAM, Place, environment, local, remote, run

HOSTILE = "\x1b]0;pwned\x07 \x9b31m \x7f \u202etxt [red]x[/red] :smile: a\nb\tc\rd"
ESCAPED = r"\x1b]0;pwned\x07 \x9b31m \x7f \u202etxt [red]x[/red] :smile: a\nb\tc\rd"


async def test_nothing_stored_moves_the_terminal(data_dir: Path) -> None:
    here = local(data_dir)
    async with serving(data_dir) as server:
        headers = {"User-Agent": "agent \x9b31m"}
        there = await remote(server, data_dir)
        async with session(server.url, there.variables["FLOWMASON_API_KEY"]) as client:
            await client.get("/api/v1/secrets/none", headers=headers)
        (await there.run("delete", HOSTILE)).failed(1, r"\x1b]0;pwned")
    await here.run("set", "[bold]A[|bold]", "--description", HOSTILE, stdin=b"1")
    commands = (["list"], ["metadata", "[bold]A[|bold]"], ["audit", "--failed"])
    tables = await here.all(*commands)
    documents = await here.all(*([*command, "--json"] for command in commands))
    for ended in (*tables, *documents):
        assert ended.code == 0
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", ended.out)
    assert all(ESCAPED in ended.out for ended in tables)
    assert all("[bold]A[|bold]" in ended.out for ended in tables[:2])
    assert documents[0].json[0]["description"] == HOSTILE
    assert documents[2].json[0]["details"]["name"] == HOSTILE
    assert documents[2].json[1]["details"]["user_agent"] == headers["User-Agent"]


async def test_output_that_can_not_be_written(data_dir: Path) -> None:
    here = local(data_dir)
    await here.run("set", "A", stdin=b"1")
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.closing(os.fdopen(writing, "wb")) as broken:
        for arguments in (["get", "A"], ["list"], ["audit", "--json"]):
            command = (*arguments, *here.options)
            ended = await run(*command, stdout=broken.fileno(), variables=here.variables)
            assert ended == (1, "", "")
    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as full:
            ended = await run(
                "get", "A", *here.options, stdout=full.fileno(), variables=here.variables
            )
            ended.failed(1, "No space left")


async def test_closed_streams_are_no_files(data_dir: Path) -> None:
    here = local(data_dir)
    await here.run("set", "A", stdin=b"1")
    script = 'exec "$@" <&- >&- 2>&-'
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        script,
        "sh",
        *PROGRAM,
        "list",
        *here.options,
        env=environment(here.variables),
    )
    assert await process.wait() == 0
    assert b"NAME" not in b"".join(file.read_bytes() for file in data_dir.rglob("*.ndjson"))


class Terminal:
    """A terminal of 60 columns with the program in it."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        self.shown = ""

    async def run(
        self, place: Place, *arguments: str, typed: Sequence[tuple[str, str]] = ()
    ) -> int:
        """Run the program there, typing a line after each of these prompts; returns its code."""
        become = (
            "import fcntl, os, sys, termios; os.setsid(); "
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", become, *PROGRAM, *arguments, *place.options),
            env=environment(place.variables | {"TERM": "xterm-256color"}),
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
        )
        os.close(self._slave)
        try:
            async with asyncio.timeout(60):
                seen = 0
                for prompt, line in typed:
                    while prompt not in self.shown[seen:]:
                        assert await self._read(), self.shown
                    seen = self.shown.index(prompt, seen) + len(prompt)
                    os.write(self._master, line.encode() + b"\n")
                while await self._read():
                    pass
                return await process.wait()
        finally:
            # Its end, if it has not ended: the program loses its terminal.
            os.close(self._master)

    async def _read(self) -> bool:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._master, ready.set)
        try:
            await ready.wait()
            data = os.read(self._master, 65536)
        except OSError:
            # Linux's way to say that nobody has the terminal open any more.
            return False
        finally:
            loop.remove_reader(self._master)
        self.shown += data.decode()
        return bool(data)


async def test_on_a_terminal(data_dir: Path) -> None:
    place = local(data_dir)
    prompt = Terminal()
    # The first two differ, so it asks again.
    typed = [
        ("Value: ", "one"),
        ("Once more: ", "two"),
        ("Value: ", "s3cret"),
        ("Once more: ", "s3cret"),
    ]
    assert await prompt.run(place, "set", "A", typed=typed) == 0
    assert "Created 'A'" in prompt.shown
    assert "s3cret" not in prompt.shown
    name = "[red]a very long name[|red] that does not fit " + "x" * 50
    stored = await place.run("set", name, "--description", HOSTILE, stdin=b"1")
    assert stored.code == 0
    table, value = Terminal(), Terminal()
    assert await table.run(place, "list") == 0
    assert await value.run(place, "get", "A") == 0
    assert value.shown == "s3cret\r\n"
    plain = re.sub("\x1b\\[[0-9;]*m", "", table.shown)
    assert "\x1b[1m" in table.shown
    assert not re.search("[\x00-\x09\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202e]", plain)
    assert max(map(len, plain.splitlines())) <= 60


class Watched(io.StringIO):
    """A stderr that somebody looks at."""

    def isatty(self) -> bool:
        return True


async def test_who_waits_for_the_index_sees_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.001)
    monkeypatch.setenv("TERM", "xterm")
    stderr = Watched()
    monkeypatch.setattr(sys, "stderr", stderr)
    steps = iter([None, None, Building(5, 1000), Building(5, 1000), Building(990, 1000), None])
    await progress.watch(lambda: next(steps))
    assert next(steps, "end") == "end"
    shown = stderr.getvalue()
    assert "Building the index" in shown
    assert "990/1000" in shown


async def test_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    await progress.watch(lambda: Building(5, 1000))
    assert stderr.getvalue() == ""
