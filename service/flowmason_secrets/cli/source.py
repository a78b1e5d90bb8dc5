"""The values of a target, as sidecars want them."""

from collections.abc import AsyncIterator, Sequence

from ..core.errors import Unresolved, UnresolvedReferences
from ..core.keyring import Plaintext
from ..sidecar.source import AT_ONCE, Listed, Selection, Values
from .target import Filters, Target

_ALL = Filters()


class TargetSource:
    """The secrets behind a target."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def listed(self) -> Sequence[Listed]:
        return [Listed.of(one) for one in await self._target.listing(_ALL)]

    async def read(self, names: Sequence[str]) -> Values:
        values: dict[str, Plaintext] = {}
        failed: list[Unresolved] = []
        for start in range(0, len(names), AT_ONCE):
            try:
                values |= await self._target.read(names[start : start + AT_ONCE])
            except UnresolvedReferences as error:
                # Whoever has to see to it wants to know all of them at once.
                failed += error.errors
        if failed:
            raise UnresolvedReferences(failed, len(names))
        return values

    async def notices(self, selection: Selection) -> AsyncIterator[None]:
        async for name in self._target.changed():
            if name is None or selection.wants(name):
                yield
