"""The command line as users run it: processes, on a data directory and on a server."""

import asyncio
import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .harness.server import MASTER_KEY, ServerProcess, issue_key, serving, session

PROGRAM = (sys.executable, "-m", "flowmason_secrets")

# More at once would only make all of them slow.
_runs = ThreadPoolExecutor(4)


class Ended(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, which is one line of JSON."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def failed(self, code: int, *words: str) -> None:
        """Assert that it ended so: nothing on stdout, one line with these words on stderr."""
        assert self.code == code, self
        assert self.out == ""
        assert self.err.startswith("flowmason-secrets: ")
        assert self.err.count("\n") == 1, self.err
        for word in words:
            assert word in self.err


def environment(variables: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of this process without what concerns the program, and with these."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLOWMASON_")}
    # Reading the system's certificates is a sixth of a run.
    return kept | {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull} | (variables or {})


async def run(
    *arguments: str,
    stdin: bytes = b"",
    stdout: int = subprocess.PIPE,
    variables: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Ended:
    """Run the program to its end; `prefix` comes before it."""
    ended = await asyncio.get_running_loop().run_in_executor(
        _runs,
        lambda: subprocess.run(
            (*prefix, *PROGRAM, *arguments),
            env=environment(variables),
            input=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        ),
    )
    assert b"Traceback" not in ended.stderr
    return Ended(ended.returncode, (ended.stdout or b"").decode(), ended.stderr.decode())


@dataclass(frozen=True)
class Place:
    """Where commands work: their options and their environment."""

    data_dir: Path
    options: tuple[str, ...]
    variables: dict[str, str] = field(repr=False)
    actor: str

    async def run(self, *arguments: str, stdin: bytes = b"") -> Ended:
        """Run the program there."""
        return await run(*arguments, *self.options, stdin=stdin, variables=self.variables)

    async def all(self, *commands: Sequence[str]) -> list[Ended]:
        """Run them all, one at least as the other."""
        return await asyncio.gather(*(self.run(*command) for command in commands))


def local(data_dir: Path, org: str = "acme") -> Place:
    """A data directory."""
    options = ("--org", org, "--data-dir", str(data_dir))
    return Place(data_dir, options, {"FLOWMASON_SECRETS_KEY": MASTER_KEY}, getpass.getuser())


async def remote(
    server: ServerProcess,
    data_dir: Path,
    scopes: tuple[str, ...] = ("full",),
    allow: tuple[str, ...] = (),
) -> Place:
    """A server, with a new API key for it."""
    key = await issue_key(data_dir, scopes=scopes, allow=allow)
    async with session(server.url, key) as client, client.get("/api/v1/auth/whoami") as answer:
        actor = (await answer.json())["api_key_id"]
    # What run keeps is in the home directory.
    variables = {"FLOWMASON_API_KEY": key, "HOME": str(data_dir.parent)}
    return Place(data_dir, ("--url", server.url), variables, actor)


@pytest.fixture(params=["local", "remote"])
async def place(request: pytest.FixtureRequest, data_dir: Path) -> AsyncIterator[Place]:
    """Each of the two in turn."""
    if request.param == "local":
        yield local(data_dir)
    else:
        async with serving(data_dir) as server:
            yield await remote(server, data_dir)


VALUES = {
    "no-newline": ("s3cret", "s3cret"),
    "only-a-newline": ("\n", ""),
    "anything": (
        "naïve 密码 🔑\u202e\r\n\x00\x1b[31m\t\n\n",
        "naïve 密码 🔑\u202e\r\n\x00\x1b[31m\t\n",
    ),
    "longest": ("x" * 65536 + "\n", "x" * 65536),
}


async def test_values_come_back_as_they_were(place: Place) -> None:
    async def there_and_back(name: str, sent: str, kept: str) -> None:
        stored = await place.run("set", name, stdin=sent.encode())
        assert (stored.code, stored.out) == (0, "")
        assert stored.err.startswith(f"Created '{name}': version 1, ETag 1-")
        assert stored.err.count("\n") == 1
        assert await place.run("get", name) == (0, kept + "\n", "")

    values = ((name, *value) for name, value in VALUES.items())
    await asyncio.gather(*(there_and_back(*value) for value in values))
    assert (await place.run("get", "anything", "--json")).json == {
        "name": "anything",
        "value": VALUES["anything"][1],
        "category": "other",
        "is_expired": False,
        "version": 1,
    }


async def test_life_of_a_secret(place: Place) -> None:
    name = "A b?%ü"
    described = ("--description", "for tests", "--category", "token")
    created = await place.run("set", name, "--json", *described, stdin=b"1")
    assert created.json.items() >= {"category": "token", "description": "for tests"}.items()
    (await place.run("set", name, "--if-none-match", stdin=b"2")).failed(1, "nothing was changed")
    shown, document = await place.all(["metadata", name], ["metadata", name, "--json"])
    assert document.json == created.json
    etag = re.search(r"^etag +(\S+)$", shown.out, re.MULTILINE)
    assert etag is not None
    expires = ("--expires-at", "2100-01-31T12:00:00+01:00")
    updated = await place.run("set", name, "--if-match", etag[1], *expires, stdin=b"3")
    assert updated.err.startswith(f"Updated '{name}': version 2")
    (await place.run("delete", name, "--if-match", f'"{etag[1]}"')).failed(1, "nothing was changed")
    table, listed, none = await place.all(
        ["list"], ["list", "--json"], ["list", "--json", "--category", "api_key"]
    )
    assert [entry["expires_at"] for entry in listed.json] == ["2100-01-31T11:00:00.000000Z"]
    assert table.out.splitlines()[0].startswith("NAME    CATEGORY  VERSION  UPDATED")
    assert table.out.splitlines()[1].startswith("A b?%ü  other     2        2")
    assert none.json == []
    assert await place.run("delete", name) == (0, "", f"Secret '{name}' deleted.\n")
    for ended in await place.all(["get", name], ["metadata", name], ["delete", name]):
        ended.failed(1, "not found")


async def test_everything_is_in_the_audit(place: Place) -> None:
    await place.run("set", "A", stdin=b"1")
    await place.run("get", "A")
    await place.run("get", "B")
    everything, reads, table = await place.all(
        ["audit", "--json"],
        ["audit", "--json", "--action", "secret.read", "--name", "A", "--actor", place.actor],
        ["audit", "--resource-type", "secret", "--failed", "--since", "2001-01-01T00:00:00Z"],
    )
    events = [entry for entry in everything.json if entry["resource_type"] == "secret"]
    who = "user_id" if "--org" in place.options else "api_key_id"
    assert [(entry["action"], entry["success"], entry[who]) for entry in events] == [
        ("secret.read", False, place.actor),
        ("secret.read", True, place.actor),
        ("secret.create", True, place.actor),
    ]
    assert [entry["id"] for entry in reads.json] == [events[1]["id"]]
    assert [line.split()[5] for line in table.out.splitlines()] == ["NAME", "B"]


async def test_api_keys(place: Place) -> None:
    limits = ("--scope", "full", "--scope", "read", "--allow", "app-*", "--allow", "x")
    raw, document = await place.all(
        ["keys", "create", "--name", "first"],
        ["keys", "create", "--name", "limited", *limits, "--json"],
    )
    assert re.fullmatch(r"fm_live_[0-9a-f]{48}\n", raw.out)
    assert raw.out.strip() not in raw.err
    limited = document.json["api_key"]
    assert (limited["scopes"], limited["allow"]) == (["full", "read"], ["app-*", "x"])
    listed = (await place.run("keys", "list", "--json")).json
    assert limited in listed
    first = next(key["id"] for key in listed if key["name"] == "first")
    assert first in raw.err
    revoked = await place.run("keys", "revoke", first)
    assert revoked == (0, "", f"API key '{first}' revoked.\n")
    (await place.run("keys", "revoke", first)).failed(1, "already revoked")
    table = await place.run("keys", "list")
    states = {line.split()[1]: line.split()[-1] for line in table.out.splitlines()}
    assert (states["first"], states["limited"]) == ("revoked", "live")
    assert raw.out.strip() not in table.out
    if "--url" in place.options:
        refused = await run("list", *place.options, variables={"FLOWMASON_API_KEY": raw.out})
        refused.failed(1, "FLOWMASON_API_KEY", "revoked")


async def test_audit_of_a_directory_is_of_all_organisations(data_dir: Path) -> None:
    acme, other = local(data_dir), local(data_dir, "other")
    await acme.run("set", "A", stdin=b"1")
    await acme.run("get", "A")
    await other.run("set", "B", stdin=b"1")
    document, table = await asyncio.gather(
        *(
            run(
                "audit",
                "--data-dir",
                str(data_dir),
                *more,
                variables={"FLOWMASON_SECRETS_KEY": MASTER_KEY},
            )
            for more in (["--json"], [])
        )
    )
    seen = [(entry["org_id"], entry["action"]) for entry in document.json]
    assert seen[:3] == [
        ("other", "secret.create"),
        ("acme", "secret.read"),
        ("acme", "secret.create"),
    ]
    assert seen[-1] == (None, "log.segment")
    assert "ORGANISATION" in table.out
    lines = (data_dir / "events" / "audit-000000000000.ndjson").read_text().splitlines()
    kinds = [json.loads(line)["actor_type"] for line in lines]
    assert kinds == ["system", "local", "local", "local"]


ANYWHERE = [["--org", "acme"], ["--url", "http://127.0.0.1:1"]]

USAGE: dict[str, tuple[list[str], str]] = {
    "no target": (["get", "A"], "--org ORG"),
    "no target for audit on a server": (["audit", "--insecure"], "--insecure"),
    "two targets": (["get", "A", "--org", "x", "--url", "https://x"], "--org"),
    "directory of a server": (["get", "A", "--data-dir", "x", "--url", "https://x"], "--data-dir"),
    "keys without target": (["keys", "list"], "--org ORG"),
    "plain http": (["get", "A", "--url", "http://192.0.2.1"], "--insecure"),
    "no url": (["get", "A", "--url", "example.org"], "--url must be like"),
    "other scheme": (["get", "A", "--url", "ftp://example.org"], "--url must be like"),
    "url with password": (["get", "A", "--url", "https://u:p@example.org"], "--url"),
    "no command": (["nothing"], "No such command"),
    "no name": (["get", "--org", "acme"], "NAME"),
    "empty organisation": (["list", "--org", ""], "org_id"),
    "category": (["set", "A", "--org", "acme", "--category", "x"], "--category"),
    "scope": (["keys", "create", "--name", "x", "--org", "a", "--scope", "x"], "--scope"),
    "limit": (["audit", "--org", "acme", "--limit", "0"], "--limit"),
    "time": (["audit", "--since", "yesterday"], "since: must be an RFC 3339 time"),
    "both preconditions": (
        ["set", "A", "--org", "a", "--if-match", "1", "--if-none-match"],
        "exclude each other",
    ),
    "etag": (["delete", "A", "--org", "acme", "--if-match", 'a"b'], "ETag"),
    "name": (["set", "a/b", "--org", "acme"], "must not contain '/'"),
    "empty stdin": (["set", "A", "--org", "acme"], "stdin is empty"),
    "not utf-8": (["get", "\udcff", "--org", "acme"], "Argument 2 is not UTF-8"),
}


def test_commands_are_imported_when_asked_for() -> None:
    """By their names; alone, the command line imports none of them."""
    shown = subprocess.run(
        (sys.executable, "-c", _COMMANDS_IMPORTED), capture_output=True, text=True, check=True
    )
    alone, with_run, *names = shown.stdout.splitlines()
    assert alone == ""
    assert "run" in with_run.split()
    assert not {"audit", "rotate", "serve", "verify"} & set(with_run.split())
    assert names == sorted(names)
    assert len(names) == 16


_COMMANDS_IMPORTED = """
import sys, click
from flowmason_secrets.cli import cli
context = click.Context(cli)
parts = {"agent", "audit", "inject", "keys", "log", "render", "rotate", "run", "secret", "serve",
         "status", "verify"}
prefix = "flowmason_secrets.cli."
def imported():
    return " ".join(part for part in sorted(parts) if prefix + part in sys.modules)
print(imported())
cli.get_command(context, "run")
print(imported())
for name in cli.list_commands(context):
    assert cli.get_command(context, name).name == name
    print(name)
"""


async def test_usage_errors(data_dir: Path) -> None:
    data_dir.mkdir()
    variables = {"FLOWMASON_API_KEY": "k", "FLOWMASON_SECRETS_DIR": str(data_dir)}
    ended = await asyncio.gather(
        *(run(*arguments, variables=variables) for arguments, _ in USAGE.values())
    )
    for (_, words), end in zip(USAGE.values(), ended, strict=True):
        end.failed(2, words)
    assert not list(data_dir.iterdir())


@pytest.mark.parametrize("target", ANYWHERE, ids=["local", "remote"])
async def test_a_value_is_no_argument(target: list[str], data_dir: Path) -> None:
    variables = {"FLOWMASON_API_KEY": "k", "FLOWMASON_SECRETS_DIR": str(data_dir)}
    for arguments in (["A", "s3cret"], ["--value=s3cret", "A"], ["A", "--value", "s3cret"]):
        ended = await run("set", *arguments, *target, stdin=b"1", variables=variables)
        ended.failed(2)
        assert "s3cret" not in ended.err
    assert not data_dir.exists()


@pytest.mark.parametrize(
    ("sent", "words"),
    [(b"x" * 65537, "more than 65536 bytes"), (b"s3cret\xff", "not UTF-8")],
    ids=["too long", "binary"],
)
async def test_values_that_are_none(sent: bytes, words: str, data_dir: Path) -> None:
    ended = await local(data_dir).run("set", "A", stdin=sent)
    ended.failed(2, words)
    assert "s3cret" not in ended.err


async def test_the_default_key_is_warned_about_once(data_dir: Path) -> None:
    options = ("--org", "acme", "--data-dir", str(data_dir))
    stored = await run("set", "A", *options, stdin=b"1")
    read = await run("get", "A", *options)
    assert read.out == "1\n"
    for ended in (stored, read):
        assert ended.code == 0
        assert ended.err.count("NO MASTER KEY") == 1
    wrong = await run("get", "A", *options, variables={"FLOWMASON_SECRETS_KEY": "another"})
    wrong.failed(1, "needs the master key default")


async def test_a_mistyped_directory_is_not_made(data_dir: Path) -> None:
    commands = (["get", "A"], ["list"], ["delete", "A"], ["metadata", "A"], ["keys", "list"])
    for ended in await local(data_dir).all(*commands, ["audit"], ["keys", "revoke", "x"]):
        ended.failed(2, "no data directory", "--data-dir")
    assert not data_dir.exists()
