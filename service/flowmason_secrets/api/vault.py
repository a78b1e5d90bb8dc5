"""Handlers of Vault's KV version 2: a path is the name of a secret, its value one JSON object."""

import contextlib
import time

import msgspec
import orjson

from .. import __version__
from ..core import names, times
from ..core.drafts import Draft, Precondition
from ..core.errors import InvalidInput, PreconditionFailed, SecretExpired, SecretNotFound
from ..core.events import Receipt
from ..core.keyring import Plaintext
from ..core.ports import ListQuery
from ..core.records import Metadata
from ..service import Service
from . import requests
from .answers import Answer, json_answer
from .problems import malformed
from .requests import Call

# The key under which a value is shown that is no JSON object: the plain API wrote it.
PLAIN = "value"
# What Go's strconv.ParseBool takes for true.
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_UNLIMITED = 1 << 62


class Options(msgspec.Struct, frozen=True):
    """What a write asks for: `cas` is the version that it replaces, 0 for none."""

    cas: int | None = None


class Entry(msgspec.Struct, frozen=True):
    """A write. `data` is kept as it was sent, so that no number loses digits."""

    data: msgspec.Raw = msgspec.Raw()
    options: Options | None = None

    def __repr__(self) -> str:
        return "<Entry>"


class Versions(msgspec.Struct, frozen=True):
    """Versions that are to be deleted."""

    versions: list[int] = msgspec.field(default_factory=list)


class Description(msgspec.Struct, frozen=True):
    """What Vault keeps beside a value; here there is nothing of it to be set."""

    custom_metadata: dict[str, str] | None = None
    cas_required: bool = False
    max_versions: int = 0
    delete_version_after: str | int = 0

    @property
    def asks(self) -> bool:
        """Whether it asks for anything."""
        return (
            bool(self.custom_metadata)
            or self.cas_required
            or self.max_versions not in (0, 1)
            or self.delete_version_after not in (0, "", "0", "0s")
        )


async def read(service: Service, call: Call) -> Answer:
    """The value, if it is the version that is asked for; of older ones only that they are gone."""
    path, wanted = _path(call), _version(call)
    if wanted:
        current = await service.metadata(call.caller, path)
        if wanted != current.version:
            return _gone(call, current, wanted)
    try:
        metadata, value, receipt = await service.get(call.caller, path)
    except SecretExpired as error:
        current = await service.metadata(call.caller, path)
        return _gone(call, current, current.version, error.expires_at)
    if wanted and wanted != metadata.version:
        return _gone(call, metadata, wanted)
    return _answer(call, {"data": _shown(value), "metadata": _about(metadata)}, receipt=receipt)


async def write(service: Service, call: Call) -> Answer:
    """Create or replace an entry."""
    sent = await requests.document(call, Entry)
    value = _value(sent)
    cas = None if sent.options is None else sent.options.cas
    precondition = None
    if cas is not None:
        precondition = Precondition(version=cas) if cas else Precondition(absent=True)
    draft = Draft(_path(call), value, nested=True)
    written = await service.set(call.caller, draft, precondition)
    return _answer(call, _about(written.metadata), receipt=written.receipt)


async def delete(service: Service, call: Call) -> Answer:
    """Delete an entry, whether there is one or not."""
    with contextlib.suppress(SecretNotFound):
        await service.delete(call.caller, _path(call))
    return _nothing()


async def delete_versions(service: Service, call: Call) -> Answer:
    """Delete an entry, if its version is among those; the others are gone already."""
    path = _path(call)
    sent = await requests.document(call, Versions)
    if not sent.versions:
        raise malformed("No version number provided")
    for version in dict.fromkeys(sent.versions):
        with contextlib.suppress(SecretNotFound, PreconditionFailed):
            await service.delete(call.caller, path, Precondition(version=version))
    return _nothing()


async def undelete(service: Service, call: Call) -> Answer:
    """Refused: what is deleted is gone."""
    raise malformed("What was deleted is not kept here: it can't be undeleted.")


async def metadata(service: Service, call: Call) -> Answer:
    """What is known of an entry but its value, or with `?list=true` the names below it."""
    if call.query.get("list") in _TRUE:
        return await names_below(service, call)
    found = await service.metadata(call.caller, _path(call))
    version = {
        "created_time": found.updated_at,
        "deletion_time": found.expires_at or "",
        "destroyed": False,
    }
    data = {
        "cas_required": False,
        "created_time": found.created_at,
        "current_version": found.version,
        "custom_metadata": None,
        "delete_version_after": "0s",
        "max_versions": 1,
        "oldest_version": found.version,
        "updated_time": found.updated_at,
        "versions": {str(found.version): version},
    }
    return _answer(call, data)


async def describe(service: Service, call: Call) -> Answer:
    """Refused, unless it asks for what is so anyway."""
    sent = await requests.document(call, Description)
    _path(call)
    if sent.asks:
        raise malformed("Metadata can't be set here: only the current version is kept.")
    return _nothing()


