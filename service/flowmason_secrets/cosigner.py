"""Asking witnesses to cosign what was signed, in the process that signs. Nothing waits for them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from .core import checkpoint, witness
from .core.checkpoint import Checkpoint
from .core.errors import SecretsError
from .core.merkle import Unverified
from .core.note import Signature
from .core.ports import Reply, Sources, Tree, WitnessLink
from .core.witness import WitnessState

# Runs a function that blocks in the thread of the one who signs.
Run = Callable[..., Awaitable[object]]

_log = logging.getLogger(__name__)

# Seconds between two submissions, and until the next one to a witness that failed: each time twice
# as long.
INTERVAL = 5.0
FIRST_RETRY = 5.0
LAST_RETRY = 300.0

# What the refusals of C2SP tlog-witness mean, beside 409.
_REFUSALS = {
    400: "it takes the request for malformed",
    403: "it does not know the log's key",
    404: "it does not know the log",
    422: "it has cosigned another log under this name",
}


class _Watched:
    """A witness, and when to ask it next, in the time of the event loop."""

    def __init__(self, link: WitnessLink, state: WitnessState) -> None:
        self.link = link
        self.state = state
        self.retry_at = 0.0
        self.failures = 0

    def due(self, size: int, now: float) -> bool:
        """Whether it is to be asked to cosign the log at this size."""
        return now >= self.retry_at and (self.state.size != size or self.state.error is not None)


class Cosigner:
    """Submits the newest checkpoint to each witness: those that were missed while it was away are
    left out. Belongs to one event loop.
    """

    def __init__(
        self, links: Sequence[WitnessLink], tree: Tree, run: Run, sources: Sources
    ) -> None:
        self._links = links
        self._tree = tree
        self._run = run
        self._sources = sources
        self._watched: list[_Watched] | None = None
        self._newest = b""
        self._offered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Submit in the background what is offered from now on."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def offer(self, signed: str) -> None:
        """This is the newest checkpoint now, and this process is the one that signs."""
        self._newest = signed.encode()
        self._offered.set()

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for link in self._links:
            await link.close()

    async def _follow(self) -> None:
        while True:
            await self._offered.wait()
            self._offered.clear()
            try:
                asked = await self._round(self._newest)
            except (SecretsError, OSError) as error:
                _log.warning("cosignatures can't be kept now: %s", error)
                asked = True
            except Exception:
                _log.exception("cosignatures can't be asked for now")
                asked = True
            if asked:
                await asyncio.sleep(INTERVAL)

    async def _round(self, signed: bytes) -> bool:
        """Ask all that are due; whether there were any."""
        statement = checkpoint.read(signed)[0]
        if self._watched is None:
            self._watched = await self._known()
        now = asyncio.get_running_loop().time()
        due = [one for one in self._watched if one.due(statement.size, now)]
        if due:
            found = await asyncio.gather(*(self._ask(one, signed, statement) for one in due))
            cosignatures = [one for one in found if one is not None]
            if cosignatures:
                # First: a witness that was taken for done is not asked again.
                await self._run(self._tree.cosign, signed, cosignatures)
            self._settle(due, found, statement)
            await self._run(self._tree.record_witnesses, [one.state for one in self._watched])
        return bool(due)

    async def _known(self) -> list[_Watched]:
        """The witnesses, as they were when this or another process asked them last."""
        recorded = await self._run(self._tree.witnesses)
        assert isinstance(recorded, list)  # noqa: S101 - see Tree.witnesses
        states = {one.name: one for one in recorded}
        names = [link.verifier.name for link in self._links]
        watched = [
            _Watched(link, states.get(name, WitnessState(name)))
            for name, link in zip(names, self._links, strict=True)
        ]
        if list(states) != names:
            await self._run(self._tree.record_witnesses, [one.state for one in watched])
        return watched

    def _settle(
        self, due: Sequence[_Watched], found: Sequence[Signature | None], statement: Checkpoint
    ) -> None:
        for one, cosignature in zip(due, found, strict=True):
            if cosignature is None:
                continue
            if one.state.error is not None:
                _log.info("the witness %s cosigns again", one.state.name)
            at = float(witness.cosigned_at(cosignature))
            one.state = WitnessState(one.state.name, statement.size, at)
            one.failures, one.retry_at = 0, 0.0

    async def _ask(self, one: _Watched, signed: bytes, statement: Checkpoint) -> Signature | None:
        try:
            return await self._submit(one, signed, statement)
        except Unverified as error:
            self._failed(one, str(error))
        except SecretsError as error:
            self._failed(one, str(error))
        except OSError as error:
            self._failed(one, str(error) or type(error).__name__)
        return None

    async def _submit(self, one: _Watched, signed: bytes, statement: Checkpoint) -> Signature:
        """Raises:
        Unverified: it refuses, or its answer is not one.
        OSError: it does not answer.
        """
        old = one.state.size if one.state.size <= statement.size else 0
        reply = await self._add(one, old, signed)
        if reply.status == 409 and reply.media == witness.SIZE:
            # It knows better what it has cosigned last.
            old = witness.parse_size(reply.body)
            if old > statement.size:
                raise Unverified(
                    f"it has cosigned {old} events, more than are signed here: the log was cut "
                    "off, or another one has its name"
                )
            reply = await self._add(one, old, signed)
        if reply.status == 409:
            raise Unverified("it has cosigned another log under this name, or another process asks")
        if reply.status != 200:
            raise Unverified(_REFUSALS.get(reply.status, f"it answers {reply.status}"))
        return witness.cosignature(reply.body, statement, one.link.verifier)

    async def _add(self, one: _Watched, old: int, signed: bytes) -> Reply:
        proof = await self._run(self._tree.connect, old, signed)
        assert isinstance(proof, list)  # noqa: S101 - see Tree.connect
        return await one.link.add_checkpoint(witness.request(old, proof, signed))

    def _failed(self, one: _Watched, reason: str) -> None:
        if one.state.error != reason:
            _log.warning("the witness %s does not cosign: %s", one.state.name, reason)
        since = one.state.since or self._sources.clock()
        one.state = replace(one.state, error=reason, since=since)
        longest = min(FIRST_RETRY * 2**one.failures, LAST_RETRY)
        one.failures += one.failures < 10
        # The end of an id is random: not all logs of a witness come back to it at once.
        share = int(self._sources.new_id()[-4:], 16) / 0x10000
        one.retry_at = asyncio.get_running_loop().time() + longest * (0.5 + share / 2)
