"""The agent's routes: a small part of the server's, and its own."""

import asyncio
import contextlib
import logging
import secrets
from typing import Protocol

import msgspec
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from ...api import requests, shapes
from ...api.answers import Answer, json_answer
from ...api.connections import Budget
from ...api.problems import RequestError, internal_error, problem_response
from ...client.errors import Refused, UnexpectedAnswer, Unreachable
from ...core import names, template
from ...core.access import Caller, Peer, Principal
from ...core.drafts import Usage
from ...core.errors import SecretsError, Unauthenticated
from ...core.keyring import Plaintext
from . import HEADER, QUIT_PATH, READY_PATH
from .peers import Allowed, Socket
from .serving import Secrets, Served

_log = logging.getLogger(__name__)

# What a read from the cache has in place of Audit-Seq and Audit-Id.
OFFLINE = "X-FlowMason-Offline"
_SECRETS = "/api/v1/secrets/"
_RESOLVE = "/api/v1/secrets/resolve"
_BODY_TIMEOUT = 10.0
_NOBODY = Caller(Principal("", "", "agent", frozenset()))


class Running(Protocol):
    """What the agent says of itself, and how it is told to end."""

    ended: asyncio.Event

    def status(self) -> shapes.Health:
        """`ready`, `unavailable` or `denied`, and why."""


class Routes:
    """The request handler of the agent's server."""

    def __init__(self, served: Secrets, allowed: Allowed, running: Running, budget: Budget) -> None:
        self._secrets = served
        self._allowed = allowed
        self._running = running
        self._budget = budget
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, raw: BaseRequest) -> StreamResponse:
        """Answer one request."""
        request_id = requests.request_id(raw) or secrets.token_hex(8)
        call = requests.Call(raw, _NOBODY, {}, {}, self._budget, _BODY_TIMEOUT)
        self._active += 1
        self._idle.clear()
        try:
            peer = self._admitted(raw)
            return await self._answer(call, peer)
        except Unauthenticated:
            refusal = RequestError(
                401,
                Unauthenticated.code,
                Unauthenticated.title,
                "The server does not accept the API key of the agent: unknown, expired or revoked.",
            )
            return problem_response(refusal, request_id)
        except (Refused, UnexpectedAnswer, Unreachable) as error:
            return problem_response(_passed_on(error), request_id)
        except SecretsError as error:
            return problem_response(error, request_id)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("request %s failed", request_id)
            return internal_error(request_id)
        finally:
            self._budget.give(call.held)
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Return when no request is being answered, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def _admitted(self, raw: BaseRequest) -> Peer:
        """Raises:
        Denied: the kernel says that it is somebody else.
        RequestError: without the header.
        """
        transport = raw.transport
        connected: Socket | None = None if transport is None else transport.get_extra_info("socket")
        if connected is None:
            raise ConnectionResetError("the client went away")
        peer = self._allowed.admit(connected)
        if raw.headers.get(HEADER) != "true":
            raise RequestError(
                412, "agent_header_missing", "Header missing", f"Send '{HEADER}: true'."
            )
        return peer

    async def _answer(self, call: requests.Call, peer: Peer) -> Answer:
        path, _, query = call.raw.raw_path.partition("?")
        if query:
            requests.decode_query(query, frozenset())
        wanted = (call.raw.method, path)
        if wanted == ("POST", _RESOLVE):
            return await self._resolve(call, peer)
        if wanted == ("GET", READY_PATH):
            health = self._running.status()
            return json_answer(health, 200 if health.status == "ready" else 503)
        if wanted == ("POST", QUIT_PATH):
            self._running.ended.set()
            return json_answer(shapes.Message("The agent ends."))
        before, _, name = path.rpartition("/")
        if wanted[0] == "GET" and f"{before}/" == _SECRETS:
            return await self._get(requests.decode_segment(name), peer)
        raise RequestError(
            404,
            "no_such_route",
            "No such route",
            f"The agent has GET {_SECRETS}{{name}} and POST {_RESOLVE}; the server has the rest.",
        )

    async def _get(self, name: str, peer: Peer) -> Answer:
        names.check_any_name(name)
        (one,) = await self._secrets.read([name], Usage(), peer)
        known = one.known
        value = shapes.SecretValue(known.name, known.value, known.category, False, known.version)
        return json_answer(value, headers=_origin([one]))

    async def _resolve(self, call: requests.Call, peer: Peer) -> Answer:
        sent = await requests.body(call, shapes.ResolveIn)
        try:
            document = Plaintext(bytes(sent.document).decode())
        except UnicodeDecodeError:
            raise requests.not_json() from None
        usage = Usage(sent.pipeline, sent.stage)
        usage.check()
        parsed = template.parse(document)
        found = await self._secrets.read(parsed.names, usage, peer) if parsed.names else []
        filled = parsed.fill({one.known.name: Plaintext(one.known.value) for one in found})
        call.hold(len(filled.reveal()))
        receipts = [
            shapes.ReadReceipt(one.known.name, one.receipt.seq, one.receipt.id)
            for one in found
            if one.receipt is not None
        ]
        out = shapes.ResolvedOut(msgspec.Raw(filled.reveal().encode()), receipts)
        return json_answer(out, headers=_offline(found))


def _origin(found: list[Served]) -> dict[str, str]:
    """The headers of an answer with one value."""
    receipt = found[0].receipt
    if receipt is None:
        return _offline(found)
    return {"Audit-Seq": str(receipt.seq), "Audit-Id": receipt.id}


def _offline(found: list[Served]) -> dict[str, str]:
    """The headers that say that values come from the cache; `Age` as RFC 9111 §5.1 has it."""
    ids = [one.read_id for one in found if one.receipt is None]
    if not ids:
        return {}
    return {OFFLINE: ", ".join(ids), "Age": str(int(max(one.age for one in found)))}


def _passed_on(error: Refused | UnexpectedAnswer | Unreachable) -> SecretsError:
    """What the client of the server met, for the client of the agent."""
    if isinstance(error, Refused):
        return RequestError(error.status, error.problem_code, "Refused", str(error))
    passed = RequestError(503, error.code, error.title, str(error))
    passed.headers = {"Retry-After": "1"}
    return passed
