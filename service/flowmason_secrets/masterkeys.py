"""The master keys of this process: read anew when others have changed them."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

import aiofiles.os

from .core.errors import ConfigurationError
from .core.events import KEYRING
from .core.keyring import Keyring, KeySource, MasterKey, Plaintext
from .core.records import Ref

_log = logging.getLogger(__name__)


class MasterKeys:
    """The keyring and its source. Belongs to one event loop.

    What is encrypted depends on `depends`, as on everything else that was read: a rotation that
    has begun makes it outdated, in every process. `position` is the store's.
    """

    def __init__(self, keyring: Keyring, source: KeySource, position: Callable[[], int]) -> None:
        self.keyring = keyring
        self._source = source
        self._position = position
        self._as_of = 0
        self._changing = asyncio.Lock()

    @property
    def shared(self) -> bool:
        """Whether other processes see a key that `use` adds."""
        return self._source.shared

    @property
    def depends(self) -> tuple[Ref, int]:
        """What a change depends on that encrypts with the active key."""
        return (KEYRING, self._as_of)

    async def prepare(self, org_id: str, key_id: str) -> None:
        """Make the organisation's key ready if it is held, or is by now: once, and never on the
        event loop, for it takes tens of milliseconds.
        """
        if self.keyring.derived(org_id, key_id):
            return
        async with self._changing:
            if key_id not in self.keyring.held:
                await self._try_reload()
            if key_id in self.keyring.held and not self.keyring.derived(org_id, key_id):
                await asyncio.to_thread(self.keyring.derive, org_id, key_id)

    async def encrypt(self, org_id: str, value: Plaintext) -> tuple[str, bytes]:
        """The id of the active key, and a token under it."""
        keyring = self.keyring
        # While one is made ready, another may become the active one.
        while not keyring.derived(org_id, keyring.active):
            await self.prepare(org_id, keyring.active)
        return keyring.active, keyring.encrypt(org_id, value)

    async def refresh(self) -> None:
        """Read the keys anew if they can be read; else those that are held stay, and the log of
        this process says so.
        """
        async with self._changing:
            await self._try_reload()

    async def reload(self) -> None:
        """Read the keys anew.

        Raises:
            ConfigurationError: they can't be read; those that are held stay.
        """
        async with self._changing:
            await self._reload()

    async def use(self, material: str) -> str:
        """Make a master key the one that encrypts, for everybody who has the same source; returns
        its id.

        Raises:
            ConfigurationError, OSError: nothing was changed.
        """
        async with self._changing:
            await aiofiles.os.wrap(self._source.put_first)(material)
            await self._reload()
        return self.keyring.active

    async def drop(self, key_ids: Collection[str]) -> None:
        """Remove master keys from the source.

        Raises:
            ConfigurationError, OSError: nothing was changed.
        """
        async with self._changing:
            await aiofiles.os.wrap(self._source.drop)(key_ids)
            await self._reload()

    async def _try_reload(self) -> None:
        try:
            await self._reload()
        except ConfigurationError as error:
            _log.error("the master keys can't be read again: %s", error)

    async def _reload(self) -> None:
        # Before it reads: what changes in between makes it outdated.
        position = self._position()
        keys: Sequence[MasterKey] = await aiofiles.os.wrap(self._source.load)()
        self.keyring.hold(keys)
        self._as_of = position
