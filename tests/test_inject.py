"""`flowmason-secrets inject`: files with secrets that nobody else can read, at no moment."""

import asyncio
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmason_secrets.core import text
from flowmason_secrets.core.errors import ConfigurationError, InvalidInput
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.sidecar.injecting import Output

from .harness.sidecars import reads, store
from .test_cli import PROGRAM, Ended, environment, local, run

VALUE = "s3cret-value"
TEMPLATE = "password = {{secrets.A}}\nliteral = \\{{secrets.A}} {{other}} {{{\n"
FILLED = f"password = {VALUE}\nliteral = {{{{secrets.A}}}} {{{{other}}}} {{{{{{\n"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory that only its owner may look into."""
    directory = tmp_path / "private"
    directory.mkdir(mode=0o700)
    return directory


async def inject(data_dir: Path, *arguments: str, template: str = TEMPLATE) -> Ended:
    """Inject once, with the template on stdin."""
    here = local(data_dir)
    return await run(
        *("inject", *here.options, "--once", "-i", "-", *arguments),
        stdin=template.encode(),
        variables=here.variables,
    )


TEXTS = {
    "nothing": ("", ""),
    "white space": ("{{ secrets.A }}{{\n\tsecrets.A}}", VALUE * 2),
    "a value that looks like a reference": ("{{secrets.R}}", "{{secrets.A}}\\{{secrets.A}}"),
    "a reference made of two": ("{{secrets.{{secrets.A}}", f"{{{{secrets.{VALUE}"),
    "backslashes": (
        r"\{{secrets.A}} \\{{secrets.A}} \\\{{secrets.A}} \n \\",
        rf"{{{{secrets.A}}}} \{VALUE} \{{{{secrets.A}}}} \n \\",
    ),
    "others": ("{{ .Values.x }} {% if %} ${X} {{secret.A}}", None),
    "no JSON": ('"{{secrets.Q}}"', '"a"b\\c\n\x00"'),
    "line ends": ("a\r\n{{secrets.A}}\r\n", f"a\r\n{VALUE}\r\n"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str) -> None:
    template, expected = TEXTS[case]
    values = {
        "A": Plaintext(VALUE),
        "R": Plaintext("{{secrets.A}}\\{{secrets.A}}"),
        "Q": Plaintext('a"b\\c\n\x00'),
    }
    found = text.parse(Plaintext(template)).fill(values).reveal()
    assert found == (template if expected is None else expected)


def test_texts_have_a_size() -> None:
    with pytest.raises(InvalidInput, match="at most 524288 bytes"):
        text.parse(Plaintext("ü" * (1 << 18) + "x"))
    many = text.parse(Plaintext("{{secrets.A}}" * 30000))
    assert many.names == ("A",)
    with pytest.raises(InvalidInput, match="2097152"):
        many.fill({"A": Plaintext("x" * 65536)})


async def test_a_file(data_dir: Path, private: Path) -> None:
    await store(data_dir, {"A": VALUE})
    out = private / "file"
    here = local(data_dir)
    (private / "template").write_text(TEMPLATE)
    files = ("-i", str(private / "template"), "-o", str(out))
    ended = await run("inject", *here.options, *files, "--once", variables=here.variables)
    assert ended == (0, "", "")
    assert out.read_text() == FILLED
    assert stat.S_IMODE(out.stat().st_mode) == 0o400
    # Once more, in place of a file that may not be written.
    await store(data_dir, {"A": "other"})
    assert (await inject(data_dir, "-o", str(out), "--mode", "640")).code == 0
    assert (out.read_text().split()[2], stat.S_IMODE(out.stat().st_mode)) == ("other", 0o640)
    assert sorted(path.name for path in private.iterdir()) == ["file", "template"]
    assert await reads(data_dir) == ["A", "A"]


async def test_all_that_is_missing_is_named(data_dir: Path, private: Path) -> None:
    await store(data_dir, {"A": VALUE})
    out = private / "file"
    out.write_text("before")
    out.chmod(0o600)
    names = [f"N{number:02}" for number in range(40)]
    template = "".join(f"{{{{secrets.{name}}}}}" for name in ("A", *names))
    ended = await inject(data_dir, "-o", str(out), template=template)
    ended.failed(78, "40 of 41", *(f"'{name}' (secret_not_found)" for name in names))
    assert out.read_text() == "before"
    assert VALUE not in ended.err


def prepared(private: Path, case: str) -> tuple[str, ...]:
    """The place of this case, as arguments."""
    out = private / "file"
    match case:
        case "open directory":
            private.chmod(0o755)
        case "directory that others write":
            private.chmod(0o702)
        case "open file":
            out.write_text("")
            out.chmod(0o604)
        case "link":
            out.symlink_to(private.parent / "elsewhere")
        case "pipe":
            os.mkfifo(out, 0o600)
        case "no directory":
            return ("-o", str(private / "none" / "file"))
        case _:
            return ("-o", str(out), "--mode", case)
    return ("-o", str(out))


PLACES = {
    "open directory": (78, "is open to everybody"),
    "directory that others write": (78, "is open to everybody"),
    "open file": (78, "chmod o="),
    "link": (78, "is not a file"),
    "pipe": (78, "is not a file"),
    "no directory": (69, "No such file"),
    "644": (78, "0644 is not one for secrets"),
    "0604": (78, "0604"),
    "4400": (78, "4400"),
    "0700": (78, "0700"),
    "0040": (78, "0040"),
    "rw": (2, "--mode"),
}


async def test_open_places_are_refused(data_dir: Path, tmp_path: Path) -> None:
    await store(data_dir, {"A": VALUE})

    async def refused(case: str) -> None:
        directory = tmp_path / case
        directory.mkdir(mode=0o700)
        arguments = prepared(directory, case)
        code, words = PLACES[case]
        before = {path.name: path.lstat().st_ino for path in directory.iterdir()}
        (await inject(data_dir, *arguments)).failed(code, words)
        assert {path.name: path.lstat().st_ino for path in directory.iterdir()} == before

    await asyncio.gather(*map(refused, PLACES))
    # Nothing was even read.
    assert await reads(data_dir) == []


class Steps:
    """What happens to a file, step by step; it can be made to fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, fails: str = "") -> None:
        self.seen: list[tuple[str, list[tuple[int, int]]]] = []
        for name in ("open", "fchmod", "write", "fdatasync", "replace", "fsync"):
            self._watch(monkeypatch, name, directory, fails)

    def _watch(
        self, monkeypatch: pytest.MonkeyPatch, name: str, directory: Path, fails: str
    ) -> None:
        real = getattr(os, name)

        def step(*arguments: object, **named: object) -> object:
            if name == fails:
                raise OSError(28, "No space left on device")
            result = real(*arguments, **named)
            states = [path.stat() for path in sorted(directory.iterdir())]
            files = [(stat.S_IMODE(s.st_mode), s.st_nlink) for s in states]
            self.seen.append((name, files))
            return result

        monkeypatch.setattr(os, name, step)


