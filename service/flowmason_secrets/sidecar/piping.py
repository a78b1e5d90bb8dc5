"""What a program prints, on its way through a masker."""

import asyncio
import contextlib
import os
import select
import threading

from .masking import Masker

_PIECE = 1 << 16


class Pump:
    """Copies from a pipe to a descriptor, in a thread: whoever reads there may take his time."""

    def __init__(self, target: int, masker: Masker) -> None:
        self._target = target
        self._masker = masker
        self._source, self.entrance = os.pipe()
        os.set_blocking(self._source, False)
        self._ended, self._end = os.pipe()
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()

    def begin(self) -> None:
        """Begin to copy; the pipe's entrance is the program's alone now."""
        os.close(self.entrance)
        threading.Thread(target=self._run, daemon=True).start()

    async def finish(self) -> None:
        """The program is dead: copy what it has left in the pipe, and no more. Returns when that
        has been taken.
        """
        os.close(self._end)
        await self._done.wait()

    def _run(self) -> None:
        try:
            while self._wait():
                data = self._read()
                if data is None:
                    continue
                if not data:
                    break
                self._write(self._masker.feed(data))
            while data := self._read():
                self._write(self._masker.feed(data))
            self._write(self._masker.end())
        except OSError:
            # Nobody reads there any more. The program learns it as if there were no pump between.
            pass
        finally:
            os.close(self._source)
            os.close(self._ended)
            # Nobody waits any more if the loop is gone.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._done.set)

    def _wait(self) -> bool:
        """Wait for more; False when the program is dead."""
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        return self._ended not in {descriptor for descriptor, _ in poll.poll()}

    def _read(self) -> bytes | None:
        """None if there is nothing now; empty at the end."""
        try:
            return os.read(self._source, _PIECE)
        except BlockingIOError:
            return None

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._target, data) :]
