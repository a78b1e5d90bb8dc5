"""Master keys, the key derived from one for each organisation, and what they encrypt.

The derivation is FlowMason 1.0's (FORMAT.md §3); the encryption is `cryptography`'s Fernet.
"""

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

ITERATIONS = 100_000
DEFAULT_KEY_ID = "default"
MIN_PRODUCTION_KEY = 32


class Plaintext:
    """A decrypted value. Its `repr` shows only a length, so that it can't slip into a log."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself: call this only where it leaves for its caller."""
        return self._value

    def __repr__(self) -> str:
        return f"<Plaintext of {len(self._value)} characters>"


@dataclass(frozen=True, slots=True)
class MasterKey:
    """One master key. `key_id` names it in `.meta` files, events and errors; it reveals nothing."""

    key_id: str
    material: str | None = field(repr=False)

    @classmethod
    def of(cls, material: str) -> "MasterKey":
        """Name a master key. Takes tens of milliseconds, like every derivation."""
        # As slow to guess from as the tokens themselves: the id adds no easier way to try keys.
        return cls(_pbkdf2(material, b"flowmason-secrets key id", 4).hex(), material)


# How the documented default key is written where master keys are listed.
DEFAULT_KEY_WORD = "default"

# The documented key of FlowMason when none is configured: anybody who knows the organisation can
# derive it, so it protects nothing.
DEFAULT_KEY = MasterKey(DEFAULT_KEY_ID, None)


# `active` encrypts and decrypts, `held` decrypts; what is under a `missing` one can't be read.
KeyState = Literal["active", "held", "missing"]


class KeyUsage(NamedTuple):
    """How many secrets are under a master key."""

    key_id: str
    secrets: int
    state: KeyState


class KeySource(Protocol):
    """Where the master keys of a process come from. Blocking: called in worker threads only.

    All of it raises ConfigurationError where the keys can't be read, and OSError where they can't
    be written.
    """

    # Whether other processes see what `put_first` and `drop` do.
    shared: bool

    def load(self) -> Sequence[MasterKey]:
        """All keys as they are now, the one that encrypts first."""

    def put_first(self, material: str) -> None:
        """From now on this key encrypts; the others stay."""

    def drop(self, key_ids: Collection[str]) -> None:
        """Forget keys; the one that encrypts stays."""


class KeyNotHeld(LookupError):
    """The keyring has no key of this id."""


class NotAuthentic(ValueError):
    """The token was not made with this key, or was changed since."""


class DerivedKey:
    """The key of one organisation, derived from a master key."""

    __slots__ = ("_fernet", "_key_id")

    def __init__(self, key_id: str, fernet: Fernet) -> None:
        self._key_id = key_id
        self._fernet = fernet

    def encrypt(self, value: Plaintext) -> bytes:
        """A Fernet token of `value`."""
        return self._fernet.encrypt(value.reveal().encode())

    def decrypt(self, token: bytes) -> Plaintext:
        """The value of `token`.

        Raises:
            NotAuthentic: the token is not of this key, or is damaged.
        """
        try:
            return Plaintext(self._fernet.decrypt(token).decode())
        except (InvalidToken, UnicodeDecodeError):
            raise NotAuthentic(self._key_id) from None


class Keyring:
    """The master keys of this process, newest first: the first one encrypts."""

    def __init__(self, keys: Sequence[MasterKey]) -> None:
        self._derived: dict[tuple[str, str], DerivedKey] = {}
        self.hold(keys)

    def hold(self, keys: Sequence[MasterKey]) -> None:
        """Hold these keys instead, the newest first.

        Raises:
            ValueError: there is none.
        """
        if not keys:
            raise ValueError("a keyring needs at least one key")
        self._keys = {key.key_id: key for key in keys}
        self._active = keys[0].key_id
        self._oldest = keys[-1].key_id
        for place in [place for place in self._derived if place[1] not in self._keys]:
            del self._derived[place]

    @property
    def active(self) -> str:
        """The id of the key that encrypts."""
        return self._active

    @property
    def oldest(self) -> str:
        """The id of the key that stands for FlowMason 1.0's, whose files don't name theirs."""
        return self._oldest

    @property
    def held(self) -> tuple[str, ...]:
        """The ids of all keys, newest first."""
        return tuple(self._keys)

    def state(self, key_id: str) -> KeyState:
        """What this keyring does with a key of this id."""
        if key_id == self._active:
            return "active"
        return "held" if key_id in self._keys else "missing"

    def derived(self, org_id: str, key_id: str) -> DerivedKey | None:
        """The key for this organisation, if it is at hand."""
        return self._derived.get((org_id, key_id))

    def derive(self, org_id: str, key_id: str) -> None:
        """Make the key for this organisation ready. Takes tens of ms: not for the loop.

        Raises:
            KeyNotHeld: this keyring has no such key.
        """
        key = self._keys.get(key_id)
        if key is None:
            raise KeyNotHeld(key_id)
        material = key.material
        if material is None:
            seed = f"flowmason-default-key-{org_id}".encode()
            material = hashlib.sha256(seed).hexdigest()[:32]
        salt = hashlib.sha256(org_id.encode()).digest()
        fernet = Fernet(urlsafe_b64encode(_pbkdf2(material, salt, 32)))
        self._derived[org_id, key_id] = DerivedKey(key_id, fernet)

    def encrypt(self, org_id: str, value: Plaintext) -> bytes:
        """A Fernet token of `value` under the active key, which must have been derived."""
        return self._derived[org_id, self._active].encrypt(value)

    def decrypt(self, org_id: str, key_id: str, token: bytes) -> Plaintext:
        """The value of `token`, with the key that `key_id` names and no other.

        Raises:
            KeyNotHeld: this keyring has no such key.
            NotAuthentic: the token is not of that key, or is damaged.
        """
        key = self.derived(org_id, key_id)
        if key is None:
            raise KeyNotHeld(key_id)
        return key.decrypt(token)


def _pbkdf2(material: str, salt: bytes, length: int) -> bytes:
    kdf = PBKDF2HMAC(algorithm=hashes.SHA256(), length=length, salt=salt, iterations=ITERATIONS)
    return kdf.derive(material.encode())
