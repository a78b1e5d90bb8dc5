"""Clients that do what comes into their heads, and write down what they asked and were told."""

import asyncio
import time
from collections.abc import Sequence
from random import Random

import msgspec

from .interfaces import CONDITIONS, KEYS, LISTING, Interface
from .linearise import Answer, Call, Operation

# How often each kind of call is made.
_PLAIN = {"set": 30, "get": 30, "metadata": 12, "delete": 14}
_CONDITIONAL = {"replace": 26, "create": 14, "delete if": 6}
_LISTING = {"list": 2}

# One request in so many is given up by its client, within so many seconds.
_HANG_UPS = 30
_PATIENCE = 0.02


class Plan(msgspec.Struct, frozen=True):
    """One process's part in a history: its clients, and how many calls each of them makes.

    No two plans with the same secrets have the same `title`: written values begin with it. `key`
    is the id of an API key that the odd ones of the clients use; the first one revokes it after
    `revoke_after` calls of his.
    """

    title: str
    secrets: tuple[str, ...]
    clients: int
    calls: int
    key: str | None = None
    revoke_after: int | None = None


async def take_part(plan: Plan, interfaces: Sequence[Interface]) -> list[Operation]:
    """Let the clients of a plan work, on one interface after the other, and return when all have
    their answers.
    """
    clients = [
        Client(plan, number, interfaces[number % len(interfaces)]).work()
        for number in range(plan.clients)
    ]
    return [one for done in await asyncio.gather(*clients) for one in done]


async def _told(interface: Interface, call: Call) -> Answer:
    """What came back, whatever it was: what should never come back is for the checker to find."""
    try:
        return await interface.perform(call)
    except Exception as error:
        return Answer("unforeseen", repr(error))


class Client:
    """One client: one call after the other."""

    def __init__(self, plan: Plan, number: int, interface: Interface) -> None:
        self._plan = plan
        self._number = number
        self._interface = interface
        self._random = Random(f"{plan.title} {interface.process} {number}")
        self._key = plan.key if KEYS in interface.abilities and number % 2 else None
        # The entity tags that he was told last.
        self._etags: dict[str, str] = {}
        self._kinds = dict(_PLAIN)
        if CONDITIONS in interface.abilities:
            self._kinds |= _CONDITIONAL
        if LISTING in interface.abilities and self._key is None:
            self._kinds |= _LISTING

    async def work(self) -> list[Operation]:
        """Make all calls; returns them as operations."""
        done: list[Operation] = []
        for step in range(self._plan.calls):
            if self._number == 0 and step == self._plan.revoke_after:
                assert self._plan.key is not None
                done.append(await self._perform(Call("revoke", self._plan.key)))
            done += await self._step(step)
        return done

    async def _step(self, step: int) -> list[Operation]:
        (kind,) = self._random.choices([*self._kinds], [*self._kinds.values()])
        if kind == "list":
            return await self._list()
        operation = await self._perform(self._call(kind, step))
        answer = operation.answer
        if answer is not None and answer.etag is not None:
            self._etags[operation.call.subject] = answer.etag
        return [operation]

    def _call(self, kind: str, step: int) -> Call:
        name = self._random.choice(self._plan.secrets)
        # No two writes of a history have the same value: it says who wrote it.
        value = f"{self._plan.title} {self._interface.process} {self._number} {step}"
        etag = self._etags.get(name)
        match kind:
            case "create":
                return Call("set", name, value, None, True, self._key)
            case "replace":
                return Call("set", name, value, etag, etag is None, self._key)
            case "delete if":
                return Call("delete", name, None, etag or "*", False, self._key)
            case "set":
                return Call("set", name, value, key=self._key)
            case "get":
                return Call("get", name, key=self._key)
            case "metadata":
                return Call("metadata", name, key=self._key)
        return Call("delete", name, key=self._key)

    async def _perform(self, call: Call) -> Operation:
        hasty = self._interface.hasty
        if hasty is not None and self._random.randrange(_HANG_UPS) == 0:
            return await self._give_up(hasty, call)
        begin = time.monotonic_ns()
        answer = await _told(self._interface, call)
        return Operation(self._interface.process, call, begin, time.monotonic_ns(), answer)

    async def _give_up(self, interface: Interface, call: Call) -> Operation:
        """Give it up after a moment, unless the answer is there by then."""
        begin = time.monotonic_ns()
        pending = asyncio.ensure_future(_told(interface, call))
        await asyncio.wait([pending], timeout=self._random.random() * _PATIENCE)
        if pending.cancel():
            await asyncio.wait([pending])
            return Operation(interface.process, call, begin)
        return Operation(interface.process, call, begin, time.monotonic_ns(), await pending)

    async def _list(self) -> list[Operation]:
        """One listing: of each secret, a look at its metadata at some moment meanwhile."""
        # All secrets of a history begin the same.
        prefix = self._plan.secrets[0].partition(".")[0] + "."
        begin = time.monotonic_ns()
        try:
            found = await self._interface.listing(prefix)
        except Exception as error:
            unforeseen = Answer("unforeseen", repr(error))
            answers = dict.fromkeys(self._plan.secrets, unforeseen)
        else:
            answers = {
                name: Answer("found", None, found[name]) if name in found else Answer("missing")
                for name in self._plan.secrets
            }
        end = time.monotonic_ns()
        return [
            Operation(
                f"{self._interface.process} list",
                Call("metadata", name),
                begin,
                end,
                answer,
            )
            for name, answer in answers.items()
        ]
