"""Server-sent events, as browsers read them (WHATWG HTML §9.2.6)."""

from collections.abc import AsyncIterable, AsyncIterator
from typing import NamedTuple


class Message(NamedTuple):
    """One event: `last_id` is where to go on after it; without `data` it says only that."""

    last_id: str
    data: str


async def messages(lines: AsyncIterable[bytes]) -> AsyncIterator[Message]:
    """The messages in the lines of a stream. One that is not ended by an empty line is none.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    last_id, data = "", list[str]()
    async for line in lines:
        text = line.decode().rstrip("\r\n")
        if not text:
            yield Message(last_id, "\n".join(data))
            data = []
            continue
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            last_id = value
        elif name == "data":
            data.append(value)
