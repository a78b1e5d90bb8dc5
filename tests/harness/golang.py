"""Go's own verifiers of notes and trees, over `tests/go/verify.go`."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

_CACHE = Path(__file__).parents[2] / ".cache"
_SOURCE = Path(__file__).parents[1] / "go" / "verify.go"
# Where Debian's golang-golang-x-mod-dev puts it.
_PACKAGES = Path("/usr/share/gocode")


def go_verify(log: Path, vkey: str, *more: Path, minimum: int = 0) -> int:
    """The size of a log in the static layout, all of which Go has verified, or what there is from a
    minimum index on; `more` are older checkpoints, and proofs.

    Raises:
        AssertionError: Go refuses it; the message says why.
    """
    since = [f"from={minimum}"] if minimum else []
    ended = subprocess.run(
        [_program(), log, vkey, *since, *more], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def _program() -> Path:
    """The program, built once for each state of its source.

    Where Go is missing the test is skipped, and fails in CI.
    """
    _CACHE.mkdir(exist_ok=True)
    program = _CACHE / "go-verify"
    with (_CACHE / "go-verify.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program.exists() and program.stat().st_mtime >= _SOURCE.stat().st_mtime:
            return program
        environment = {
            "GO111MODULE": "off",
            "GOPATH": str(_PACKAGES),
            "GOCACHE": str(_CACHE / "go"),
        }
        try:
            built = subprocess.run(
                ["go", "build", "-o", program, _SOURCE],
                env=os.environ | environment,
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            _missing("there is no Go: apt-get install golang-go golang-golang-x-mod-dev")
        if built.returncode:
            _missing(f"tests/go/verify.go can't be built: {built.stderr[-500:]}")
    return program


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
