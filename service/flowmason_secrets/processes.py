"""Work in several processes, whose results come in order."""

import functools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Pool:
    """Runs jobs in other processes, or here if there is no executor."""

    def __init__(self, executor: ProcessPoolExecutor | None = None, ahead: int = 0) -> None:
        self._executor = executor
        self._ahead = ahead

    def each(self, work: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        """The results of `work` for each job, in their order; only a few of them are there at a
        time.
        """
        waiting: deque[Callable[[], R]] = deque()
        for job in jobs:
            if self._executor is None:
                waiting.append(functools.partial(work, job))
            else:
                waiting.append(self._executor.submit(work, job).result)
            if len(waiting) > self._ahead:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


@contextmanager
def pool(processes: int) -> Iterator[Pool]:
    """A pool of so many processes; of none other than this one if it is one."""
    if processes == 1:
        yield Pool()
        return
    # Forking would copy locks that other threads, a progress bar's, hold at the moment.
    executor = ProcessPoolExecutor(processes, get_context("spawn"), _obey_parent)
    try:
        yield Pool(executor, 2 * processes)
    finally:
        executor.shutdown(cancel_futures=True)


def _obey_parent() -> None:
    """Ctrl-C is for the parent to act upon; without it they would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # noqa: S101 - this is a process of a pool

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=wait, daemon=True).start()
