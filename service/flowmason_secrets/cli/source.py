"""The values of a target, as sidecars want them."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

from ..core.errors import Unresolved, UnresolvedReferences
from ..core.keyring import Plaintext
from ..sidecar.source import Listed, Values
from .target import Filters, Target

# Seconds between two looks at the list, more or less: many sidecars don't look all at once.
_LOOK = 1.0
# The largest values, of which every other character is escaped on the way, are not too much.
_AT_ONCE = 16
_ALL = Filters()


class TargetSource:
    """The secrets behind a target."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def listed(self) -> Sequence[Listed]:
        found = await self._target.listing(_ALL)
        return [
            Listed(one.name, f"{one.version} {one.updated_at}", one.is_expired) for one in found
        ]

    async def read(self, names: Sequence[str]) -> Values:
        values: dict[str, Plaintext] = {}
        failed: list[Unresolved] = []
        for start in range(0, len(names), _AT_ONCE):
            try:
                values |= await self._target.read(names[start : start + _AT_ONCE])
            except UnresolvedReferences as error:
                # Whoever has to see to it wants to know all of them at once.
                failed += error.errors
        if failed:
            raise UnresolvedReferences(failed, len(names))
        return values

    async def notices(self) -> AsyncIterator[None]:
        while True:
            yield
            await asyncio.sleep(_LOOK * random.uniform(0.75, 1.25))
