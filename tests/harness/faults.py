"""Disks that fail: a step raises, the power goes off, and what was not synced is gone.

All of them are the real `Durable` on real files; only the failing step is made up.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from random import Random

from flowmason_secrets.storage.durable import Durable, ShortWrite, StrPath

STEPS = (
    "make_directory",
    "open_append",
    "open_existing",
    "open_slot",
    "write",
    "put_slot",
    "sync",
    "sync_path",
    "create",
    "put",
    "rename",
    "unlink",
)


class PowerOff(BaseException):
    """The machine stops here: nothing may catch it, as nothing can."""


def no_space() -> OSError:
    """The disk is full."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error() -> OSError:
    """The disk is broken."""
    return OSError(errno.EIO, os.strerror(errno.EIO))


def short_write() -> OSError:
    """The system took only a part."""
    return ShortWrite("wrote 1 of 2 bytes")


class Watched(Durable):
    """Calls `before` with the kind of each step; what that raises is what the step raises.

    A write that fails leaves half of its bytes behind, as writes do.
    """

    def __init__(self) -> None:
        self.steps: list[str] = []

    def before(self, kind: str) -> None:
        """Called before each step."""

    def _step(self, kind: str) -> None:
        self.steps.append(kind)
        self.before(kind)

    def make_directory(self, path: StrPath, mode: int = 0o700) -> None:
        self._step("make_directory")
        super().make_directory(path, mode)

    def open_append(self, path: Path, mode: int) -> int:
        self._step("open_append")
        return super().open_append(path, mode)

    def open_existing(self, path: Path) -> int:
        self._step("open_existing")
        return super().open_existing(path)

    def open_slot(self, path: Path) -> int:
        self._step("open_slot")
        return super().open_slot(path)

    def write(self, descriptor: int, data: bytes) -> None:
        with self._halved(lambda half: Durable.write(self, descriptor, half), data):
            self._step("write")
        super().write(descriptor, data)

    def put_slot(self, descriptor: int, data: bytes) -> None:
        with self._halved(lambda half: Durable.put_slot(self, descriptor, half), data):
            self._step("put_slot")
        super().put_slot(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._step("sync")
        super().sync(descriptor)

    def sync_path(self, path: StrPath) -> None:
        self._step("sync_path")
        super().sync_path(path)

    def create(self, path: Path, data: bytes, mode: int, *, sync: bool) -> None:
        self._step("create")
        super().create(path, data, mode, sync=sync)

    def put(self, path: str, data: bytes, mode: int) -> None:
        self._step("put")
        super().put(path, data, mode)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def unlink(self, path: StrPath) -> None:
        self._step("unlink")
        super().unlink(path)

    @contextlib.contextmanager
    def _halved(self, write: Callable[[bytes], None], data: bytes) -> Iterator[None]:
        try:
            yield
        except BaseException:
            write(data[: len(data) // 2])
            raise


class Faulty(Watched):
    """Steps of some kinds fail while it is `broken`."""

    def __init__(self, kinds: Collection[str], error: Callable[[], OSError]) -> None:
        super().__init__()
        self._kinds = frozenset(kinds)
        self._error = error
        self.broken = False
        self.failed = 0

    def before(self, kind: str) -> None:
        if self.broken and kind in self._kinds:
            self.failed += 1
            raise self._error()


class Unplugged(Watched):
    """The power goes off before step `off_at`, and stays off: no later step happens either."""

    def __init__(self) -> None:
        super().__init__()
        self.off_at: int | None = None
        self.off = threading.Event()
        self.on_off: Callable[[], object] = lambda: None

    def arm(self, steps: int) -> None:
        """Let so many more steps happen."""
        self.off_at = len(self.steps) + steps

    def before(self, kind: str) -> None:
        if self.off_at is not None and len(self.steps) > self.off_at:
            self.off.set()
            self.on_off()
            raise PowerOff

    @contextlib.contextmanager
    def _halved(self, write: Callable[[bytes], None], data: bytes) -> Iterator[None]:
        # Only the write that the power goes off in leaves a part; later ones never begin.
        was_off = self.off.is_set()
        try:
            yield
        except BaseException:
            if not was_off:
                write(data[: len(data) // 2])
            raise


class Volatile(Unplugged):
    """Also knows what is on stable storage: contents since `sync`, names since `sync_path`.

    Stricter than any file system: a file's own sync does not keep its name. `root` and what is
    in it at first is durable.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        # Holding a file open keeps its inode from being given to another one.
        self._held: dict[int, int] = {}
        self._content: dict[int, bytes] = {}
        self._names: dict[str, dict[str, int | None]] = {}
        for directory, _, files in os.walk(root):
            self._remember_names(directory)
            for name in files:
                self._remember(os.path.join(directory, name))

    def sync(self, descriptor: int) -> None:
        # As it was before: what another thread writes meanwhile is not covered.
        before = self._now(f"/proc/self/fd/{descriptor}")
        super().sync(descriptor)
        self._content[before[0]] = before[1]

    def sync_path(self, path: StrPath) -> None:
        if os.path.isdir(path):
            names = self._listed(path)
            super().sync_path(path)
            self._names[os.fspath(path)] = names
            return
        try:
            before = self._now(path)
        except FileNotFoundError:
            super().sync_path(path)
            return
        super().sync_path(path)
        self._content[before[0]] = before[1]

    def close(self) -> None:
        """Release what is held."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def after_loss(self, target: Path, chance: Random | None) -> None:
        """Write to `target` what is there when the power is back.

        With `chance`, of what was not synced anything may have reached the disk; without, nothing.
        """
        self._restore(os.fspath(self._root), target, chance)

    def _restore(self, directory: str, target: Path, chance: Random | None) -> None:
        target.mkdir(mode=0o700)
        durable = self._names.get(directory, {})
        current = self._listed(directory) if os.path.isdir(directory) else {}
        for name in sorted(durable.keys() | current.keys()):
            choices = [durable, current] if chance is not None else [durable]
            names = choices[0] if chance is None else chance.choice(choices)
            if name not in names:
                continue
            inode = names[name]
            if inode is None:
                self._restore(f"{directory}/{name}", target / name, chance)
            else:
                (target / name).write_bytes(self._lost(inode, chance))
                os.chmod(target / name, 0o600)

    def _lost(self, inode: int, chance: Random | None) -> bytes:
        synced = self._content.get(inode, b"")
        if chance is None:
            return synced
        current = _read_all(self._held[inode])
        match chance.randrange(4):
            case 0:
                return synced
            case 1:
                return current
            case 2:
                # A part of it, in place of what was there.
                cut = chance.randint(0, len(current))
                return current[:cut] + synced[cut:]
            case _:
                # The size reached the disk, a part of the bytes did not.
                begin = chance.randint(len(synced), max(len(synced), len(current)))
                return synced + bytes(max(0, begin - len(synced))) + current[begin:]

    def _now(self, path: StrPath) -> tuple[int, bytes]:
        inode = self._hold(path)
        return inode, _read_all(self._held[inode])

    def _remember(self, path: StrPath) -> None:
        inode, content = self._now(path)
        self._content[inode] = content

    def _remember_names(self, directory: StrPath) -> None:
        self._names[os.fspath(directory)] = self._listed(directory)

    def _listed(self, directory: StrPath) -> dict[str, int | None]:
        """Each name's inode; None for directories."""
        found: dict[str, int | None] = {}
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = None if entry.is_dir() else self._hold(entry.path)
        return found

    def _hold(self, path: StrPath) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        inode = os.fstat(descriptor).st_ino
        if inode in self._held:
            os.close(descriptor)
        else:
            self._held[inode] = descriptor
        return inode


def _read_all(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
