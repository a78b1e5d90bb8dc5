"""What the inside asks of the outside."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from .errors import SecretsError
from .events import Entry, Receipt
from .intents import Intent
from .minimum import Minimum
from .note import Signature, Verifier
from .records import ApiKey, Inventory, Metadata, SecretRecord
from .tiles import Tile
from .witness import WitnessState

# Seconds since the epoch.
Clock = Callable[[], float]


class Sources(NamedTuple):
    """Where times and event ids come from: passed in, so that tests decide."""

    clock: Clock
    new_id: Callable[[], str]


class Stale:
    """The answer to an intent whose versions are no longer current: read anew and try again."""


STALE = Stale()

# None: nothing had to be recorded, and what the intent read is current.
Verdict = Receipt | Stale | SecretsError | None


class Space(NamedTuple):
    """Room on the disk, in bytes: how much is `free`, and how large the reserve would have to be
    that is `missing`.
    """

    free: int
    missing: int


class Store(Protocol):
    """What holds secrets, API keys and the event log."""

    @property
    def position(self) -> int:
        """How many events of the log this process has caught up with."""

    def peek(self, org_id: str, name: str) -> SecretRecord | None:
        """The record if it is at hand in memory. It may be outdated: only `commit` knows."""

    def forget(self, org_id: str, name: str) -> None:
        """Drop what is at hand in memory: the gate found it outdated."""

    async def load(self, org_id: str, name: str) -> SecretRecord | None:
        """The record as it is stored now, or None if there is none.

        A record with `damage` set stands for files that don't make a whole secret.
        """

    async def load_all(self, org_id: str, names: Sequence[str]) -> list[SecretRecord | None]:
        """Like `load`, one for each name; nothing of it is kept in memory."""

    async def org_hashes(self) -> list[str]:
        """The hashes of all organisations that have secrets, and perhaps of some that had."""

    async def inventory(self, org_hash: str) -> Inventory:
        """Which secrets an organisation has, and under which master keys: from what is stored."""

    async def load_api_key(self, digest: str) -> ApiKey | None:
        """The API key with this SHA-256 (hex), live or not."""

    async def api_keys(self, org_id: str) -> list[ApiKey]:
        """All API keys of the organisation, oldest first, the revoked ones included."""

    async def commit(self, batch: Sequence[Intent]) -> list[Verdict]:
        """Return only when every admitted event of the batch is on stable storage, in order,
        without gaps, and every change of it is published, or staged and read from there as long as
        there is no room to publish it; one verdict for each intent; of
        several events, it is the last one's receipt.

        An error among the verdicts is that intent's alone. LogUnavailable: not acknowledged, and
        absent unless recovery finds its event whole in the log. InvalidInput: its event can't be
        a line of the log.

        Raises:
            LogUnavailable: not even the state of the log could be read.
            LogDamaged: the log contradicts itself.
        """

    async def probe(self) -> None:
        """Find out whether there is room for more events.

        Raises:
            LogUnavailable: there is none.
        """

    async def space(self) -> Space:
        """How much room there is.

        Raises:
            LogUnavailable: it can't be found out.
        """

    async def watch(self) -> bool:
        """Whether this process is the one of those that serve that watches the room; it becomes
        that if nobody is. Then it also keeps the reserve, as far as there is room.

        Raises:
            LogUnavailable: the reserve can't be made.
        """

    async def close(self) -> None:
        """Release everything; what was committed is durable under its final name."""


class AuditQuery(NamedTuple):
    """Filters of an audit query; times in seconds since the epoch, `until` exclusive.

    `before` is a seq: only events older than that one. `after` is one too: only events newer than
    that one, and the oldest of them come first. `allow` hides events of other secrets.
    """

    org_id: str | None
    resource_type: str | None = None
    action: str | None = None
    name: str | None = None
    actor: str | None = None
    success: bool | None = None
    since: float | None = None
    until: float | None = None
    before: int | None = None
    limit: int = 100
    offset: int = 0
    allow: tuple[str, ...] = ()
    after: int | None = None


# What events can be counted by; the default first.
Group = Literal["action", "outcome", "actor", "name"]


class Grouping(NamedTuple):
    """How events are counted: by which field, and by buckets of so many seconds of their time, from
    the epoch on. There are at most `most` counts.
    """

    by: Group
    seconds: int
    most: int


class Count(NamedTuple):
    """So many events with this value of a field, in the bucket that begins at `start`, in seconds
    since the epoch.
    """

    start: float
    key: str | None
    events: int


class ListQuery(NamedTuple):
    """Filters of a listing: `after` is the last name before this page, `expired` is as of `now`."""

    org_id: str
    now: float
    category: str | None = None
    prefix: str | None = None
    expired: bool | None = None
    after: str | None = None
    limit: int = 1000
    allow: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """Whole lines of one segment, one after the other: the first has seq `first`.

    `segment` is the number in the segment's file name, `offset` the place of `data` in it.
    """

    first: int
    segment: int
    offset: int
    data: bytes


class Building(NamedTuple):
    """An index that is being built: `indexed` of so many `events` are in it."""

    indexed: int
    events: int


class Tail(Protocol):
    """What the projections are made from. Blocking: called in worker threads only."""

    def claim(self) -> Callable[[], None] | None:
        """Become the one process that follows the log: what is returned ends that, as does the end
        of the process. None while another one is.
        """

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """All lines with `start` <= seq < `stop`, in order, in chunks of about a mebibyte."""

    def minimum(self) -> Minimum:
        """Which events were archived until now: `chunks` has none of them."""

    def lines_at(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """The lines at these places, each a segment and an offset, without their newlines."""

    def organisations(self) -> list[str]:
        """The hashes of all organisations that have a directory."""

    def stems(self, org_hash: str) -> list[str]:
        """The secret hashes of all metadata that an organisation has."""

    def metadata(self, org_hash: str, stem: str) -> Metadata | None:
        """The metadata stored under a secret hash now; None if there is none that can be read."""

    def settled(self) -> bool:
        """Whether metadata and stems are what every process reads; otherwise they are not to be
        kept, because committed changes wait for room to be published.
        """


class Index(Protocol):
    """The projections: views derived from events and metadata, never the truth."""

    async def audit(self, query: AuditQuery, position: int) -> list[Entry]:
        """Matching events among the first `position` ones, newest first unless `query.after` says
        otherwise.

        Raises:
            EventArchived: events after `query.after` were archived, unless that is -1.
        """

    async def summary(self, query: AuditQuery, grouping: Grouping, position: int) -> list[Count]:
        """How many of the first `position` events match, by their time and a field, in the order of
        both. Of the query, `limit` and `offset` don't count.

        Raises:
            InvalidInput: there are more counts than `grouping.most`.
        """

    async def listing(self, query: ListQuery, position: int) -> list[Metadata]:
        """Matching secrets sorted by name, as they were after `position` events or later."""

    async def organisations(self, position: int) -> list[str]:
        """The ids of all organisations among the first `position` events, archived ones too."""

    async def minimum(self, *, answered: bool = False) -> Minimum:
        """Which events were archived until now, or until the newest answer: it has none of them."""

    async def key_counts(self, position: int) -> dict[str, int]:
        """How many secrets are under each master key, by key id, over all organisations, as it was
        after `position` events or later. Secrets whose metadata can't be read are not counted.
        """

    @property
    def building(self) -> Building | None:
        """How far it is, while much of the log is not in it yet."""

    def start(self) -> None:
        """Follow the log in the background, unless another process does."""

    async def close(self) -> None:
        """Stop following."""


class Anchor(NamedTuple):
    """The newest checkpoint within the log: the seq and the time of its event, and whether a
    segment has begun since. Before there is one, the time is that of the log's first line.
    """

    seq: int
    time: float
    sealed: bool


class Progress(NamedTuple):
    """How far the log is signed, in events; the newest checkpoint; and the newest in the log."""

    size: int
    note: str
    anchor: Anchor


class Tree(Protocol):
    """The Merkle tree of the log and its checkpoints. Blocking: `lead`, `begin`, `check`, `grow`,
    `sign`, `cosign`, `record_witnesses` and `close` in one worker thread, the others in any.
    """

    def lead(self) -> bool:
        """Whether this process is the one that signs; it becomes that if nobody is."""

    def begin(self) -> None:
        """Find out what was signed. The first process ever makes the key.

        Raises:
            ConfigurationError: the signing key can't be used, or is gone.
            LogDamaged: what was signed was not signed with it.
        """

    def check(self, position: int) -> None:
        """Hold the first `position` events against what was signed when `begin` was called, so the
        position has to be newer than that. Signing goes on from there.

        Raises:
            LogDamaged: the log is shorter than what was signed, or another one.
        """

    def grow(self, position: int, most: int) -> int:
        """Do so many events' part of the next `sign` already; how many events have theirs now."""

    def sign(self, position: int) -> Progress:
        """Sign a checkpoint over the log up to `position`, or less of it if there is much; durable
        when this returns. Only if this process leads.
        """

    def newest(self, *, cosigned: bool = False) -> bytes | None:
        """The newest checkpoint, or the newest with a cosignature; None before there is one."""

    def tile(self, tile: Tile) -> bytes | None:
        """The hashes of a tile that the newest checkpoint covers; None if it does not."""

    def prove(self, seq: int, *, cosigned: bool = False) -> bytes | None:
        """The proof file that event `seq` is in the log, with the newest checkpoint or with the
        newest that is cosigned; None if that does not cover it yet.

        Raises:
            EventArchived: its line was archived.
            LogDamaged: it is not.
        """

    def connect(self, old: int, signed: bytes) -> list[bytes]:
        """The proof that the log of `old` events is the beginning of what a checkpoint covers;
        empty if `old` is 0, or all of it.

        Raises:
            LogDamaged: it is not.
        """

    def cosign(self, signed: bytes, cosignatures: Sequence[Signature]) -> None:
        """Keep what witnesses have added to a checkpoint; durable when this returns. Nothing
        happens if this process does not lead any more.
        """

    def witnesses(self) -> list[WitnessState]:
        """How it stands with the witnesses, as the process that signs has recorded it."""

    def record_witnesses(self, states: Sequence[WitnessState]) -> None:
        """Record it; like `cosign`, but not durable."""

    def close(self) -> None:
        """Let another process sign."""


class Reply(NamedTuple):
    """What a witness answered: the HTTP status, the media type, and the body."""

    status: int
    media: str
    body: bytes


class WitnessLink(Protocol):
    """The way to a witness."""

    @property
    def verifier(self) -> Verifier:
        """The key that its cosignatures are of."""

    async def add_checkpoint(self, body: bytes) -> Reply:
        """Submit a checkpoint: C2SP tlog-witness.

        Raises:
            OSError: it did not answer; the text says why, and holds nothing secret.
        """

    async def close(self) -> None:
        """Release its connections."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What a service works on."""

    store: Store
    index: Index
    tree: Tree
    witnesses: tuple[WitnessLink, ...] = ()
