"""Files that commands read and write."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from aiofiles.os import wrap

from ..core.errors import InvalidInput
from ..core.keyring import Plaintext
from ..core.template import MAX_DOCUMENT
from ..storage.durable import PRIVATE_FILE, Durable


async def write_whole(path: Path, pieces: AsyncIterator[bytes]) -> None:
    """Write a file that appears under its name, in place of another one, when it is whole.

    Raises:
        OSError: it can't be written; nothing is left of it.
    """
    durable = Durable()
    draft = path.with_name(f".{path.name}.{uuid4().hex}.part")
    await wrap(durable.create)(draft, b"", PRIVATE_FILE, sync=False)
    try:
        descriptor = await wrap(durable.open_existing)(draft)
        try:
            async for piece in pieces:
                await wrap(durable.write)(descriptor, piece)
            await wrap(durable.sync)(descriptor)
        finally:
            os.close(descriptor)
        await wrap(durable.rename)(draft, path)
    except BaseException:
        await wrap(durable.unlink)(draft)
        raise
    await wrap(durable.sync_path)(path.parent)


def read_text(file: BinaryIO, field: str) -> Plaintext:
    """A document with references, as far as one may be that large.

    Raises:
        InvalidInput: it is larger, or not UTF-8.
    """
    # One more than allowed: an endless stdin must not fill the memory.
    data = file.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise InvalidInput(field, f"must have at most {MAX_DOCUMENT} bytes")
    try:
        return Plaintext(data.decode())
    except UnicodeDecodeError:
        raise InvalidInput(field, "is not UTF-8") from None
