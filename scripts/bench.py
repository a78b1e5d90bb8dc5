"""Measures the service beside a bare aiohttp handler: same cores, same run, in turn.

Every figure that means anything is a ratio: absolute ones are those of the machine.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CONNECTIONS = 64
SECRETS = 1000
READS = 500_000
MASTER_KEY = "a master key for measurements, long enough"

# As many processes as its argument says, on one socket, as the service's workers are.
BARE = """
import asyncio, os, signal, socket, sys, uvloop
from aiohttp import web
BODY = b'{"name":"SECRET_0000","value":"%s","category":"api_key","is_expired":false,"version":1}'
async def answer(request):
    return web.Response(body=BODY, content_type="application/json")
async def main(bound, children):
    app = web.Application()
    app.router.add_get("/api/v1/secrets/{name}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, bound, backlog=1024).start()
    if children is not None:
        print("ready on http://%%s:%%d" %% bound.getsockname(), flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    for child in children or ():
        os.kill(child, signal.SIGTERM)
bound = socket.socket()
bound.bind(("127.0.0.1", 0))
children = []
for _ in range(int(sys.argv[1]) - 1):
    child = os.fork()
    if not child:
        children = None
        break
    children.append(child)
uvloop.run(main(bound, children))
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


# wrk knows no unix sockets: so many connections, each with one request after the other, by one
# process. Prints the rate, the latencies in milliseconds, and how many answers were not 200.
UNIX_LOAD = """
import selectors, socket, statistics, sys, time
path, connections, seconds, secrets = sys.argv[1], *map(int, sys.argv[2:])
selector = selectors.DefaultSelector()
number = failed = 0
taken = []
def ask(state):
    global number
    number = (number + 7) % secrets
    state[1], state[2] = b"", time.perf_counter()
    state[0].send(
        b"GET /api/v1/secrets/SECRET_%04d HTTP/1.1\\r\\nHost: a\\r\\n"
        b"X-FlowMason-Agent: true\\r\\n\\r\\n" % number
    )
for _ in range(connections):
    one = socket.socket(socket.AF_UNIX)
    one.connect(path)
    state = [one, b"", 0.0]
    selector.register(one, selectors.EVENT_READ, state)
    ask(state)
began = time.perf_counter()
while time.perf_counter() < began + seconds:
    for key, _ in selector.select(1):
        state = key.data
        state[1] += state[0].recv(65536)
        head, end, body = state[1].partition(b"\\r\\n\\r\\n")
        if end and len(body) >= int(head.partition(b"Content-Length: ")[2].split()[0]):
            taken.append(time.perf_counter() - state[2])
            failed += not head.startswith(b"HTTP/1.1 200")
            ask(state)
taken.sort()
print(len(taken) / seconds, *(1000 * taken[len(taken) * n // 100] for n in (50, 99)), failed)
"""


@dataclass
class Row:
    """The rounds of one measurement: requests per second, p50 and p99 in milliseconds. `bare` is
    what it is compared with.
    """

    name: str
    bare: "Row | None" = None
    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    errors: int = 0
    rss: float | None = None
    # Whose memory is measured.
    process: "Target | None" = None

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """To what it is compared with: the median of the rounds' own ratios, as the speed of a
        machine that others use changes from one round to the next.
        """
        rounds = zip(self.rates, (self.bare or self).rates, strict=True)
        return statistics.median(rate / bare for rate, bare in rounds)

    @property
    def slow(self) -> float:
        return statistics.median(self.p99)


class Target:
    """A server on the measured cores."""

    def __init__(
        self,
        name: str,
        command: list[str],
        cores: set[int],
        cwd: str | None = None,
        **environment: str,
    ) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
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


def wrk(row: Row, url: str, script: str, seconds: int, cores: set[int]) -> int:
    """One round; returns how many requests were answered."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        report = subprocess.run(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", file.name, url],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
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


def load(row: Row, url: str, seconds: int, cores: set[int]) -> int:
    """One round on a unix socket; returns how many requests were answered."""
    path, numbers = url.removeprefix("unix:"), map(str, (CONNECTIONS, seconds, SECRETS))
    told = subprocess.run(
        [sys.executable, "-c", UNIX_LOAD, path, *numbers],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ).stdout.split()
    for figures, figure in zip((row.rates, row.p50, row.p99), map(float, told), strict=False):
        figures.append(figure)
    row.errors += int(told[3])
    return int(row.rates[-1] * seconds)


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
def ours(cores: set[int], *options: str) -> Iterator[tuple[Target, str]]:
    """The service, a worker for each core, on a fresh data directory with the secrets in it, and an
    API key.
    """
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
        serve = [*program, "serve", "--port=0", "--workers=0", *options]
        target = Target("the service", serve, cores, **environment)
        try:
            for number in range(SECRETS):
                name = f"SECRET_{number:04d}"
                call(target.url, key, {"name": name, "value": "x" * 64, "category": "api_key"})
            yield target, key
        finally:
            target.stop()


@contextlib.contextmanager
def agent(url: str, key: str, cores: set[int]) -> Iterator[Target]:
    """An agent of that server."""
    # A path of a socket has at most 108 bytes.
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "flowmason_secrets", "agent"]
        options = [f"--url={url}", f"--state-dir={directory}"]
        target = Target("the agent", [*command, *options], cores, FLOWMASON_API_KEY=key)
        try:
            yield target
        finally:
            target.stop()


LEGACY = Path(".cache/flowmason-1.0-server")


def install_legacy() -> bool:
    """FlowMason 1.0.24 in an environment of its own; False where it can't be installed."""
    if (LEGACY / "ready").exists():
        return True
    pip = [str(LEGACY / "bin" / "python"), "-m", "pip", "install", "-q"]
    packages = ["flowmason[studio]==1.0.24", "uvicorn", "cryptography", "python-multipart"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(LEGACY)], check=True)
        subprocess.run([*pip, *packages], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"left out: FlowMason 1.0.24 can't be installed ({error})", file=sys.stderr)
        return False
    (LEGACY / "ready").touch()
    return True


@contextlib.contextmanager
def legacy(cores: set[int]) -> Iterator[tuple[Target, str]]:
    """FlowMason 1.0.24 under uvicorn, with the secrets in it, and an API key."""
    with tempfile.TemporaryDirectory(dir=".cache") as home:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = (
            "import uvicorn; from flowmason_studio_backend.api.app import app; "
            f"print('ready on http://127.0.0.1:{port}', flush=True); "
            f"uvicorn.run(app, port={port}, access_log=False, log_level='error')"
        )
        python = str((LEGACY / "bin" / "python").absolute())
        environment = {"HOME": home, "FLOWMASON_SECRETS_KEY": MASTER_KEY}
        command = [python, "-W", "ignore", "-c", program]
        # It keeps its database in the working directory.
        target = Target("FlowMason 1.0.24", command, cores, cwd=home, **environment)
        try:
            request = urllib.request.Request(f"{target.url}/api/v1/auth/bootstrap", b"")
            key = _when_up(request)["api_key"]["key"]
            for number in range(SECRETS):
                name = f"SECRET_{number:04d}"
                call(target.url, key, {"name": name, "value": "x" * 64, "category": "api_key"})
            yield target, key
        finally:
            target.stop()


def _when_up(request: urllib.request.Request) -> dict[str, dict[str, str]]:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)  # type: ignore[no-any-return]
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def scripts(key: str) -> tuple[str, str]:
    """What wrk sends: reads of all secrets in turn, and updates of one per connection."""
    read = READ_LUA.format(key=key, secrets=SECRETS, path="/api/v1/secrets/SECRET_%04d")
    update = UPDATE_LUA.format(key=key, connections=CONNECTIONS, path="/api/v1/secrets")
    return read, update


