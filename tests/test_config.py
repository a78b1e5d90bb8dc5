"""The settings: what the environment may say, and what it may not."""

import base64
import hashlib
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from flowmason_secrets import app, config
from flowmason_secrets.config import PREFIX, VARIABLES, Settings, from_environment
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Draft
from flowmason_secrets.core.errors import ConfigurationError, DecryptionFailed
from flowmason_secrets.core.keyring import DEFAULT_KEY_ID, Keyring, MasterKey, Plaintext

KEY = "the first master key, of 32 characters or more"
OLD = "the second master key, 32 characters or more"
CANARY = "canary-5f2c81"

NUMBERS = [
    variable
    for variable, (field, _) in VARIABLES.items()
    if isinstance(getattr(Settings(), field), int | float)
]
WHOLE = [
    variable
    for variable, (field, _) in VARIABLES.items()
    if isinstance(getattr(Settings(), field), int)
]

# Variable → what it says, and what becomes of it.
SAID: dict[str, tuple[str, Any]] = {
    "KEY": (KEY, (KEY,)),
    "KEY_FILE": ("", None),
    "OLD_KEYS": ("", ()),
    "DIR": ("/srv/secrets", Path("/srv/secrets")),
    "HOST": ("::1", "::1"),
    "PORT": ("8701", 8701),
    "WORKERS": ("0", 0),
    "CACHE_BYTES": ("0", 0),
    "SEGMENT_BYTES": ("1048576", 1048576),
    "SEGMENT_AGE": ("3600.5", 3600.5),
    "QUEUE_LIMIT": ("7", 7),
    "CONNECTIONS": ("100", 100),
    "REQUEST_BYTES": ("1048576", 1048576),
    "HEAD_TIMEOUT": ("1.5", 1.5),
    "BODY_TIMEOUT": ("2.5", 2.5),
    "WRITE_TIMEOUT": ("4", 4.0),
    "KEEPALIVE_TIMEOUT": ("10", 10.0),
    "SIGNING_KEY_FILE": ("/etc/signing.key", Path("/etc/signing.key")),
    "FREE_SPACE_WARNING": ("5000000000", 5000000000),
    "RESERVE_BYTES": ("0", 0),
    "WITNESS": ("https://w.example/a http://[::1]:1", ("https://w.example/a", "http://[::1]:1")),
    "WITNESS_KEY": ("one two", ("one", "two")),
    "VAULT_COMPAT": ("true", True),
}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key file with one key, as it should be."""
    path = tmp_path / "master.key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


def refused(environ: dict[str, str], *words: str) -> None:
    """Assert that these variables are an error whose text has these words and no key."""
    with pytest.raises(ConfigurationError) as caught:
        from_environment({PREFIX + name: text for name, text in environ.items()})
    for word in words:
        assert word in str(caught.value)
    for key in (KEY, OLD, CANARY):
        assert key not in str(caught.value)


# What is said.


def test_nothing_said() -> None:
    assert from_environment({}) == from_environment({"HOME": "/", "FLOWMASON_X": "y"}) == Settings()
    assert Settings().port == config.DEFAULT_PORT == 8700
    assert Settings().host == "127.0.0.1"
    assert Settings().master_keys == ()


def test_the_default_directory_is_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert Settings().root == Path("/home/ann/.flowmason/secrets")
    assert from_environment({f"{PREFIX}DIR": "~/x"}).root == Path("/home/ann/x")


def test_the_table_is_complete() -> None:
    assert set(SAID) == set(VARIABLES)


@pytest.mark.parametrize("variable", SAID)
def test_each_variable(variable: str) -> None:
    text, value = SAID[variable]
    field, purpose = VARIABLES[variable]
    settings = from_environment({PREFIX + variable: text})
    found = getattr(settings, field)
    assert found == value
    default = getattr(Settings(), field)
    assert default is None or type(found) is type(default)
    # And nothing else.
    assert replace(settings, **{field: default}) == Settings()
    assert purpose.endswith(".")


def test_all_variables_at_once(key_file: Path) -> None:
    said = {PREFIX + name: text for name, (text, _) in SAID.items() if name != "KEY"}
    settings = from_environment(said | {f"{PREFIX}KEY_FILE": str(key_file)})
    assert settings.master_keys == (KEY,)
    assert settings.port == 8701
    assert settings.body_timeout == 2.5


def test_every_field_has_its_variable() -> None:
    assert {field for field, _ in VARIABLES.values()} == set(Settings.__dataclass_fields__)


# What is refused.


@pytest.mark.parametrize("name", ["KEYS", "key", "DATA_DIR", "", "PORT_"])
def test_unknown_variables(name: str) -> None:
    refused({name: CANARY}, PREFIX + name, f"{PREFIX}KEY_FILE", f"{PREFIX}PORT")
    refused({name: CANARY, "KEY": KEY}, PREFIX + name)


@pytest.mark.parametrize("text", ["", "1", "True", "yes", "on"])
def test_what_is_neither_true_nor_false(text: str) -> None:
    refused({"VAULT_COMPAT": text}, f"{PREFIX}VAULT_COMPAT={text!r}", "true or false")
    assert from_environment({f"{PREFIX}VAULT_COMPAT": "false"}) == Settings()


@pytest.mark.parametrize("text", ["", " ", "x", "-1", "8700x", "0x10", "1,5", "nan", "-inf"])
@pytest.mark.parametrize("variable", NUMBERS)
def test_bad_numbers(variable: str, text: str) -> None:
    refused({variable: text}, PREFIX + variable)


@pytest.mark.parametrize("text", ["1.5", "1e3", "inf"])
@pytest.mark.parametrize("variable", WHOLE)
def test_numbers_that_are_not_whole(variable: str, text: str) -> None:
    refused({variable: text}, PREFIX + variable)


@pytest.mark.parametrize("port", ["65536", "70000", "99999999999"])
def test_ports_that_do_not_exist(port: str) -> None:
    # uvloop would listen on another one: 70000 becomes 4464.
    refused({"PORT": port}, f"{PREFIX}PORT")


def test_an_empty_directory_is_not_the_working_directory() -> None:
    # As from a line `FLOWMASON_SECRETS_DIR=${DATA_DIR}` without a DATA_DIR.
    try:
        settings = from_environment({f"{PREFIX}DIR": ""})
    except ConfigurationError as error:
        assert f"{PREFIX}DIR" in str(error)  # noqa: PT017 - refusing is fine, too
    else:
        assert settings.root == Settings().root


def test_a_key_that_is_not_text() -> None:
    # The environment's bytes that are not UTF-8 arrive as lone surrogates.
    refused({"KEY": f"{CANARY}\udcff\udcfe" * 4}, f"{PREFIX}KEY")


# Keys.


def test_one_source_of_keys(key_file: Path) -> None:
    refused({"KEY": KEY, "KEY_FILE": str(key_file)}, f"{PREFIX}KEY", f"{PREFIX}KEY_FILE", "both")
    # An empty one says nothing.
    with_file = {f"{PREFIX}KEY": "", f"{PREFIX}KEY_FILE": str(key_file)}
    assert from_environment(with_file).master_keys == (KEY,)
    with_key = {f"{PREFIX}KEY": OLD, f"{PREFIX}KEY_FILE": ""}
    assert from_environment(with_key).master_keys == (OLD,)


def test_a_given_master_key_takes_the_place_of_the_environments(tmp_path: Path) -> None:
    missing = {f"{PREFIX}KEY": OLD, f"{PREFIX}KEY_FILE": str(tmp_path / "none")}
    settings = from_environment(missing | {f"{PREFIX}PORT": "1"}, master_key=KEY)
    assert (settings.master_keys, settings.port) == ((KEY,), 1)
    with pytest.raises(ConfigurationError, match="NONE"):
        from_environment({f"{PREFIX}NONE": ""}, master_key=KEY)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o644, 0o660, 0o777])
def test_key_files_that_others_may_touch(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    refused({"KEY_FILE": str(key_file)}, str(key_file), f"{mode:04o}", "chmod 600")


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_key_files_of_their_owner(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert from_environment({f"{PREFIX}KEY_FILE": str(key_file)}).master_keys == (KEY,)


def test_the_mode_of_what_a_link_leads_to_counts(key_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file)
    assert from_environment({f"{PREFIX}KEY_FILE": str(link)}).master_keys == (KEY,)
    key_file.chmod(0o644)
    refused({"KEY_FILE": str(link)}, "0644")


def test_the_key_file_may_be_in_the_home(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(key_file.parent))
    assert from_environment({f"{PREFIX}KEY_FILE": "~/master.key"}).master_keys == (KEY,)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (f"{KEY}\n{OLD}\n", (KEY, OLD)),
        (f"{KEY}", (KEY,)),
        (f"\n  {KEY}\t\r\n\r\n{OLD}\r\n\n", (KEY, OLD)),
        ("schl\u00fcssel\n", ("schl\u00fcssel",)),
    ],
)
def test_one_key_a_line(key_file: Path, content: str, keys: tuple[str, ...]) -> None:
    key_file.write_bytes(content.encode())
    assert from_environment({f"{PREFIX}KEY_FILE": str(key_file)}).master_keys == keys


def test_old_keys_follow_the_one_that_encrypts(key_file: Path) -> None:
    old = {f"{PREFIX}OLD_KEYS": f"{OLD}\ndefault\n"}
    assert from_environment(old | {f"{PREFIX}KEY": KEY}).master_keys == (KEY, OLD, "default")
    settings = from_environment(old | {f"{PREFIX}KEY_FILE": str(key_file)})
    assert settings.master_keys == (KEY, OLD, "default")
    assert (settings.key_file, settings.old_keys) == (key_file, (OLD, "default"))
    assert from_environment(old, master_key=KEY).master_keys == (KEY, OLD, "default")
    refused({"OLD_KEYS": OLD}, f"{PREFIX}KEY", f"{PREFIX}KEY_FILE")


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n\t\n", b"\xff\xfe" + CANARY.encode()])
def test_key_files_without_a_key(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    refused({"KEY_FILE": str(key_file)}, str(key_file))


def test_key_files_that_are_none(tmp_path: Path) -> None:
    refused({"KEY_FILE": str(tmp_path / "none")}, str(tmp_path / "none"))
    refused({"KEY_FILE": str(tmp_path)}, str(tmp_path))


async def test_older_keys_decrypt_what_was_written_under_them(
    key_file: Path, data_dir: Path, caller: Caller
) -> None:
    def settings(*keys: str) -> Settings:
        key_file.write_text("".join(f"{key}\n" for key in keys))
        said = {f"{PREFIX}KEY_FILE": str(key_file), f"{PREFIX}DIR": str(data_dir)}
        return from_environment(said)

    service = await app.open_service(settings(OLD))
    await service.set(caller, Draft("BEFORE", Plaintext("v1")))
    await service.close()

    service = await app.open_service(settings(KEY, OLD))
    assert (await service.get(caller, "BEFORE")).value.reveal() == "v1"
    written = await service.set(caller, Draft("AFTER", Plaintext("v2")))
    assert written.metadata.key_id == MasterKey.of(KEY).key_id
    await service.close()

    service = await app.open_service(settings(KEY))
    assert (await service.get(caller, "AFTER")).value.reveal() == "v2"
    with pytest.raises(DecryptionFailed) as caught:
        await service.get(caller, "BEFORE")
    assert caught.value.key_id == MasterKey.of(OLD).key_id
    assert caught.value.held == (MasterKey.of(KEY).key_id,)
    await service.close()


# No key at all.


async def test_without_a_master_key(
    data_dir: Path, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    service = await app.open_service(Settings(data_dir=data_dir))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "NO MASTER KEY" in warning.getMessage()
    assert f"{PREFIX}KEY_FILE" in warning.getMessage()
    written = await service.set(caller, Draft("S", Plaintext(CANARY)))
    assert written.metadata.key_id == DEFAULT_KEY_ID
    await service.close()
    # As documented, from nothing but the name of the organisation.
    material = hashlib.sha256(b"flowmason-default-key-acme").hexdigest()[:32]
    salt = hashlib.sha256(b"acme").digest()
    key = hashlib.pbkdf2_hmac("sha256", material.encode(), salt, 100_000, 32)
    directory = data_dir / hashlib.sha256(b"acme").hexdigest()[:16]
    token = (directory / f"{hashlib.sha256(b'S').hexdigest()[:32]}.secret").read_bytes()
    assert Fernet(base64.urlsafe_b64encode(key)).decrypt(token.strip()) == CANARY.encode()


async def test_with_a_master_key_there_is_nothing_to_warn_of(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = await app.open_service(Settings(master_keys=(KEY,), data_dir=data_dir))
    await service.close()
    assert caplog.records == []


# Production.


@pytest.mark.parametrize("keys", [(), ("x" * 31,), ("x" * 32, "y" * 31), ("",)])
def test_production_refuses(keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="--production") as caught:
        config.check_production(Settings(master_keys=keys))
    assert "x" * 31 not in str(caught.value)


@pytest.mark.parametrize("keys", [("x" * 32,), ("x" * 40, "y" * 32)])
def test_production_accepts(keys: tuple[str, ...]) -> None:
    config.check_production(Settings(master_keys=keys))


@pytest.mark.parametrize(
    "variables",
    [{}, {"KEY": ""}, {"KEY": "short"}, {"KEY": "\udcff" * 40}, {"KEY": KEY, "PORT": "70000"}],
    ids=["none", "empty", "short", "not text", "port"],
)
def test_production_refuses_to_start(tmp_path: Path, variables: dict[str, str]) -> None:
    data_dir = tmp_path / "secrets"
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLOWMASON_")}
    said = {f"{PREFIX}PORT": "0"} | {PREFIX + name: text for name, text in variables.items()}
    command = ("-m", "flowmason_secrets", "serve", "--production", "--data-dir", str(data_dir))
    with subprocess.Popen(
        (sys.executable, *command),
        env=kept | said,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        out = process.stdout.readline()
        if out:
            process.terminate()
        err = process.stderr.read().decode()
    assert out == b""
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "defect" not in err
    assert not data_dir.exists()


# Nothing is shown.


def test_settings_hide_their_keys() -> None:
    settings = Settings(master_keys=(KEY, OLD))
    keyring = Keyring([MasterKey.of(KEY), MasterKey.of(OLD)])
    for shown in (settings, keyring, [settings], MasterKey.of(KEY), {"settings": settings}):
        for text in (repr(shown), str(shown), f"{shown}"):
            assert KEY not in text
            assert OLD not in text
    assert "8700" in repr(settings)
