"""`storage/durable` is the only place that changes the disk, and the tests can fail each of its
system calls.
"""

import ast
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmason_secrets.storage import durable, filesystems
from flowmason_secrets.storage.durable import Durable

from .harness.faults import MANY, STEPS, SYNCS, Call, Failing, Unplugged, Watched, io_error

PACKAGE = Path(durable.__file__).parent.parent
# `filesystems` is a system call that `os` lacks.
WRITING = {PACKAGE / "storage" / name for name in ("durable.py", "filesystems.py")}
ELSEWHERE = sorted(path for path in PACKAGE.rglob("*.py") if path not in WRITING)

CHANGING = {
    *("pwrite", "writev", "pwritev", "fsync", "fdatasync", "sync", "sendfile", "copy_file_range"),
    *("rename", "renames", "replace", "unlink", "remove", "removedirs", "truncate", "ftruncate"),
    *("mkdir", "makedirs", "rmdir", "mkfifo", "link", "symlink", "posix_fallocate"),
}
WRITERS = {"write_bytes", "write_text", "touch", "symlink_to", "hardlink_to", "rmtree", "mkstemp"}
WRITERS |= {"syncfs"}
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
        assert name not in WRITERS or owner == "filesystems", ast.unparse(call)


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


@pytest.fixture
def since(tmp_path: Path) -> Iterator[int]:
    """A descriptor that is open before anything else is written."""
    descriptor = os.open(tmp_path / "since", os.O_CREAT | os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def write_some(directory: Path, count: int) -> list[str]:
    paths = [str(directory / f"{number:03}") for number in range(count)]
    for path in paths:
        Path(path).write_bytes(b"1234")
    return paths


def synced(disk: Watched) -> list[tuple[str, int]]:
    return [(call.name, call.arguments[0]) for call in disk.calls if call.name in SYNCS]


def test_a_file_system_is_synced_at_once_for_many_files(tmp_path: Path, since: int) -> None:
    """With the disk's cache, which `fsync` empties; a file that is gone needs no sync."""
    disk = Watched()
    paths = write_some(tmp_path, MANY)
    os.unlink(paths[0])
    disk.sync_paths(paths, since)
    assert synced(disk) == [("syncfs", since), ("fsync", since)]


def test_few_files_are_synced_each(tmp_path: Path, since: int) -> None:
    disk = Watched()
    disk.sync_paths(write_some(tmp_path, MANY - 1), since)
    assert [name for name, _ in synced(disk)] == ["fdatasync"] * (MANY - 1)


def test_a_file_that_is_elsewhere_is_synced_itself(tmp_path: Path, since: int) -> None:
    """Above a data directory that is a volume of its own, another file system begins."""
    disk = Watched()
    paths = write_some(tmp_path, MANY)
    elsewhere = Path("/proc/self/mountinfo")
    assert elsewhere.stat().st_dev != tmp_path.stat().st_dev
    with contextlib.suppress(OSError):
        # It can't be synced; what counts is that it was tried.
        disk.sync_paths([*paths[:3], elsewhere, *paths[3:]], since)
    (*whole, (name, _)) = synced(disk)
    assert whole == [("syncfs", since), ("fsync", since)]
    assert name == "fdatasync"


def test_files_of_a_file_system_that_promises_less_are_synced_each(
    tmp_path: Path, since: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(durable), "filesystems", filesystems)
    monkeypatch.setattr(filesystems, "can_be_synced", lambda device: False)
    disk = Watched()
    disk.sync_paths(write_some(tmp_path, MANY), since)
    assert [name for name, _ in synced(disk)] == ["fdatasync"] * MANY


@pytest.mark.parametrize("failing", ["syncfs", "fsync"])
def test_what_a_file_system_could_not_write_is_told(
    failing: str, tmp_path: Path, since: int
) -> None:
    disk = Failing(0, lambda call: call.do(), lasting=True)
    disk.sync_paths(write_some(tmp_path, MANY), since)
    (number,) = [call.number for call in disk.calls if call.name == failing]

    def fail(call: Call) -> None:
        assert call.name == failing
        raise io_error()

    with pytest.raises(OSError, match="Input/output"):
        Failing(number, fail, lasting=False).sync_paths(write_some(tmp_path, MANY), since)


def test_a_call_that_fails_says_why() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        filesystems.syncfs(-1)


MOUNTS = """\
21 26 0:20 / /proc rw,nosuid - proc proc rw
26 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
27 26 0:31 / /dev/shm rw,nosuid shared:3 - tmpfs tmpfs rw
28 26 259:3 / /srv rw,relatime - xfs /dev/nvme0n1p3 rw,attr2
29 26 0:44 /data /net rw shared:5 - nfs4 server:/data rw
30 26 0:45 / /over rw - overlay overlay rw,lowerdir=/a
31 26 0:46 / /home rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("device", "release", "can"),
    [
        ((254, 0), "6.1.0-18-amd64", True),
        ((259, 3), "5.8", True),
        ((254, 0), "5.10.0-rc3+", True),
        ((254, 0), "5.7.19", False),
        ((254, 0), "4.19.0-26-amd64", False),
        ((0, 31), "6.1.0", False),
        ((0, 44), "6.1.0", False),
        ((0, 45), "6.1.0", False),
        ((0, 46), "6.1.0", False),
        ((0, 99), "6.1.0", False),
    ],
)
def test_which_file_systems_can_be_synced(
    device: tuple[int, int],
    release: str,
    can: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of which it is known, with a kernel that tells errors."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(filesystems, "_MOUNTS", mounts)
    system = os.uname()
    names = os.uname_result((*system[:2], release, *system[3:]))
    monkeypatch.setattr(os, "uname", lambda: names)
    assert filesystems.can_be_synced(os.makedev(*device)) is can


def test_mounts_with_any_name_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        b"25 26 0:9 / /mnt/\xff\x1c\xe2\x80\xa8 rw - vfat /dev/sda rw\n" + MOUNTS.encode()
    )
    monkeypatch.setattr(filesystems, "_MOUNTS", mounts)
    assert filesystems.can_be_synced(os.makedev(254, 0))
    assert not filesystems.can_be_synced(os.makedev(0, 9))


def test_without_a_list_of_mounts_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory of a root of its own, say, where nobody has mounted /proc."""
    monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "missing")
    assert not filesystems.can_be_synced(tmp_path.stat().st_dev)


def test_the_real_list_of_mounts_is_understood(tmp_path: Path) -> None:
    """Whatever this directory is on; what is in no list can't be synced."""
    (kind,) = subprocess.run(
        ("stat", "-f", "-c", "%T", tmp_path), capture_output=True, text=True, check=True
    ).stdout.split()
    can = filesystems.can_be_synced(tmp_path.stat().st_dev)
    # GNU stat can't tell ext4 from its elders.
    assert can is (kind in {"ext2/ext3", "xfs"})


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
