"""Checkpoints: C2SP tlog-checkpoint. A signed statement that the log had a size and a root."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from . import note
from .merkle import HASH_BYTES, Unverified
from .note import Note, Signer, Verifier

MAX_SIZE = (1 << 63) - 1

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")


class Checkpoint(NamedTuple):
    """What is stated. `origin` names the log, `root` is a hash of 32 bytes."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text of the note."""
        lines = (self.origin, str(self.size), note.encode_base64(self.root), *self.extensions)
        return "".join(f"{line}\n" for line in lines)

    def sign(self, *signers: Signer) -> bytes:
        """The signed note."""
        return Note(self.text, tuple(signer.sign(self.text) for signer in signers)).encode()

    @classmethod
    def parse(cls, text: str) -> "Checkpoint":
        """The statement in the text of a note.

        Raises:
            Unverified: it is not a checkpoint.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop() or not all(lines):
            raise Unverified("a checkpoint has at least three lines, none of them empty")
        origin, size, root, *extensions = lines
        found = cls(origin, parse_number(size), note.decode_base64(root), tuple(extensions))
        if len(found.root) != HASH_BYTES:
            raise Unverified("the root of a checkpoint has 32 bytes")
        return found


def read(data: bytes) -> tuple[Checkpoint, Note]:
    """A signed checkpoint, nothing of which is verified.

    Raises:
        Unverified: it is not one.
    """
    parsed = note.parse(data)
    return Checkpoint.parse(parsed.text), parsed


def verify(data: bytes, verifiers: Sequence[Verifier]) -> Checkpoint:
    """The statement of a checkpoint that the log itself has signed: a known key with the name
    that the checkpoint gives as its origin. Signatures of others are ignored; those of other known
    keys have to be valid.

    Raises:
        Unverified: it is not a checkpoint, or not signed so.
    """
    found, parsed = read(data)
    signed = note.verify(parsed, verifiers)
    if all(verifier.name != found.origin for verifier in signed):
        raise Unverified("the checkpoint is of another log than the key")
    return found


def parse_number(text: str) -> int:
    """A size or an index: decimal digits without leading zeroes, below 2**63.

    Raises:
        Unverified: it is not one.
    """
    if _NUMBER.fullmatch(text) is None or int(text) > MAX_SIZE:
        raise Unverified("not a number of leaves")
    return int(text)
