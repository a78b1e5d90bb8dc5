"""FlowMason 1.0.24 itself, from PyPI, in a process of its own."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .server import MASTER_KEY

VERSION = "1.0.24"

_CACHE = Path(__file__).parents[2] / ".cache"

# One request a line: a service of 1.0 is made as its users make it, with the default layout
# below HOME, and called.
_DRIVER = """
import dataclasses, json, logging, os, sys, time
from datetime import datetime
from flowmason_studio_backend.services.secrets import SecretsService

logging.disable()

def plain(found):
    if isinstance(found, list):
        return [plain(one) for one in found]
    return dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found

def call(service, method, arguments):
    if arguments.get("expires_at"):
        arguments["expires_at"] = datetime.fromisoformat(arguments["expires_at"])
    try:
        return {"answer": plain(getattr(service, method)(**arguments))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}

for line in sys.stdin:
    request = json.loads(line)
    os.environ["HOME"] = request["home"]
    if request["zone"] is not None:
        os.environ["TZ"] = request["zone"]
        time.tzset()
    service = SecretsService(request["org"], master_key=request["master_key"])
    answers = [call(service, method, arguments) for method, arguments in request["calls"]]
    print(json.dumps(answers), flush=True)
"""


def installed() -> Path:
    """The folder with FlowMason 1.0.24, installed from PyPI once.

    Where it can't be installed the test is skipped, and fails in CI.
    """
    folder = _CACHE / f"flowmason-{VERSION}"
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / f"flowmason-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            draft = _CACHE / f"flowmason-{VERSION}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
                    *("--disable-pip-version-check", f"--target={draft}", f"flowmason=={VERSION}"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                reason = f"flowmason=={VERSION} can't be installed: {done.stderr[-500:]}"
                if os.environ.get("CI") == "true":
                    pytest.fail(reason)
                pytest.skip(reason)
            # Whole or not at all: an interrupted installation is done again.
            draft.rename(folder)
    return folder


class Legacy:
    """A process that has FlowMason 1.0.24 loaded."""

    def __init__(self) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("FLOWMASON_SECRETS_")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER],
            env=environment | {"PYTHONPATH": str(installed())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, object]) -> list[dict[str, Any]]:
        """One answer, or error, for each call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answers: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return answers

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        assert self._process.returncode == 0


@dataclass(frozen=True, slots=True)
class LegacyStore:
    """What FlowMason 1.0 keeps for one organisation below a home directory."""

    legacy: Legacy
    home: Path
    org: str = "acme"
    master_key: str | None = field(default=MASTER_KEY, repr=False)
    zone: str | None = None

    @property
    def data_dir(self) -> Path:
        """The folder of all organisations: what we call a data directory."""
        return self.home / ".flowmason" / "secrets"

    def run(self, *calls: tuple[str, dict[str, object]]) -> list[dict[str, Any]]:
        """Call methods of 1.0's SecretsService one after the other."""
        request: dict[str, object] = {"home": str(self.home), "org": self.org, "calls": calls}
        return self.legacy.ask(request | {"master_key": self.master_key, "zone": self.zone})

    def call(self, method: str, **arguments: object) -> Any:
        """What one method of 1.0's SecretsService returns; its failure is a failure here."""
        (answer,) = self.run((method, arguments))
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def set(self, name: str, value: str, **fields: object) -> dict[str, Any]:
        """Write a secret; returns 1.0's metadata of it."""
        written: dict[str, Any] = self.call("set", name=name, value=value, **fields)
        return written

    def set_all(self, values: dict[str, str]) -> None:
        """Write many secrets."""
        drafts: list[dict[str, object]] = [
            {"name": name, "value": value} for name, value in values.items()
        ]
        answers = self.run(*(("set", draft) for draft in drafts))
        assert [answer for answer in answers if "error" in answer] == []
