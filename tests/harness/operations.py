"""The operations of the tables of failures: a new one is a line in `OPERATIONS`."""

import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowmason_secrets.core.drafts import Draft, KeyDraft, Usage
from flowmason_secrets.core.events import Ids
from flowmason_secrets.core.keyring import Keyring, Plaintext
from flowmason_secrets.core.names import org_hash, secret_hash
from flowmason_secrets.core.note import Signature
from flowmason_secrets.core.ports import Backend, Sources
from flowmason_secrets.core.witness import WitnessState
from flowmason_secrets.index.sqlite import SqliteIndex
from flowmason_secrets.masterkeys import MasterKeys
from flowmason_secrets.service import Service
from flowmason_secrets.storage import files as files_module
from flowmason_secrets.storage.cache import CiphertextCache
from flowmason_secrets.storage.durable import Durable
from flowmason_secrets.storage.engine import Environment
from flowmason_secrets.storage.eventlog import SegmentLimits
from flowmason_secrets.storage.files import FilesStore, FilesTail
from flowmason_secrets.storage.keysources import KeyFile
from flowmason_secrets.storage.published import Layout, Published
from flowmason_secrets.storage.signedtree import FilesTree
from flowmason_secrets.storage.signing import SigningKey

from .faults import no_space
from .signed import sign
from .truth import (
    CALLER,
    MARK,
    OTHER_CALLER,
    Secret,
    Truth,
    gone,
    key_file,
    set_to,
    signing_key,
    under,
)

WHOLE = 64 << 20
RESERVE = 1 << 16

IDS = Ids(time.time, os.urandom)
OLD_KEY, NEW_KEY = f"{MARK}: the old master key", f"{MARK}: the new master key"


def open_on(root: Path, durable: Durable, segment: int = WHOLE, block: int = 32768) -> Service:
    """What `app.open_service` makes, but for the recovery: that is a part of the operation."""
    source = KeyFile(key_file(root), (), durable)
    keyring = Keyring(source.load())
    layout = Layout(root)
    sources = Sources(time.time, IDS)
    environment = Environment(
        layout=layout,
        durable=durable,
        published=Published(layout, durable, lambda: keyring.oldest),
        cache=CiphertextCache(1 << 20),
        sources=sources,
        limits=SegmentLimits(segment),
        reserve_bytes=RESERVE,
    )
    store = FilesStore(environment)
    index = SqliteIndex(
        FilesTail(environment), layout.index, lambda: store.position, durable.unlink, block
    )
    master = MasterKeys(keyring, source, lambda: store.position)
    key = SigningKey(signing_key(root), durable)
    tree = FilesTree(layout, durable, key, sources.clock)
    return Service(Backend(store, index, tree), master, sources)


# --- what is done ---------------------------------------------------------------------------

Act = Callable[[Service, Truth], Awaitable[None]]


def put(name: str, text: str) -> Act:
    """Create or update a secret."""
    value = f"{MARK}: {text}"

    async def act(service: Service, truth: Truth) -> None:
        caller = OTHER_CALLER if name == "OTHER" else CALLER
        truth.ask(name, set_to(value))
        written = await service.set(caller, Draft(name, Plaintext(value)))
        truth.secrets[name] = Secret(value, written.metadata)
        truth.heard(written.receipt, "secret.create")

    return act


def drop(name: str) -> Act:
    """Delete a secret; one that is gone is put back first."""

    async def act(service: Service, truth: Truth) -> None:
        if name not in truth.secrets:
            await put(name, "back again")(service, truth)
        truth.ask(name, gone)
        receipt = await service.delete(CALLER, name)
        del truth.secrets[name]
        truth.heard(receipt, "secret.delete")

    return act


async def read(service: Service, truth: Truth) -> None:
    """Read a secret."""
    revealed = await service.get(CALLER, "OLD")
    assert Secret(revealed.value.reveal(), revealed.metadata) == truth.secrets["OLD"]
    truth.heard(revealed.receipt, "secret.read")


async def resolve(service: Service, truth: Truth) -> None:
    """Read two secrets for one document."""
    document = Plaintext('["{{secrets.OLD}}","{{secrets.LONG}}"]')
    resolved = await service.references.resolve(CALLER, document, Usage("p"))
    values = [truth.secrets[name].value for name in ("OLD", "LONG")]
    assert json.loads(resolved.document.reveal()) == values
    for receipt in resolved.receipts.values():
        truth.heard(receipt, "secret.read")


