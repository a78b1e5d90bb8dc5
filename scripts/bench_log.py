"""Makes a log of many events and measures what may depend on its length: how fast the index is
rebuilt and how large it is, how long the service takes to start, how long the first page of an
audit query takes, what a commit costs, and how fast all of it is verified.
"""

import argparse
import asyncio
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlencode

import aiohttp
import loggen

from flowmason_secrets import app
from flowmason_secrets.api.trail import BUCKETS, GROUPS
from flowmason_secrets.config import Settings
from flowmason_secrets.core.drafts import Draft, KeyDraft
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.ports import AuditQuery, Grouping
from flowmason_secrets.service import Service

MASTER_KEY = "a master key for measurements, long enough"
SMALL = 1000
PAGE = "/api/v1/auth/audit-log"
ORGANISATIONS = (0, 5, loggen.ORGANISATIONS - 1)

# For each organisation, how many queries each single filter gets, and how many each combination of
# filters; and how many commits a round of them has.
SINGLE, COMBINED, COMMITS = 70, 4, 4000


@dataclass
class Bound:
    """A figure and what it may be."""

    text: str
    value: float
    limit: float
    least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.least else "<="
        return (
            f"{'ok  ' if self.kept else 'MISS'} {self.text:48}"
            f"{self.value:12,.2f}   {sign} {self.limit:,.2f}"
        )


async def opened(directory: Path) -> Service:
    """The service over a data directory."""
    settings = app.with_overrides(Settings(), master_keys=(MASTER_KEY,), data_dir=directory)
    return await app.open_service(settings)


async def rebuild(directory: Path, events: int) -> list[Bound]:
    """How many events a second are indexed, and how large the index is beside the log."""
    service = await opened(directory)
    began = time.perf_counter()
    await service.audit(app.local_caller(loggen.org(0)), AuditQuery(loggen.org(0), limit=1))
    rate = events / (time.perf_counter() - began)
    await service.close()
    index = sum(path.stat().st_size for path in directory.glob("index.sqlite3*"))
    log = sum(path.stat().st_size for path in (directory / "events").iterdir())
    print(f"the log has {log / 1e6:,.0f} MB, the index {index / 1e6:,.0f} MB")
    return [
        Bound("rebuild: events a second", rate, 150_000, least=True),
        Bound("index: size beside the log's", index / log, 1.0),
    ]


async def sign(directory: Path, events: int) -> None:
    """Sign the log, as a server would have done while it grew."""
    service = await opened(directory)
    began = time.perf_counter()
    await service.signer.open()
    while (await service.signer.sign()).size < events:
        pass
    rate = events / (time.perf_counter() - began)
    await service.close()
    print(f"signed, {rate:,.0f} events a second")


