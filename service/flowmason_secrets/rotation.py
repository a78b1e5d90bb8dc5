"""The use cases of master keys: change the one that encrypts, and put every secret under it.

What is left to do is in the metadata of the secrets, nowhere else: a rotation may end anywhere,
and the next one goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from .attempts import Attempt, Path
from .core.access import Caller
from .core.errors import ConfigurationError, Denied, RotationIncomplete
from .core.events import KEY_ROTATE, Detail, Event
from .core.intents import Intent
from .core.keyring import KeyNotHeld, NotAuthentic
from .core.names import org_hash, secret_id
from .core.ports import Index, Store
from .core.records import PutSecret, Rekey, SecretRecord
from .gate import Gate
from .masterkeys import MasterKeys

# Secrets whose files are written while the commit lock is held: a read waits for as many.
BATCH = 48

# How often what looks damaged is looked at again.
_LOOKS = 2

_BEGIN, _BATCH, _RETIRE = "begin", "batch", "retire"


class Progress(NamedTuple):
    """What a batch did: how many secrets it re-encrypted, and the names of those it can't."""

    done: int
    failed: list[str]


class Survey(NamedTuple):
    """What is stored under which master key: the names of an organisation's secrets by key id.

    `nameless` are directories of organisations that no event names, `damaged` files that are no
    secret: nobody can re-encrypt these.
    """

    secrets: dict[str, dict[str, list[str]]]
    nameless: list[str]
    damaged: list[str]

    def left(self, active: str) -> dict[str, list[str]]:
        """The names of secrets that are not under this key, by organisation."""
        found = {}
        for org_id, by_key in self.secrets.items():
            names = [name for key, group in by_key.items() if key != active for name in group]
            if names:
                found[org_id] = names
        return found


