"""Reading state: the stored secret that an attempt is about, and its value."""

import asyncio
from weakref import WeakValueDictionary

from .attempts import Attempt
from .core import errors
from .core.access import Caller
from .core.keyring import Keyring, NotAuthentic, Plaintext
from .core.ports import Clock, Store
from .core.records import Ref, SecretRecord
from .masterkeys import MasterKeys


class Sealed:
    """A value that is still to be decrypted, with the key that is at hand for it, if one is."""

    __slots__ = ("_key", "_keyring", "_org_id", "_record", "value")

    value: Plaintext

    def __init__(self, keyring: Keyring, org_id: str, record: SecretRecord) -> None:
        self._keyring = keyring
        self._org_id = org_id
        self._record = record
        self._key = keyring.derived(org_id, record.metadata.key_id)

    @property
    def proven(self) -> bool:
        """Whether it has been decrypted before, so that it can be this time."""
        proof = self._record.proof
        return proof is not None and proof.key is self._key is not None

    async def find_key(self, master: MasterKeys) -> None:
        """Derive the key if there is none at hand, and it is held."""
        if self._key is None:
            key_id = self._record.metadata.key_id
            await master.prepare(self._org_id, key_id)
            self._key = self._keyring.derived(self._org_id, key_id)

    def open(self) -> errors.DecryptionFailed | None:
        """Decrypt it: from now on there is a `value`, unless this returns why not."""
        metadata, token, _, _, proof = self._record
        key = self._key
        try:
            value = None if key is None else key.decrypt(token)
        except NotAuthentic:
            value = None
        if value is None:
            return errors.DecryptionFailed(metadata.name, metadata.key_id, self._keyring.held)
        self.value = value
        if proof is not None:
            proof.key = key
        return None

    def open_again(self) -> None:
        """Decrypt what is proven."""
        if self.open() is not None:
            raise AssertionError("what was decrypted before can't be decrypted now")


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
            attempt.depends += (((org_id, attempt.resource[1] or ""), as_of),)
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
        metadata, _, _, damage, _ = record
        if metadata.expiry is not None and metadata.is_expired(self._clock()):
            raise errors.SecretExpired(metadata.name, metadata.expires_at or "")
        if damage is not None:
            raise errors.SecretDamaged(metadata.name, damage)
        sealed = Sealed(self._master.keyring, attempt.caller.principal.org_id, record)
        if not sealed.proven:
            await sealed.find_key(self._master)
        return sealed

    def lock(self, caller: Caller, name: str) -> asyncio.Lock:
        """What changes of a secret take turns with, in this process."""
        ref = (caller.principal.org_id, name)
        lock = self._locks.get(ref)
        if lock is None:
            lock = self._locks[ref] = asyncio.Lock()
        return lock


def _depend(attempt: Attempt, org_id: str, record: SecretRecord) -> None:
    metadata, _, as_of, _, _ = record
    attempt.version = metadata.version
    # Not the id in the file: events name this one.
    attempt.depends += (((org_id, attempt.resource[1] or ""), as_of),)
