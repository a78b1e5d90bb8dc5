"""Reads that an agent served while it could not reach the server: each gets into the log once."""

from collections.abc import Callable
from hashlib import sha256

from .attempts import Attempt, Path
from .core import names, times
from .core.access import EXECUTE, FULL, Caller
from .core.drafts import Delivery, OfflineRead
from .core.errors import Denied, InvalidInput
from .core.events import DELIVER, Detail, Event, Receipt, event
from .core.intents import Intent
from .core.ports import AuditQuery, Backend
from .gate import Gate

_SCOPES = frozenset({FULL, EXECUTE})
_READ = "secret.read"


class OfflineReads:
    """Takes over what agents have recorded themselves.

    How far each queue was taken over is in the log and nowhere else: an event `agent.deliver` says
    what follows it, and each read that follows has its number. # format §5.5
    """

    def __init__(self, backend: Backend, gate: Gate, path: Path, new_id: Callable[[], str]) -> None:
        self._store, self._index = backend.store, backend.index
        self._gate = gate
        self._path = path
        self._new_id = new_id

    async def record(self, caller: Caller, delivery: Delivery) -> int:
        """Put those reads into the log that are not in it yet; how often they are delivered, and
        to which process, does not count. Returns the number up to which the log has them.

        Raises:
            InvalidInput: numbers that don't ascend, or no such time; nothing was recorded.
            Denied: by the scopes of the API key; recorded.
            LogUnavailable, IndexUnavailable: deliver them again.
        """
        _check(delivery.reads)
        queue = f"queue_{sha256(delivery.ticket.reveal().encode()).hexdigest()[:32]}"
        while True:
            attempt = Attempt(caller, ("offline_queue", queue, queue))
            try:
                caller.principal.require(_SCOPES)
            except Denied as refusal:
                if await self._path.refuse(attempt, DELIVER, refusal):
                    raise
            else:
                position = await self._path.barrier(caller)
                done = await self._taken_over(caller, queue, position)
                new = [read for read in delivery.reads if read.number > done]
                if not new:
                    return done
                # Of two that take over the same reads at once, the second has to look again.
                depends = (*attempt.depends, ((caller.principal.org_id, queue), position))
                first, *more = self._events(caller, queue, new)
                intent = Intent(first, depends, more=tuple(more))
                if type(await self._gate.submit(intent)) is Receipt:
                    return new[-1].number
            caller = await self._path.renew(attempt, None)

    async def _taken_over(self, caller: Caller, queue: str, position: int) -> int:
        """Up to which number the first `position` events have the reads of a queue."""
        org_id = caller.principal.org_id
        wanted = AuditQuery(org_id, action=DELIVER, name=queue, success=True, limit=1)
        newest = await self._index.audit(wanted, position)
        if not newest:
            return 0
        seq, details = newest[0].line["seq"], newest[0].line["details"]
        first, count = details.get("first"), details.get("reads")
        assert isinstance(first, int) and isinstance(count, int)  # noqa: S101, PT018 - ours
        behind = AuditQuery(org_id, action=_READ, after=seq, limit=count)
        numbers = [first - 1]
        # A crash may have left only some of them, and something else behind.
        for entry in await self._index.audit(behind, position):
            details = entry.line["details"]
            number = details.get("number")
            if details.get("queue") == queue and isinstance(number, int):
                numbers.append(number)
        return max(numbers)

    def _events(self, caller: Caller, queue: str, reads: list[OfflineRead]) -> list[Event]:
        details: dict[str, Detail] = {
            "first": reads[0].number,
            "last": reads[-1].number,
            "reads": len(reads),
        }
        resource = ("offline_queue", queue, queue)
        marker = event(self._new_id(), caller, DELIVER, "success", resource, 200, details=details)
        return [marker, *(self._read(caller, queue, read) for read in reads)]

    def _read(self, caller: Caller, queue: str, read: OfflineRead) -> Event:
        details: dict[str, Detail] = {
            "offline": True,
            "read_at": read.time,
            "read_id": read.id,
            "queue": queue,
            "number": read.number,
        }
        # The value is out: whether it should be does not matter to whether it is recorded.
        allowed = caller.principal.may_name(read.name)
        if not allowed:
            details["error"] = Denied.code
        resource_id = names.secret_id(caller.principal.org_id, read.name)
        return event(
            self._new_id(),
            caller._replace(peer=read.peer),
            _READ,
            "success" if allowed else "denied",
            ("secret", resource_id, read.name),
            200 if allowed else 403,
            read.version,
            details,
        )


def _check(reads: tuple[OfflineRead, ...]) -> None:
    before = 0
    for read in reads:
        if read.number <= before:
            raise InvalidInput("reads", "must have ascending numbers")
        before = read.number
        names.check_any_name(read.name)
        times.parse(read.time, "time")
