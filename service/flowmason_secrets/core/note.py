"""Signed notes: C2SP signed-note, with Ed25519 signatures and C2SP tlog-cosignature v1."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .merkle import Unverified

# Signature types of signed-note.
ED25519 = 1
COSIGNATURE = 4

MAX_SIGNATURES = 100
_KEY_BYTES = 32
_DASH = "\N{EM DASH} "


class Signature(NamedTuple):
    """One signature line: who signed, the key's id (4 bytes), and what the key made."""

    name: str
    key_id: bytes
    data: bytes

    @property
    def line(self) -> str:
        """The line, with its newline."""
        return f"{_DASH}{self.name} {encode_base64(self.key_id + self.data)}\n"


class Note(NamedTuple):
    """A text that ends in a newline, and its signatures, whoever made them."""

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        """The note as bytes."""
        return (self.text + "\n" + "".join(one.line for one in self.signatures)).encode()


class Verifier(NamedTuple):
    """A public key with its name; `kind` is `ED25519` or `COSIGNATURE`."""

    name: str
    public: bytes
    kind: int = ED25519

    @property
    def key_id(self) -> bytes:
        """The first 4 bytes of the SHA-256 of name, newline, type and key."""
        data = self.name.encode() + b"\n" + bytes([self.kind]) + self.public
        return hashlib.sha256(data).digest()[:4]

    def encode(self) -> str:
        """The verifier key: `name+<key id>+<base64 of type and key>`."""
        return f"{self.name}+{self.key_id.hex()}+{encode_base64(bytes([self.kind]) + self.public)}"

    @classmethod
    def decode(cls, vkey: str) -> "Verifier":
        """The key in a verifier key.

        Raises:
            Unverified: it is not one, or of a type that is not known here.
        """
        name, key_id, data = _split_key(vkey)
        verifier = cls(name, data[1:], data[0])
        if verifier.kind not in (ED25519, COSIGNATURE) or len(verifier.public) != _KEY_BYTES:
            raise Unverified("the verifier key is not of Ed25519")
        if verifier.key_id != key_id:
            raise Unverified("the key id of the verifier key is wrong")
        return verifier

    def made(self, signature: Signature) -> bool:
        """Whether the signature claims to be of this key."""
        return (self.name, self.key_id) == (signature.name, signature.key_id)

    def verify(self, text: str, signature: Signature) -> None:
        """Check a signature that claims to be of this key.

        Raises:
            Unverified: it is not.
        """
        message, data = text.encode(), signature.data
        if self.kind == COSIGNATURE:
            message = cosigned(text, int.from_bytes(data[:8], "big"))
            data = data[8:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(data, message)
        except (InvalidSignature, ValueError):
            raise Unverified(f"the signature of {self.name} is not valid") from None


class Signer:
    """A private key with its name. Its `repr` shows only the name.

    Raises:
        Unverified: not a name for a key, or not 32 bytes.
    """

    def __init__(self, name: str, seed: bytes) -> None:
        check_name(name)
        if len(seed) != _KEY_BYTES:
            raise Unverified(f"a signing key has {_KEY_BYTES} bytes")
        self.name = name
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.verifier = Verifier(name, self._private.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"<Signer {self.name}>"

    @classmethod
    def decode(cls, skey: str) -> "Signer":
        """The key in the text that `encode` gives, which Go's `note.GenerateKey` gives as well.

        Raises:
            Unverified: it is not one. The message holds nothing of it.
        """
        prefix = "PRIVATE+KEY+"
        if not skey.startswith(prefix):
            raise Unverified("a signing key begins with PRIVATE+KEY+")
        name, key_id, data = _split_key(skey[len(prefix) :])
        if data[0] != ED25519:
            raise Unverified("the signing key is not of Ed25519")
        signer = cls(name, data[1:])
        if not hmac.compare_digest(signer.verifier.key_id, key_id):
            raise Unverified("the key id of the signing key is wrong")
        return signer

    def encode(self) -> str:
        """`PRIVATE+KEY+<name>+<key id>+<base64 of type and seed>`: keep it secret."""
        data = encode_base64(bytes([ED25519]) + self._private.private_bytes_raw())
        return f"PRIVATE+KEY+{self.name}+{self.verifier.key_id.hex()}+{data}"

    def sign(self, text: str) -> Signature:
        """The signature of a note's text, which ends in a newline."""
        return Signature(self.name, self.verifier.key_id, self._private.sign(text.encode()))


def cosigned(text: str, timestamp: int) -> bytes:
    """What a witness signs: C2SP tlog-cosignature, "Ed25519 signed message"."""
    return f"cosignature/v1\ntime {timestamp}\n{text}".encode()


def parse(data: bytes) -> Note:
    """A note, nothing of which is verified.

    Raises:
        Unverified: it is not one.
    """
    try:
        content = data.decode()
    except UnicodeDecodeError:
        raise Unverified("the note is not UTF-8") from None
    if any(character < " " and character != "\n" for character in content):
        raise Unverified("the note has control characters")
    text, blank, lines = content.rpartition("\n\n")
    if not blank or not lines.endswith("\n"):
        raise Unverified("the note has no signatures")
    return Note(text + "\n", parse_signatures(lines))


def parse_signatures(lines: str) -> tuple[Signature, ...]:
    """Signature lines, each with its newline: of a note, or what a witness answers.

    Raises:
        Unverified: something else, or more than 100 of them.
    """
    found = lines.split("\n")
    if found.pop() or len(found) > MAX_SIGNATURES:
        raise Unverified("not signature lines, or too many")
    return tuple(_parse_line(line) for line in found)


def verify(note: Note, verifiers: Sequence[Verifier]) -> list[Verifier]:
    """Which of the known keys signed the note. Signatures of others are ignored.

    Raises:
        Unverified: none did, or a signature that claims to be of one of them is not.
    """
    signed: list[Verifier] = []
    for verifier in verifiers:
        for signature in note.signatures:
            if verifier.made(signature):
                verifier.verify(note.text, signature)
                if verifier not in signed:
                    signed.append(verifier)
    if not signed:
        raise Unverified("no known key has signed the note")
    return signed


def check_name(name: str) -> str:
    """Return what can be the name of a key, or an origin.

    Raises:
        Unverified: empty, or with a space or a plus in it.
    """
    if not name or any(one.isspace() or one == "+" or one < " " for one in name):
        raise Unverified("the name of a key has neither spaces nor '+', and is not empty")
    return name


def encode_base64(data: bytes) -> str:
    """RFC 4648 §4."""
    return base64.b64encode(data).decode()


def decode_base64(text: str) -> bytes:
    """What `encode_base64` gives this for.

    Raises:
        Unverified: nothing.
    """
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise Unverified("not base64") from None
    # b64decode takes bits that belong to nothing.
    if encode_base64(data) != text:
        raise Unverified("not canonical base64")
    return data


def _parse_line(line: str) -> Signature:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    data = decode_base64(encoded)
    if not line.startswith(_DASH) or not space or len(data) < 5:
        raise Unverified("not a signature line")
    return Signature(check_name(name), data[:4], data[4:])


def _split_key(text: str) -> tuple[str, bytes, bytes]:
    """Name, key id, and type with key."""
    name, _, rest = text.partition("+")
    key_id, _, encoded = rest.partition("+")
    data = decode_base64(encoded)
    if len(key_id) != 8 or not data:
        raise Unverified("not a key: it has the form name+id+base64")
    try:
        return check_name(name), bytes.fromhex(key_id), data
    except ValueError:
        raise Unverified("not a key: its id is not 8 hex digits") from None
