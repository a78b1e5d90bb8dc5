"""The ways to a secret: HTTP, the library, the command line; each takes calls and gives answers."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import aiohttp
from click.testing import CliRunner

from flowmason_secrets.blocking import SecretsService
from flowmason_secrets.cli import cli
from flowmason_secrets.core.errors import SecretNotFound
from flowmason_secrets.core.records import SecretMetadata
from flowmason_secrets.library import AsyncSecretsService

from .linearise import Answer, Call, Kind, Outcome

ORG = "acme"

# What some interfaces can be asked for, beside reading, writing and deleting.
CONDITIONS, LISTING, KEYS = "conditions", "listing", "keys"


class Interface(Protocol):
    """One way, in one process. `hasty` is the one for calls that may be given up."""

    process: str
    abilities: frozenset[str]
    hasty: "Interface | None"

    async def perform(self, call: Call) -> Answer:
        """Do it, and say what came back. Anything unforeseen raises."""

    async def listing(self, prefix: str) -> dict[str, int]:
        """The versions of the secrets whose names begin so."""


_SUCCESS: dict[Kind, Outcome] = {
    "set": "updated",
    "delete": "deleted",
    "get": "found",
    "metadata": "found",
    "revoke": "revoked",
    "use": "used",
}
_STATUS: dict[int, Outcome] = {
    201: "created",
    401: "refused",
    404: "missing",
    412: "conflict",
}


class Http:
    """A client of a server; `keys` are the raw API keys by their ids."""

    abilities = frozenset({CONDITIONS, LISTING, KEYS})

    def __init__(
        self,
        process: str,
        client: aiohttp.ClientSession,
        keys: dict[str, str],
        hasty: Interface | None = None,
    ) -> None:
        self.process = process
        self.hasty = hasty
        self._client = client
        self._keys = keys

    async def perform(self, call: Call) -> Answer:
        method, path = self._route(call)
        headers = {} if call.key is None else {"Authorization": f"Bearer {self._keys[call.key]}"}
        if call.if_none_match:
            headers["If-None-Match"] = "*"
        if call.if_match is not None:
            headers["If-Match"] = call.if_match
        body = None
        if call.kind == "set":
            body = {"name": call.subject, "value": call.value}
        async with self._client.request(method, path, json=body, headers=headers) as response:
            text = await response.text()
            outcome = (
                _SUCCESS[call.kind] if response.status == 200 else _STATUS.get(response.status)
            )
            assert outcome is not None, (call, response.status, text)
            if outcome not in ("created", "updated", "found"):
                return Answer(outcome)
            told = json.loads(text)
            return Answer(outcome, told.get("value"), told["version"], response.headers["ETag"])

    async def listing(self, prefix: str) -> dict[str, int]:
        query = {"prefix": prefix}
        async with self._client.get("/api/v1/secrets", params=query) as response:
            assert response.status == 200, await response.text()
            return {entry["name"]: entry["version"] for entry in await response.json()}

    def _route(self, call: Call) -> tuple[str, str]:
        secrets, auth = "/api/v1/secrets", "/api/v1/auth"
        match call.kind:
            case "set":
                return "POST", secrets
            case "get":
                return "GET", f"{secrets}/{call.subject}"
            case "metadata":
                return "GET", f"{secrets}/{call.subject}/metadata"
            case "delete":
                return "DELETE", f"{secrets}/{call.subject}"
            case "revoke":
                return "DELETE", f"{auth}/api-keys/{call.subject}"
            case "use":
                return "GET", f"{auth}/whoami"


class Library:
    """`AsyncSecretsService`."""

    process = "library"
    abilities: frozenset[str] = frozenset()
    hasty: Interface | None = None

    def __init__(self, secrets: AsyncSecretsService) -> None:
        self._secrets = secrets

    async def perform(self, call: Call) -> Answer:
        try:
            match call.kind:
                case "set":
                    assert call.value is not None
                    return _written(await self._secrets.set(call.subject, call.value))
                case "get":
                    return Answer("found", await self._secrets.get(call.subject))
                case "metadata":
                    found = await self._secrets.get_metadata(call.subject)
                    return Answer("found", None, found.version)
            assert call.kind == "delete"
            await self._secrets.delete(call.subject)
            return Answer("deleted")
        except SecretNotFound:
            return Answer("missing")

    async def listing(self, prefix: str) -> dict[str, int]:
        found = await self._secrets.list()
        return {entry.name: entry.version for entry in found if entry.name.startswith(prefix)}


class BlockingLibrary:
    """`SecretsService`, each call in a thread."""

    process = "library 2"
    abilities: frozenset[str] = frozenset()
    hasty: Interface | None = None

    def __init__(self, secrets: SecretsService) -> None:
        self._secrets = secrets

    async def perform(self, call: Call) -> Answer:
        return await asyncio.to_thread(self._perform, call)

    def _perform(self, call: Call) -> Answer:
        try:
            match call.kind:
                case "set":
                    assert call.value is not None
                    return _written(self._secrets.set(call.subject, call.value))
                case "get":
                    return Answer("found", self._secrets.get(call.subject))
                case "metadata":
                    return Answer("found" if self._secrets.exists(call.subject) else "missing")
            assert call.kind == "delete"
            self._secrets.delete(call.subject)
            return Answer("deleted")
        except SecretNotFound:
            return Answer("missing")

    async def listing(self, prefix: str) -> dict[str, int]:
        found = await asyncio.to_thread(self._secrets.list)
        return {entry.name: entry.version for entry in found if entry.name.startswith(prefix)}


def _written(metadata: SecretMetadata) -> Answer:
    # The library doesn't tell whether it created: the first version was.
    outcome: Outcome = "created" if metadata.version == 1 else "updated"
    return Answer(outcome, None, metadata.version)


class Ended(NamedTuple):
    """How a command ended; `errors` is its stderr, or the text of the error."""

    good: bool
    out: str
    errors: str


class CommandLine:
    """The commands within this process, each of which opens the data directory and closes it."""

    process = "command line"
    abilities = frozenset({CONDITIONS, LISTING})
    hasty: Interface | None = None

    def __init__(self, data_dir: Path) -> None:
        self._options = ("--org", ORG, "--data-dir", str(data_dir))

    async def perform(self, call: Call) -> Answer:
        return _answer(call, await self.run(_arguments(call), call.value))

    async def listing(self, prefix: str) -> dict[str, int]:
        ended = await self.run(["list", "--prefix", prefix, "--json"], None)
        assert ended.good, ended
        return {entry["name"]: entry["version"] for entry in json.loads(ended.out)}

    async def run(self, arguments: list[str], value: str | None) -> Ended:
        """Run one command to its end."""
        return await asyncio.to_thread(self._run, arguments, value)

    def _run(self, arguments: list[str], value: str | None) -> Ended:
        ended = CliRunner().invoke(cli, [*arguments, *self._options], input=value)
        good = ended.exit_code == 0
        return Ended(good, ended.stdout, ended.stderr if good else str(ended.exception))


class Program(CommandLine):
    """The installed program: a process for each command."""

    process = "program"

    def __init__(self, data_dir: Path, variables: dict[str, str]) -> None:
        super().__init__(data_dir)
        self._data_dir = data_dir
        self._environment = environment(variables)

    async def run(self, arguments: list[str], value: str | None) -> Ended:
        return await self._started([*arguments, *self._options], value)

    async def rotate(self, *options: str) -> None:
        """Put all secrets under a new master key."""
        ended = await self._started(["rotate-key", f"--data-dir={self._data_dir}", *options], None)
        assert ended.good, ended

    async def _started(self, arguments: list[str], value: str | None) -> Ended:
        started = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowmason_secrets", *arguments),
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await started.communicate((value or "").encode())
        return Ended(started.returncode == 0, out.decode(), errors.decode())


def environment(variables: dict[str, str]) -> dict[str, str]:
    """That of this process, with nothing that concerns the program but these variables."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLOWMASON_")}
    return kept | variables


def _arguments(call: Call) -> list[str]:
    arguments = [call.kind, call.subject]
    if call.kind == "revoke":
        arguments = ["keys", *arguments]
    if call.kind == "get":
        arguments.append("--json")
    if call.if_none_match:
        arguments.append("--if-none-match")
    if call.if_match is not None:
        arguments += ["--if-match", call.if_match]
    return arguments


def _answer(call: Call, ended: Ended) -> Answer:
    if not ended.good:
        missing = re.search(r"Secret '\S+' not found|There is no live API key", ended.errors)
        assert missing or "nothing was changed" in ended.errors, (call, ended)
        return Answer("missing" if missing else "conflict")
    match call.kind:
        case "set":
            told = re.search(r"(Created|Updated) '\S+': version (\d+), ETag (\S+)\.", ended.errors)
            assert told is not None, ended
            outcome: Outcome = "created" if told[1] == "Created" else "updated"
            return Answer(outcome, None, int(told[2]), f'"{told[3]}"')
        case "get":
            found = json.loads(ended.out)
            return Answer("found", found["value"], found["version"])
        case "metadata":
            rows = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
            return Answer("found", None, int(rows["version"]), f'"{rows["etag"]}"')
    return Answer(_SUCCESS[call.kind])
