"""Several secrets at once: references of a document, or a list. All of them or none."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from .attempts import Attempt, Part, Path
from .core import names, template
from .core.access import EXECUTE, FULL, Caller
from .core.drafts import Resolved, Revealed, Usage
from .core.errors import InvalidInput, SecretsError, Unresolved, UnresolvedReferences
from .core.events import Receipt
from .core.keyring import Plaintext
from .core.records import Metadata
from .reading import Reading

T = TypeVar("T")

_SCOPES = frozenset({FULL, EXECUTE})
_ACTION = "secret.read"

Found = dict[str, tuple[Metadata, Plaintext]]


class References:
    """Reads several secrets in one operation: one event for each, in one batch."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self._path = path
        self._reading = reading

    async def resolve(self, caller: Caller, document: Plaintext, usage: Usage) -> Resolved:
        """Put values in the place of the references in a JSON document. See `core.template`.

        All reads are durable in the event log before this returns.

        Raises:
            InvalidInput: not such a document: nothing was recorded. Or it would become too large,
                which is recorded for each secret.
            UnresolvedReferences: some secrets can't be read; recorded for each of these.
            Denied: by the scopes of the API key; recorded.
            LogUnavailable: the events could not be written, so nothing was revealed.
        """
        # In a thread: half a megabyte of braces would hold up everybody else.
        parsed = await asyncio.to_thread(template.parse, document)

        def fill(found: Found) -> Plaintext:
            return parsed.fill({name: value for name, (_, value) in found.items()})

        return Resolved(*await self._read_all(caller, parsed.names, usage, fill))

    async def read(self, caller: Caller, wanted: Sequence[str], usage: Usage) -> list[Revealed]:
        """The current values of several secrets, each once, with the receipts of these reads.

        Raises: as `resolve`.
        """
        if len(wanted) > template.MAX_SECRETS:
            raise InvalidInput("names", f"must be at most {template.MAX_SECRETS}")

        def check(found: Found) -> Found:
            template.check_result(sum(template.json_size(value) for _, value in found.values()))
            return found

        found, receipts = await self._read_all(caller, tuple(dict.fromkeys(wanted)), usage, check)
        return [Revealed(*found[name], receipt) for name, receipt in receipts.items()]

    async def _read_all(
        self,
        caller: Caller,
        wanted: Sequence[str],
        usage: Usage,
        use: Callable[[Found], T],
    ) -> tuple[T, dict[str, Receipt]]:
        """What `use` makes of the values, and the receipts by name."""
        for name in wanted:
            names.check_any_name(name)
        details = usage.check()
        if not wanted:
            await self._path.permit(caller, _ACTION, "secret", lambda who: who.require(_SCOPES))
            return use({}), {}

        async def step(attempt: Attempt) -> tuple[T, tuple[Part, ...]]:
            attempt.details = details
            attempt.caller.principal.require(_SCOPES)
            attempt.parts = tuple(Part(attempt, name) for name in wanted)
            return use(await self._values(attempt.parts, wanted)), attempt.parts

        (made, parts), last = await self._path.perform(caller, _ACTION, None, step)
        first = last.seq + 1 - len(parts)
        receipts = (Receipt(seq, part.event_id) for seq, part in enumerate(parts, first))
        return made, dict(zip(wanted, receipts, strict=True))

    async def _values(self, parts: Sequence[Part], wanted: Sequence[str]) -> Found:
        """Raises:
        UnresolvedReferences: each part says why.
        """
        found: Found = {}
        failed: list[Unresolved] = []
        for part, name in zip(parts, wanted, strict=True):
            try:
                found[name] = await self._value(part, name)
            except SecretsError as refusal:
                part.refusal = refusal
                failed.append(Unresolved(name, refusal.code))
        if failed:
            raise UnresolvedReferences(failed, len(wanted))
        return found

    async def _value(self, part: Part, name: str) -> tuple[Metadata, Plaintext]:
        part.caller.principal.require_name(name)
        record = await self._reading.read(part, name)
        return record.metadata, await self._reading.decrypt(part, record)
