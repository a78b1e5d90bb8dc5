"""`SecretsService` and `AsyncSecretsService` as pipelines use them."""

import asyncio
import datetime as dt
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmason_studio.services.secrets import (
    AsyncSecretsService,
    ConfigurationError,
    DecryptionFailed,
    InvalidInput,
    SecretExpired,
    SecretMetadata,
    SecretNotFound,
    SecretsError,
    SecretsService,
    get_secrets_service,
)

from .harness.server import MASTER_KEY, issue_key, serving, session

OTHER_KEY = "another master key, of 32 characters or more"
CANARY = "canary-5f2c81"

SNIPPET = """
from flowmason_studio.services.secrets import SecretsService
secrets = SecretsService(org_id="my-org")
secrets.set(name="OPENAI_API_KEY", value="sk-...", description="OpenAI API key", category="api_key")
value = secrets.get("OPENAI_API_KEY")
for secret in secrets.list(): print(f"{secret.name}: {secret.category}")
if secrets.exists("OPENAI_API_KEY"): ...
secrets.delete("OPENAI_API_KEY")
"""

PROLOGUE = """
import json, os, signal, sys, threading
from pathlib import Path
from flowmason_studio.services.secrets import *
place = Path(sys.argv[1])
"""

# Nothing that the library leaves open or undone at exit goes unnoticed.
STRICT = ("-X", "dev", "-W", "error")


