"""An event loop in a thread of its own, for synchronous callers.

One serves a whole process. A call waits for it, so it works in plain code, in several threads, and
inside a running event loop, which it blocks for as long as the call takes.
"""

import asyncio

# Registers its end first.
import concurrent.futures.thread
import ctypes
import os
import threading
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Owned(Protocol):
    """What lives in the loop, and is closed in it when the process ends."""

    async def close(self) -> None:
        """Release everything."""


O = TypeVar("O", bound=Owned)  # noqa: E741 - a type


class Background:
    """The event loop of this process, started when it is first needed, and what is open in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owned: dict[type[Any], Any] = {}

    def own(self, kind: type[O]) -> O:
        """The one of this kind that lives in the loop."""
        with self._lock:
            if kind not in self._owned:
                self._owned[kind] = kind()
            owned: O = self._owned[kind]
            return owned

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs in the loop."""
        return self.start(coroutine).result()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run a coroutine in the loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                name = "flowmason-secrets"
                threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Close what is open in the loop."""
        for owned in self._owned.values():
            self.run(owned.close())


_current = Background()


def current() -> Background:
    """The loop of this process; a forked child has another one than its parent."""
    return _current


def _forget() -> None:
    # Threads don't survive a fork, and locks on shared descriptors would not exclude the parent:
    # the child begins anew.
    global _current
    # Never finalised, not even when the child ends: connections, SQLite's too, are the parent's,
    # and a socket that is closed here is taken out of the epoll set that the parent waits on.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_current))
    _current = Background()


os.register_at_fork(after_in_child=_forget)
# The public `atexit` comes too late: executors take no more work by then. concurrent.futures
# registers its own end in the same place, and these run in reverse order.
threading._register_atexit(lambda: _current.close())  # type: ignore[attr-defined]