Run = tuple[Row, str, str, set[int]]


def one_core(stack: contextlib.ExitStack, arguments: argparse.Namespace) -> list[Run]:
    """One process on one core, the client on another."""
    cores, client = {arguments.core}, {1 - arguments.core}
    bare = Target("bare aiohttp", [sys.executable, "-c", BARE, "1"], cores)
    stack.callback(bare.stop)
    target, key = stack.enter_context(ours(cores, *arguments.options))
    read, update = scripts(key)
    base = Row("bare aiohttp")
    runs: list[Run] = [(base, bare.url, read, client)]
    runs.append((Row("secrets: GET", base, process=target), target.url, read, client))
    runs.append((Row("secrets: POST (update)", base), target.url, update, client))
    # On the same core: a read through the agent is a read of the service, too. It has a service of
    # its own, which is what it follows: the other rows have nobody who follows them.
    its, its_key = stack.enter_context(ours(cores, *arguments.options))
    beside = stack.enter_context(agent(its.url, its_key, cores))
    through = Row("secrets: GET by the agent", base, process=beside)
    runs.append((through, beside.url, "", client))
    if not arguments.no_legacy and install_legacy():
        old, old_key = stack.enter_context(legacy(cores))
        read, update = scripts(old_key)
        runs.append((Row("FlowMason 1.0.24: GET", base), old.url, read, client))
        runs.append((Row("FlowMason 1.0.24: POST", base), old.url, update, client))
    return runs


