"""How a client goes about its requests."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """How long a client waits, how often it tries, and how it connects. Times are in seconds.

    `timeout` is for one attempt, of which connecting has `connect_timeout`; `deadline` is for all
    attempts of an operation and the pauses between them, of which there are at most `retries`.
    `ca_file` has the certificates to trust instead of the system's. `insecure` allows plain HTTP
    over a network. Proxies are taken from the environment only with `environment_proxies`.
    """

    timeout: float = 30.0
    connect_timeout: float = 5.0
    deadline: float = 60.0
    retries: int = 6
    first_pause: float = 0.1
    longest_pause: float = 5.0
    connections: int = 100
    ca_file: Path | None = None
    insecure: bool = False
    environment_proxies: bool = False

    def pause(self, retry: int, retry_after: float, chance: Callable[[], float]) -> float:
        """How long to wait before a retry, counted from 0: what the server asked for, and "full
        jitter" on top, so that clients that failed together don't come back together.
        """
        return retry_after + chance() * min(self.longest_pause, self.first_pause * 2.0**retry)


# Not a secret: it only spreads the load.
CHANCE: Callable[[], float] = random.random