@pytest.fixture(params=[0, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """As little protection by the umask as there can be, and more than is asked for."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("mode", [0o400, 0o660])
async def test_its_mode_is_final_before_its_first_byte(
    private: Path, monkeypatch: pytest.MonkeyPatch, mode: int, umask: int
) -> None:
    output = Output(private / "file", mode)
    steps = Steps(monkeypatch, private)
    assert await output.put(Plaintext(VALUE))
    monkeypatch.undo()
    names = [name for name, _ in steps.seen]
    assert names[0] == "open"
    assert names.index("write") < names.index("fdatasync") < names.index("replace")
    assert names.index("replace") < names.index("fsync")
    for name, files in steps.seen:
        expected = mode & ~umask if (name, files) == steps.seen[0] else mode
        assert files == [(expected, 1)], name


@pytest.mark.parametrize("step", ["open", "fchmod", "write", "fdatasync", "replace"])
async def test_what_can_not_be_written_leaves_the_old_file(
    private: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    output = Output(private / "file", 0o400)
    assert await output.put(Plaintext("before"))
    Steps(monkeypatch, private, step)
    with pytest.raises(OSError, match="No space left"):
        await output.put(Plaintext(VALUE))
    monkeypatch.undo()
    assert [path.read_text() for path in private.iterdir()] == ["before"]
    # The next time is the first one, as far as this text goes.
    assert await output.put(Plaintext(VALUE))
    assert not await output.put(Plaintext(VALUE))
    assert [path.read_text() for path in private.iterdir()] == [VALUE]


async def test_a_place_that_becomes_open_is_refused_then(private: Path) -> None:
    output = Output(private / "file", 0o400)
    assert await output.put(Plaintext("before"))
    private.chmod(0o755)
    with pytest.raises(ConfigurationError):
        await output.put(Plaintext(VALUE))
    assert (private / "file").read_text() == "before"


async def test_what_is_run_after_it(data_dir: Path, private: Path) -> None:
    await store(data_dir, {"A": VALUE})
    out = private / "file"
    command = f"cat {out}; env | grep -c FLOWMASON_SECRETS_KEY; exit 7"
    ended = await inject(data_dir, "-o", str(out), "--exec", command)
    assert ended == (7, f"{FILLED}0\n", "")


async def test_it_is_kept_current(data_dir: Path, private: Path) -> None:
    await store(data_dir, {"A": VALUE, "B": "b"})
    out = private / "file"
    here = local(data_dir)
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, "inject", *here.options, "-i", "-", "-o", str(out)),
        *("--exec", f"head -n 1 {out}; ! grep -q second {out}"),
        env=environment(here.variables),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(TEMPLATE.encode())
    process.stdin.close()
    assert await process.stdout.readline() == f"password = {VALUE}\n".encode()
    first = out.stat().st_ino
    await store(data_dir, {"A": "second", "B": "not looked at"})
    assert await process.stdout.readline() == b"password = second\n"
    assert await process.stderr.readline() == b"--exec ended with exit code 1.\n"
    assert out.stat().st_ino != first
    # From now on it can't be put there; the old one stays, and it goes on.
    private.chmod(0o755)
    await store(data_dir, {"A": "third"})
    assert b"stays as it was" in await process.stderr.readline()
    assert out.read_text().split()[2] == "second"
    process.send_signal(signal.SIGTERM)
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 0
    assert sorted(path.name for path in private.iterdir()) == ["file"]
