"""What the agent asks the server."""

import os
from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import quote

import msgspec

from ...api import deliveries, shapes
from ...api.requests import PEER_HEADER
from ...client.address import Address
from ...client.errors import Refused, UnexpectedAnswer, Unreachable
from ...client.options import Options
from ...client.transport import Request, Transport
from ...core.access import Peer
from ...core.drafts import Usage
from ...core.errors import SecretsError, UnresolvedReferences
from ...core.keyring import Plaintext
from ...core.records import SecretMetadata
from ...core.status import STATUS

T = TypeVar("T")

_BATCH = "/api/v1/secrets/batch"
_OFFLINE = "/api/v1/auth/audit-log/offline"
_CODES = {kind.code: status for kind, status in STATUS.items()}


class Upstream:
    """One server, and the API key of the agent. Belongs to one event loop.

    Nothing is tried again here: a worker waits, and there is a cache.
    """

    def __init__(self, where: Address, api_key: Plaintext, options: Options) -> None:
        self._transport = Transport(where, api_key, options)

    async def read(
        self, wanted: Sequence[str], usage: Usage, peer: Peer
    ) -> list[tuple[shapes.SecretValue, shapes.ReadReceipt]]:
        """The values of secrets, and the events of these reads: all or none.

        Raises:
            SecretsError: see `is_away` and `refused`.
        """
        body = {"names": list(wanted)} | {
            field: label for field, label in usage._asdict().items() if label is not None
        }
        request = Request(
            "POST", _BATCH, body=msgspec.json.encode(body), headers={PEER_HEADER: _told(peer)}
        )
        found = await self._send(request, shapes.BatchOut)
        return list(zip(found.secrets, found.receipts, strict=True))

    async def metadata(self, name: str) -> SecretMetadata:
        """What is known of a secret but its value. No event, unless it is refused."""
        path = f"/api/v1/secrets/{quote(name, safe='')}/metadata"
        return await self._send(Request("GET", path), SecretMetadata)

    async def deliver(self, ticket: str, reads: Sequence[deliveries.OfflineReadIn]) -> int:
        """Hand over reads that were served from the cache; returns up to which number the server
        has them. May be repeated.
        """
        body = msgspec.json.encode(deliveries.OfflineIn(ticket, list(reads)))
        request = Request("POST", _OFFLINE, body=body)
        return (await self._send(request, deliveries.OfflineOut)).delivered

    async def check(self) -> None:
        """Raises:
        Unauthenticated: the API key is not live.
        SecretsError: the server can't be asked.
        """
        await self._send(Request("GET", "/api/v1/auth/whoami"), shapes.WhoAmI)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def _send(self, request: Request, shape: type[T]) -> T:
        answer = await self._transport.send(request)
        try:
            return msgspec.json.decode(answer.body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Not the decoder's words: the body may hold a value.
            pass
        raise UnexpectedAnswer(self._transport.address.url, answer.status)


def is_away(error: SecretsError) -> bool:
    """Whether the server failed, instead of refusing: no answer, or one of 5xx."""
    if isinstance(error, Unreachable):
        return True
    if isinstance(error, (Refused, UnexpectedAnswer)):
        return error.status >= 500
    if isinstance(error, UnresolvedReferences):
        return bool(error.errors) and all(_CODES.get(one.code, 0) >= 500 for one in error.errors)
    return STATUS[type(error)] >= 500


def refused(error: SecretsError) -> dict[str, int]:
    """The secrets that the server refused to give, and the status that each would have alone."""
    if not isinstance(error, UnresolvedReferences):
        return {}
    statuses = {one.name: _CODES.get(one.code, 0) for one in error.errors}
    return {name: status for name, status in statuses.items() if status in (403, 404, 410)}


def own_peer() -> Peer:
    """The agent itself, when it reads to keep its cache warm."""
    return Peer(os.getuid(), os.getpid())


def _told(peer: Peer) -> str:
    return f"uid={peer.uid};pid={peer.pid}"
