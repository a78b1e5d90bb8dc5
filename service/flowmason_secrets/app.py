"""The composition root: the only place that names a concrete store."""

import asyncio
import contextlib
import logging
import os
import pwd
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from . import config
from .config import PREFIX, Settings
from .core.access import ANY, Caller, Principal
from .core.events import Ids
from .core.keyring import DEFAULT_KEY, Keyring, KeySource, MasterKey
from .core.names import check_line, check_org
from .core.ports import Backend, Sources, WitnessLink
from .index.sqlite import SqliteIndex
from .masterkeys import MasterKeys
from .service import Service
from .storage.cache import CiphertextCache
from .storage.durable import Durable
from .storage.engine import Environment
from .storage.eventlog import SegmentLimits
from .storage.files import FilesStore, FilesTail
from .storage.keysources import FixedKeys, KeyFile, Naming
from .storage.published import Layout, Published
from .storage.signedtree import FilesTree
from .storage.signing import SigningKey

if TYPE_CHECKING:
    from .archiving import Archiving

_log = logging.getLogger("flowmason_secrets")

DEFAULT_KEY_WARNING = (
    "NO MASTER KEY IS CONFIGURED: secrets are encrypted with the documented default key, which "
    f"anybody can derive who knows the organisation's name. Set {PREFIX}KEY_FILE or {PREFIX}KEY."
)


async def open_service(
    settings: Settings, durable: Durable | None = None, *, signs: bool = False
) -> Service:
    """Open the data directory and recover what a crash left. Close the service after use.

    With `signs` the log is held against what was signed, and signed from now on, and cosigned by
    the witnesses, unless another process does that.

    Raises:
        LogUnavailable: the data directory can't be used.
        LogDamaged: the event log contradicts itself, or what was signed.
        ConfigurationError: the key that signs the log can't be used, or those of the witnesses.
    """
    service, _ = await _assembled(settings, durable or Durable(), signs=signs)
    await _opened(service, signs=signs)
    return service


@contextlib.asynccontextmanager
async def open_archiving(
    settings: Settings, durable: Durable | None = None
) -> AsyncIterator["Archiving"]:
    """Open the data directory for archiving, for the duration of a block.

    Raises:
        LogUnavailable, LogDamaged, ConfigurationError: see `open_service`.
    """
    # Only one command needs it, and others start faster without it.
    from .archiving import Archiving
    from .storage.archive import FilesArchive

    durable = durable or Durable()
    service, parts = await _assembled(settings, durable, signs=False)
    await _opened(service, signs=False)
    layout, sources = parts.environment.layout, parts.environment.sources
    tree = FilesTree(layout, durable, SigningKey(settings.signing_key, durable), sources.clock)
    archive = FilesArchive(layout, durable, tree, sources.clock)
    try:
        yield Archiving((parts.store, parts.projections), service.gate, archive, sources)
    finally:
        await service.close()


class _Parts(NamedTuple):
    """What a service was made of."""

    environment: Environment
    store: FilesStore
    projections: SqliteIndex


async def _assembled(
    settings: Settings, durable: Durable, *, signs: bool
) -> tuple[Service, _Parts]:
    source = await asyncio.to_thread(key_source, settings, durable)
    keyring = Keyring(await asyncio.to_thread(source.load))
    layout = Layout(settings.root)
    sources = Sources(time.time, Ids(time.time, os.urandom))
    environment = Environment(
        layout=layout,
        durable=durable,
        published=Published(layout, durable, lambda: keyring.oldest),
        cache=CiphertextCache(settings.cache_bytes),
        sources=sources,
        limits=SegmentLimits(settings.segment_bytes, settings.segment_age),
        reserve_bytes=settings.reserve_bytes,
    )
    store = FilesStore(environment)
    index = SqliteIndex(
        FilesTail(environment), layout.index, lambda: store.position, durable.unlink
    )
    master = MasterKeys(keyring, source, lambda: store.position)
    tree = FilesTree(layout, durable, SigningKey(settings.signing_key, durable), sources.clock)
    links = _links(settings) if signs else ()
    backend = Backend(store, index, tree, links)
    service = Service(backend, master, sources, settings.queue_limit, settings.free_space_warning)
    return service, _Parts(environment, store, index)


async def _opened(service: Service, *, signs: bool) -> None:
    try:
        await service.recover()
        if signs:
            await service.signer.open()
            service.signer.start()
    except BaseException:
        await service.close()
        raise


def _links(settings: Settings) -> tuple[WitnessLink, ...]:
    witnesses = config.witnesses(settings)
    if not witnesses:
        return ()
    # Most programs that use the library have none, and start faster without it.
    from .witnesslink import HttpWitness

    return tuple(map(HttpWitness, witnesses))


def key_source(settings: Settings, durable: Durable) -> KeySource:
    """Where the master keys of these settings come from; without any, it is the documented default
    and a warning.

    Takes tens of milliseconds for each key.
    """
    if settings.key_file is not None:
        return KeyFile(settings.key_file, settings.old_keys, durable)
    if not settings.master_keys:
        _log.warning(DEFAULT_KEY_WARNING)
        return FixedKeys([DEFAULT_KEY])
    first, *others = settings.master_keys
    # Only in a list does a word stand for the default key.
    return FixedKeys([MasterKey.of(first), *Naming()(others)])


def local_caller(org_id: str, actor: str | None = None) -> Caller:
    """A local process: it holds the master key, so it may do everything in this organisation.

    Raises:
        InvalidInput: not the name of an organisation.
    """
    who = check_line("actor", actor or _user())
    return Caller(Principal(check_org(org_id), who[:128], "local", ANY))


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid:{os.getuid()}"


def with_overrides(settings: Settings, **changes: object) -> Settings:
    """The settings with those changes that are not None."""
    chosen = {name: value for name, value in changes.items() if value is not None}
    return replace(settings, **chosen)  # type: ignore[arg-type] # callers name fields
