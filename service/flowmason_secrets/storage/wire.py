"""Events, metadata, API keys and staged changes as bytes. FORMAT.md §2, §4, §5, §6."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ..core import times
from ..core.events import BETWEEN_LINES, MAX_LINE, MAX_USER_AGENT, Event, Line
from ..core.names import secret_id
from ..core.records import ApiKey, Change, DropSecret, Metadata, PutApiKey, PutSecret, Rekey


class Malformed(ValueError):
    """Bytes on disk that are not what the format says."""


class Unwritable(ValueError):
    """Events that can't be lines: `reasons` says why, by their places."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons


class _Written(msgspec.Struct, gc=False):
    """A line of the log as it is written: its fields in their order. # format §5.1"""

    v: int
    id: str
    seq: int
    time: str
    action: str
    outcome: str
    org_id: str | None
    resource_type: str
    resource_id: str | None
    name: str | None
    version: int | None
    actor: str | None
    actor_type: str
    client_ip: str | None
    user_agent: str | None
    request_id: str | None
    status: int | None
    details: msgspec.Raw | dict[str, Any]


class Followed(msgspec.Struct, gc=False):
    """What of a line of the log matters to who follows it."""

    id: str
    seq: int
    time: str
    action: str
    outcome: str
    org_id: str | None
    resource_id: str | None
    details: dict[str, Any]


def _plain(value: object) -> str:
    """What msgspec takes of a kind of text that a caller of the library has made himself."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_NOTHING: dict[str, Any] = {}
_encoder = msgspec.json.Encoder(enc_hook=_plain)
_decoder = msgspec.json.Decoder(Followed)


def encode_lines(events: Sequence[Event], first: int, time: str) -> bytes:
    """Lines of the log with their newlines, numbered from `first` on. # format §5.1

    Raises:
        Unwritable: some would be longer than 8,000 bytes, or hold what is not text.
    """
    try:
        return _encoded(events, first, time)
    except ValueError as error:
        if len(events) == 1:
            raise Unwritable({0: str(error)}) from None
    reasons: dict[int, str] = {}
    for place, event in enumerate(events):
        try:
            encode_lines([event], first + place, time)
        except Unwritable as error:
            reasons[place] = str(error)
    raise Unwritable(reasons)


def _encoded(events: Sequence[Event], first: int, time: str) -> bytes:
    try:
        data = _encoder.encode_lines(
            [_written(event, seq, time) for seq, event in enumerate(events, first)]
        )
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    # From one line end as far as a line may reach, again and again.
    place, size = 0, len(data)
    while place < size:
        end = data.rfind(b"\n", place, place + MAX_LINE) + 1
        if not end:
            longest = max(map(len, data.split(b"\n"))) + 1
            raise ValueError(f"an event of {longest} bytes does not fit into a line")
        place = end
    return data


def _written(event: Event, seq: int, time: str) -> _Written:
    (
        identity, action, outcome, org_id, kind, resource, name, version,
        actor, actor_type, client_ip, agent, request_id, status, details,
    ) = event  # fmt: skip
    if agent is not None:
        agent = agent[:MAX_USER_AGENT]
    # RFC 8259 §6: beyond 64 bits not every reader understands a number.
    if version is not None and version.bit_length() > 63:
        raise ValueError("a version of more than 63 bits")
    # Few have any, and orjson knows that limit.
    said = msgspec.Raw(orjson.dumps(details)) if details else _NOTHING
    return _Written(
        1, identity, seq, time, action, outcome, org_id, kind, resource, name, version,
        actor, actor_type, client_ip, agent, request_id, status, said,
    )  # fmt: skip


def encode_header(event: Event, seq: int, time: str, size: int) -> bytes:
    """The first line of a segment, padded to at least `size` bytes. # format §5.3"""
    missing = size - len(encode_lines([event], seq, time))
    padded = {**(event.details or {}), "padding": "." * max(0, missing)}
    return encode_lines([event._replace(details=padded)], seq, time)


