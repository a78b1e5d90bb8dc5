"""Makes a long event log quickly: real segments, which the service opens, of made-up events."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flowmason_secrets.core.events import Event
from flowmason_secrets.core.names import secret_id
from flowmason_secrets.storage import wire
from flowmason_secrets.storage.chunks import segment_name
from flowmason_secrets.storage.eventlog import HEADER_BYTES

ORGANISATIONS = 50
NAMES = 200
ACTORS = 4
DAYS = 30
_SEGMENT = 64 << 20
END = datetime(2026, 7, 1, tzinfo=UTC)
_HOUR = timedelta(hours=1)
_MARK = "\x7f"

# Action, outcome, resource type, HTTP status, and how many in a thousand events.
KINDS = (
    ("secret.read", "success", "secret", 200, 880),
    ("secret.read", "not_found", "secret", 404, 30),
    ("secret.read", "denied", "secret", 403, 10),
    ("secret.read", "expired", "secret", 410, 5),
    ("secret.create", "success", "secret", 200, 50),
    ("secret.delete", "success", "secret", 200, 10),
    ("api_key.create", "success", "api_key", 201, 4),
    ("api_key.revoke", "success", "api_key", 200, 3),
    ("audit.read", "denied", "audit_log", 403, 3),
    ("auth.failed", "denied", "api_key", 401, 5),
)


def org(number: int) -> str:
    """The organisations; the first ones have the most events."""
    return f"organisation-{number:02d}"


def name(number: int) -> str:
    """The names of secrets, the same in each organisation; the first ones are used most."""
    return f"SERVICE_{number:03d}_API_KEY"


def actor(organisation: int, number: int) -> str:
    """The API keys of an organisation."""
    return f"{organisation:08x}{number:08x}"


@dataclass
class _Tails:
    """What events look like behind their time, and how often there are such."""

    texts: list[str]
    weights: list[float]


def _tails(chance: random.Random) -> _Tails:
    tails = _Tails([], [])
    for organisation in range(ORGANISATIONS):
        for number in range(NAMES):
            for kind in KINDS:
                tails.texts.append(_tail(chance, organisation, number, kind))
                tails.weights.append(kind[4] / (organisation + 3) / (number + 10))
    return tails


def _tail(
    chance: random.Random, organisation: int, number: int, kind: tuple[str, str, str, int, int]
) -> str:
    action, outcome, resource, status, _ = kind
    is_secret, failed = resource == "secret", action == "auth.failed"
    of, named = (None if failed else org(organisation)), (name(number) if is_secret else None)
    event = Event(
        _MARK,
        action,
        outcome,  # type: ignore[arg-type] # from the table
        of,
        resource,
        secret_id(org(organisation), name(number)) if is_secret else None,
        named,
        version=chance.randint(1, 9) if outcome == "success" and is_secret else None,
        actor=None if failed else actor(organisation, chance.randrange(ACTORS)),
        actor_type="api_key",
        client_ip=f"10.{organisation}.0.{chance.randint(1, 254)}",
        user_agent="python-aiohttp/3.12 (pipeline worker)",
        request_id=f"{chance.getrandbits(64):016x}",
        status=status,
        details={} if outcome == "success" else {"error": outcome},
    )
    line = wire.encode_lines([event], 0, _MARK).decode()
    return line[line.index(_MARK, line.index('"time"')) + 1 :]


def _hours(events: int) -> Iterator[tuple[str, int, list[int]]]:
    """Each hour with events: how its times begin, the same in milliseconds since the epoch, and
    the places of its events in it, in microseconds.
    """
    step = DAYS * 86_400_000_000 // events or 1
    start, place = END - timedelta(days=DAYS), 0
    for _ in range(events):
        if place >= DAYS * 86_400_000_000:
            return
        begin = place - place % 3_600_000_000
        count = -(-(begin + 3_600_000_000 - place) // step)
        places = list(range(place - begin, place - begin + count * step, step))
        moment = start + timedelta(microseconds=begin)
        yield f"{moment:%Y-%m-%dT%H:}", int(moment.timestamp() * 1000), places
        place += count * step


def generate(directory: Path, events: int, seed: int = 1) -> int:
    """Write a log of about so many events to `events/` of a data directory; returns how many."""
    target = directory / "events"
    target.mkdir(parents=True, mode=0o700)
    chance = random.Random(seed)
    tails = _tails(chance)
    cumulative = [sum(tails.weights[:1])]
    for weight in tails.weights[1:]:
        cumulative.append(cumulative[-1] + weight)
    minutes = [f"{second // 60:02d}:{second % 60:02d}." for second in range(3600)]
    seq, size, file = 0, _SEGMENT, None
    for prefix, epoch, places in _hours(events):
        if seq >= events:
            break
        places = places[: events - seq]
        if size >= _SEGMENT:
            if file is not None:
                file.close()
            file, size = (target / segment_name(seq)).open("wb"), 0
            size += file.write(_header(seq, f"{prefix}{minutes[places[0] // 10**6]}000000Z"))
            seq, places = seq + 1, places[1:]
        chosen = chance.choices(tails.texts, cum_weights=cumulative, k=len(places))
        lines = [
            f'{{"v":1,"id":"{_uuid(epoch + place // 1000, number)}","seq":{number},'
            f'"time":"{prefix}{minutes[place // 1_000_000]}{place % 1_000_000:06d}Z{tail}'
            for number, place, tail in zip(
                range(seq, seq + len(places)), places, chosen, strict=True
            )
        ]
        assert file is not None
        size += file.write("".join(lines).encode())
        seq += len(places)
    if file is not None:
        file.close()
    return seq


def _uuid(milliseconds: int, number: int) -> str:
    front = f"{milliseconds:012x}"
    return f"{front[:8]}-{front[8:]}-7000-8000-{number * 0x9E3779B97F4A % 2**48:012x}"


def _header(seq: int, time: str) -> bytes:
    header = Event(
        _uuid(0, seq + 1),
        "log.segment",
        "success",
        None,
        "log",
        segment_name(seq),
        details={"previous_checkpoint": None},
    )
    return wire.encode_header(header, seq, time, HEADER_BYTES)
