"""Where master keys come from: a key file, or what the process was started with. Blocking.

FORMAT.md §3.1 says what a key file holds.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from .. import forking
from ..core.errors import ConfigurationError
from ..core.keyring import DEFAULT_KEY, DEFAULT_KEY_WORD, MasterKey
from .durable import PRIVATE_FILE, Durable


class Naming:
    """Names master keys; each of them once, because that takes tens of milliseconds."""

    def __init__(self) -> None:
        self._known = {DEFAULT_KEY_WORD: DEFAULT_KEY}

    def __call__(self, materials: Sequence[str]) -> list[MasterKey]:
        """The keys of these materials. The word `default` stands for the documented default."""
        for material in materials:
            if material not in self._known:
                self._known[material] = MasterKey.of(material)
        return [self._known[material] for material in materials]


class FixedKeys:
    """The keys that this process was started with. What is changed holds for this process."""

    shared = False

    def __init__(self, keys: Sequence[MasterKey]) -> None:
        self._keys = list(keys)

    def load(self) -> Sequence[MasterKey]:
        """See `KeySource.load`."""
        return list(self._keys)

    def put_first(self, material: str) -> None:
        """See `KeySource.put_first`."""
        first = MasterKey.of(material)
        self._keys = [first, *(key for key in self._keys if key.key_id != first.key_id)]

    def drop(self, key_ids: Collection[str]) -> None:
        """See `KeySource.drop`."""
        first, *others = self._keys
        self._keys = [first, *(key for key in others if key.key_id not in key_ids)]


class KeyFile:
    """The keys of a file, and behind them those that this process was told of besides."""

    shared = True

    def __init__(self, path: Path, old: Sequence[str], durable: Durable) -> None:
        self._path = path
        self._old = tuple(old)
        self._durable = durable
        self._naming = Naming()

    def load(self) -> Sequence[MasterKey]:
        """See `KeySource.load`."""
        return self._naming((*read_key_file(self._path), *self._old))

    def put_first(self, material: str) -> None:
        """See `KeySource.put_first`."""
        if material == DEFAULT_KEY_WORD or material.strip().splitlines() != [material]:
            raise ConfigurationError(
                "A master key in a key file is one line without white space around it, and not "
                f"the word '{DEFAULT_KEY_WORD}'."
            )
        with self._alone():
            held = read_key_file(self._path)
            if held[0] != material:
                self._write([material, *(line for line in held if line != material)])

    def drop(self, key_ids: Collection[str]) -> None:
        """See `KeySource.drop`."""
        with self._alone():
            first, *others = read_key_file(self._path)
            keys = zip(others, self._naming(others), strict=True)
            kept = [first, *(line for line, key in keys if key.key_id not in key_ids)]
            if len(kept) <= len(others):
                self._write(kept)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others from changing the file meanwhile: a key that gets lost takes secrets along.

        Locked is the directory, because the file is replaced.
        """
        descriptor = os.open(self._path.resolve().parent, os.O_RDONLY | os.O_CLOEXEC)
        forking.close_in_children(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            forking.close(descriptor)

    def _write(self, lines: Sequence[str]) -> None:
        # Whoever reads the file meanwhile gets the old one or the new one, whole.
        path = self._path.resolve()
        draft = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        owner = path.stat()
        data = "".join(f"{line}\n" for line in lines).encode()
        self._durable.create(draft, data, PRIVATE_FILE, sync=True)
        try:
            self._durable.give(draft, owner.st_uid, owner.st_gid)
            self._durable.rename(draft, path)
        except OSError:
            self._durable.unlink(draft)
            raise
        self._durable.sync_path(path.parent)


def read_key_file(path: Path) -> tuple[str, ...]:
    """The master keys in a key file, the active one first. # format §3.1

    Raises:
        ConfigurationError: missing, empty, or readable by group or others.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            keys = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The key file {path} can't be read: {error}.") from None
    if mode & 0o077:
        raise ConfigurationError(
            f"The key file {path} is open to others (mode {mode:04o}). Run: chmod 600 {path}"
        )
    if not keys:
        raise ConfigurationError(f"The key file {path} holds no key. It has one key a line.")
    return keys
