"""node-vault, over `tests/node/vault.js`."""

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# Another version is somebody else's code: it is chosen, not whatever is the newest.
VERSION = "0.12.0"

_CACHE = Path(__file__).parents[2] / ".cache"
_PROGRAM = Path(__file__).parents[1] / "node" / "vault.js"


def node_vault(url: str, token: str) -> dict[str, Any]:
    """What each step of the program came to: `ok` with the result, or `status` and `errors`.

    Where Node is missing the test is skipped, and fails in CI.
    """
    if shutil.which("npm") is None:
        _missing("there is no Node: apt-get install nodejs npm")
    ended = subprocess.run(
        ["node", _PROGRAM, _package(), url, token],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(line) for line in ended.stdout.splitlines())


def _package() -> Path:
    """The package, installed once for each version."""
    place = _CACHE / f"node-vault-{VERSION}"
    place.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "node-vault.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "ready").exists():
            # With a file of its own it is no part of whatever project is above it.
            (place / "package.json").write_text("{}")
            command = ["npm", "install", "--no-audit", "--no-fund", f"node-vault@{VERSION}"]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode:
                _missing(f"node-vault can't be installed: {done.stderr[-500:]}")
            (place / "ready").touch()
    return place / "node_modules" / "node-vault"


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
