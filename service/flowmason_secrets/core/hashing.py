"""Hashing of many leaves and nodes, RFC 6962 §2.1. `_speedups` does the same, where it was compiled
when this was installed.
"""

import hashlib
from collections.abc import Sequence

# Each hash goes on from a copy of one of these: a new one of OpenSSL's is looked up by its name.
_LEAF = hashlib.sha256(b"\x00")
_NODE = hashlib.sha256(b"\x01")


def leaf_hashes(lines: Sequence[bytes]) -> list[bytes]:
    """The hashes of many leaves."""
    copy, hashes = _LEAF.copy, []
    for line in lines:
        one = copy()
        one.update(line)
        hashes.append(one.digest())
    return hashes


def parents(nodes: Sequence[bytes]) -> list[bytes]:
    """The hashes of the complete pairs of neighbours among `nodes`."""
    copy, hashes, rest = _NODE.copy, [], iter(nodes)
    for left, right in zip(rest, rest, strict=False):
        one = copy()
        one.update(left + right)
        hashes.append(one.digest())
    return hashes