def two_cores(stack: contextlib.ExitStack, client: set[int], options: list[str]) -> list[Run]:
    """Two processes on two cores."""
    cores = {0, 1}
    bare = Target("bare aiohttp", [sys.executable, "-c", BARE, "2"], cores)
    stack.callback(bare.stop)
    target, key = stack.enter_context(ours(cores, *options))
    read, update = scripts(key)
    base = Row("bare aiohttp, 2 processes")
    return [
        (base, bare.url, read, client),
        (Row("secrets: GET, 2 workers", base), target.url, read, client),
        (Row("secrets: POST, 2 workers", base), target.url, update, client),
    ]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rounds, in turn."""
    # With two cores, the client has to share them with two processes.
    third = {2} if (os.cpu_count() or 1) > 2 else {0, 1}
    print(
        f"one process: on core {arguments.core}, wrk on core {1 - arguments.core}; "
        f"two: on cores 0 and 1, wrk on {' and '.join(map(str, sorted(third)))}"
    )
    with contextlib.ExitStack() as stack:
        runs = one_core(stack, arguments)
        runs += two_cores(stack, third, arguments.options)
        _, (read, url, script, client), *_ = runs
        reads = 0
        for _ in range(arguments.rounds):
            for row, where, what, client in runs:
                if where.startswith("unix:"):
                    load(row, where, arguments.seconds, client)
                    continue
                done = wrk(row, where, what, arguments.seconds, client)
                reads += done if row is read else 0
        while reads < READS and not arguments.quick:
            reads += wrk(Row("more"), url, script, arguments.seconds, client)
        for row, *_ in runs:
            row.rss = None if row.process is None else row.process.rss()
    return [row for row, *_ in runs]


def report(rows: list[Row]) -> bool:
    """Print the table; whether every bound is kept."""
    print(f"{'':28}{'requests/s':>12}{'ratio':>8}{'p50 ms':>9}{'p99 ms':>9}{'MiB':>6}{'errors':>8}")
    for row in rows:
        rss = "" if row.rss is None else f"{row.rss:.0f}"
        print(
            f"{row.name:28}{row.rate:12,.0f}{row.ratio:8.2f}"
            f"{statistics.median(row.p50):9.1f}{row.slow:9.1f}{rss:>6}{row.errors:8}"
        )
    bare, read, update, through = rows[:4]
    shared = rows[-2]
    bounds = [
        ("reads: at least 0.50 of bare", read.ratio >= 0.50),
        ("reads: p99 at most twice bare's", read.slow <= 2 * bare.slow),
        ("reads: at most 90 MiB resident", (read.rss or 0) <= 90),
        ("reads by the agent: at most 60 MiB resident", (through.rss or 0) <= 60),
        ("updates: at least 0.10 of bare", update.ratio >= 0.10),
        ("updates: p99 at most 60 ms", update.slow <= 60),
        ("reads, 2 workers: at least 0.45 of 2 bare processes", shared.ratio >= 0.45),
        ("no errors", not sum(row.errors for row in rows if row.name.startswith("secrets"))),
    ]
    for text, kept in bounds:
        print(f"{'ok  ' if kept else 'MISS'} {text}")
    return all(kept for _, kept in bounds)


def main() -> int:
    """Measure, print the table, and say whether it is as fast as it has to be."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=2, help="length of a round")
    parser.add_argument(
        "--core", type=int, default=0, choices=(0, 1), help="of one process; wrk has the other"
    )
    parser.add_argument("--quick", action="store_true", help="don't go on to 500,000 reads")
    parser.add_argument("--no-legacy", action="store_true", help="leave out FlowMason 1.0.24")
    parser.add_argument(
        "--vault-compat",
        dest="options",
        action="append_const",
        const="--vault-compat",
        default=[],
        help="serve clients of Vault, too",
    )
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is needed: apt-get install wrk, or brew install wrk", file=sys.stderr)
        return 2
    os.chdir(Path(__file__).parent.parent)
    return 0 if report(measure(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
