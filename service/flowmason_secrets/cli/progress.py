"""Progress bars, for those who wait."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..core.ports import Building

if TYPE_CHECKING:
    from rich.progress import Progress

# Seconds.
_EVERY = 0.2


async def watch(building: Callable[[], Building | None]) -> None:
    """Show on stderr how far the index is while it is being built, if somebody is looking."""
    if not sys.stderr.isatty():
        return
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        while True:
            now = building()
            if now is not None:
                bar = bar or stack.enter_context(_bar("Building the index"))
                bar.update(bar.task_ids[0], completed=now.indexed, total=now.events)
            elif bar is not None:
                return
            await asyncio.sleep(_EVERY)


@contextlib.contextmanager
def telling(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how much is done and of how much, if somebody is looking."""
    with _bar(title) if sys.stderr.isatty() else contextlib.nullcontext() as bar:

        def tell(done: int, total: int) -> None:
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done, total=total)

        yield tell


def _bar(title: str) -> "Progress":
    # Takes longer to import than everything else here.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("")
    return bar
