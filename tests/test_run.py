"""`flowmason-secrets run`, as users run it: real processes, signals and terminals."""

import asyncio
import contextlib
import functools
import gc
import os
import pty
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmason_secrets.core.errors import Denied, LogUnavailable, SecretsError
from flowmason_secrets.sidecar.launching import Program
from flowmason_secrets.sidecar.masking import Masker
from flowmason_secrets.sidecar.source import Found, Selection
from flowmason_secrets.sidecar.supervising import Rules, Supervisor
from flowmason_secrets.sidecar.watching import Pace, Watcher

from .harness.jumping import jump
from .harness.server import serving
from .harness.sidecars import Changing, reads, store
from .test_cli import PROGRAM, Ended, Place, environment, local, place, remote, run

__all__ = ["place"]

VALUE = "s3cret-value"


async def started(
    place: Place, *arguments: str, script: str, below: tuple[str, ...] = ()
) -> asyncio.subprocess.Process:
    """A run of a Python script, with pipes; `below` comes before it."""
    return await asyncio.create_subprocess_exec(
        *(*below, *PROGRAM, "run", *place.options, *arguments, "--"),
        *(sys.executable, "-c", textwrap.dedent(script)),
        env=environment(place.variables | {"PYTHONUNBUFFERED": "1"}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ran(place: Place, *arguments: str, script: str) -> Ended:
    """The end of such a run."""
    process = await started(place, *arguments, script=script)
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def line(process: asyncio.subprocess.Process) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().rstrip("\n")


# Masking.


def masked(values: Sequence[str], pieces: Sequence[bytes]) -> bytes:
    """What comes out when the pieces go in."""
    masker = Masker(values)
    return b"".join(map(masker.feed, pieces)) + masker.end()


def covered(values: Sequence[str], text: bytes) -> bytes:
    """The same, the plain way: every byte of every occurrence, and one mark for what overlaps."""
    places = sorted(
        (at, at + len(value))
        for value in map(str.encode, values)
        for at in range(len(text))
        if text.startswith(value, at)
    )
    out, end = b"", 0
    for begins, ends in places:
        if begins >= end:
            out += text[end:begins] + b"***"
        end = max(end, ends)
    return out + text[end:]


MASKED = {
    "one": ([VALUE], f"a {VALUE} b", "a *** b"),
    "at both ends": ([VALUE], f"{VALUE} and {VALUE}", "*** and ***"),
    "side by side": ([VALUE], VALUE * 2, "******"),
    "almost": ([VALUE], f"{VALUE[:-1]} {VALUE[1:]}", f"{VALUE[:-1]} {VALUE[1:]}"),
    "one in another": (["inner", "an inner one"], "an inner one, inner", "***, ***"),
    "one over another": (["abcdef", "defghi"], "xabcdefghix", "x***x"),
    "over itself": (["abab"], "xabababx", "x***x"),
    "a run": (["----"], "--------- -----", "*** ***"),
    "begins again": (["aaab"], "aaaaaab", "aaa***"),
    "no ASCII": (["naïve 密码"], "a naïve 密码 b", "a *** b"),
    "lines": (["first line\nsecond line\n"], "1: first line, 2: second line", "1: ***, 2: ***"),
    "too short": (["abc", ""], "abc", "abc"),
}


@pytest.mark.parametrize("case", MASKED)
def test_values_are_masked_wherever_they_are_cut(case: str) -> None:
    values, text, expected = MASKED[case]
    data = text.encode()
    for count in (0, 1, 2):
        for cuts in combinations(range(len(data) + 1), count):
            pieces = [data[a:b] for a, b in pairwise((0, *cuts, len(data)))]
            assert masked(values, pieces) == expected.encode(), pieces
    assert masked(values, [bytes([byte]) for byte in data]) == expected.encode()


_SMALL = st.text("ab", min_size=4, max_size=9)


@given(st.lists(_SMALL, max_size=4), st.lists(st.text("abc", max_size=12)))
def test_masking_does_not_depend_on_the_pieces(values: list[str], pieces: list[str]) -> None:
    cut = [piece.encode() for piece in pieces]
    whole = b"".join(cut)
    assert masked(values, cut) == masked(values, [whole]) == covered(values, whole)


def test_no_more_is_kept_back_than_may_become_a_value() -> None:
    masker = Masker([VALUE, "-----BEGIN"])
    assert masker.feed(b"Password: ") == b"Password: "
    assert masker.feed(f"x{VALUE}".encode()) == b"x***"
    assert masker.feed(VALUE[:5].encode()) == b""
    assert masker.feed(b"!") == VALUE[:5].encode() + b"!"


def test_long_values_and_long_output_take_no_long_time() -> None:
    values = ["x" * 65536, "y" * 65535 + "z", *(f"{number:040}" for number in range(500))]
    out = masked(values, [b"x" * 65536] * 16 + [b"log line\n" * 4096] * 16)
    assert out == b"***" + b"log line\n" * 65536


# What is in the environment.


async def test_the_process_becomes_the_program(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    process = await started(
        local(data_dir),
        script="""
        import os, signal
        print(os.getpid(), os.environ["A"], signal.getsignal(signal.SIGPIPE).name)
        print(sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1] if os.path.isdir("/proc")
              else [0, 1, 2], os.read(0, 5).decode())
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    out, err = await process.communicate(b"stdin")
    # Python ignores SIGPIPE itself, but says which signals it found ignored.
    assert out.decode().splitlines()[0].startswith(f"{process.pid} {VALUE} ")
    assert out.decode().splitlines()[1] == "[0, 1, 2] stdin"
    assert (process.returncode, err) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize("mask", ["never", "always"])
async def test_signals_are_as_for_any_other_program(data_dir: Path, mask: str) -> None:
    await store(data_dir, {"A": VALUE})
    here = local(data_dir)
    # Python ignores SIGPIPE: a program that inherits that would not be ended by it.
    ended = await run(
        *("run", *here.options, "--mask", mask, "--", "sh", "-c", "kill -PIPE $$; echo alive"),
        variables=here.variables,
    )
    assert (ended.code, ended.out) == (-signal.SIGPIPE if mask == "never" else 141, "")


SHOW = "import os, json; print(json.dumps(dict(os.environ)))"


async def test_variables(data_dir: Path, tmp_path: Path) -> None:
    await store(data_dir, {"A": VALUE, "app-key.1": "k", "9lives": "9", "naïve": "\n n\t"})
    file = tmp_path / "template"
    file.write_text(
        "# comment\n\nexport URL=https://u:{{secrets.A}}@h/{{ secrets.app-key.1 }}?a=b \n"
        "QUOTED=' x '\nLITERAL=\\{{secrets.A}} $A\nHOME=/nowhere\n"
    )
    here = local(data_dir)
    here.variables.update(
        {"A": "inherited", "FLOWMASON_API_KEY": "fm_live_x", "LEFT": "\udcff", "FLOWMASON_X": "1"}
    )
    all_of_them, some, prefixed, templated, both = await asyncio.gather(
        ran(here, script=SHOW),
        ran(here, "--only", "app-*", "--only", "9lives", script=SHOW),
        ran(here, "--prefix", "my-", script=SHOW),
        ran(here, "--env-file", str(file), script=SHOW),
        ran(here, "--env-file", str(file), "--only", "A", script=SHOW),
    )
    found = all_of_them.json
    assert {name: found[name] for name in ("A", "app_key_1", "_9lives", "na_ve")} == {
        "A": VALUE,
        "app_key_1": "k",
        "_9lives": "9",
        "na_ve": "\n n\t",
    }
    assert (found["LEFT"], found["FLOWMASON_X"]) == ("\udcff", "1")
    assert {name for name in found if name.startswith("FLOWMASON_")} == {"FLOWMASON_X"}
    assert some.json["A"] == "inherited"
    assert (some.json["app_key_1"], some.json["_9lives"]) == ("k", "9")
    assert "na_ve" not in some.json
    assert (prefixed.json["my_A"], prefixed.json["my_9lives"]) == (VALUE, "9")
    assert prefixed.json["A"] == "inherited"
    assert templated.json["URL"] == f"https://u:{VALUE}@h/k?a=b"
    assert (templated.json["QUOTED"], templated.json["HOME"]) == (" x ", "/nowhere")
    assert templated.json["LITERAL"] == "{{secrets.A}} $A"
    assert (templated.json["A"], both.json["A"]) == ("inherited", VALUE)
    assert "app_key_1" not in both.json


async def test_expired_secrets_are_left_out_unless_they_are_named(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    await store(data_dir, {"OLD": "old"}, expires_at="2001-01-01T00:00:00Z")
    ended, named = await asyncio.gather(
        ran(local(data_dir), script="import os; print(os.environ['A'], 'OLD' in os.environ)"),
        ran(local(data_dir), "--only", "OLD", script=""),
    )
    assert (ended.code, ended.out) == (0, f"{VALUE} False\n")
    assert ended.err == "Secret 'OLD' has expired and is left out.\n"
    named.failed(78, "'OLD' (secret_expired)")


REFUSED: dict[str, tuple[dict[str, str], tuple[str, ...], str, int, str]] = {
    "two of a kind": ({"a-b": VALUE, "a.b": VALUE}, (), "", 78, "'a.b'"),
    "NUL": ({"N": f"{VALUE}\0"}, (), "", 78, "secret 'N') holds a NUL"),
    "the loader's": ({"LD_PRELOAD": VALUE}, (), "", 78, "'LD_PRELOAD'"),
    "PATH": ({"PATH": VALUE}, (), "", 78, "--prefix"),
    "none at all": ({}, (), "", 78, "no secret"),
    "no match": ({"A": VALUE}, ("--only", "B*"), "", 78, "'B*'"),
    "not there": ({"A": VALUE}, ("--only", "B", "--only", "C"), "", 78, "'C' (secret_not_found)"),
    "template": ({"A": VALUE}, (), "X={{secrets.B}}{{secrets.C}}", 78, "2 of 2"),
    "no line": ({"A": VALUE}, (), "X=1\nY", 78, "line 2 is not NAME=text"),
    "no name": ({"A": VALUE}, (), "A-B=1", 78, "line 1"),
    "twice": ({"A": VALUE}, (), "X=1\nX=2", 78, "line 2 sets X once more"),
    "file and secret": ({"A": VALUE}, ("--only", "A"), "A=1", 78, "the environment file"),
}


async def test_what_makes_no_environment_is_refused(tmp_path: Path) -> None:
    async def refused(case: str) -> None:
        secrets, arguments, template, code, words = REFUSED[case]
        directory = tmp_path / case
        await store(directory / "secrets", secrets)
        if template:
            (directory / "template").write_text(template)
            arguments = (*arguments, "--env-file", str(directory / "template"))
        ended = await ran(local(directory / "secrets"), *arguments, script="print('ran')")
        ended.failed(code, words)
        assert VALUE not in ended.err

    await asyncio.gather(*map(refused, REFUSED))


@pytest.mark.parametrize("mask", ["never", "always"])
async def test_what_can_not_be_executed(data_dir: Path, tmp_path: Path, mask: str) -> None:
    await store(data_dir, {f"S{number}": VALUE * 5000 for number in range(40)})
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    here = local(data_dir)

    async def tried(*command: str, only: str = "S1") -> Ended:
        options = ("--only", only, "--mask", mask)
        return await run("run", *here.options, *options, *command, variables=here.variables)

    missing, here_not, directory, text, large = await asyncio.gather(
        tried("no-such-program"),
        tried("./no-such-program"),
        tried("--", "/"),
        tried(str(tmp_path / "text")),
        tried("true", only="S*"),
    )
    missing.failed(127, "'no-such-program' can't be executed")
    here_not.failed(127)
    directory.failed(126, "Permission denied")
    text.failed(126, "Exec format error")
    large.failed(126, "40 variables of secrets have 2400000 bytes", "S9 (60000 bytes)", "--only")
    assert VALUE not in large.err


async def test_five_hundred_variables(data_dir: Path) -> None:
    await store(data_dir, {f"S{number:03}": f"{VALUE}-{number}" for number in range(500)})
    ended = await ran(
        local(data_dir),
        script="import os; print(*(v for n, v in sorted(os.environ.items()) if n[1:].isdigit()))",
    )
    assert ended.out.split() == [f"{VALUE}-{number}" for number in range(500)]
    assert sorted(await reads(data_dir)) == [f"S{number:03}" for number in range(500)]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("arguments", [(), ("--mask", "always"), ("--watch", "restart")])
async def test_no_value_is_in_the_arguments_of_a_process(
    data_dir: Path, arguments: tuple[str, ...]
) -> None:
    # Other tests may be running.
    await store(data_dir, {"A": f"{VALUE}-{uuid4()}"})
    process = await started(
        local(data_dir),
        *arguments,
        script="""
        import glob, os
        def read(path):
            try:
                with open(path, "rb") as file:
                    return file.read()
            except OSError:
                return b""
        value = os.environb[b"A"]
        print(sum(value in read(path) for path in glob.glob("/proc/[0-9]*/cmdline")),
              [os.getpid()] == [int(path.split("/")[2]) for path in
                                glob.glob("/proc/[0-9]*/environ") if value in read(path)])
        """,
    )
    # Nor in any other environment, the one of the supervisor for one.
    assert (await process.communicate())[0] == b"0 True\n"


# Looking after the program.


async def test_its_exit_code_is_ours(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})

    async def ends_with(code: int) -> None:
        script = f"import sys; sys.exit({code})"
        assert await ran(local(data_dir), "--mask", "always", script=script) == (code, "", "")

    await asyncio.gather(*map(ends_with, (0, 1, 42, 255)))


COUNT = """
import os, signal, sys
numbers = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1,
           signal.SIGUSR2, signal.SIGWINCH}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("ready", os.getpgrp() == os.getpid(), os.environ["A"])
came = []
while len(came) < len(numbers):
    came.append(signal.sigwait(numbers))
    print("got", came[-1])
print(set(came) == numbers, signal.sigpending() & numbers)
sys.exit(5)
"""


async def test_signals_are_passed_on_once(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    # Whoever started the tests may ignore some of them, and what is ignored is not passed on.
    heard = ("env", "--default-signal")
    process = await started(local(data_dir), "--watch", "restart", script=COUNT, below=heard)
    assert await line(process) == "ready True ***"
    for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "WINCH"):
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert (await line(process)).startswith("got ")
    assert await line(process) == "True set()"
    assert await process.wait() == 5


IGNORE = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    signal.pause()
print("ready", os.getpid())
while True:
    signal.pause()
"""


async def test_what_ignores_sigterm_is_killed_after_its_grace(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    process = await started(local(data_dir), "--watch", "restart", "--grace", "0.3", script=IGNORE)
    group = int((await line(process)).split()[1])
    before = asyncio.get_running_loop().time()
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 128 + signal.SIGKILL
    assert asyncio.get_running_loop().time() - before >= 0.3
    assert process.stderr is not None
    assert b"did not end within 0.3 s" in await process.stderr.read()
    # All of its group: the other one may need a moment to be gone.
    while group_lives(group):
        await asyncio.sleep(0.01)


async def test_what_is_stopped_is_ended_too(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    process = await started(
        local(data_dir),
        *("--mask", "always"),
        script="import os, signal; print(os.getpid()); os.kill(os.getpid(), signal.SIGSTOP)",
    )
    pid = await line(process)
    while (
        "T"
        not in subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True).stdout.decode()
    ):
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 128 + signal.SIGTERM


def group_lives(group: int) -> bool:
    """Whether a process of the group is running, and not just waiting to be buried."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        return any(int(found[2]) == group and found[0] != "Z" for found in fields)
    return False


async def test_output_is_masked_and_passed_on_as_it_comes(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    process = await started(
        local(data_dir),
        *("--mask", "always"),
        script="""
        import os, sys
        value = os.environb[b"A"]
        for at in range(len(value) + 1):
            os.write(1, b"<" + value[:at])
            # The other end has what could be passed on of the first piece.
            sys.stdin.readline()
            os.write(1, value[at:] + b">\\n")
        os.write(2, b"to stderr: " + value)
        os.write(1, value)
        """,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for at in range(len(VALUE) + 1):
        assert await process.stdout.readexactly(1) == b"<"
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"***>\n", at
    assert await process.communicate() == (b"***", b"to stderr: ***")
    assert process.returncode == 0


def test_what_was_printed_before_the_end_is_not_lost(data_dir: Path) -> None:
    asyncio.run(store(data_dir, {"A": VALUE}))
    here = local(data_dir)
    script = "import os; os.write(1, b'%7d' % os.getpid() + b'x' * 150000)"
    process = subprocess.Popen(
        (*PROGRAM, "run", *here.options, "--mask=always", "--", sys.executable, "-c", script),
        env=environment(here.variables),
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    pid = int(process.stdout.read(7) or "")
    # It is dead before most of what it has printed is taken.
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
    assert len(process.communicate()[0]) == 150000
    assert process.returncode == 0


async def test_it_notices_that_nobody_reads_any_more(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    here = local(data_dir)
    command = " ".join((*PROGRAM, "run", *here.options, "--mask always -- yes | head -n 1"))
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-o", "pipefail", "-c", command),
        env=environment(here.variables),
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await shell.communicate())[0] == b"y\n"
    assert shell.returncode == 128 + signal.SIGPIPE


async def test_what_it_leaves_running_does_not_keep_us(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    process = await started(
        local(data_dir),
        *("--mask", "always"),
        script="""
        import os, signal
        if os.fork() == 0:
            signal.pause()
        print("last words", os.getpid())
        """,
    )
    words, _, group = (await line(process)).rpartition(" ")
    try:
        assert words == "last words"
        assert await process.wait() == 0
    finally:
        os.killpg(int(group), signal.SIGKILL)


# Terminals.


class OnTerminal:
    """A run on a terminal of its own, as the leader of its session or below a shell."""

    def __init__(self, command: Sequence[str], variables: dict[str, str]) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], list(command), environment(variables))
        self._output = b""

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def until(self, words: str) -> str:
        """What appears on it up to these words."""
        while words.encode() not in self._output:
            self._output += os.read(self._master, 4096)
        seen, _, self._output = self._output.partition(words.encode())
        return seen.decode() + words

    def wait(self) -> int:
        """Its exit code."""
        # Linux says so when nobody has the terminal open any more.
        with contextlib.suppress(OSError):
            while os.read(self._master, 4096):
                pass
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


TALK = """
import os, signal, sys, time
interrupts = []
signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
print("terminals", *(os.isatty(n) for n in range(3)), os.tcgetpgrp(0) == os.getpgrp(),
      os.environ["A"])
print("read", sys.stdin.readline().strip())
print("waiting")
while not interrupts:
    time.sleep(0.01)
print("interrupts", len(interrupts))
print("again", sys.stdin.readline().strip())
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("arguments", [(), ("--watch", "restart", "--mask", "always")])
async def test_on_a_terminal_it_is_as_without_us(
    data_dir: Path, arguments: tuple[str, ...]
) -> None:
    await store(data_dir, {"A": VALUE})
    here = local(data_dir)
    command = (*PROGRAM, "run", *here.options, *arguments, "--", sys.executable, "-uc", TALK)
    terminal = OnTerminal(command, here.variables)
    terminal.until(f"terminals True True True True {VALUE}\r\n")
    terminal.type("hello\n")
    terminal.until("read hello\r\n")
    terminal.until("waiting\r\n")
    terminal.type("\x03")
    terminal.until("interrupts 1\r\n")
    terminal.type("more\n")
    terminal.until("again more\r\n")
    assert terminal.wait() == (143 if arguments else -signal.SIGTERM)


async def test_it_stops_and_goes_on_with_the_program(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    here = local(data_dir)
    script = data_dir.parent / "program"
    script.write_text("#!/bin/sh\necho program is here\nread x\necho program got $x\nexit 9\n")
    script.chmod(0o755)
    command = " ".join((*PROGRAM, "run", *here.options, "--watch restart --", str(script)))
    # A shell with job control, without what would get in between.
    shell = OnTerminal(("bash", "--norc", "--noprofile", "--noediting", "-i"), here.variables)
    shell.type("PS1='%''% '\n")
    shell.until("%% ")
    shell.type(f"{command}\n")
    shell.until("program is here\r\n")
    shell.type("\x1a")
    shell.until("Stopped")
    shell.until("%% ")
    shell.type("echo between jobs: $(jobs -s | wc -l)\n")
    shell.until("between jobs: 1\r\n")
    shell.type("fg\n")
    shell.until(str(script))
    shell.type("that\n")
    shell.until("program got that\r\n")
    shell.until("%% ")
    shell.type("echo code $?\n")
    shell.until("code 9\r\n")
    shell.type("exit 0\n")
    assert shell.wait() == 0


async def test_in_a_pipeline_it_leaves_the_terminal_to_others(data_dir: Path) -> None:
    await store(data_dir, {"A": VALUE})
    here = local(data_dir)
    reads = "import os; print('head', input(), open('/dev/tty').readline().strip())"
    command = (*PROGRAM, "run", *here.options, "--watch restart -- sh -c 'echo to $A'")
    shell = OnTerminal(
        ("bash", "-ic", " ".join((*command, "|", sys.executable, "-c", f'"{reads}"'))),
        here.variables,
    )
    shell.type("typed\n")
    shell.until("head to *** typed\r\n")
    assert shell.wait() == 0


# Changes.

PACE = Pace(settle=1.0, longest=60.0)


EVERYTHING = Selection(patterns=("*",))


async def followed(
    source: Changing, seconds: float, selection: Selection = EVERYTHING
) -> list[tuple[float, dict[str, str]]]:
    """What a watcher of the source finds in this time, and when."""
    watcher = Watcher(source, selection, PACE)
    found = [seen(await watcher.begin())]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            # Kept one by one: it ends in the middle.
            async for change in watcher.changes():
                found += [seen(change)]
    return found


def seen(found: Found) -> tuple[float, dict[str, str]]:
    """When it was found, and the values."""
    values = {name: value.reveal() for name, value in found.values.items()}
    return asyncio.get_running_loop().time(), values


async def at(*steps: tuple[float, Callable[[], object]]) -> None:
    """Do each step at its time."""
    clock = asyncio.get_running_loop().time
    for when, step in steps:
        await asyncio.sleep(when - clock())
        step()


def test_a_flapping_secret_restarts_it_more_and_more_seldom() -> None:
    source = Changing(A="0", B="b")

    async def flap() -> list[tuple[float, dict[str, str]]]:
        steps = [(n / 10, functools.partial(source.set, "A", str(n))) for n in range(1, 3000)]
        flapping = asyncio.create_task(at(*steps))
        found = await followed(source, 500)
        await flapping
        return found

    found = jump(flap())
    times = [time for time, _ in found[1:]]
    pauses = [round(later - earlier, 6) for earlier, later in pairwise(times)]
    assert 1 <= times[0] <= 1.2
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    # The last of all is never lost.
    assert found[-1][1] == {"A": "2999", "B": "b"}


def test_after_a_calm_time_it_is_as_quick_as_at_first() -> None:
    source = Changing(A="0")

    async def change() -> list[tuple[float, dict[str, str]]]:
        times = (10, 11.5, 13, 90)
        steps = [(time, functools.partial(source.set, "A", str(time))) for time in times]
        changing = asyncio.create_task(at(*steps))
        found = await followed(source, 200)
        await changing
        return found

    assert [round(time, 6) for time, _ in jump(change())] == [0, 11, 12.5, 14.5, 91]


def test_what_is_no_other_value_is_no_change() -> None:
    source = Changing(A="a", B="b")

    async def change() -> tuple[list[tuple[float, dict[str, str]]], int]:
        changing = asyncio.create_task(
            at(
                (10, source.notice),
                # The same again.
                (20, functools.partial(source.set, "A", "a")),
                # There and back.
                (30, functools.partial(source.set, "A", "x")),
                (30.5, functools.partial(source.set, "A", "a")),
                # Of another one.
                (40, functools.partial(source.set, "C", "c")),
            )
        )
        found = await followed(source, 100, Selection(("A", "B")))
        await changing
        return found, source.reads

    found, count = jump(change())
    assert found == [(0, {"A": "a", "B": "b"})]
    # A version that is new has to be read to know.
    assert count == 3


def test_new_and_deleted_secrets_are_changes() -> None:
    source = Changing(A="a")

    async def change() -> list[tuple[float, dict[str, str]]]:
        # Of the second one there is no notice.
        drop = functools.partial(source.secrets.pop, "A")
        changing = asyncio.create_task(
            at((10, functools.partial(source.set, "B", "b")), (50, drop))
        )
        found = await followed(source, 200)
        await changing
        return found

    assert jump(change()) == [(0, {"A": "a"}), (11, {"A": "a", "B": "b"}), (72, {"B": "b"})]


def test_what_can_not_be_read_anew_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    source = Changing(A="a", B="b")

    def fail(problem: SecretsError | None) -> None:
        source.problem = problem
        source.notice()

    async def change() -> tuple[list[dict[str, str]], list[int]]:
        counts: list[int] = []
        unavailable, denied = LogUnavailable("the disk is full"), Denied("not for you")
        changing = asyncio.create_task(
            at(
                (5, functools.partial(fail, unavailable)),
                (5, functools.partial(source.set, "A", "new")),
                *((when, source.notice) for when in range(7, 15, 2)),
                (16, lambda: counts.append(source.reads)),
                (20, functools.partial(fail, denied)),
                *((when, source.notice) for when in range(22, 30, 2)),
                (35, lambda: counts.append(source.reads)),
                (40, functools.partial(fail, None)),
                (41, functools.partial(source.set, "A", "newer")),
            )
        )
        found = await followed(source, 100, Selection(("A", "B")))
        await changing
        return [values for _, values in found], counts

    found, counts = jump(change())
    assert found == [{"A": "a", "B": "b"}, {"A": "newer", "B": "b"}]
    # What passes is tried again; what is refused is recorded, and once is enough.
    assert counts == [1 + 5, 1 + 5 + 1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert ["disk is full" in messages[0], "not for you" in messages[1]] == [True, True]


START = """
import os, signal, sys
def end(number, frame):
    print("asked to end")
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("started with", os.environ["A"])
while True:
    signal.pause()
"""


async def test_only_another_value_restarts_it(place: Place) -> None:
    await store(place.data_dir, {"A": "first"})
    process = await started(place, "--watch", "restart", "--mask", "never", script=START)
    assert await line(process) == "started with first"
    await store(place.data_dir, {"A": "first"})
    await reads(place.data_dir, at_least=2)
    await store(place.data_dir, {"A": "second", "B": "b"})
    assert await line(process) == "asked to end"
    assert await line(process) == "started with second"
    process.send_signal(signal.SIGTERM)
    assert await line(process) == "asked to end"
    out, err = await process.communicate()
    assert (process.returncode, out) == (3, b"")
    assert err.count(b"restarting") == 1


# It ends at once; what it began does not.
LEAVE = IGNORE.replace(
    'print("ready"', 'signal.signal(signal.SIGTERM, signal.SIG_DFL)\nprint("ready"'
)


# As the first process of a container, it is given whatever the dead leave behind.
FIRST_PROCESS = (
    *(sys.executable, "-c"),
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])",
)


@pytest.mark.parametrize(
    ("script", "code", "below"), [(IGNORE, 137, ()), (LEAVE, 143, ()), (LEAVE, 143, FIRST_PROCESS)]
)
async def test_a_program_that_does_not_end_is_replaced(
    data_dir: Path, script: str, code: int, below: tuple[str, ...]
) -> None:
    if below and sys.platform != "linux":
        pytest.skip("a system call of Linux")
    await store(data_dir, {"A": "first"})
    process = await started(
        local(data_dir), "--watch", "restart", "--grace=0.2", script=script, below=below
    )
    group = int((await line(process)).split()[1])
    await store(data_dir, {"A": "second"})
    successor = int((await line(process)).split()[1])
    assert successor != group
    # The other process of its group is gone before the next one begins.
    assert not group_lives(group)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == code
    assert not group_lives(successor)


async def test_it_can_be_told_instead(data_dir: Path) -> None:
    await store(data_dir, {"A": "first"})
    process = await started(
        local(data_dir),
        *("--watch", "signal:HUP"),
        script="""
        import signal, sys
        signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(9))
        print("ready")
        while True:
            signal.pause()
        """,
    )
    assert await line(process) == "ready"
    await store(data_dir, {"A": "second"})
    assert await process.wait() == 9


async def test_it_waits_for_its_server(data_dir: Path) -> None:
    await store(data_dir, {"A": "first"})
    async with serving(data_dir) as server:
        there = await remote(server, data_dir)
        process = await started(there, "--watch", "restart", "--mask", "never", script=START)
        assert await line(process) == "started with first"
        await store(data_dir, {"A": "between"})
        assert await line(process) == "asked to end"
        assert await line(process) == "started with between"
    await store(data_dir, {"A": "second"})
    async with serving(data_dir, f"--port={server.url.rpartition(':')[2]}"):
        assert await line(process) == "asked to end"
        assert await line(process) == "started with second"
        # An API key that is revoked ends only the watching.
        await revoke_keys(data_dir)
        assert process.stderr is not None
        await process.stderr.readuntil(b"changes are no longer noticed: ")
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 3


async def revoke_keys(data_dir: Path) -> None:
    """Revoke all API keys."""
    here = local(data_dir)
    for key in (await here.run("keys", "list", "--json")).json:
        await here.run("keys", "revoke", key["id"])


async def test_with_a_server(data_dir: Path) -> None:
    await store(data_dir, {"app-A": VALUE, "B": "b"})
    show = "import os; print(os.environ.get('app_A'), os.environ.get('B'))"
    async with serving(data_dir) as server:
        limited = await remote(server, data_dir, ("execute",), ("app-*",))
        reader = await remote(server, data_dir, scopes=("read",))
        everything, named, other, refused = await asyncio.gather(
            ran(limited, script=show),
            ran(limited, "--only", "app-A", script=show),
            ran(limited, "--only", "B", script=show),
            ran(reader, script=show),
        )
    assert (everything.code, everything.out) == (0, f"{VALUE} None\n")
    assert named == everything
    other.failed(77, "'B' (denied)")
    refused.failed(77, "scope")
    (await ran(limited, "--cache", "off", script=show)).failed(69, "can't be reached")
    limited.variables["FLOWMASON_API_KEY"] = "fm_live_unknown"
    async with serving(data_dir) as server:
        wrong = Place(data_dir, ("--url", server.url), limited.variables, "")
        (await ran(wrong, script=show)).failed(77, "FLOWMASON_API_KEY")


async def test_no_value_is_kept_while_the_program_runs(tmp_path: Path) -> None:
    source = Changing(A=VALUE)
    watcher = Watcher(source, EVERYTHING, Pace(settle=0.0))
    started = tmp_path / "started"
    # Twice: as it is first, and after a change.
    script = ["sh", "-c", f"echo $A >> {started}; trap 'exit 0' TERM; while :; do sleep 0.01; done"]

    async def programs() -> AsyncIterator[Program]:
        yield program_of(await watcher.begin())
        changes = watcher.changes()
        while True:
            yield program_of(await anext(changes))

    def program_of(found: Found) -> Program:
        variables = {name.encode(): value.reveal().encode() for name, value in found.values.items()}
        return Program(script, {b"PATH": os.environb[b"PATH"], **variables}, "")

    running = asyncio.create_task(Supervisor(Rules(masks=False)).run(programs()))
    for lines in (1, 2):
        while not started.exists() or started.read_text().count("\n") < lines:
            await asyncio.sleep(0.01)
        gc.collect()
        assert [kept for kept in gc.get_objects() if isinstance(kept, (Program, Found))] == []
        source.set("A", "second")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert started.read_text() == f"{VALUE}\nsecond\n"
