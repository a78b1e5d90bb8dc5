"""Proof files: C2SP tlog-proof. That a line is in the log, for whoever has the log's key."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import checkpoint, merkle
from .checkpoint import Checkpoint
from .merkle import HASH_BYTES, Unverified
from .note import Verifier, decode_base64, encode_base64

_HEADER = "c2sp.org/tlog-proof@v1"
# No path is longer: a tree has fewer than 2**63 leaves.
_MAX_HASHES = 63


@dataclass(frozen=True, slots=True)
class Proof:
    """`hashes` go from the leaf upward, `signed` is the whole checkpoint, `extra` shows nothing."""

    index: int
    hashes: tuple[bytes, ...]
    signed: bytes
    extra: bytes | None = None

    def encode(self) -> bytes:
        """The proof file."""
        lines = [_HEADER]
        if self.extra is not None:
            lines.append(f"extra {encode_base64(self.extra)}")
        lines.append(f"index {self.index}")
        lines += map(encode_base64, self.hashes)
        return "".join(f"{line}\n" for line in lines).encode() + b"\n" + self.signed


def parse(data: bytes) -> Proof:
    """A proof file, nothing of which is verified.

    Raises:
        Unverified: it is not one.
    """
    head, blank, signed = data.partition(b"\n\n")
    try:
        header, *lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise Unverified("not a proof file") from None
    if not blank or header != _HEADER:
        raise Unverified(f"a proof file begins with {_HEADER}")
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0).removeprefix("extra "))
    if not lines or not lines[0].startswith("index "):
        raise Unverified("the proof file names no index")
    index = checkpoint.parse_number(lines.pop(0).removeprefix("index "))
    hashes = tuple(map(decode_base64, lines))
    if len(hashes) > _MAX_HASHES or any(len(one) != HASH_BYTES for one in hashes):
        raise Unverified("the hashes of the proof file are not those of a proof")
    return Proof(index, hashes, signed, extra)


def verify(line: bytes, proof: Proof, verifiers: Sequence[Verifier]) -> Checkpoint:
    """Check that the log's keys vouch for a line (without its newline) at the proof's index;
    returns the checkpoint that they signed.

    Raises:
        Unverified: they don't.
    """
    signed = checkpoint.verify(proof.signed, verifiers)
    leaf = merkle.leaf_hash(line)
    merkle.verify_inclusion(proof.index, signed.size, leaf, proof.hashes, signed.root)
    return signed
