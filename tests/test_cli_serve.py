"""`flowmason-secrets serve`, and the settings of all commands."""

import asyncio
import datetime
import fcntl
import ipaddress
import json
import signal
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flowmason_secrets import config
from flowmason_secrets.storage.published import Layout

from .harness.server import MASTER_KEY, issue_key, serving
from .test_cli import PROGRAM, environment, local, run


class Certificate:
    """A self-signed certificate of a host at 127.0.0.1, and its key, also with a password."""

    def __init__(self, directory: Path, host: str = "test") -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(host), address]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        self.path = directory / "cert.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.key = directory / "key.pem"
        self.locked = directory / "locked.pem"
        locked = serialization.BestAvailableEncryption(b"password")
        for path, encryption in ((self.key, serialization.NoEncryption()), (self.locked, locked)):
            path.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
                )
            )


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """A certificate of this test."""
    return Certificate(tmp_path)


async def test_sigterm_lets_requests_end(data_dir: Path) -> None:
    api_key = await issue_key(data_dir)
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, "serve", "--port=0", f"--data-dir={data_dir}"),
        env=environment({"FLOWMASON_SECRETS_KEY": MASTER_KEY}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    ready = (await process.stdout.readline()).decode()
    assert ready.startswith("flowmason-secrets is ready on http://127.0.0.1:")
    port = int(ready.rpartition(":")[2])
    body = json.dumps({"name": "A", "value": "1"})
    head = (
        "POST /api/v1/secrets HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"X-API-Key: {api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with Layout(data_dir).lock.open("rb") as lock:
        # Nothing is committed while this process has the lock of the data directory.
        fcntl.flock(lock, fcntl.LOCK_EX)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        # The answer to the first request says that the server has the second one too.
        writer.write(f"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n{head}{body}".encode())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        process.send_signal(signal.SIGTERM)
        while await accepts(port):
            pass
        assert process.returncode is None
    assert b" 201 Created" in await reader.read()
    writer.close()
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 0
    assert (await local(data_dir).run("get", "A")).out == "1\n"


async def accepts(port: int) -> bool:
    """Whether somebody listens on the port."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
    except ConnectionError:
        return False
    return True


async def test_tls(data_dir: Path, certificate: Certificate) -> None:
    files = (f"--tls-cert={certificate.path}", f"--tls-key={certificate.key}")
    async with serving(data_dir, "--host=0.0.0.0", *files) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert url.startswith("https://127.0.0.1:")
        variables = {"FLOWMASON_API_KEY": await issue_key(data_dir)}
        distrusted = await run("list", "--url", url, variables=variables)
        distrusted.failed(1, "certificate")
        variables["SSL_CERT_FILE"] = str(certificate.path)
        trusted = await run("list", "--json", "--url", url, variables=variables)
        assert trusted.json == []


async def test_unix_socket(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(data_dir, f"--unix-socket={path}") as server:
        assert server.url == f"unix:{path}"
        variables = {"FLOWMASON_API_KEY": await issue_key(data_dir)}
        options = ("--url", server.url)
        assert (await run("set", "A", *options, stdin=b"1", variables=variables)).code == 0
        assert (await run("get", "A", *options, variables=variables)).out == "1\n"
    (await run("get", "A", *options, variables=variables)).failed(1, "can't be reached")


async def test_used_port(data_dir: Path, tmp_path: Path) -> None:
    async with serving(data_dir) as server:
        port = server.url.rpartition(":")[2]
        other = f"--data-dir={tmp_path / 'other'}"
        variables = {"FLOWMASON_SECRETS_KEY": MASTER_KEY}
        ended = await run("serve", f"--port={port}", other, variables=variables)
        ended.failed(1, f"127.0.0.1 port {port}", "in use", "--port")


async def test_files_that_are_no_certificate(data_dir: Path, certificate: Certificate) -> None:
    data_dir.mkdir()
    other = Certificate(data_dir)
    text = data_dir / "text"
    text.write_text("text")
    pairs = {
        (certificate.path, data_dir / "none"): "No such file",
        (text, text): "PEM",
        (certificate.path, certificate.locked): "PEM",
        (certificate.path, other.key): "MISMATCH",
    }
    for (cert, key), words in pairs.items():
        ended = await run("serve", "--port=0", f"--tls-cert={cert}", f"--tls-key={key}")
        ended.failed(1, str(cert), words)


SETTINGS: dict[str, tuple[dict[str, str], list[str], str]] = {
    "unknown variable": ({"X": "1"}, ["list", "--org=a"], "Unknown variable FLOWMASON_SECRETS_X"),
    "two keys": ({"KEY": "s3cret", "KEY_FILE": "/key"}, ["list", "--org=a"], "not both"),
    "no key file": ({"KEY_FILE": "{tmp}/none"}, ["list", "--org=a"], "can't be read"),
    "open key file": ({"KEY_FILE": "{tmp}/open"}, ["list", "--org=a"], "chmod 600"),
    "empty key file": ({"KEY_FILE": "{tmp}/empty"}, ["list", "--org=a"], "holds no key"),
    "no number": ({"PORT": "x"}, ["serve"], "FLOWMASON_SECRETS_PORT"),
    "no key in production": ({}, ["serve", "--production"], "--production needs a master key"),
    "short key in production": ({"KEY": "s3cret"}, ["serve", "--production"], "32 characters"),
    "half of tls": ({}, ["serve", "--tls-cert=x"], "go together"),
    "clear text": ({}, ["serve", "--host=0.0.0.0"], "--tls-cert"),
    "clear text, every address": ({}, ["serve", "--host=::"], "--behind-proxy"),
    "clear text by variable": ({"HOST": "192.0.2.1"}, ["serve"], "--behind-proxy"),
    "port": ({}, ["serve", "--port=65536"], "--port"),
}


async def test_settings_that_are_refused(data_dir: Path, tmp_path: Path) -> None:
    for name, text, mode in (("open", "s3cret", 0o640), ("empty", "\n", 0o600)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)

    async def check(given: dict[str, str], arguments: list[str], words: str) -> None:
        variables = {
            config.PREFIX + name: text.format(tmp=tmp_path)
            for name, text in {"DIR": str(data_dir), **given}.items()
        }
        ended = await run(*arguments, variables=variables)
        ended.failed(2, words)
        assert "s3cret" not in ended.err

    await asyncio.gather(*(check(*case) for case in SETTINGS.values()))
    assert not data_dir.exists()


async def test_key_file(data_dir: Path, tmp_path: Path) -> None:
    here = local(data_dir)
    await here.run("set", "A", stdin=b"1")
    path = tmp_path / "key"
    path.write_text(f"a newer key\n{MASTER_KEY}\n")
    path.chmod(0o600)
    variables = {"FLOWMASON_SECRETS_KEY_FILE": str(path)}
    assert await run("get", "A", *here.options, variables=variables) == (0, "1\n", "")


async def test_help_tells_the_settings() -> None:
    whole, command = await asyncio.gather(run("--help"), run("serve", "--help"))
    assert (whole.code, whole.err, command.code, command.err) == (0, "", 0, "")
    for variable in config.VARIABLES:
        assert config.PREFIX + variable in command.out
    defaults = config.Settings()
    for default in (defaults.host, defaults.port, defaults.data_dir, defaults.cache_bytes):
        assert str(default) in command.out
    for name in ("audit", "delete", "get", "keys", "list", "metadata", "serve", "set"):
        assert f"\n  {name} " in whole.out
    nothing = await run()
    assert (nothing.code, nothing.out) == (2, "")
    assert "Usage:" in nothing.err
