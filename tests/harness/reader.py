"""Reads secrets through the library until its stdin ends, as a pipeline worker does.

`python -m tests.harness.reader DATA_DIR COUNT`: a line on stdin is answered with what it has seen
since the last one, as JSON: `reads`, `failed` (texts) and `p99` in milliseconds.
"""

import json
import sys
import threading
import time
from random import Random

from flowmason_studio.services.secrets import SecretsError, SecretsService


class Seen:
    """Latencies in seconds and failures since the last report. Shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: list[float] = []
        self._failed: list[str] = []

    def note(self, seconds: float) -> None:
        """One read."""
        with self._lock:
            self._times.append(seconds)

    def fail(self, text: str) -> None:
        """One that failed."""
        with self._lock:
            self._failed.append(text)

    def report(self) -> dict[str, object]:
        """What there was; it begins anew."""
        with self._lock:
            times, self._times = sorted(self._times), []
            failed, self._failed = self._failed, []
        p99 = times[len(times) * 99 // 100] * 1000 if times else 0.0
        return {"reads": len(times), "failed": failed, "p99": p99}


def read_on(data_dir: str, count: int, seen: Seen, stop: threading.Event) -> None:
    """Random secrets, with pauses: about 200 reads a second."""
    random = Random(1)
    secrets = SecretsService("acme", storage_path=data_dir)
    while not stop.wait(0.005):
        number = random.randrange(count)
        began = time.perf_counter()
        try:
            value = secrets.get(f"S{number:05}")
        except SecretsError as error:
            seen.fail(str(error))
            continue
        seen.note(time.perf_counter() - began)
        if value != f"value {number:05}":
            seen.fail(f"S{number:05} has another value")
    secrets.close()


def main() -> None:
    """Read in a thread, answer here."""
    seen, stop = Seen(), threading.Event()
    arguments = (sys.argv[1], int(sys.argv[2]), seen, stop)
    reading = threading.Thread(target=read_on, args=arguments)
    reading.start()
    for _ in sys.stdin:
        print(json.dumps(seen.report()), flush=True)
    stop.set()
    reading.join()


if __name__ == "__main__":
    main()