def start(
    program: str, *arguments: object, flags: tuple[str, ...] = (), **variables: str
) -> "subprocess.Popen[str]":
    """Python, in a process of its own, with only these variables for the product."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLOWMASON_")}
    return subprocess.Popen(
        (sys.executable, *flags, "-c", program, *map(str, arguments)),
        env=kept | {"FLOWMASON_SECRETS_KEY": MASTER_KEY} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]", timeout: float = 60.0) -> tuple[int, str, str]:
    """How it ended: its exit code, its stdout and its stderr."""
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, out, err


def run(program: str, *arguments: object, flags: tuple[str, ...] = (), **variables: str) -> str:
    """The stdout of a program that has to end well and to say nothing on stderr."""
    code, out, err = end(start(program, *arguments, flags=flags, **variables))
    assert (code, err) == (0, "")
    return out


def log(data_dir: Path) -> list[dict[str, Any]]:
    """All events, which are numbered without gaps."""
    lines = [
        json.loads(line)
        for segment in sorted((data_dir / "events").iterdir())
        for line in segment.read_bytes().splitlines()
    ]
    assert [line["seq"] for line in lines] == list(range(len(lines)))
    return lines


def of(lines: list[dict[str, Any]], name: str) -> list[tuple[str, str]]:
    """What happened to one secret: actions and outcomes."""
    return [(line["action"], line["outcome"]) for line in lines if line["name"] == name]


def snapshot(data_dir: Path) -> dict[str, bytes]:
    """Every published file of a secret."""
    files = (path for path in data_dir.rglob("*") if path.suffix in (".secret", ".meta"))
    return {str(path): path.read_bytes() for path in files}


def staged(data_dir: Path) -> list[str]:
    """What is on its way."""
    return os.listdir(data_dir / "staged")


Make = Callable[..., SecretsService]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("FLOWMASON_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLOWMASON_SECRETS_KEY", MASTER_KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def make(data_dir: Path) -> Iterator[Make]:
    """Makes services on the data directory of this test, and closes them after it."""
    made: list[SecretsService] = []

    def one(org: str = "acme", **parameters: Any) -> SecretsService:
        made.append(SecretsService(org, **({"storage_path": data_dir} | parameters)))
        return made[-1]

    yield one
    for service in made:
        service.close()


@pytest.fixture
def secrets(make: Make) -> SecretsService:
    """A service of `acme`."""
    return make()


# The documented use.


def test_the_documented_snippet(tmp_path: Path) -> None:
    code, out, err = end(start(SNIPPET, HOME=str(tmp_path), FLOWMASON_SECRETS_KEY="", flags=STRICT))
    assert (code, out) == (0, "OPENAI_API_KEY: api_key\n")
    # The only thing to say: there is no master key.
    assert err.count("\n") == 1
    assert "NO MASTER KEY" in err
    data_dir = tmp_path / ".flowmason" / "secrets"
    done = ("secret.create", "secret.read", "secret.delete")
    assert of(log(data_dir), "OPENAI_API_KEY") == [(action, "success") for action in done]
    assert snapshot(data_dir) == {}
    assert staged(data_dir) == []
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


def test_the_snippet_with_a_key_says_nothing(tmp_path: Path) -> None:
    assert run(SNIPPET, HOME=str(tmp_path), flags=STRICT) == "OPENAI_API_KEY: api_key\n"


def test_everything_about_a_secret(secrets: SecretsService, data_dir: Path) -> None:
    before = dt.datetime.now(dt.UTC)
    made = secrets.set(
        "TOKEN", CANARY, "what for", "token", expires_at="2099-01-01T00:00:00+01:00", actor="ann"
    )
    after = dt.datetime.now(dt.UTC)
    assert made == secrets.get_metadata("TOKEN") == secrets.list()[0]
    assert isinstance(made, SecretMetadata)
    assert (made.name, made.description, made.category) == ("TOKEN", "what for", "token")
    assert (made.created_by, made.version, made.is_expired) == ("ann", 1, False)
    assert made.expires_at == "2098-12-31T23:00:00.000000Z"
    assert before <= dt.datetime.fromisoformat(made.created_at) <= after
    assert made.updated_at == made.created_at

    again = secrets.set("TOKEN", "other", actor="bob")
    assert (again.id, again.created_at, again.created_by) == (made.id, made.created_at, "ann")
    assert (again.version, again.expires_at, again.description) == (2, None, "")
    assert again.updated_at > made.updated_at
    assert secrets.get("TOKEN") == "other"
    assert stat.S_IMODE(next(data_dir.rglob("*.secret")).stat().st_mode) == 0o600


def test_lists_are_sorted_and_of_one_organisation(make: Make) -> None:
    ours, theirs = make(), make("globex")
    for name in ("b", "a", "C"):
        ours.set(name, "v")
    theirs.set("d", "v")
    assert [secret.name for secret in ours.list()] == ["C", "a", "b"]
    assert [secret.name for secret in theirs.list()] == ["d"]
    assert not theirs.exists("a")
    assert ours.delete("a") is True
    assert [secret.name for secret in ours.list()] == ["C", "b"]
    assert not ours.exists("a")
    assert ours.exists("b")


def test_a_missing_secret_raises(secrets: SecretsService, data_dir: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: secrets.get("NONE"),
        lambda: secrets.get_metadata("NONE"),
        lambda: secrets.delete("NONE"),
    ]
    for call in calls:
        with pytest.raises(SecretNotFound, match="NONE") as caught:
            call()
        assert isinstance(caught.value, LookupError)
        assert isinstance(caught.value, SecretsError)
    assert [outcome for _, outcome in of(log(data_dir), "NONE")] == ["not_found"] * 3


def test_a_default_is_returned_only_when_given(secrets: SecretsService, data_dir: Path) -> None:
    fallback = object()
    assert secrets.get("NONE", "else") == "else"
    assert secrets.get("NONE", default=fallback) is fallback
    assert secrets.get("NONE", None) is None
    secrets.set("SOME", "v")
    assert secrets.get("SOME", default="else") == "v"
    assert of(log(data_dir), "NONE") == [("secret.read", "not_found")] * 3


def test_an_expired_secret_raises_whatever_the_default(
    secrets: SecretsService, data_dir: Path
) -> None:
    gone = secrets.set("OLD", CANARY, expires_at="2001-01-01T00:00:00Z")
    assert gone.is_expired
    calls: list[Callable[[], object]] = [
        lambda: secrets.get("OLD"),
        lambda: secrets.get("OLD", "else"),
        lambda: secrets.get("OLD", None),
    ]
    for call in calls:
        with pytest.raises(SecretExpired, match="2001-01-01") as caught:
            call()
        assert isinstance(caught.value, SecretsError)
        assert not isinstance(caught.value, LookupError)
        assert CANARY not in str(caught.value)
    assert secrets.exists("OLD")
    assert secrets.get_metadata("OLD") == gone == secrets.list()[0]
    assert of(log(data_dir), "OLD")[1:] == [("secret.read", "expired")] * 3
    secrets.set("OLD", "new", expires_at=None)
    assert secrets.get("OLD") == "new"


def test_another_master_key_decrypts_nothing_and_damages_nothing(
    make: Make, data_dir: Path
) -> None:
    make(master_key=OTHER_KEY).set("KEPT", CANARY)
    before = snapshot(data_dir)
    wrong = make()
    calls: list[Callable[[], object]] = [
        lambda: wrong.get("KEPT"),
        lambda: wrong.get("KEPT", "else"),
    ]
    for call in calls:
        with pytest.raises(DecryptionFailed, match="KEPT") as caught:
            call()
        assert not isinstance(caught.value, LookupError)
        assert caught.value.key_id not in caught.value.held
        assert caught.value.key_id in str(caught.value)
        assert CANARY not in str(caught.value)
        assert OTHER_KEY not in str(caught.value)
    assert wrong.exists("KEPT")
    assert snapshot(data_dir) == before
    assert of(log(data_dir), "KEPT")[1:] == [("secret.read", "failed")] * 2
    # `master_key` takes the place of the environment's.
    assert make(master_key=OTHER_KEY).get("KEPT") == CANARY


# Times.


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        (dt.datetime(2099, 5, 6, 7, 8, 9, 123456, dt.UTC), "2099-05-06T07:08:09.123456Z"),
        (
            dt.datetime(2099, 5, 6, 7, 8, 9, tzinfo=dt.timezone(dt.timedelta(hours=2))),
            "2099-05-06T05:08:09.000000Z",
        ),
        ("2099-05-06T07:08:09Z", "2099-05-06T07:08:09.000000Z"),
        ("2099-05-06T07:08:09.5-05:30", "2099-05-06T12:38:09.500000Z"),
        # People write "never" so; the text is accepted, and so is the moment.
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.000000Z"),
        (dt.datetime.max.replace(tzinfo=dt.UTC), "9999-12-31T23:59:59.000000Z"),
    ],
    ids=str,
)
def test_expiries(secrets: SecretsService, given: dt.datetime | str | None, kept: str) -> None:
    assert secrets.set("S", "v", expires_at=given).expires_at == kept
    assert secrets.get_metadata("S").expires_at == kept
    assert secrets.get("S") == "v"


class _Nowhere(dt.tzinfo):
    """A zone that does not say which: what has it is naive all the same."""

    def utcoffset(self, when: dt.datetime | None) -> None:
        return None

    dst = tzname = utcoffset

    def __repr__(self) -> str:
        return "nowhere"


@pytest.mark.parametrize(
    "given",
    [
        dt.datetime(2099, 1, 1),  # noqa: DTZ001 - that it is naive is the point
        dt.datetime(2099, 1, 1, tzinfo=_Nowhere()),
        "2099-01-01T00:00:00",
        "2099-01-01",
        "tomorrow",
        "",
        "2099-02-30T00:00:00Z",
        dt.date(2099, 1, 1),
        4070908800,
    ],
    ids=repr,
)
def test_other_times_are_refused(secrets: SecretsService, data_dir: Path, given: Any) -> None:
    with pytest.raises(InvalidInput, match="expires_at"):
        secrets.set("S", "v", expires_at=given)
    assert not secrets.exists("S")
    assert snapshot(data_dir) == {}


# Bad input.


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", "a\nb"),
        ("name", "x" * 257),
        ("name", "a\ud800"),
        ("name", None),
        ("value", "x" * 65537),
        ("value", None),
        ("value", CANARY.encode()),
        ("value", f"{CANARY}\ud800"),
        ("description", "x" * 1025),
        ("description", "a\ud800"),
        ("description", None),
        ("category", "password"),
        ("category", None),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_bad_fields_are_named_and_nothing_happens(
    secrets: SecretsService, data_dir: Path, field: str, bad: Any
) -> None:
    fields: dict[str, Any] = {"name": "S", "value": "v"} | {field: bad}
    with pytest.raises(InvalidInput) as caught:
        secrets.set(**fields)
    assert caught.value.field == field
    assert snapshot(data_dir) == {}
    assert secrets.list() == []


def test_no_error_carries_a_value_that_is_not_unicode(secrets: SecretsService) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - which one, the test above says
        secrets.set("S", f"{CANARY}\ud800")
    error: BaseException | None = caught.value
    while error is not None:
        # `UnicodeEncodeError.object` is the whole text.
        assert CANARY not in repr(vars(error)) + repr(error.args)
        assert not isinstance(error, UnicodeError)
        error = error.__cause__ or error.__context__


def test_names_that_nobody_can_have(secrets: SecretsService) -> None:
    for name in ("", "a/b", "x" * 5000, "a\nb"):
        assert not secrets.exists(name)
        assert secrets.get(name, "else") == "else"
    calls: list[Callable[[], object]] = [
        lambda: secrets.get("a\ud800", "else"),
        lambda: secrets.delete("a\ud800"),
        lambda: secrets.exists("a\ud800"),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="name"):
            call()


def test_an_organisation_has_a_name(data_dir: Path) -> None:
    for org in ("", "a\nb", "x" * 257, "a\ud800"):
        with pytest.raises(InvalidInput, match="org_id"):
            SecretsService(org, storage_path=data_dir)


def test_an_empty_master_key_is_none(data_dir: Path) -> None:
    # `master_key=os.environ.get("MY_KEY", "")`: encrypting under "" would protect nothing.
    with pytest.raises((ConfigurationError, InvalidInput), match=r"(?i)key"):
        SecretsService("acme", master_key="", storage_path=data_dir).set("S", "v")
    assert not data_dir.exists()


def test_an_empty_path_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigurationError, InvalidInput)):
        SecretsService("acme", storage_path="").set("S", "v")
    assert not (tmp_path / "events").exists()


def test_the_working_directory_may_change(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    program = PROLOGUE + (
        "os.chdir(place)\n"
        "secrets = SecretsService('acme', storage_path='data')\n"
        "late = SecretsService('acme', storage_path='data')\n"
        "secrets.set('A', 'v1')\n"
        "os.chdir('elsewhere')\n"
        "secrets.set('B', 'v2')\n"
        "print(secrets.get('A'), [s.name for s in secrets.list()], late.get('B'))\n"
    )
    assert run(program, tmp_path, flags=STRICT) == "v1 ['A', 'B'] v2\n"
    assert os.listdir(tmp_path / "elsewhere") == []
    assert staged(tmp_path / "data") == []


# Who did it.


def test_actors(make: Make, data_dir: Path) -> None:
    nobody, ann = make(), make(actor="ann")
    nobody.set("S", "v")
    ann.get("S")
    ann.get("S", actor="bob")
    ann.list()
    ann.delete("S", actor="carl")
    lines = [line for line in log(data_dir) if line["name"] == "S"]
    user = subprocess.run(("id", "-un"), capture_output=True, text=True, check=True).stdout.strip()
    assert [line["actor"] for line in lines] == [user, "ann", "bob", "carl"]
    assert {line["actor_type"] for line in lines} == {"local"}
    assert {line["org_id"] for line in lines} == {"acme"}
    assert all(CANARY not in json.dumps(line) for line in lines)


def test_a_strange_actor_harms_nobody(secrets: SecretsService, data_dir: Path) -> None:
    # Each event is one line of at most 8,000 bytes, whatever an actor is called.
    secrets.set("\U0001f600" * 256, "v", actor='\\"\U0001f600' * 5000)
    assert max(map(len, next((data_dir / "events").iterdir()).open("rb"))) <= 8000
    with pytest.raises(InvalidInput, match="actor"):
        secrets.set("S", "v", actor="a\ud800")
    assert secrets.set("S", "v").version == 1
    assert len(log(data_dir)) == 3


async def test_a_bad_operation_does_not_take_others_with_it(data_dir: Path) -> None:
    # They wait for the same batch.
    async with AsyncSecretsService("acme", storage_path=data_dir) as secrets:
        await secrets.set("S", "v")
        results = await asyncio.gather(
            *(secrets.get("S") for _ in range(10)),
            secrets.get("S", actor="a\ud800"),
            *(secrets.get("S") for _ in range(10)),
            return_exceptions=True,
        )
    assert [result for result in results if result != "v"] == [results[10]]


# One service for each organisation.


def test_one_service_for_each_organisation(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMASON_SECRETS_DIR", str(data_dir))
    one = get_secrets_service("one-for-each")
    assert get_secrets_service("one-for-each") is one
    assert get_secrets_service("another-for-each") is not one
    one.set("S", "v")
    assert get_secrets_service("one-for-each").get("S") == "v"
    assert of(log(data_dir), "S") == [("secret.create", "success"), ("secret.read", "success")]
    one.close()


def test_threads_get_the_same_service(tmp_path: Path) -> None:
    program = PROLOGUE + (
        "sys.setswitchinterval(1e-6)\n"
        "def ask():\n"
        "    barrier.wait()\n"
        "    got.append(get_secrets_service(org))\n"
        "for org in map(str, range(20)):\n"
        "    barrier, got = threading.Barrier(8), []\n"
        "    threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "    [thread.start() for thread in threads]\n"
        "    [thread.join() for thread in threads]\n"
        "    print(len(set(map(id, got))))\n"
    )
    assert run(program, tmp_path, HOME=str(tmp_path)).split() == ["1"] * 20


# Threads, event loops, processes.


def test_threads_lose_nothing(secrets: SecretsService, data_dir: Path) -> None:
    threads, rounds = 8, 10
    failures: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for turn in range(rounds):
                secrets.set("SHARED", f"{number}.{turn}", description=f"{number}.{turn}")
                assert secrets.get("SHARED")
                secrets.set(f"MINE_{number}", str(turn))
                assert secrets.get(f"MINE_{number}") == str(turn)
                assert secrets.exists(f"MINE_{number}")
                if turn % 2:
                    secrets.delete(f"MINE_{number}")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    lines = log(data_dir)
    assert {line["outcome"] for line in lines} == {"success"}
    written = [
        line["version"]
        for line in lines
        if line["name"] == "SHARED" and line["action"] == "secret.create"
    ]
    assert written == list(range(1, threads * rounds + 1))
    assert secrets.get_metadata("SHARED").version == threads * rounds
    # The value and the metadata are of the same write.
    assert secrets.get("SHARED") == secrets.get_metadata("SHARED").description
    create, read, delete = (f"secret.{action}" for action in ("create", "read", "delete"))
    turns = [create, read, create, read, delete] * (rounds // 2)
    for number in range(threads):
        assert [action for action, _ in of(lines, f"MINE_{number}")] == turns


def test_first_calls_of_many_threads_leave_nothing(tmp_path: Path) -> None:
    # What one of them opened and nobody remembers would not be closed at exit.
    program = PROLOGUE + (
        "sys.setswitchinterval(1e-6)\n"
        "def work(number):\n"
        "    barrier.wait()\n"
        "    secrets.set(f'S{number}', 'v')\n"
        "for turn in range(4):\n"
        "    barrier = threading.Barrier(8)\n"
        "    secrets = SecretsService('acme', storage_path=place / str(turn))\n"
        "    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]\n"
        "    [thread.start() for thread in threads]\n"
        "    [thread.join() for thread in threads]\n"
    )
    run(program, tmp_path, flags=STRICT)
    for turn in range(4):
        assert len(log(tmp_path / str(turn))) == 1 + 8
        assert staged(tmp_path / str(turn)) == []


async def test_inside_a_running_loop(secrets: SecretsService, data_dir: Path) -> None:
    secrets.set("S", "v")
    assert secrets.get("S") == "v"
    assert await asyncio.to_thread(secrets.get, "S") == "v"
    values = await asyncio.gather(*(asyncio.to_thread(secrets.get, "S") for _ in range(20)))
    assert values == ["v"] * 20
    assert len(of(log(data_dir), "S")) == 23


def test_a_forked_child_uses_the_service_of_its_parent(tmp_path: Path) -> None:
    program = PROLOGUE + (
        "import multiprocessing\n"
        "secrets = SecretsService('acme', storage_path=place)\n"
        "secrets.set('S', 'parent')\n"
        "def work(number):\n"
        "    assert secrets.get('S').startswith('parent')\n"
        "    secrets.set(f'C{number}', 'child')\n"
        "    assert 'S' in [s.name for s in secrets.list()]\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(30)\n"
        "    work(0)\n"
        "    secrets.close()\n"
        "    os._exit(0)\n"
        "children = [multiprocessing.get_context('fork').Process(target=work, args=(n,))\n"
        "            for n in range(1, 4)]\n"
        "for child in children:\n"
        "    child.start()\n"
        "for turn in range(20):\n"
        "    secrets.set('S', f'parent {turn}')\n"
        "[child.join() for child in children]\n"
        "print(os.waitpid(pid, 0)[1], [child.exitcode for child in children])\n"
        "print(*(s.name for s in secrets.list()), secrets.get('C0'), secrets.get('S'))\n"
    )
    # From 3.12 on, Python warns of every fork of a process with threads.
    out = run(program, tmp_path, flags=("-W", "ignore::DeprecationWarning"))
    assert out == "0 [0, 0, 0]\nC0 C1 C2 C3 S child parent 19\n"
    lines = log(tmp_path)
    assert len(of(lines, "S")) == 1 + 20 + 4 + 1
    assert staged(tmp_path) == []


def test_threads_of_a_forked_child(tmp_path: Path) -> None:
    program = PROLOGUE + (
        "sys.setswitchinterval(1e-6)\n"
        "secrets = SecretsService('acme', storage_path=place)\n"
        "secrets.set('S', 'v')\n"
        "def work():\n"
        "    barrier.wait()\n"
        "    got.append(secrets.get('S'))\n"
        "def child():\n"
        "    global barrier, got\n"
        "    signal.alarm(20)\n"
        "    barrier, got = threading.Barrier(8), []\n"
        "    threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "    [thread.start() for thread in threads]\n"
        "    [thread.join() for thread in threads]\n"
        "    os._exit(got != ['v'] * 8)\n"
        "for _ in range(8):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        child()\n"
        "    print(os.waitpid(pid, 0)[1])\n"
    )
    out = run(program, tmp_path, flags=("-W", "ignore::DeprecationWarning"))
    assert out.split() == ["0"] * 8
    assert len(of(log(tmp_path), "S")) == 1 + 64


def test_children_forked_while_the_parent_is_busy(tmp_path: Path) -> None:
    # What the parent's threads held at that moment, the index above all, is held by nobody here.
    program = PROLOGUE + (
        "secrets = SecretsService('acme', storage_path=place)\n"
        "secrets.set('S', 'v')\n"
        "stop, turns = threading.Event(), threading.Semaphore(0)\n"
        "def busy(number):\n"
        "    while not stop.is_set():\n"
        "        secrets.set(f'P{number}', 'v')\n"
        "        secrets.list()\n"
        "        turns.release()\n"
        "threads = [threading.Thread(target=busy, args=(n,)) for n in range(2)]\n"
        "[thread.start() for thread in threads]\n"
        "def fork(number):\n"
        "    turns.acquire(), turns.acquire()\n"
        "    for _ in range(37 * number % 400): pass\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        signal.alarm(15)\n"
        "        secrets.get('S')\n"
        "        assert 'S' in [s.name for s in secrets.list()]\n"
        "        os._exit(0)\n"
        "    return pid\n"
        "for wave in range(25):\n"
        "    pids = [fork(4 * wave + n) for n in range(4)]\n"
        "    if any([os.waitpid(pid, 0)[1] for pid in pids]):\n"
        "        break\n"
        "stop.set()\n"
        "[thread.join() for thread in threads]\n"
        "print(wave, *(s.name for s in secrets.list()))\n"
    )
    out = run(program, tmp_path, flags=("-W", "ignore::DeprecationWarning"))
    assert out == "24 P0 P1 S\n"
    assert len(of(log(tmp_path), "S")) == 1 + 100


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    # The lock belongs to the open file, which a child inherits: while such a child lives, nobody
    # could commit any more. The parent is killed while its lock is held.
    parent = PROLOGUE + (
        "import fcntl, time\n"
        "secrets = SecretsService('acme', storage_path=place)\n"
        "secrets.set('S', 'v')\n"
        "def busy(number):\n"
        "    while True:\n"
        "        secrets.set(f'P{number}', 'v')\n"
        "for number in range(4):\n"
        "    threading.Thread(target=busy, args=(number,), daemon=True).start()\n"
        "ready, done = os.pipe()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os.write(done, b'x')\n"
        "    time.sleep(300)\n"
        "    os._exit(0)\n"
        "os.read(ready, 1)\n"
        "print(pid, flush=True)\n"
        "lock = os.open(place / 'commit.lock', os.O_RDWR)\n"
        "while True:\n"
        "    try:\n"
        "        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "        fcntl.flock(lock, fcntl.LOCK_UN)\n"
        "    except BlockingIOError:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    other = PROLOGUE + "SecretsService('acme', storage_path=place).set('OTHER', 'v')"
    for turn in range(3):
        place = tmp_path / str(turn)
        process = start(parent, place, flags=("-W", "ignore::DeprecationWarning"))
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.wait(timeout=30)
            try:
                code, _, err = end(start(other, place), timeout=10)
            except subprocess.TimeoutExpired:
                pytest.fail("the child of a killed process blocks the data directory")
            assert (code, err) == (0, "")
        finally:
            os.kill(child, 9)
            end(process)
        assert of(log(place), "OTHER") == [("secret.create", "success")]


def test_two_processes_at_once(tmp_path: Path) -> None:
    program = PROLOGUE + (
        "secrets = SecretsService('acme', storage_path=place)\n"
        "secrets.exists('S')\n"
        "print('ready', flush=True)\n"
        "while not (place / 'go').exists(): pass\n"
        "for turn in range(50):\n"
        "    secrets.set('SHARED', sys.argv[2] + str(turn), description=sys.argv[2] + str(turn))\n"
        "    secrets.set(sys.argv[2], str(turn))\n"
        "    assert secrets.get(sys.argv[2]) == str(turn)\n"
    )
    both = [start(program, tmp_path, name, flags=STRICT) for name in ("ONE", "TWO")]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for process in both:
        assert end(process) == (0, "", "")
    lines = log(tmp_path)
    for name in ("ONE", "TWO"):
        assert of(lines, name) == [("secret.create", "success"), ("secret.read", "success")] * 50
    shared = [(line["version"], line["outcome"]) for line in lines if line["name"] == "SHARED"]
    assert shared == [(version, "success") for version in range(1, 101)]
    assert staged(tmp_path) == []


# Nothing is left behind.


@pytest.mark.parametrize(
    ("last", "code", "says"),
    [
        ("", 0, ""),
        ("secrets.close(); secrets.close()", 0, ""),
        ("secrets.close(); secrets.set('T', 'v')", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("del secrets", 0, ""),
        ("raise KeyError('mine')", 1, "KeyError: 'mine'\n"),
        ("import shutil; shutil.rmtree(place)", 0, ""),
    ],
)
def test_at_exit(tmp_path: Path, last: str, code: int, says: str) -> None:
    program = PROLOGUE + (
        "secrets = SecretsService('acme', storage_path=place)\n"
        "secrets.set('S', 'v')\n"
        "get_secrets_service('acme').exists('S')\n"
        "secrets.list()\n"
    )
    data_dir = tmp_path / "secrets"
    ended, out, err = end(start(program + last, data_dir, HOME=str(tmp_path), flags=STRICT))
    assert (ended, out) == (code, "")
    assert err.endswith(says)
    assert err.count("Traceback") == (1 if says else 0)
    assert says or err == ""
    assert not data_dir.exists() or staged(data_dir) == []


def test_services_that_are_gone_take_nothing(tmp_path: Path) -> None:
    # One for each task of a worker that runs for months.
    program = PROLOGUE + (
        "import gc\n"
        "def tasks(count):\n"
        "    for _ in range(count):\n"
        "        secrets = SecretsService('acme', storage_path=place)\n"
        "        secrets.set('S', 'v')\n"
        "        secrets.list()\n"
        "    del secrets\n"
        "    gc.collect()\n"
        "    return threading.active_count()\n"
        "few = tasks(5)\n"
        "print(tasks(25) - few)\n"
    )
    assert int(run(program, tmp_path)) <= 5


def test_nothing_is_shown(make: Make, data_dir: Path) -> None:
    secrets = make(master_key=OTHER_KEY)
    made = secrets.set("S", CANARY)
    twin = AsyncSecretsService("acme", master_key=OTHER_KEY, storage_path=data_dir)
    for shown in (secrets, twin, made, secrets.list(), secrets.set, twin.get, secrets._twin):
        for text in (repr(shown), str(shown), f"{shown}"):
            assert CANARY not in text
            assert OTHER_KEY not in text
    assert "acme" in repr(secrets)
    assert OTHER_KEY not in repr(twin._settings)


# The asynchronous twin.


async def test_the_asynchronous_twin(data_dir: Path) -> None:
    async with AsyncSecretsService("acme", storage_path=data_dir, actor="ann") as secrets:
        expiry = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)
        made = await secrets.set("S", "v", "what for", "token", expiry)
        assert made == await secrets.get_metadata("S") == (await secrets.list())[0]
        assert await secrets.get("S", actor="bob") == "v"
        assert await secrets.exists("S")
        assert await secrets.get("NONE", "else") == "else"
        with pytest.raises(SecretNotFound):
            await secrets.get("NONE")
        await secrets.set("OLD", "v", expires_at="2001-01-01T00:00:00Z")
        with pytest.raises(SecretExpired):
            await secrets.get("OLD", "else")
        assert await secrets.delete("S") is True
        with pytest.raises(SecretNotFound):
            await secrets.delete("S")
        assert not await secrets.exists("S")
    assert staged(data_dir) == []
    lines = log(data_dir)
    assert [line["actor"] for line in lines if line["name"] == "S"][:2] == ["ann", "bob"]
    # What is closed opens again.
    assert await secrets.get_metadata("OLD")
    await secrets.close()
    await secrets.close()


async def test_the_twin_closes_after_an_error(data_dir: Path) -> None:
    async def fail() -> None:
        async with AsyncSecretsService("acme", storage_path=data_dir) as secrets:
            await secrets.set("S", "v")
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert staged(data_dir) == []
    async with AsyncSecretsService("acme", OTHER_KEY, data_dir) as other:
        with pytest.raises(DecryptionFailed):
            await other.get("S")


async def test_many_operations_of_the_twin_at_once(data_dir: Path) -> None:
    secrets = AsyncSecretsService("acme", storage_path=data_dir)
    made = await asyncio.gather(*(secrets.set("SHARED", str(n)) for n in range(50)))
    assert sorted(one.version for one in made) == list(range(1, 51))
    last = max(made, key=lambda one: one.version)
    assert await secrets.get("SHARED") == str(made.index(last))
    await secrets.close()
    assert len(log(data_dir)) == 1 + 50 + 1


async def test_what_is_cancelled_happened_whole_or_not_at_all(data_dir: Path) -> None:
    secrets = AsyncSecretsService("acme", storage_path=data_dir)
    await secrets.set("S", "0", description="0")
    for turn in range(1, 30):
        text = str(turn)
        task = asyncio.create_task(secrets.set("S", text, description=text))
        for _ in range(turn):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        # Submitted before it was cancelled, it may commit after this one, in the same batch.
        await secrets.exists("S")
        found = await secrets.get_metadata("S")
        assert await secrets.get("S") == found.description
        if not task.cancelled():
            assert found.description == text
    versions = [line["version"] for line in log(data_dir) if line["action"] == "secret.create"]
    assert versions == list(range(1, (await secrets.get_metadata("S")).version + 1))
    await secrets.close()


# Beside a server.


async def _expect(awaited: Awaitable[Any], status: int) -> Any:
    answer = await awaited
    async with answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def test_beside_a_running_server(make: Make, data_dir: Path) -> None:
    api_key = await issue_key(data_dir)
    secrets = make(actor="pipeline")
    path = "/api/v1/secrets"
    async with serving(data_dir) as server, session(server.url, api_key) as client:
        for turn in range(10):
            secrets.set("S", f"library {turn}")
            got = await _expect(client.get(f"{path}/S"), 200)
            assert got["value"] == f"library {turn}"
            written = await _expect(client.post(path, json={"name": "S", "value": str(turn)}), 200)
            assert secrets.get("S") == str(turn)
            assert secrets.get_metadata("S").version == written["version"] == 2 * turn + 2
        secrets.set("MINE", "v")
        assert [one["name"] for one in await _expect(client.get(path), 200)] == ["MINE", "S"]
        await _expect(client.delete(f"{path}/MINE"), 200)
        assert not secrets.exists("MINE")
        assert [one.name for one in secrets.list()] == ["S"]
        with pytest.raises(SecretNotFound):
            secrets.get("MINE")
        secrets.delete("S")
        await _expect(client.get(f"{path}/S"), 404)
        audit = await _expect(client.get("/api/v1/auth/audit-log?name=S&limit=3"), 200)
        assert [(one["action"], one["user_id"] == "pipeline") for one in audit] == [
            ("secret.read", False),
            ("secret.delete", True),
            ("secret.read", True),
        ]
    lines = log(data_dir)
    assert [line["actor_type"] for line in lines if line["name"] == "S"] == [
        *["local", "api_key", "api_key", "local"] * 10,
        "local",
        "api_key",
    ]
    assert len(list((data_dir / "events").iterdir())) == 1


# Installed how.

_WITHOUT = (
    "import sys\n"
    "class Blocker:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] == 'cryptography':\n"
    "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Blocker())\n"
)


@pytest.mark.parametrize(
    "statement",
    [
        "from flowmason_studio.services.secrets import SecretsService",
        "import flowmason_secrets",
        "import flowmason_secrets.cli",
    ],
)
def test_without_cryptography_the_import_says_how_to_install(statement: str) -> None:
    code, out, err = end(start(_WITHOUT + statement))
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "cryptography" in last
    assert "pip install 'flowmason[secrets]'" in last


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_flowmason_studio_tree_can_coexist(tmp_path: Path, ours_first: bool) -> None:
    services = tmp_path / "flowmason_studio" / "services"
    services.mkdir(parents=True)
    (services.parent / "other.py").write_text("WHO = 'other'\n")
    (services / "sibling.py").write_text("WHO = 'sibling'\n")
    theirs = (
        "import flowmason_studio.other, flowmason_studio.services.sibling\n"
        "print(flowmason_studio.other.WHO, flowmason_studio.services.sibling.WHO)\n"
    )
    ours = (
        "from flowmason_studio.services.secrets import SecretsService\n"
        "print(SecretsService.__name__)\n"
    )
    program = ours + theirs if ours_first else theirs + ours
    out = run(program, PYTHONPATH=str(tmp_path)).split("\n")
    assert sorted(out) == ["", "SecretsService", "other sibling"]