class Server:
    """`flowmason-secrets serve` over a data directory; `seconds` is how long it took to start."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-m", "flowmason_secrets", "serve", "--port=0"]
        environment = {
            "FLOWMASON_SECRETS_KEY": MASTER_KEY,
            "FLOWMASON_SECRETS_DIR": str(directory),
        }
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "ready on " in line:
                self.url = line.strip().rpartition(" ")[2]
                break
        else:
            raise SystemExit("the service did not start")
        self.seconds = time.perf_counter() - began

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


def start(directory: Path) -> list[Bound]:
    """How long a server takes until it says that it is ready."""
    taken = []
    for _ in range(3):
        server = Server(directory)
        taken.append(server.seconds)
        server.stop()
    return [Bound("start of the service: seconds", max(taken), 2.0)]


class Filters:
    """Makes up values of the filters for one organisation."""

    def __init__(self, chance: random.Random, organisation: int) -> None:
        self._chance = chance
        self._organisation = organisation

    def value(self, name: str) -> str:
        chance = self._chance
        match name:
            case "resource_type":
                return chance.choice(("secret", "api_key", "audit_log"))
            case "action":
                return chance.choice([kind[0] for kind in loggen.KINDS])
            case "name":
                return loggen.name(min(int(chance.expovariate(0.02)), loggen.NAMES))
            case "actor":
                of = chance.choice((self._organisation, self._organisation, 1))
                return loggen.actor(of, chance.randrange(loggen.ACTORS))
            case "success":
                return chance.choice(("true", "false"))
            case "offset":
                return str(int(10 ** chance.uniform(0, 5)))
        back = timedelta(days=loggen.DAYS) * chance.random() ** 2
        return (loggen.END - back).isoformat().replace("+00:00", "Z")

    def query(self, names: Sequence[str]) -> str:
        chosen = {name: self.value(name) for name in names}
        if "since" in chosen and "until" in chosen:
            chosen["since"], chosen["until"] = sorted((chosen["since"], chosen["until"]))
        return urlencode(chosen)


FILTERS = ("resource_type", "action", "name", "actor", "success", "since", "until", "offset")


class Timings:
    """Milliseconds of the queries of some kind."""

    def __init__(self) -> None:
        self.all: dict[str, list[float]] = {}

    def show(self) -> None:
        print(
            f"{'first page of an audit query':32}{'queries':>9}{'p50 ms':>9}{'p99 ms':>9}{'max':>9}"
        )
        for name, found in self.all.items():
            print(
                f"{name:32}{len(found):9}{statistics.median(found):9.2f}"
                f"{p99(found):9.2f}{max(found):9.2f}"
            )


def p99(found: Sequence[float]) -> float:
    """The nearest rank."""
    return sorted(found)[max(0, -(-99 * len(found) // 100) - 1)]


async def keys(directory: Path) -> dict[str, tuple[int, str]]:
    """API keys of a large, a middling and a small organisation, and one limited to names."""
    service = await opened(directory)
    found: dict[str, tuple[int, str]] = {}
    for number in ORGANISATIONS:
        for allow in ((), ("SERVICE_00*", "SERVICE_1?5_*")):
            caller = app.local_caller(loggen.org(number))
            issued = await service.keys.issue(caller, KeyDraft("bench", ("read",), allow))
            kind = f"{number}{', of some names' if allow else ''}"
            found[kind] = (number, issued.raw.reveal())
    # With these, the index is up to date.
    await service.audit(caller, AuditQuery(loggen.org(0), limit=1))
    await service.close()
    return found


async def queries(directory: Path) -> list[Bound]:
    """How long the first page takes: for each filter, and for all their combinations."""
    timings = Timings()
    issued = await keys(directory)
    server = Server(directory)
    try:
        async with aiohttp.ClientSession(server.url) as session:
            for kind, (number, key) in issued.items():
                filters = Filters(random.Random(2), number)
                headers = {"Authorization": f"Bearer {key}"}
                for size in range(len(FILTERS) + 1):
                    for names in itertools.combinations(FILTERS, size):
                        label = " ".join(names) or "no filter" if size < 2 else f"{size} filters"
                        if "of some names" in kind:
                            label = "API key limited to names"
                        taken = timings.all.setdefault(label, [])
                        for _ in range(SINGLE if size < 2 else COMBINED):
                            url = f"{PAGE}?{filters.query(names)}"
                            began = time.perf_counter()
                            async with session.get(url, headers=headers) as answer:
                                await answer.read()
                                assert answer.status == 200, await answer.text()
                            taken.append((time.perf_counter() - began) * 1000)
    finally:
        server.stop()
    timings.show()
    worst = max(timings.all, key=lambda name: p99(timings.all[name]))
    return [Bound(f"first page, p99 of the worst ({worst}): ms", p99(timings.all[worst]), 20.0)]


async def summaries(directory: Path) -> None:
    """How long it takes to count the events of the largest organisation."""
    service = await opened(directory)
    caller = app.local_caller(loggen.org(0))
    everything = AuditQuery(loggen.org(0))
    await service.audit(caller, everything)
    print(f"{'summary, ms':32}{'all days':>12}{'a week':>12}{'counts':>9}")
    for by in GROUPS:
        for bucket, seconds in BUCKETS.items():
            row = f"by {by}, per {bucket}"
            for days in (loggen.DAYS + 1, 7):
                since = (loggen.END - timedelta(days=days)).timestamp()
                began = time.perf_counter()
                counts = await service.audit_summary(
                    caller, everything._replace(since=since), Grouping(by, seconds, 1_000_000)
                )
                took = (time.perf_counter() - began) * 1000
                row = f"{row:32}{took:12,.0f}"
            print(f"{row}{len(counts):9,}")
    await service.close()


async def commits(directory: Path, small: Path) -> list[Bound]:
    """What a commit costs with a short log and with a long one, in turn."""
    services = [await opened(small), await opened(directory)]
    caller = app.local_caller("bench")
    taken: list[list[float]] = [[], []]
    for service in services:
        await service.set(caller, Draft("NAME", Plaintext("value"), "", "other", None))
        service.start()

    async def reader(service: Service) -> None:
        for _ in range(COMMITS // 64):
            await service.get(caller, "NAME")

    for _ in range(7):
        for service, rounds in zip(services, taken, strict=True):
            began = time.perf_counter()
            await asyncio.gather(*(reader(service) for _ in range(64)))
            rounds.append((time.perf_counter() - began) / (COMMITS // 64 * 64) * 1e6)
    for service in services:
        await service.close()
    short, long = map(statistics.median, taken)
    print(f"a commit costs {short:.1f} µs after {SMALL:,} events, {long:.1f} µs after all")
    return [Bound("commit: cost beside that of a short log", long / short, 1.25)]


def verification(directory: Path, events: int) -> list[Bound]:
    """How many events a second are verified."""
    command = [sys.executable, "-m", "flowmason_secrets", "verify", f"--data-dir={directory}"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rate = events / (time.perf_counter() - began)
    print(done.stdout.strip())
    return [Bound("verify: events a second", rate, 400_000, least=True)]


def measure(place: Path, events: int) -> bool:
    """Make the logs, measure, and say whether every bound is kept."""
    directory, small = place / "long", place / "short"
    loggen.generate(small, SMALL)
    began = time.perf_counter()
    loggen.generate(directory, events)
    print(f"{events:,} events, made in {time.perf_counter() - began:.0f} s")
    asyncio.run(sign(directory, events))
    bounds = asyncio.run(rebuild(directory, events))
    bounds += start(directory)
    bounds += asyncio.run(queries(directory))
    asyncio.run(summaries(directory))
    bounds += asyncio.run(commits(directory, small))
    bounds += verification(directory, events)
    print(*bounds, sep="\n")
    return all(bound.kept for bound in bounds)


def main() -> int:
    """Measure, and say whether it is as it has to be."""
    parser = argparse.ArgumentParser(prog="scripts/bench-log", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(os.environ.get("BENCH_DIR", ".cache")),
        help="where to work",
    )
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(arguments.dir).free < 800 * arguments.events:
        print("there is not enough room on the disk", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
        return 0 if measure(Path(place), arguments.events) else 1


if __name__ == "__main__":
    sys.exit(main())
