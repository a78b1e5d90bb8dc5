"""Work in several processes, whose results come in order."""

import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
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

    def each(self, work: Callable[[J], R], jobs: Iterable[J], together: int = 1) -> Iterator[R]:
        """The results of `work` for each job, in their order; only a few of them are there at a
        time. A process gets so many jobs together: small ones cost less then.
        """
        if self._executor is None:
            yield from map(work, jobs)
            return
        waiting: deque[Future[list[R]]] = deque()
        rest = iter(jobs)
        while some := list(itertools.islice(rest, together)):
            waiting.append(self._executor.submit(_all, work, some))
            if len(waiting) > self._ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _all(work: Callable[[J], R], jobs: list[J]) -> list[R]:
    return [work(job) for job in jobs]


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
