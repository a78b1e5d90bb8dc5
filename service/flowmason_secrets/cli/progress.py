"""A progress bar for those who wait for the index."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
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
                bar = bar or stack.enter_context(_bar())
                bar.update(bar.task_ids[0], completed=now.indexed, total=now.events)
            elif bar is not None:
                return
            await asyncio.sleep(_EVERY)


def _bar() -> "Progress":
    # Takes longer to import than everything else here.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("Building the index", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("")
    return bar
