"""Recovery: whatever ends the process, and wherever, what was acknowledged is there."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from flowmason_secrets.core.access import Caller
from flowmason_secrets.core.errors import ApiKeyNotFound, SecretsError
from flowmason_secrets.core.names import org_hash, secret_hash
from flowmason_secrets.storage.durable import Durable

from .harness.load import (
    Grown,
    Known,
    Seen,
    check_acknowledged,
    check_pairs,
    check_receipts,
    read_on,
    until_gone,
    write_on,
)
from .harness.operations import open_on, read, settled, update
from .harness.server import ServerProcess, issue_key, session
from .harness.truth import CALLER

ROUNDS = 20
WRITERS = 16
READERS = 16


async def test_kill_9_under_load(data_dir: Path) -> None:
    random = Random(9)
    key = await issue_key(data_dir)
    known = {f"W{number}-{n}": Known() for number in range(WRITERS) for n in range(2)}
    seen, grown = Seen(), Grown(data_dir)
    unanswered = 0
    for round_number in range(ROUNDS + 1):
        # Small segments, so that it also happens while one begins.
        server = ServerProcess(data_dir, FLOWMASON_SECRETS_SEGMENT_BYTES="60000")
        await server.start()
        try:
            async with session(server.url, key) as client:
                await check_acknowledged(client, known, seen, data_dir)
                check_pairs(data_dir)
                grown.check()
                if round_number == ROUNDS:
                    break
                load = [
                    write_on(client, number, known, seen, Random(random.random()))
                    for number in range(WRITERS)
                ] + [
                    read_on(client, list(known), seen, Random(random.random()))
                    for _ in range(READERS)
                ]
                tasks = [asyncio.create_task(until_gone(work)) for work in load]
                await asyncio.sleep(random.uniform(0.15, 1.2))
                assert not any(task.done() for task in tasks)
                await server.kill()
                await asyncio.gather(*tasks)
            unanswered += sum(len(secret.pending) for secret in known.values())
            grown.check()
        finally:
            if server.process is not None and server.process.returncode is None:
                assert await server.stop() == 0
    assert list((data_dir / "staged").iterdir()) == []
    check_pairs(data_dir)
    check_receipts(seen, data_dir)
    changes = sum(action != "secret.read" for _, _, action, _ in seen.receipts)
    segments = len(list((data_dir / "events").iterdir()))
    print(f"{changes} changes and {seen.reads} reads acknowledged, {unanswered} not; {segments=}")
    # It was a load, and the kills came in the middle of it.
    assert changes > 1000
    assert seen.reads > 1000
    assert unanswered > ROUNDS * 5
    assert segments > 5


async def test_errors_of_the_service_are_its_own_even_after_a_crash(tmp_path: Path) -> None:
    """A torn pair that nobody has staged any more is reported, and can be set again."""
    root = tmp_path / "place" / "data"
    truth = await settled(root)
    (root / org_hash("acme") / f"{secret_hash('OLD')}.meta").write_bytes(b"{")
    service = open_on(root, Durable())
    with pytest.raises(SecretsError, match="damaged"):
        await service.get(CALLER, "OLD")
    await update(service, truth)
    await read(service, truth)
    with pytest.raises(ApiKeyNotFound):
        await service.keys.revoke(Caller(CALLER.principal), "key_none")
    await service.close()
