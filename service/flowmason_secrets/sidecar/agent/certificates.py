"""Root certificates, read when they are needed.

aiohttp reads all of them whenever it is imported, twice: a third of the work that it takes to start
an agent, and in vain where its server does not speak TLS.
"""

import contextlib
import ssl
from collections.abc import Iterator

_without: list[ssl.SSLContext] = []


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Contexts for TLS that are created in here trust nobody before `load`. Not for libraries: it
    holds for every thread of the process.
    """

    def remember(context: ssl.SSLContext) -> None:
        _without.append(context)

    ssl.SSLContext.set_default_verify_paths = remember  # type: ignore[assignment]
    try:
        yield
    finally:
        # The inherited one is back.
        del ssl.SSLContext.set_default_verify_paths


def load() -> None:
    """Let them trust whom the system's root certificates vouch for."""
    while _without:
        context = _without.pop()
        if context.verify_mode is not ssl.CERT_NONE:
            context.set_default_verify_paths()
