"""`storage/durable` is the only place that changes the disk, and the tests can fail each of its
system calls.
"""

import ast
import os
from pathlib import Path

import pytest

from flowmason_secrets.storage import durable
from flowmason_secrets.storage.durable import Durable

from .harness.faults import STEPS, SYNCS, Call, Unplugged, Watched, io_error

PACKAGE = Path(durable.__file__).parent.parent
ELSEWHERE = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "storage" / "durable.py"
)

CHANGING = {
    *("pwrite", "writev", "pwritev", "fsync", "fdatasync", "sync", "sendfile", "copy_file_range"),
    *("rename", "renames", "replace", "unlink", "remove", "removedirs", "truncate", "ftruncate"),
    *("mkdir", "makedirs", "rmdir", "mkfifo", "link", "symlink", "posix_fallocate"),
}
WRITERS = {"write_bytes", "write_text", "touch", "symlink_to", "hardlink_to", "rmtree", "mkstemp"}
READING = {"r", "rb"}


def calls(path: Path) -> list[tuple[str, str, ast.Call]]:
    """Every call in a module: the object as it is written, the function, and the call."""
    found: list[tuple[str, str, ast.Call]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found.append((ast.unparse(node.func.value), node.func.attr, node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.append(("", node.func.id, node))
    return found


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_changes_the_disk(path: Path) -> None:
    for owner, name, call in calls(path):
        text = ast.unparse(call)
        assert owner != "os" or name not in CHANGING, text
        assert name not in WRITERS, text
        if name == "open" and owner == "os":
            assert "os.O_RDONLY" in text or "os.devnull" in text, text
        elif name == "open":
            assert _modes(call) <= READING, text


def _modes(call: ast.Call) -> set[str]:
    """What may be the mode of this call of `open`."""
    values = [*call.args[:2], *(word.value for word in call.keywords if word.arg == "mode")]
    return {
        value.value
        for value in values
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def test_durable_goes_through_os_alone() -> None:
    for owner, name, call in calls(PACKAGE / "storage" / "durable.py"):
        if name in CHANGING | {"open", "chmod", "write"}:
            assert owner in ("os", "self"), ast.unparse(call)
        assert name not in WRITERS, ast.unparse(call)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_watched(step: str) -> None:
    assert vars(Watched)[step].__wrapped__ is vars(Durable)[step]


def test_the_system_calls_of_a_step_are_found_while_it_runs(tmp_path: Path) -> None:
    disk = Watched()
    disk.create(tmp_path / "a", b"1234", 0o600, sync=True)
    assert disk.steps == ["create", "write", "sync"]
    assert [str(call) for call in disk.calls] == [
        "0. open of create",
        "1. fchmod of create",
        "2. write of write of create",
        "3. fdatasync of sync of create",
    ]


def test_many_files_are_synced_each_before_their_directory(tmp_path: Path) -> None:
    """In parts; one that is gone needs no sync; nothing stays open, also of a part that fails."""
    before = os.listdir("/proc/self/fd")
    paths = [tmp_path / f"{number:03}" for number in range(70)]
    for path in paths[1:]:
        path.write_bytes(b"1234")
    synced: list[str] = []

    class Noting(Watched):
        def perform(self, call: Call) -> object:
            if call.name in SYNCS:
                synced.append(f"{call.name} {os.readlink(f'/proc/self/fd/{call.arguments[0]}')}")
                if len(synced) == 100:
                    raise io_error()
            return super().perform(call)

    disk = Noting()
    disk.sync_paths([*paths, tmp_path])
    assert synced == [*(f"fdatasync {path}" for path in paths[1:]), f"fsync {tmp_path}"]
    with pytest.raises(OSError, match="Input/output"):
        disk.sync_paths([*paths, tmp_path])
    assert len(synced) == 100
    assert os.listdir("/proc/self/fd") == before


def test_the_power_goes_off_before_each_call_or_within_it(tmp_path: Path) -> None:
    sizes: list[int | None] = []
    for number in range(5):
        path, disk = tmp_path / str(number), Unplugged()
        disk.arm(number)
        try:
            disk.create(path, b"1234", 0o600, sync=True)
        except BaseException:
            assert disk.off.is_set()
        sizes.append(os.path.getsize(path) if path.exists() else None)
    assert sizes == [None, 0, 2, 4, 4]
    assert not disk.off.is_set()
