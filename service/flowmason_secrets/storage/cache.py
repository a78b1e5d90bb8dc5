"""The ciphertext cache: encrypted records by secret, bounded in bytes."""

from threading import Lock

from ..core.records import Ref, SecretRecord

# What a record costs beside its token and texts: the objects around them.
_OVERHEAD = 1200


class CiphertextCache:
    """The records kept longest go first. Safe to use from several threads.

    An outdated record does no harm: it says how long the log was when it was read, and the gate
    refuses what was read before a change.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._records: dict[Ref, SecretRecord] = {}
        self._lock = Lock()

    @property
    def used(self) -> int:
        """Bytes that the records take, approximately."""
        return self._used

    def get(self, ref: Ref) -> SecretRecord | None:
        """The record, if it is here."""
        return self._records.get(ref)

    def put(self, ref: Ref, record: SecretRecord) -> None:
        """Keep a record, unless it alone is larger than the cache."""
        size = _size(record)
        with self._lock:
            self._remove(ref)
            if size > self._limit:
                return
            while self._used + size > self._limit:
                self._remove(next(iter(self._records)))
            self._records[ref] = record
            self._used += size

    def drop(self, ref: Ref) -> None:
        """Forget a record."""
        if ref in self._records:
            with self._lock:
                self._remove(ref)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._records.clear()
            self._used = 0

    def _remove(self, ref: Ref) -> None:
        record = self._records.pop(ref, None)
        if record is not None:
            self._used -= _size(record)


def _size(record: SecretRecord) -> int:
    metadata = record.metadata
    return _OVERHEAD + len(record.token) + len(metadata.name) + len(metadata.description)
