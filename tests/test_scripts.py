"""`./scripts/*`: what a new user runs first, run as he does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
COMMANDS = sorted(
    path for path in SCRIPTS.iterdir() if not path.suffix and path.name != "environment"
)

needs_curl = pytest.mark.skipif(
    shutil.which("curl") is None and os.environ.get("CI") != "true", reason="curl is not installed"
)


def environment(**variables: str) -> dict[str, str]:
    """The environment of this process without what concerns the product, and with these."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLOWMASON_")}
    return kept | variables


@pytest.fixture(scope="module")
def prepared() -> None:
    """The virtual environment is up to date: with another HOME, pip may not find its settings."""
    for extra in ("secrets", "dev"):
        subprocess.run(
            ("bash", "-c", f"source scripts/environment && prepare {extra}"),
            cwd=ROOT,
            env=environment(PYTHON=sys.executable),
            check=True,
        )


def free_port() -> str:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Served:
    """`scripts/serve` in a home, until it is stopped."""

    def __init__(
        self, home: Path, *arguments: str, cwd: Path = ROOT, said: dict[str, str] | None = None
    ) -> None:
        self.home = home
        self._said = home.parent / f"{home.name}.stderr"
        with self._said.open("w") as errors:
            self.process = subprocess.Popen(
                (SCRIPTS / "serve", *arguments),
                cwd=cwd,
                env=environment(HOME=str(home), PYTHON=sys.executable, **(said or {})),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline().strip()
        assert "ready on " in self.ready, self.said

    @property
    def said(self) -> str:
        """Its stderr."""
        return self._said.read_text()

    @property
    def hints(self) -> list[str]:
        """The commands that it says to try."""
        shown = self.said.partition("Try it:\n")[2].partition("The events are in")[0]
        return re.findall(r"^  (curl (?:.*\\\n)*.*)$", shown, re.MULTILINE)

    def try_hint(self, number: int) -> Any:
        """What the server answers to one of them, run in a shell."""
        ended = subprocess.run(
            ("bash", "-c", self.hints[number]),
            env=environment(HOME=str(self.home)),
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stderr == ""
        return json.loads(ended.stdout)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        rest = self.process.stdout.read()
        assert rest == ""
        self.process.stdout.close()
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def served(
    home: Path, *arguments: str, cwd: Path = ROOT, said: dict[str, str] | None = None
) -> Iterator[Served]:
    """`scripts/serve` for the duration of a block."""
    home.mkdir(exist_ok=True)
    running = Served(home, *arguments, cwd=cwd, said=said)
    try:
        yield running
    finally:
        assert running.stop() == 0
        assert "Traceback" not in running.said


def mode(path: Path) -> int:
    """The permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def events(data_dir: Path) -> list[dict[str, Any]]:
    """All lines of the event files."""
    return [
        json.loads(line)
        for segment in sorted((data_dir / "events").glob("audit-*.ndjson"))
        for line in segment.read_text().splitlines()
    ]


@needs_curl
@pytest.mark.usefixtures("prepared")
def test_the_first_run_of_a_new_user(tmp_path: Path) -> None:
    home = tmp_path / "home"
    port = free_port()
    config = home / ".flowmason"
    data_dir = config / "secrets"
    with served(home, said={"FLOWMASON_SECRETS_PORT": port}) as server:
        assert server.ready.endswith(f"ready on http://127.0.0.1:{port}")
        assert "Made a master key" in server.said
        assert "Made a first API key" in server.said
        assert "NO MASTER KEY" not in server.said
        write, read, audit = range(len(server.hints))
        assert server.try_hint(write)["name"] == "OPENAI_API_KEY"
        shown = server.try_hint(read)
        assert (shown["value"], shown["category"]) == ("sk-...", "api_key")
        entries = server.try_hint(audit)
        seen = [(entry["action"], entry["success"]) for entry in entries[:2]]
        assert seen == [("secret.read", True), ("secret.create", True)]
        assert f"The events are in {data_dir}/events/." in server.said
        lines = [line for line in events(data_dir) if line["name"] == "OPENAI_API_KEY"]
        assert [line["action"] for line in lines] == ["secret.create", "secret.read"]
        assert [line["id"] for line in lines] == [entry["id"] for entry in entries[1::-1]]

    secret_files = [path for path in data_dir.rglob("*") if path.suffix in (".secret", ".meta")]
    assert len(secret_files) == 2
    for path in (config / "master.key", config / "api.key", *secret_files):
        assert mode(path) == 0o600, path
    for path in (config, data_dir, secret_files[0].parent, data_dir / "events"):
        assert mode(path) == 0o700, path
    assert {mode(path) for path in (data_dir / "events").iterdir()} == {0o640}
    assert os.listdir(data_dir / "staged") == []
    # The keys are shown nowhere.
    keys = [(config / name).read_text().strip() for name in ("master.key", "api.key")]
    assert re.fullmatch("fm_live_[0-9a-f]{48}", keys[1])
    assert len(keys[0]) >= 32
    assert [key for key in keys if key in server.said + server.ready] == []

    with served(home, said={"FLOWMASON_SECRETS_PORT": port}) as server:
        assert "Made" not in server.said
        assert server.try_hint(read)["value"] == "sk-..."
    assert [(config / name).read_text().strip() for name in ("master.key", "api.key")] == keys


@needs_curl
@pytest.mark.usefixtures("prepared")
def test_the_hint_works_with_options(tmp_path: Path) -> None:
    port = free_port()
    data_dir = tmp_path / "elsewhere"
    with served(tmp_path / "home", f"--port={port}", f"--data-dir={data_dir}") as server:
        assert server.ready.endswith(f":{port}")
        # Before it is tried: something else may listen on the port that it names.
        assert [hint for hint in server.hints if f":{port}/" not in hint] == []
        assert server.try_hint(0)["name"] == "OPENAI_API_KEY"
        assert server.try_hint(1)["value"] == "sk-..."
        assert f"{data_dir}/events/" in server.said


@needs_curl
@pytest.mark.usefixtures("prepared")
def test_the_hint_works_with_another_data_directory(tmp_path: Path) -> None:
    # An API key is of one data directory; the first one's opens nothing in the second.
    for name in ("one", "two"):
        said = {
            "FLOWMASON_SECRETS_PORT": free_port(),
            "FLOWMASON_SECRETS_DIR": str(tmp_path / name),
        }
        with served(tmp_path / "home", said=said) as server:
            assert server.try_hint(0)["name"] == "OPENAI_API_KEY"
        assert "secret.create" in [line["action"] for line in events(tmp_path / name)]


@needs_curl
@pytest.mark.usefixtures("prepared")
def test_the_hint_works_in_a_home_with_a_space(tmp_path: Path) -> None:
    with served(tmp_path / "Ann's home", said={"FLOWMASON_SECRETS_PORT": free_port()}) as server:
        assert server.try_hint(0)["name"] == "OPENAI_API_KEY"
        assert server.try_hint(1)["value"] == "sk-..."


@pytest.mark.usefixtures("prepared")
def test_paths_are_those_of_where_it_was_called(tmp_path: Path) -> None:
    place = f"data-of-{tmp_path.name}"
    strayed = ROOT / place
    assert not strayed.exists()
    said = {"FLOWMASON_SECRETS_PORT": free_port(), "FLOWMASON_SECRETS_DIR": place}
    try:
        with served(tmp_path / "home", cwd=tmp_path, said=said):
            assert not strayed.exists()
            assert (tmp_path / place / "events").is_dir()
    finally:
        shutil.rmtree(strayed, ignore_errors=True)


@pytest.mark.usefixtures("prepared")
def test_a_key_of_ones_own_is_used(tmp_path: Path) -> None:
    said = {
        "FLOWMASON_SECRETS_PORT": free_port(),
        "FLOWMASON_SECRETS_KEY": "a key of my own, of 32 characters or more",
    }
    with served(tmp_path / "home", said=said) as server:
        assert "Made a master key" not in server.said
        assert "Made a first API key" in server.said
    assert not (tmp_path / "home" / ".flowmason" / "master.key").exists()


def bench(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A run of `scripts/bench`."""
    return subprocess.run(
        (SCRIPTS / "bench", *arguments),
        env=environment(PYTHON=sys.executable, **variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.usefixtures("prepared")
def test_bench_explains_itself() -> None:
    ended = bench("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--rounds" in ended.stdout
    assert "aiohttp" in ended.stdout


@pytest.mark.usefixtures("prepared")
def test_bench_without_wrk_says_how_to_get_it(tmp_path: Path) -> None:
    for tool in ("bash", "env", "dirname", "cksum", "cat"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    ended = bench(PATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "wrk" in ended.stderr
    assert "apt-get install wrk" in ended.stderr
    assert "brew install wrk" in ended.stderr


def test_the_scripts_are_there() -> None:
    assert [path.name for path in COMMANDS] == ["bench", "bench-log", "check", "serve", "test"]


@pytest.mark.parametrize("path", [*COMMANDS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_every_script_runs_and_stops_at_the_first_error(path: Path) -> None:
    first, *rest = path.read_text().splitlines()
    assert first == "#!/usr/bin/env bash"
    assert mode(path) & 0o111 == 0o111
    commands = [line for line in rest if not line.startswith("#")]
    assert commands[0] in ("set -euo pipefail", 'source "$(dirname "$0")/environment"')
    subprocess.run(("bash", "-n", path), check=True)


def test_what_they_share_is_strict() -> None:
    lines = (SCRIPTS / "environment").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "set -euo pipefail"
    subprocess.run(("bash", "-n", SCRIPTS / "environment"), check=True)


def test_ci_checks_and_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == ["./scripts/check", "./scripts/test"]


def test_the_readme_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    mentioned = set(re.findall(r"\./scripts/[\w.-]*\w", text))
    assert {"./scripts/serve", "./scripts/test"} <= mentioned
    assert [name for name in mentioned if not os.access(ROOT / name, os.X_OK)] == []
    for place in set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)):
        assert (ROOT / place).exists(), place