def decode_lines(data: bytes) -> list[Followed]:
    """The events that stand at the start of `data`, in whole lines, up to the first line that is
    none.
    """
    try:
        lines = _decoder.decode_lines(data)
        if len(lines) == data.count(b"\n") == data.count(BETWEEN_LINES) + 1:
            return lines
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    lines = []
    for line in data.split(b"\n")[:-1]:
        try:
            lines.append(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            break
    return lines


def decode_line(data: bytes) -> Line:
    """Raises:
    Malformed: not an event.
    """
    try:
        line: Line = orjson.loads(data)
        if not isinstance(line["seq"], int) or not isinstance(line["id"], str):
            raise Malformed("an event without seq or id")
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise Malformed(f"not an event: {error}") from None
    return line


def encode_metadata(metadata: Metadata, token: bytes) -> bytes:
    """A `.meta` file. # format §2.3"""
    return orjson.dumps(_metadata_fields(metadata, token), option=orjson.OPT_INDENT_2)


def _metadata_fields(metadata: Metadata, token: bytes) -> dict[str, Any]:
    return {
        "id": metadata.id,
        "name": metadata.name,
        "description": metadata.description,
        "category": metadata.category,
        "created_at": metadata.created_at,
        "updated_at": metadata.updated_at,
        "created_by": metadata.created_by,
        "expires_at": metadata.expires_at,
        "version": metadata.version,
        "revision": metadata.revision,
        "key_id": metadata.key_id,
        "token_sha256": hashlib.sha256(token).hexdigest(),
    }


def decode_metadata(data: bytes, oldest_key: str) -> tuple[Metadata, str | None]:
    """The metadata of a `.meta` file of ours or of FlowMason 1.0, and its token's SHA-256 if named.

    FlowMason 1.0 named no key: its files are under `oldest_key`. # format §2.4

    Raises:
        Malformed: incomplete, or not JSON at all.
    """
    try:
        fields = _load(data)
        expires_at = fields.get("expires_at")
        expiry = None if expires_at is None else times.parse_stored(expires_at)
        metadata = Metadata(
            id=str(fields["id"]),
            name=str(fields["name"]),
            description=str(fields.get("description") or ""),
            category=str(fields.get("category") or "other"),
            created_at=times.restored(fields["created_at"]),
            updated_at=times.restored(fields["updated_at"]),
            created_by=fields.get("created_by"),
            expires_at=None if expiry is None else times.render(expiry),
            version=int(fields.get("version", 1)),
            revision=str(fields.get("revision", "")),
            key_id=str(fields.get("key_id", oldest_key)),
            expiry=expiry,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise Malformed(f"unreadable metadata: {type(error).__name__}") from None
    return metadata, fields.get("token_sha256")


def decode_key_id(data: bytes, oldest_key: str) -> tuple[str, str]:
    """The name and the key id of a `.meta` file, of which there may be many to look at.

    Raises:
        Malformed: incomplete, or not JSON at all.
    """
    try:
        fields = _load(data)
        return str(fields["name"]), str(fields.get("key_id", oldest_key))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Malformed(f"unreadable metadata: {type(error).__name__}") from None


def _load(data: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = orjson.loads(data)
    except orjson.JSONDecodeError:
        # FlowMason 1.0 escaped lone surrogates, which have no UTF-8 form.
        text = json.dumps(json.loads(data), ensure_ascii=False)
        fields = orjson.loads(text.encode("utf-8", "replace"))
    return fields


def encode_api_key(key: ApiKey) -> bytes:
    """A file of `keys/`. # format §4"""
    return orjson.dumps(_api_key_fields(key), option=orjson.OPT_INDENT_2)


def _api_key_fields(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "org_id": key.org_id,
        "name": key.name,
        "sha256": key.digest,
        "scopes": key.scopes,
        "allow": key.allow,
        "created_at": key.created_at,
        "created_by": key.created_by,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def decode_api_key(data: bytes) -> ApiKey:
    """Raises:
    Malformed: incomplete, or not JSON at all.
    """
    try:
        fields: dict[str, Any] = orjson.loads(data)
        expires_at = fields["expires_at"]
        return ApiKey(
            id=fields["id"],
            org_id=fields["org_id"],
            name=fields["name"],
            digest=fields["sha256"],
            scopes=tuple(fields["scopes"]),
            allow=tuple(fields["allow"]),
            created_at=fields["created_at"],
            created_by=fields["created_by"],
            expires_at=expires_at,
            expiry=None if expires_at is None else times.parse_stored(expires_at),
            revoked_at=fields["revoked_at"],
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise Malformed(f"unreadable API key: {type(error).__name__}") from None


def encode_staged(event_id: str, change: Change) -> bytes:
    """One line of a staging file. # format §6"""
    record: dict[str, Any] = {"event": event_id}
    match change:
        case PutSecret():
            record["put_secret"] = _put_fields(change)
        case DropSecret(org_id, name):
            record["drop_secret"] = {"org_id": org_id, "name": name}
        case PutApiKey(key):
            record["put_api_key"] = _api_key_fields(key)
        case Rekey(secrets):
            record["rekey"] = [_put_fields(secret) for secret in secrets]
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _put_fields(put: PutSecret) -> dict[str, Any]:
    return {
        "org_id": put.org_id,
        "metadata": _metadata_fields(put.metadata, put.token),
        "token": put.token.decode("ascii"),
    }


def _put(fields: dict[str, Any]) -> PutSecret:
    metadata, _ = decode_metadata(orjson.dumps(fields["metadata"]), "")
    return PutSecret(fields["org_id"], metadata, fields["token"].encode("ascii"))


def decode_staged(line: bytes) -> tuple[str, Change]:
    """Raises:
    Malformed: a torn line.
    """
    try:
        record: dict[str, Any] = orjson.loads(line)
        event_id = record["event"]
        if (put := record.get("put_secret")) is not None:
            return event_id, _put(put)
        if (secrets := record.get("rekey")) is not None:
            return event_id, Rekey(tuple(map(_put, secrets)))
        if (drop := record.get("drop_secret")) is not None:
            return event_id, DropSecret(drop["org_id"], drop["name"])
        return event_id, PutApiKey(decode_api_key(orjson.dumps(record["put_api_key"])))
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise Malformed(f"unreadable staged change: {type(error).__name__}") from None


def unreadable(org_id: str, name: str, oldest_key: str) -> Metadata:
    """What is known of a secret whose metadata can't be read: the name it was asked by."""
    return Metadata(
        id=secret_id(org_id, name),
        name=name,
        description="",
        category="other",
        created_at="",
        updated_at="",
        created_by=None,
        expires_at=None,
        version=0,
        revision="",
        key_id=oldest_key,
    )
