"""Measures the service beside a bare aiohttp handler: same core, same run, in turn.

Every figure that means anything is a ratio: absolute ones are those of the machine.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CONNECTIONS = 64
SECRETS = 1000
READS = 500_000
MASTER_KEY = "a master key for measurements, long enough"

BARE = """
import asyncio, sys, uvloop
from aiohttp import web
BODY = b'{"name":"SECRET_0000","value":"%s","category":"api_key","is_expired":false,"version":1}'
async def answer(request):
    return web.Response(body=BODY, content_type="application/json")
async def main():
    app = web.Application()
    app.router.add_get("/api/v1/secrets/{name}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print("ready on http://%%s:%%d" %% runner.addresses[0][:2], flush=True)
    await asyncio.Event().wait()
uvloop.run(main())
""" % ("x" * 64)

READ_LUA = """
wrk.headers["Authorization"] = "Bearer {key}"
local n = 0
request = function()
  n = (n + 7) % {secrets}
  return wrk.format("GET", string.format("{path}", n))
end
"""

UPDATE_LUA = """
local id = 0
function setup(thread) thread:set("id", id); id = id + 1 end
wrk.headers["Authorization"] = "Bearer {key}"
wrk.headers["Content-Type"] = "application/json"
local n = 0
request = function()
  n = (n + 1) % {connections}
  local body = string.format('{{"name":"BENCH_%04d","value":"' .. string.rep("y", 64) .. '"}}', n)
  return wrk.format("POST", "{path}", nil, body)
end
"""


@dataclass
class Row:
    """The rounds of one measurement: requests per second, p50 and p99 in milliseconds."""

    name: str
    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    errors: int = 0
    rss: float | None = None

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def slow(self) -> float:
        return statistics.median(self.p99)


class Target:
    """A server process on the measured core."""

    def __init__(self, name: str, command: list[str], core: int, **environment: str) -> None:
        self.row = Row(name)
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "ready on " in line:
                self.url = line.strip().rpartition(" ")[2]
                return
        raise SystemExit(f"{name} did not start")

    def rss(self) -> float:
        """Resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def stop(self) -> None:
        """SIGTERM, as an operator would."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)


def wrk(row: Row, url: str, script: str, seconds: int, core: int) -> int:
    """One round; returns how many requests were answered."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        report = subprocess.run(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", file.name, url],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        ).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", report)
    total = re.search(r"(\d+) requests in", report)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", report)
    assert rate is not None
    assert total is not None
    row.rates.append(float(rate[1]))
    row.p50.append(_milliseconds(report, "50%"))
    row.p99.append(_milliseconds(report, "99%"))
    row.errors += int(failed[1]) if failed else 0
    return int(total[1])


def _milliseconds(report: str, percentile: str) -> float:
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)", report)
    assert found is not None
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def call(url: str, key: str, document: dict[str, object]) -> None:
    """POST a secret."""
    request = urllib.request.Request(
        f"{url}/api/v1/secrets",
        json.dumps(document).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        answer.read()


@contextlib.contextmanager
def ours(core: int) -> Iterator[tuple[Target, str]]:
    """The service on a fresh data directory with the secrets in it, and an API key."""
    program = [sys.executable, "-m", "flowmason_secrets"]
    place = Path(os.environ.get("BENCH_DIR", ".cache"))
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        environment = {"FLOWMASON_SECRETS_KEY": MASTER_KEY, "FLOWMASON_SECRETS_DIR": directory}
        key = subprocess.run(
            [*program, "keys", "create", "--org", "bench", "--name", "bench"],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        target = Target("secrets: GET", [*program, "serve", "--port=0"], core, **environment)
        try:
            for number in range(SECRETS):
                name = f"SECRET_{number:04d}"
                call(target.url, key, {"name": name, "value": "x" * 64, "category": "api_key"})
            yield target, key
        finally:
            target.stop()


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rounds, in turn."""
    served, client = arguments.core, 1 - arguments.core
    bare = Target("bare aiohttp", [sys.executable, "-c", BARE], served)
    updates = Row("secrets: POST (update)")
    path = "/api/v1/secrets/SECRET_%04d"
    try:
        with ours(served) as (target, key):
            read = READ_LUA.format(key=key, secrets=SECRETS, path=path)
            update = UPDATE_LUA.format(
                key=key, connections=CONNECTIONS, path="/api/v1/secrets"
            )
            done = 0
            for _ in range(arguments.rounds):
                wrk(bare.row, bare.url, read, arguments.seconds, served ^ 1)
                done += wrk(target.row, target.url, read, arguments.seconds, client)
                wrk(updates, target.url, update, arguments.seconds, client)
            while done < READS and not arguments.quick:
                done += wrk(Row("more"), target.url, read, arguments.seconds, client)
            target.row.rss = target.rss()
    finally:
        bare.stop()
    return [bare.row, target.row, updates]


def report(rows: list[Row]) -> None:
    """The table."""
    bare = rows[0]
    print(f"{'':28}{'requests/s':>12}{'ratio':>8}{'p50 ms':>9}{'p99 ms':>9}{'MiB':>7}{'errors':>8}")
    for row in rows:
        rss = "" if row.rss is None else f"{row.rss:.0f}"
        print(
            f"{row.name:28}{row.rate:12,.0f}{row.rate / bare.rate:8.2f}"
            f"{statistics.median(row.p50):9.1f}{row.slow:9.1f}{rss:>7}{row.errors:8}"
        )


def main() -> int:
    """Measure, print the table, and say whether it is as fast as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="length of a round")
    parser.add_argument("--core", type=int, default=0, help="the servers' core; the client has another")
    parser.add_argument("--quick", action="store_true", help="don't top up to 500,000 reads")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is needed: apt-get install wrk, or brew install wrk", file=sys.stderr)
        return 2
    started = time.monotonic()
    rows = measure(arguments)
    report(rows)
    print(f"{arguments.rounds} rounds of {arguments.seconds} s, {time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
