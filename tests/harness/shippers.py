"""Real log shippers, configured by `deploy/shippers`, and a collector that they ship to."""

import asyncio
import contextlib
import os
import re
import signal
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..test_cli_serve import Certificate

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "deploy" / "shippers"
HOST = "collector.example"

# Where .ci/shippers unpacks them.
_UNPACKED = ROOT / ".cache" / "shippers"
# Their libraries there; those of the machine follow.
_LIBRARIES = ("usr/lib/{machine}-linux-gnu", "lib/{machine}-linux-gnu", "usr/lib/syslog-ng")

# Seconds within which what is written has arrived.
DEADLINE = 40.0

# RFC 5424 §6: a header of six fields, structured data, the message.
_MESSAGE = re.compile(rb"<\d+>1 \S+ \S+ (\S+) \S+ \S+ (?:-|\[.*?[^\\]\]) (.*)", re.DOTALL)


class Collector:
    """Takes syslog over TLS (RFC 5425), and keeps the messages in the order of their arrival."""

    def __init__(self, certificate: Certificate) -> None:
        self.certificate = certificate.path
        self.port = 0
        self.lines: list[bytes] = []
        self.received: Counter[bytes] = Counter()
        # What came and was no message.
        self.broken: list[bytes] = []
        self._arrival = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.path, certificate.key)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Take connections for the duration of a block."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        async with server:
            self.port = server.sockets[0].getsockname()[1]
            yield

    async def all_of(self, lines: Sequence[bytes]) -> None:
        """Return when all of these lines have arrived.

        Raises:
            AssertionError: they haven't in time.
        """
        missing = set(lines)
        try:
            async with asyncio.timeout(DEADLINE):
                while missing := {line for line in missing if line not in self.received}:
                    self._arrival.clear()
                    await self._arrival.wait()
        except TimeoutError:
            some = min(missing)[:200]
            raise AssertionError(f"{len(missing)} lines have not arrived, {some!r}") from None

    async def ended(self) -> None:
        """Return when all connections are at their end."""
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while True:
                # RFC 5425 §4.3: the length, a space, the message.
                size = int(await reader.readuntil(b" "))
                self._take(await reader.readexactly(size))
        except asyncio.IncompleteReadError as end:
            if end.partial:
                self.broken.append(end.partial)
        except (ConnectionError, ValueError) as error:
            self.broken.append(repr(error).encode())
        finally:
            writer.close()

    def _take(self, message: bytes) -> None:
        match = _MESSAGE.fullmatch(message)
        if match is None or match[1] != b"flowmason-secrets":
            self.broken.append(message)
            return
        # syslog-ng ends every message with a newline of its own.
        line = match[2].removesuffix(b"\n")
        self.lines.append(line)
        self.received[line] += 1
        self._arrival.set()


@dataclass(frozen=True, slots=True)
class Kind:
    """A shipper. `{unpacked}` is where it is, and `{place}` is its own directory.

    `begins` goes before its configuration, `changed` is what is another thing in tests.
    """

    name: str
    configuration: str
    begins: str
    changed: dict[str, str]
    command: tuple[str, ...]


_EVERYWHERE = {
    "/var/lib/flowmason/secrets/events": "{events}",
    "/etc/flowmason/collector-ca.pem": "{ca}",
    "6514": "{port}",
}

RSYSLOG = Kind(
    "rsyslog",
    "rsyslog.conf",
    'global(workDirectory="{place}")\n',
    {**_EVERYWHERE, f'target="{HOST}"': 'target="127.0.0.1"'},
    (
        *("{unpacked}/usr/sbin/rsyslogd", "-n", "-f", "{place}/conf", "-i", "{place}/pid"),
        *("-M", "{unpacked}/usr/lib/{machine}-linux-gnu/rsyslog"),
    ),
)

SYSLOG_NG = Kind(
    "syslog-ng",
    "syslog-ng.conf",
    "@version: 3.38\n",
    {**_EVERYWHERE, f'  "{HOST}"': '  "127.0.0.1"', "/var/lib/syslog-ng": "{place}"},
    (
        *("{unpacked}/usr/sbin/syslog-ng", "-F", "-e", "--no-caps", "-f", "{place}/conf"),
        *("-R", "{place}/persist", "-p", "{place}/pid", "-c", "{place}/control"),
        "--module-path={unpacked}/usr/lib/syslog-ng/3.38",
    ),
)


class Shipper:
    """A shipper that ships a directory of segments to a collector."""

    def __init__(self, kind: Kind, place: Path, events: Path, collector: Collector) -> None:
        place.mkdir()
        unpacked = _unpacked(kind)
        self._pid_file = place / "pid"
        self._said = place / "said"
        names = {
            "unpacked": unpacked,
            "machine": os.uname().machine,
            "place": place,
            "events": events,
            "ca": collector.certificate,
            "port": collector.port,
        }
        text = (CONFIGURATIONS / kind.configuration).read_text(encoding="utf-8")
        for ours, theirs in kind.changed.items():
            assert text.count(ours) == 1, ours
            text = text.replace(ours, theirs.format_map(names))
        (place / "conf").write_text(kind.begins.format_map(names) + text)
        self._command = [part.format_map(names) for part in kind.command]
        self._libraries = [f"{unpacked}/{path.format_map(names)}" for path in _LIBRARIES]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def said(self) -> str:
        """Its last words."""
        return self._said.read_text(errors="replace")[-2000:]

    async def start(self) -> None:
        """Return when it runs."""
        with self._said.open("ab") as said:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": ":".join(self._libraries)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        async with asyncio.timeout(DEADLINE):
            while not self._pid_file.exists():
                assert self._process.returncode is None, self.said
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """SIGTERM, as systemd does."""
        assert self._process is not None
        assert self._process.returncode is None, self.said
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE):
            assert await self._process.wait() == 0, self.said
        self._pid_file.unlink(missing_ok=True)

    async def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def shipping(
    kind: Kind, place: Path, events: Path, certificate: Certificate
) -> AsyncIterator[tuple[Shipper, Collector]]:
    """A shipper and its collector for the duration of a block."""
    collector = Collector(certificate)
    async with collector.listening():
        shipper = Shipper(kind, place, events, collector)
        await shipper.start()
        try:
            yield shipper, collector
        finally:
            await shipper.kill()


def differences(written: Sequence[bytes], shipped: Sequence[bytes]) -> list[str]:
    """What is not as it should be: every line once."""
    due, came = Counter(written), Counter(shipped)
    return [
        f"{kind} {count} times: {line[:200]!r}"
        for kind, these in (("missing", due - came), ("too much", came - due))
        for line, count in these.items()
    ]


def _unpacked(kind: Kind) -> Path:
    """Where it is. Where it is missing the test is skipped, and fails in CI."""
    place = _UNPACKED / kind.name
    if not place.with_name(f"{kind.name}.unpacked").exists():
        reason = f"there is no {kind.name} to run: .ci/shippers unpacks it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return place