async def issue(service: Service, truth: Truth) -> None:
    """Create an API key."""
    label = f"key {len(truth.live)}"
    truth.ask_key(label, True)
    issued = await service.keys.issue(CALLER, KeyDraft(label))
    truth.live[label], truth.raw[label] = True, issued.raw
    truth.heard(issued.receipt, "api_key.create")


async def revoke(service: Service, truth: Truth) -> None:
    """Revoke an API key; if none is live, one is created first."""
    if not any(truth.live.values()):
        await issue(service, truth)
    label = next(label for label, live in truth.live.items() if live)
    (key,) = [key for key in await service.keys.all(CALLER) if key.name == label]
    truth.ask_key(label, False)
    receipt = await service.keys.revoke(CALLER, key.id)
    truth.live[label] = False
    truth.heard(receipt, "api_key.revoke")


async def recover(service: Service, truth: Truth) -> None:
    """Only open."""
    await service.recover()


def several(*acts: Act) -> Act:
    """One after the other, so that a later one finds the journal of an earlier one."""

    async def act(service: Service, truth: Truth) -> None:
        for one in acts:
            await one(service, truth)

    return act


async def use_new_key(service: Service, truth: Truth) -> None:
    """Put another master key first in the key file, and tell everybody."""
    truth.asked_keys = (NEW_KEY, *(key for key in truth.keys if key != NEW_KEY))
    await service.rotation.use(CALLER, NEW_KEY)
    truth.keys = truth.asked_keys
    truth.answered()


async def rotate(service: Service, truth: Truth) -> None:
    """Put all secrets of an organisation under the first master key: one batch, one event."""
    key_id = service.rotation.active
    for name in set(truth.secrets) - {"OTHER"}:
        truth.ask(name, under(key_id))
    await service.rotation.finish(CALLER)
    for name in set(truth.secrets) - {"OTHER"}:
        truth.secrets[name] = truth.secrets[name].moved_to(key_id)
    truth.answered()


async def retire(service: Service, truth: Truth) -> None:
    """Remove the old master key."""
    truth.asked_keys = truth.keys[:1]
    await service.rotation.retire(CALLER, ())
    truth.keys = truth.asked_keys
    truth.answered()


async def read_and_sign(service: Service, truth: Truth) -> None:
    """Read a secret, and sign the log, which is held against what was signed before."""
    await read(service, truth)
    await sign(service)


async def cosign(service: Service, truth: Truth) -> None:
    """Sign the log, and keep what a witness has added, now and once more."""
    await read_and_sign(service, truth)
    tree = service.signer._tree
    signed = tree.newest()
    assert signed is not None
    for at in (1, 2):
        tree.cosign(signed, [Signature("witness.example/w1", bytes(4), bytes([at]) * 72)])
        tree.record_witnesses([WitnessState("witness.example/w1", at)])


async def use_reserve(service: Service, truth: Truth) -> None:
    """Make the reserve, use it for a deletion, and fill it again for a change."""
    store = service.space._store
    assert isinstance(store, FilesStore)
    await store.watch()
    store._reserve.release(no_space())
    await drop("OLD")(service, truth)
    await put("NEW", "new")(service, truth)


async def with_reserve(root: Path) -> Truth:
    """A server has made the reserve."""
    truth = await settled(root)
    service = open_on(root, Durable())
    assert await service.space._store.watch()
    await service.close()
    assert (root / "reserve").stat().st_size == RESERVE
    return truth


update = put("OLD", "a new value, longer than the one before " * 9)

# --- where it begins ------------------------------------------------------------------------


async def empty(root: Path) -> Truth:
    """A directory that is not there."""
    root.parent.mkdir(parents=True)
    key_file(root).touch(mode=0o600)
    key_file(root).write_text(f"{OLD_KEY}\n")
    return Truth(keys=(OLD_KEY,))


async def settled(root: Path) -> Truth:
    """A directory with something in it, closed cleanly."""
    truth = await empty(root)
    service = open_on(root, Durable())
    begin = several(put("OLD", "old"), put("LONG", "long " * 500), put("OTHER", "other"), issue)
    await begin(service, truth)
    await service.close()
    return truth


