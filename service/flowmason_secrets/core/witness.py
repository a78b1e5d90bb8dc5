"""What goes between a log and a witness: C2SP tlog-witness, with the cosignatures of C2SP
tlog-cosignature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import note
from .checkpoint import MAX_SIZE, Checkpoint, parse_number
from .merkle import Unverified
from .note import Note, Signature, Verifier, encode_base64

# What a witness may answer at most, in bytes.
MAX_ANSWER = 1 << 16
# The media type of the answer that tells which size the witness knows.
SIZE = "text/x.tlog.size"

_MAX_HASHES = 63
_STAMP = 8
_SIGNATURE = 64


class Witness(NamedTuple):
    """Whom to ask: the URL before `/add-checkpoint`, and the key that the answers are of."""

    url: str
    verifier: Verifier


@dataclass(frozen=True, slots=True)
class WitnessState:
    """How it stands with a witness: it has cosigned the log at `size`, at the time `cosigned_at`
    of its own clock. `error` says why it has not cosigned anything since the time `since`.

    Times in seconds since the epoch; `size` is 0 if it has never cosigned.
    """

    name: str
    size: int = 0
    cosigned_at: float = 0.0
    error: str | None = None
    since: float | None = None


def request(old: int, proof: Sequence[bytes], signed: bytes) -> bytes:
    """The body of `add-checkpoint`: the size that the witness knows, the proof that what it has
    seen begins the log, and the checkpoint.
    """
    if len(proof) > _MAX_HASHES:
        raise Unverified("no consistency proof is that long")
    lines = (f"old {old}", *map(encode_base64, proof), "")
    return "".join(f"{line}\n" for line in lines).encode() + signed


def parse_size(answer: bytes) -> int:
    """The size that a witness knows, from its answer of the type `SIZE`.

    Raises:
        Unverified: it is none.
    """
    text = answer.decode("ascii", "replace")
    if not text.endswith("\n"):
        raise Unverified("not a size")
    return parse_number(text[:-1])


def cosignature(answer: bytes, statement: Checkpoint, verifier: Verifier) -> Signature:
    """The witness's cosignature in its answer; lines of other keys are ignored.

    Raises:
        Unverified: there is none, or it is not one of this checkpoint.
    """
    try:
        found = note.parse_signatures(answer.decode())
    except UnicodeDecodeError:
        raise Unverified("the answer is not UTF-8") from None
    for signature in found:
        if verifier.made(signature):
            if len(signature.data) != _STAMP + _SIGNATURE:
                raise Unverified("not a cosignature")
            if not 0 < cosigned_at(signature) <= MAX_SIZE:
                raise Unverified("the cosignature has no time")
            verifier.verify(statement.text, signature)
            return signature
    raise Unverified("the answer has no signature of the witness's key")


def cosigned_at(signature: Signature) -> int:
    """When a cosignature was made, in seconds since the epoch."""
    return int.from_bytes(signature.data[:_STAMP], "big")


def merge(signed: bytes, before: bytes | None, added: Sequence[Signature]) -> bytes:
    """A checkpoint with more cosignatures: those that it had `before`, if that is the same one, and
    those that are new, in place of older ones of their keys.
    """
    text, signatures = note.parse(signed)
    if before is not None:
        known = note.parse(before)
        if known.text == text:
            signatures += known.signatures
    by_key = {(one.name, one.key_id): one for one in (*signatures, *added)}
    return Note(text, tuple(by_key.values())).encode()
