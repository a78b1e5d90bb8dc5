"""What a power loss takes: everything that nobody has synced."""

import contextlib
import os
import stat
import threading
from pathlib import Path
from random import Random
from typing import Any

from flowmason_secrets.storage.durable import StrPath

from .faults import SYNCS, Call, Medium


class Volatile(Medium):
    """Knows what is on stable storage: contents since their file was synced, names since their
    directory was.

    Stricter than any file system: a file's own sync does not keep its name. `root` and what is
    in it at first is durable.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        # Of two syncs at once, the one that looked first must not have the last word.
        self._syncing = threading.Lock()
        # Holding a file open keeps its inode from being given to another one.
        self._held: dict[int, int] = {}
        self._names, self._content = self._all()

    def perform(self, call: Call) -> Any:
        """Do the call, and remember what it made durable."""
        if call.name not in SYNCS:
            return call.do()
        with self._syncing:
            return self._sync(call)

    def _sync(self, call: Call) -> Any:
        if call.name == "syncfs":
            everything = self._all()
            result = call.do()
            self._names.update(everything[0])
            self._content.update(everything[1])
            return result
        descriptor = call.arguments[0]
        path = f"/proc/self/fd/{descriptor}"
        # As it was before: what another thread writes meanwhile is not covered.
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            directory = os.readlink(path)
            names = self._listed(directory)
            result = call.do()
            # A new name is no data: fdatasync need not keep it.
            if call.name == "fsync":
                self._names[directory] = names
        else:
            inode, content = self._now(path)
            result = call.do()
            self._content[inode] = content
        return result

    def _all(self) -> tuple[dict[str, dict[str, int | None]], dict[int, bytes]]:
        """The names and contents of everything as it is now."""
        names, contents = {}, {}
        for directory, _, files in os.walk(self._root):
            names[directory] = self._listed(directory)
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    inode, content = self._now(os.path.join(directory, name))
                    contents[inode] = content
        return names, contents

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
                mode = stat.S_IMODE(os.fstat(self._held[inode]).st_mode)
                os.chmod(target / name, mode)

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