async def crashed(root: Path) -> Truth:
    """All is committed, nothing of it is settled, and some of it is torn or not published."""
    await empty(root)
    running = root.parent / "running" / "data"
    truth = await settled(running)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "SETTLE_AFTER", 60.0)
        service = open_on(running, Durable())
        await several(update, issue, drop("LONG"), put("NEW", "new"), revoke)(service, truth)
        shutil.copytree(running, root)
        await service.close()
    shutil.rmtree(running.parent)
    organisation = root / org_hash("acme")
    (organisation / f"{secret_hash('NEW')}.meta").unlink()
    (organisation / f"{secret_hash('OLD')}.secret").write_bytes(b"gAAAA-torn")
    return truth


async def torn(root: Path) -> Truth:
    """The last one died while it wrote an event."""
    truth = await settled(root)
    (segment,) = (root / "events").iterdir()
    with segment.open("ab") as file:
        file.write(segment.read_bytes()[-300:-150])
    return truth


async def loose(root: Path) -> Truth:
    """FlowMason 1.0 made its directories with the default mode."""
    truth = await settled(root)
    (root / org_hash("acme")).chmod(0o755)
    return truth


async def signed(root: Path) -> Truth:
    """The log was signed before, and the last line of the history is torn."""
    truth = await settled(root)
    service = open_on(root, Durable())
    await read_and_sign(service, truth)
    await service.close()
    with (root / "checkpoints.ndjson").open("ab") as file:
        file.write(b'{"time":"20')
    return truth


async def rotating(root: Path) -> Truth:
    """A rotation has begun: the new master key is the first one."""
    truth = await settled(root)
    service = open_on(root, Durable())
    await use_new_key(service, truth)
    await service.close()
    return truth


async def rotated(root: Path) -> Truth:
    """Nothing is under the old master key any more, which is still there."""
    truth = await rotating(root)
    service = open_on(root, Durable())
    await rotate(service, truth)
    await service.rotation.finish(OTHER_CALLER)
    truth.secrets["OTHER"] = truth.secrets["OTHER"].moved_to(service.rotation.active)
    await service.close()
    return truth


# --- the table ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done, on a directory that is how it begins; `segment` is the segments' size."""

    act: Act
    begin: Callable[[Path], Awaitable[Truth]] = settled
    segment: int = WHOLE


OPERATIONS: dict[str, Operation] = {
    "create": Operation(put("NEW", "new")),
    "update": Operation(update),
    "update with less": Operation(put("LONG", "short")),
    "delete": Operation(drop("OLD")),
    "read": Operation(read),
    "read of several": Operation(resolve),
    "key create": Operation(issue),
    "key revoke": Operation(revoke),
    "segment roll": Operation(read, segment=1),
    "segment roll behind a torn line": Operation(update, torn),
    "create, new segment": Operation(put("NEW", "new"), segment=1),
    "update, new segment": Operation(update, segment=1),
    "delete, new segment": Operation(drop("OLD"), segment=1),
    "key revoke, new segment": Operation(revoke, segment=1),
    "several, in small segments": Operation(
        several(update, drop("OLD"), put("OLD", "reborn"), read), segment=2500
    ),
    "recovery": Operation(recover, crashed),
    "recovery, new segment": Operation(read, crashed, segment=1),
    "new master key": Operation(use_new_key),
    "rotation step": Operation(rotate, rotating),
    "rotation step, new segment": Operation(rotate, rotating, segment=1),
    "old master key retired": Operation(retire, rotated),
    "signing step": Operation(read_and_sign, signed),
    "signing step, new segment": Operation(read_and_sign, signed, segment=1),
    "cosigning step": Operation(cosign, signed),
    "reserve used and filled again": Operation(use_reserve),
    "update with a reserve": Operation(update, with_reserve),
    "delete with a reserve, new segment": Operation(drop("OLD"), with_reserve, segment=1),
    "opening what anybody may read": Operation(read, loose),
    "first start": Operation(put("OLD", "first"), empty),
}


class Beginnings:
    """Where the operations begin, each made once for all cases: a place that holds the data
    directory, and beside it the key file.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._made: dict[str, Truth] = {}

    async def copy(self, operation: Operation, place: Path) -> tuple[Path, Truth]:
        """Make `place` what the operation begins with; returns the data directory."""
        name = operation.begin.__name__
        if name not in self._made:
            self._made[name] = await operation.begin(self._place / name / "data")
        shutil.copytree(self._place / name, place)
        return place / "data", self._made[name].copy()
