"""The memory store: for tests, and as the shortest description of what a store does."""

import sys
from collections.abc import Callable, Iterator, Sequence

from ..core import times
from ..core.errors import LogDamaged
from ..core.events import Event, Receipt
from ..core.intents import Changes, Intent, admit
from ..core.minimum import Minimum
from ..core.names import org_hash, secret_hash
from ..core.ports import STALE, Chunk, Sources, Space, Verdict
from ..core.records import (
    ApiKey,
    DropSecret,
    Inventory,
    Metadata,
    PutApiKey,
    PutSecret,
    SecretRecord,
    Single,
    singles,
)
from . import wire


class MemoryStore:
    """Keeps everything in this process; durable as long as it lives."""

    def __init__(self, sources: Sources) -> None:
        self._clock = sources.clock
        self._lines: list[bytes] = []
        self._secrets: dict[tuple[str, str], PutSecret] = {}
        self._keys: dict[str, ApiKey] = {}
        self._changes = Changes(0)
        header = Event(sources.new_id(), "log.segment", "success", None, "log", "memory")
        self._append([header])

    @property
    def position(self) -> int:
        """See `Store.position`."""
        return len(self._lines)

    def peek(self, org_id: str, name: str) -> SecretRecord | None:
        """See `Store.peek`."""
        put = self._secrets.get((org_id, name))
        return None if put is None else SecretRecord(put.metadata, put.token, self.position)

    def forget(self, org_id: str, name: str) -> None:
        """See `Store.forget`. There is nothing but memory here."""

    async def load(self, org_id: str, name: str) -> SecretRecord | None:
        """See `Store.load`."""
        return self.peek(org_id, name)

    async def load_all(self, org_id: str, names: Sequence[str]) -> list[SecretRecord | None]:
        """See `Store.load_all`."""
        return [self.peek(org_id, name) for name in names]

    async def org_hashes(self) -> list[str]:
        """See `Store.org_hashes`."""
        return self.organisations()

    async def inventory(self, org_hash: str) -> Inventory:
        """See `Store.inventory`."""
        found = Inventory({}, [])
        for key, put in self._secrets.items():
            if _place(key)[0] == org_hash:
                found.names.setdefault(put.metadata.key_id, []).append(put.metadata.name)
        return found

    async def load_api_key(self, digest: str) -> ApiKey | None:
        """See `Store.load_api_key`."""
        return self._keys.get(digest)

    async def api_keys(self, org_id: str) -> list[ApiKey]:
        """See `Store.api_keys`."""
        keys = [key for key in self._keys.values() if key.org_id == org_id]
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    async def commit(self, batch: Sequence[Intent]) -> list[Verdict]:
        """See `Store.commit`."""
        verdicts: list[Verdict] = [None] * len(batch)
        admission = admit(batch, self._changes, self.position)
        for index in admission.stale:
            verdicts[index] = STALE
        first = self.position
        self._append([event for _, event in admission.events])
        for seq, (index, event) in enumerate(admission.events, first):
            verdicts[index] = Receipt(seq, event.id)
            change = batch[index].change
            if change is not None:
                for _, single in singles(change):
                    self._publish(single)
        return verdicts

    async def probe(self) -> None:
        """See `Store.probe`. There is room as long as there is memory."""

    async def space(self) -> Space:
        """See `Store.space`. As above."""
        return Space(sys.maxsize, 0)

    async def watch(self) -> bool:
        """See `Store.watch`. There is only this process."""
        return True

    async def close(self) -> None:
        """See `Store.close`."""

    def claim(self) -> Callable[[], None] | None:
        """See `Tail.claim`. There is only this process."""
        return lambda: None

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """See `Tail.chunks`."""
        if stop > self.position:
            raise LogDamaged(f"the log ends before event {stop}")
        for seq in range(start, stop):
            yield Chunk(seq, 0, seq, self._lines[seq])

    def minimum(self) -> Minimum:
        """See `Tail.minimum`. Nothing is ever archived."""
        return Minimum()

    def lines_at(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Tail.lines_at`. An offset is a seq here."""
        return [self._lines[seq].rstrip(b"\n") for _, seq in places]

    def organisations(self) -> list[str]:
        """See `Tail.organisations`."""
        return sorted({org_hash(org_id) for org_id, _ in self._secrets})

    def stems(self, org_hash: str) -> list[str]:
        """See `Tail.stems`."""
        return [stem for org, stem in map(_place, self._secrets) if org == org_hash]

    def metadata(self, org_hash: str, stem: str) -> Metadata | None:
        """See `Tail.metadata`."""
        for key, put in list(self._secrets.items()):
            if _place(key) == (org_hash, stem):
                return put.metadata
        return None

    def settled(self) -> bool:
        """See `Tail.settled`."""
        return True

    def _append(self, events: Sequence[Event]) -> None:
        time = times.render(self._clock())
        self._lines += wire.encode_lines(events, self.position, time).splitlines(keepends=True)

    def _publish(self, change: Single) -> None:
        match change:
            case PutSecret(org_id, metadata):
                self._secrets[org_id, metadata.name] = change
            case DropSecret(org_id, name):
                self._secrets.pop((org_id, name), None)
            case PutApiKey(key):
                self._keys[key.digest] = key


def _place(key: tuple[str, str]) -> tuple[str, str]:
    return org_hash(key[0]), secret_hash(key[1])
