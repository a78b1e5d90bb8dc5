"""Reading state: the stored secret that an attempt is about, and its value."""

import asyncio
from weakref import WeakValueDictionary

from .attempts import Attempt
from .core import errors, names
from .core.access import Caller
from .core.keyring import KeyNotHeld, Keyring, NotAuthentic, Plaintext
from .core.ports import Clock, Store
from .core.records import Ref, SecretRecord
from .masterkeys import MasterKeys


class Sealed:
    """A value that is still to be decrypted, with a key that is at hand."""

    __slots__ = ("_keyring", "_org_id", "_record", "value")

    value: Plaintext

    def __init__(self, keyring: Keyring, org_id: str, record: SecretRecord) -> None:
        self._keyring = keyring
        self._org_id = org_id
        self._record = record

    def open(self) -> errors.DecryptionFailed | None:
        """Decrypt it: from now on there is a `value`, unless this returns why not."""
        metadata, token, _, _ = self._record
        try:
            self.value = self._keyring.decrypt(self._org_id, metadata.key_id, token)
        except (KeyNotHeld, NotAuthentic):
            return errors.DecryptionFailed(metadata.name, metadata.key_id, self._keyring.held)
        return None


class Reading:
    """Reads secrets for attempts. Belongs to one event loop."""

    def __init__(self, store: Store, master: MasterKeys, clock: Clock) -> None:
        self._store = store
        self._master = master
        self._clock = clock
        self._locks: WeakValueDictionary[Ref, asyncio.Lock] = WeakValueDictionary()

    async def find(self, attempt: Attempt, name: str) -> SecretRecord | None:
        """The stored secret; the attempt depends on it from now on, or on its absence."""
        org_id = attempt.caller.principal.org_id
        as_of = self._store.position
        record = self._store.peek(org_id, name) or await self._store.load(org_id, name)
        if record is None:
            attempt.depends += (((org_id, names.secret_id(org_id, name)), as_of),)
        else:
            _depend(attempt, org_id, record)
        return record

    async def read(self, attempt: Attempt, name: str) -> SecretRecord:
        """The stored secret; the attempt depends on it from now on, or on its absence.

        Raises:
            SecretNotFound: there is none.
        """
        org_id = attempt.caller.principal.org_id
        record = self._store.peek(org_id, name)
        if record is not None:
            _depend(attempt, org_id, record)
            return record
        # Many may ask for a secret that is not at hand: one of them reads it.
        async with self.lock(attempt.caller, name):
            record = await self.find(attempt, name)
        if record is None:
            raise errors.SecretNotFound(name)
        return record

    async def decrypt(self, attempt: Attempt, record: SecretRecord) -> Plaintext:
        """The value of a secret that was read.

        Raises:
            SecretExpired, SecretDamaged, DecryptionFailed: and no value.
        """
        sealed = await self.sealed(attempt, record)
        refusal = sealed.open()
        if refusal is not None:
            raise refusal
        return sealed.value

    async def sealed(self, attempt: Attempt, record: SecretRecord) -> Sealed:
        """The same, still to be decrypted.

        Raises:
            SecretExpired, SecretDamaged: and no value.
        """
        metadata, _, _, damage = record
        if metadata.is_expired(self._clock()):
            raise errors.SecretExpired(metadata.name, metadata.expires_at or "")
        if damage is not None:
            raise errors.SecretDamaged(metadata.name, damage)
        org_id, key_id = attempt.caller.principal.org_id, metadata.key_id
        keyring = self._master.keyring
        if not keyring.derived(org_id, key_id):
            await self._master.prepare(org_id, key_id)
        return Sealed(keyring, org_id, record)

    def lock(self, caller: Caller, name: str) -> asyncio.Lock:
        """What changes of a secret take turns with, in this process."""
        ref = (caller.principal.org_id, name)
        lock = self._locks.get(ref)
        if lock is None:
            lock = self._locks[ref] = asyncio.Lock()
        return lock


def _depend(attempt: Attempt, org_id: str, record: SecretRecord) -> None:
    metadata = record.metadata
    attempt.version = metadata.version
    # Not the id in the file: events name this one.
    ref = (org_id, names.secret_id(org_id, metadata.name))
    attempt.depends += ((ref, record.as_of),)