class Rotation:
    """Re-encrypts secrets online. For local callers: whoever has the files and the keys."""

    def __init__(
        self,
        ports: tuple[Store, Index],
        gate: Gate,
        path: Path,
        master: MasterKeys,
        new_id: Callable[[], str],
    ) -> None:
        self._store, self._index = ports
        self._gate = gate
        self._path = path
        self._master = master
        self._new_id = new_id

    @property
    def shared(self) -> bool:
        """Whether other processes see the key that `use` makes the first one."""
        return self._master.shared

    @property
    def active(self) -> str:
        """The id of the key that encrypts."""
        return self._master.keyring.active

    async def use(self, caller: Caller, material: str) -> str:
        """Make a master key the one that encrypts; returns its id. When this returns, no process
        that has the same key file writes under another key any more.

        Raises:
            Denied: an API key can't do this.
            ConfigurationError, OSError: the key file can't be read or written.
            LogUnavailable: the key is the first one, but not everybody may know.
        """
        if caller.principal.digest is not None:
            raise Denied("Master keys are changed on the machine itself, not with an API key.")
        key_id = await self._master.use(material)
        await self.announce(caller)
        return key_id

    async def announce(self, caller: Caller) -> None:
        """Make every process with the same key file look at it before it encrypts anything more.

        Raises:
            ConfigurationError: the keys can't be read.
            LogUnavailable: not everybody may know.
        """
        # Another process may have changed them since.
        await self._master.reload()
        await self._tell(caller, {"kind": _BEGIN, "to": self.active})

    async def reencrypt(self, caller: Caller, names: Sequence[str]) -> AsyncIterator[Progress]:
        """Put secrets of the caller's organisation under the active key, batch by batch, if they
        are not. Versions, times and entity tags stay as they are.

        Raises:
            LogUnavailable: it goes on from there if it is called again.
        """
        loop = asyncio.get_running_loop()
        for start in range(0, len(names), BATCH):
            began = loop.time()
            progress = await self._reencrypt(caller, names[start : start + BATCH])
            # Those who read share the machine with it: half of the time they have it alone.
            await asyncio.sleep(loop.time() - began)
            yield progress

    async def finish(self, caller: Caller) -> int:
        """Re-encrypt all secrets of the caller's organisation; returns how many there were.

        Raises:
            RotationIncomplete: some can't be decrypted; all others are under the active key.
            LogUnavailable: it goes on from there if it is called again.
        """
        inventory = await self._store.inventory(org_hash(caller.principal.org_id))
        old = (names for key_id, names in inventory.names.items() if key_id != self.active)
        done, failed = 0, list[str]()
        async for progress in self.reencrypt(caller, [name for names in old for name in names]):
            done += progress.done
            failed += progress.failed
        if failed:
            raise RotationIncomplete(failed, done)
        return done

    async def survey(self, known: Collection[str]) -> Survey:
        """What is stored under which key. `known` are organisations besides those in the log.

        Raises:
            LogUnavailable: not even the state of the log can be read.
            IndexUnavailable: the organisations can't be looked up.
        """
        found = await self._survey(known)
        for _ in range(_LOOKS):
            if not found.damaged:
                break
            # A secret that is just being created or deleted is half of one for a moment.
            again = await self._survey(known)
            found = again._replace(damaged=[n for n in again.damaged if n in found.damaged])
        return found

    async def _survey(self, known: Collection[str]) -> Survey:
        # What is being published is published when this returns: both hold the commit lock.
        await self._gate.is_current(Intent(None, ()))
        ids = {*known, *await self._index.organisations(self._store.position)}
        by_hash = {org_hash(org_id): org_id for org_id in ids}
        found = Survey({}, [], [])
        for directory in await self._store.org_hashes():
            names, damaged = await self._store.inventory(directory)
            found.damaged.extend(f"{directory}/{stem}" for stem in damaged)
            if directory in by_hash:
                found.secrets[by_hash[directory]] = names
            elif names:
                found.nameless.append(directory)
        return found

    async def retire(self, caller: Caller, known: Collection[str]) -> list[str]:
        """Remove all master keys but the active one; returns their ids.

        Raises:
            ConfigurationError: something is still under them; nothing was changed.
            OSError: the key file can't be written.
        """
        # From here on nobody writes under another key: what is found now is all there will be.
        await self.announce(caller)
        found = await self.survey(known)
        left = sum(map(len, found.left(self.active).values()))
        if left or found.nameless or found.damaged:
            raise ConfigurationError(
                f"{left} secrets, {len(found.nameless)} organisations without a name and "
                f"{len(found.damaged)} damaged files are not under the key {self.active}; the old "
                "keys stay."
            )
        old = [key_id for key_id in self._master.keyring.held if key_id != self.active]
        if old:
            await self._master.drop(old)
            await self._tell(caller, {"kind": _RETIRE, "to": self.active, "from": old})
        return old

    async def _tell(self, caller: Caller, details: dict[str, Detail]) -> None:
        """An event that makes outdated, in every process, what was encrypted before it."""
        principal = caller.principal
        event = Event(
            id=self._new_id(),
            action=KEY_ROTATE,
            outcome="success",
            org_id=None,
            resource_type="master_key",
            resource_id=str(details["to"]),
            actor=principal.actor,
            actor_type=principal.actor_type,
            status=200,
            details=details,
        )
        await self._gate.submit(Intent(event, ()))

    async def _reencrypt(self, caller: Caller, names: Sequence[str]) -> Progress:
        async def step(attempt: Attempt) -> Progress:
            org_id = attempt.caller.principal.org_id
            attempt.depends += (self._master.depends,)
            as_of = self._store.position
            puts: list[PutSecret] = []
            failed: list[str] = []
            origins: set[str] = set()
            records = await self._store.load_all(org_id, names)
            for name, record in zip(names, records, strict=True):
                attempt.depends += (((org_id, secret_id(org_id, name)), as_of),)
                if record is None or record.metadata.key_id == self.active:
                    continue
                put = await self._put(org_id, record)
                if put is None:
                    failed.append(name)
                else:
                    puts.append(put)
                    origins.add(record.metadata.key_id)
            self._describe(attempt, puts, origins, len(failed))
            return Progress(len(puts), failed)

        progress, _ = await self._path.perform(caller, KEY_ROTATE, None, step)
        return progress

    async def _put(self, org_id: str, record: SecretRecord) -> PutSecret | None:
        """The same secret under the active key; None if it can't be decrypted."""
        metadata = record.metadata
        if record.damage is not None:
            return None
        await self._master.prepare(org_id, metadata.key_id)
        try:
            value = self._master.keyring.decrypt(org_id, metadata.key_id, record.token)
        except (KeyNotHeld, NotAuthentic):
            return None
        key_id, token = await self._master.encrypt(org_id, value)
        return PutSecret(org_id, replace(metadata, key_id=key_id), token)

    def _describe(
        self, attempt: Attempt, puts: list[PutSecret], origins: set[str], failed: int
    ) -> None:
        # format §5.4
        attempt.resource = ("master_key", self.active, None)
        attempt.change = Rekey(tuple(puts)) if puts else None
        attempt.details = {
            "kind": _BATCH,
            "count": len(puts),
            "failed": failed,
            "from": sorted(origins),
            "to": self.active,
            "secrets": [secret_id(put.org_id, put.metadata.name) for put in puts],
        }
