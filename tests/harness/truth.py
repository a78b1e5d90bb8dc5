"""What the caller of a service knows, and whether what he finds later agrees with it."""

import asyncio
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flowmason_secrets import app
from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.drafts import Revealed
from flowmason_secrets.core.errors import SecretNotFound, Unauthenticated
from flowmason_secrets.core.events import Line, Receipt
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.records import Metadata
from flowmason_secrets.service import Service
from flowmason_secrets.storage.keysources import read_key_file

from .load import check_pairs, read_log
from .signed import check_signed

CALLER = app.local_caller("acme", "tester")
OTHER_CALLER = app.local_caller("globex", "tester")
PLACES = ((CALLER, "OLD"), (CALLER, "LONG"), (CALLER, "NEW"), (OTHER_CALLER, "OTHER"))

# Every value begins with it: it is nowhere on the disk.
MARK = "in plain sight"


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret as its reader sees it."""

    value: str
    metadata: Metadata

    def moved_to(self, key_id: str) -> "Secret":
        """The same secret under another master key."""
        return Secret(self.value, replace(self.metadata, key_id=key_id))


# Whether a secret is what a change would have made of it, by what it was before and what was found.
Aim = Callable[[Secret | None, Secret | None], bool]


def set_to(value: str) -> Aim:
    """The aim of a create or an update."""

    def reached(before: Secret | None, found: Secret | None) -> bool:
        if found is None or found.value != value:
            return False
        if before is None:
            return found.metadata.version == 1
        known = (before.metadata.version + 1, before.metadata.created_at)
        return (found.metadata.version, found.metadata.created_at) == known

    return reached


def under(key_id: str) -> Aim:
    """The aim of a re-encryption: all but the master key is as it was, times and tag included."""

    def reached(before: Secret | None, found: Secret | None) -> bool:
        return before is not None and found == before.moved_to(key_id)

    return reached


def gone(before: Secret | None, found: Secret | None) -> bool:
    """The aim of a deletion."""
    return found is None


@dataclass
class Truth:
    """What was acknowledged, and what was asked for and not answered: that is there whole, or not
    at all. API keys are known by their labels; `keys` are the lines of the key file.
    """

    secrets: dict[str, Secret] = field(default_factory=dict)
    live: dict[str, bool] = field(default_factory=dict)
    raw: dict[str, Plaintext] = field(default_factory=dict)
    receipts: list[tuple[Receipt, str]] = field(default_factory=list)
    keys: tuple[str, ...] = ()
    asked: dict[str, Aim] = field(default_factory=dict)
    asked_live: dict[str, bool] = field(default_factory=dict)
    asked_keys: tuple[str, ...] | None = None

    def copy(self) -> "Truth":
        """The same, to go on from here."""
        return replace(
            self,
            secrets=dict(self.secrets),
            live=dict(self.live),
            raw=dict(self.raw),
            receipts=list(self.receipts),
        )

    def ask(self, name: str, aim: Aim) -> None:
        """A change of a secret begins."""
        self.asked = {**self.asked, name: aim}

    def ask_key(self, label: str, live: bool) -> None:
        """An API key is to be live from now on, or not."""
        self.asked_live = {**self.asked_live, label: live}

    def heard(self, receipt: Receipt, action: str) -> None:
        """What was asked was answered."""
        self.receipts.append((receipt, action))
        self.answered()

    def answered(self) -> None:
        """Nothing is under way any more."""
        self.asked, self.asked_live, self.asked_keys = {}, {}, None

    def accept(self, found: "Found") -> None:
        """What was not answered is decided by what was found: so it stays."""
        self.check(found)
        self.secrets, self.live, self.keys = dict(found.secrets), dict(found.live), found.keys
        self.receipts += found.receipts
        self.answered()

    def check(self, found: "Found") -> None:
        """All that was acknowledged is there, and the rest of it whole or not at all."""
        # The key file changes before, and apart from, everything in the data directory.
        assert found.keys in (self.keys, self.asked_keys or self.keys), (self, found)
        secrets = _differing(self.secrets, found.secrets)
        labels = _differing(self.live, found.live)
        if not secrets and not labels:
            return
        assert secrets <= self.asked.keys(), (secrets, self, found)
        assert labels <= self.asked_live.keys(), (labels, self, found)
        for name, aim in self.asked.items():
            assert aim(self.secrets.get(name), found.secrets.get(name)), (name, self, found)
        for label, live in self.asked_live.items():
            assert found.live.get(label) == live, (label, self, found)


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@dataclass
class Found:
    """What a reader finds."""

    secrets: dict[str, Secret] = field(default_factory=dict)
    live: dict[str, bool] = field(default_factory=dict)
    receipts: list[tuple[Receipt, str]] = field(default_factory=list)
    keys: tuple[str, ...] = ()


def key_file(root: Path) -> Path:
    """The key file of a data directory in a table."""
    return root.with_name("master.key")


def signing_key(root: Path) -> Path:
    """The key that signs the log of a data directory in a table."""
    return root.with_name("signing.key")


async def look(service: Service, root: Path, raw: dict[str, Plaintext]) -> Found:
    """Read everything, and try the API keys."""
    found = Found(keys=read_key_file(key_file(root)))
    for revealed in await asyncio.gather(*(_read(service, *place) for place in PLACES)):
        if revealed is not None:
            metadata = revealed.metadata
            found.secrets[metadata.name] = Secret(revealed.value.reveal(), metadata)
            found.receipts.append((revealed.receipt, "secret.read"))
    for key in await service.keys.all(CALLER):
        assert key.name not in found.live
        found.live[key.name] = key.revoked_at is None
    opens = await asyncio.gather(*(_opens(service, api_key) for api_key in raw.values()))
    assert list(opens) == [found.live[label] for label in raw]
    return found


async def _read(service: Service, caller: Caller, name: str) -> Revealed | None:
    try:
        return await service.get(caller, name)
    except SecretNotFound:
        return None


async def _opens(service: Service, api_key: Plaintext) -> bool:
    try:
        principal, as_of = await service.authentication.authenticate(api_key)
        await service.whoami(Caller(principal, as_of=as_of))
    except Unauthenticated:
        return False
    return True


def check_closed(root: Path, found: Found, receipts: Iterable[tuple[Receipt, str]]) -> None:
    """A data directory that was closed agrees with what was found in it before."""
    assert list((root / "staged").iterdir()) == []
    check_pairs(root)
    check_hidden(root)
    _check_modes(root)
    if signing_key(root).exists():
        check_signed(root, signing_key(root))
    lines = read_log(root)
    for receipt, action in [*receipts, *found.receipts]:
        line = lines[receipt.seq]
        assert (line["id"], line["action"], line["outcome"]) == (receipt.id, action, "success")
    check_events(lines, found)


def check_events(lines: list[Line], found: Found) -> None:
    """The event is the change: what the log says last is what is there."""
    revisions: dict[str, str] = {}
    moved: dict[str, str] = {}
    live: dict[str, bool] = {}
    for line in lines:
        name, action = line["name"] or "", line["action"]
        if line["outcome"] != "success":
            continue
        if action == "secret.create":
            revisions[name] = line["id"]
            moved.pop(line["resource_id"] or "", None)
        elif action == "secret.delete":
            del revisions[name]
            moved.pop(line["resource_id"] or "", None)
        elif action in ("api_key.create", "api_key.revoke"):
            live[name] = action == "api_key.create"
        elif action == "key.rotate" and line["details"]["kind"] == "batch":
            secrets = line["details"]["secrets"]
            assert isinstance(secrets, list)
            moved.update(dict.fromkeys(secrets, line["resource_id"] or ""))
    under_key = {secret.metadata.id: secret.metadata.key_id for secret in found.secrets.values()}
    assert moved.items() <= under_key.items()
    assert {name: secret.metadata.revision for name, secret in found.secrets.items()} == revisions
    assert found.live == live


def check_hidden(root: Path) -> None:
    """No file holds a value or a raw API key, and nobody else may read any."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            # A file may be on its way to its mode, or to its place among the segments.
            shared = _is_shared(path) or name.endswith(".tmp")
            assert not _mode(path) & ~(0o640 if shared else 0o600), path
            with open(path, "rb", buffering=0) as file:
                data = file.read()
            assert MARK.encode() not in data, path
            assert b"fm_live_" not in data, path


def _check_modes(root: Path) -> None:
    for directory, _, names in os.walk(root):
        assert _mode(directory) == 0o700, directory
        for name in names:
            path = os.path.join(directory, name)
            assert _mode(path) == (0o640 if _is_shared(path) else 0o600), path


def _is_shared(path: str) -> bool:
    """Whether log shippers may read it."""
    directory, name = os.path.split(path)
    shared = ("checkpoint", "checkpoint.cosigned", "checkpoints.ndjson")
    return directory.endswith("/events") or name in shared


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)