async def names_below(service: Service, call: Call) -> Answer:
    """The names right below a path; those that have others below them end with `/`."""
    folder = call.params["path"].rstrip("/")
    prefix = f"{_checked(folder)}/" if folder else ""
    wanted = ListQuery(
        org_id=call.caller.principal.org_id, now=time.time(), prefix=prefix, limit=_UNLIMITED
    )
    keys: dict[str, None] = {}
    async for page in service.listing(call.caller, wanted):
        before = len(keys)
        for entry in page:
            if names.is_path(entry.name):
                head, slash, _ = entry.name[len(prefix) :].partition("/")
                keys[head + slash] = None
        call.hold(sum(len(key) for key in list(keys)[before:]))
    if not keys:
        raise SecretNotFound(folder)
    return _answer(call, {"keys": sorted(keys)})


async def lookup_self(service: Service, call: Call) -> Answer:
    """What the API key may do. It is not told again: `id` is that of the key."""
    principal = await service.whoami(call.caller)
    expires_at = principal.expires_at
    left = 0 if expires_at is None else max(1, int(expires_at - time.time()))
    data = {
        "accessor": principal.actor,
        "creation_time": 0,
        "creation_ttl": 0,
        "display_name": principal.actor,
        "entity_id": "",
        "expire_time": None if expires_at is None else times.render(expires_at),
        "explicit_max_ttl": 0,
        "id": principal.actor,
        "meta": {"org_id": principal.org_id},
        "num_uses": 0,
        "orphan": True,
        "path": "auth/token/create",
        "policies": sorted(principal.scopes),
        "renewable": False,
        "ttl": left,
        "type": "service",
    }
    return _answer(call, data)


async def mount(service: Service, call: Call) -> Answer:
    """Where a path is mounted, and that it is KV version 2."""
    await service.whoami(call.caller)
    data = {"path": "secret/", "type": "kv", "options": {"version": "2"}}
    return _answer(call, data)


async def health(service: Service, call: Call) -> Answer:
    """Values can be served; if not, it is what Vault calls sealed."""
    sealed = await service.ready() is not None
    document = {
        "initialized": True,
        "sealed": sealed,
        "standby": False,
        "performance_standby": False,
        "replication_performance_mode": "disabled",
        "replication_dr_mode": "disabled",
        "server_time_utc": int(time.time()),
        "version": __version__,
        "cluster_name": "flowmason-secrets",
    }
    return json_answer(document, 503 if sealed else 200)


def _path(call: Call) -> str:
    return _checked(call.params["path"])


def _checked(path: str) -> str:
    """Raises:
    InvalidInput: URLs can't carry it.
    """
    if not names.is_path(path):
        raise InvalidInput("path", "must not have empty segments, '.' or '..' between its '/'")
    return path


def _version(call: Call) -> int:
    """The version that is asked for, 0 for the current one."""
    text = call.query.get("version") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidInput("version", "must be a number")
    return int(text)


def _value(sent: Entry) -> Plaintext:
    """Raises:
    RequestError: it is no JSON object.
    """
    # No variable holds it in clear: tracebacks show variables.
    if bytes(sent.data) in (b"", b"null"):
        raise malformed("no data provided")
    if not _is_object(bytes(sent.data)):
        raise malformed("data must be a JSON object in UTF-8")
    return Plaintext(bytes(sent.data).decode())


def _is_object(text: str | bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:
        return False


def _shown(value: Plaintext) -> object:
    if _is_object(value.reveal()):
        return orjson.Fragment(value.reveal())
    return {PLAIN: value.reveal()}


def _about(metadata: Metadata) -> dict[str, object]:
    """A version that is there. It is deleted when it expires."""
    return {
        "created_time": metadata.updated_at,
        "custom_metadata": None,
        "deletion_time": metadata.expires_at or "",
        "destroyed": False,
        "version": metadata.version,
    }


def _gone(call: Call, current: Metadata, version: int, deleted: str | None = None) -> Answer:
    """A version that was there: deleted at that time, or destroyed by the next one.

    Raises:
        SecretNotFound: it never was.
    """
    if version > current.version:
        raise SecretNotFound(current.name)
    about = _about(current) | {
        # Of older ones it is not known; they are not older than the first.
        "created_time": current.created_at if deleted is None else current.updated_at,
        "deletion_time": deleted or "",
        "destroyed": deleted is None,
        "version": version,
    }
    return _answer(call, {"data": None, "metadata": about}, 404)


def _nothing() -> Answer:
    return Answer(204, {"Cache-Control": "no-store"}, b"")


def _answer(call: Call, data: object, status: int = 200, receipt: Receipt | None = None) -> Answer:
    """What Vault puts around everything that succeeded."""
    envelope = {
        "request_id": call.caller.request_id,
        "lease_id": "",
        "renewable": False,
        "lease_duration": 0,
        "data": data,
        "wrap_info": None,
        "warnings": None,
        "auth": None,
    }
    headers = {}
    if receipt is not None:
        headers = {"Audit-Seq": str(receipt.seq), "Audit-Id": receipt.id}
    return json_answer(orjson.dumps(envelope), status, headers)
