"""A witness as C2SP tlog-witness wants it, over tlog-scales: nothing of it is ours."""

import base64
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Self

from aiohttp import web
from aiohttp.test_utils import RawTestServer
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tlog_scales.signing import NoteSignature, Vkey
from tlog_scales.tlog import Checkpoint, ConsistencyProof, ConsistencyProofInvalid

Answer = Callable[[], Awaitable[web.Response]]

_EMPTY = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


class Asked(NamedTuple):
    """One request and its answer: the sizes that it names, and the status, or 0."""

    old: int
    size: int
    status: int


class FakeWitness:
    """An HTTP server of this process, with what it knows; `fault` answers in its place."""

    def __init__(self, name: str = "witness.example/w1") -> None:
        self._key = Ed25519PrivateKey.generate()
        self.vkey = Vkey(name, None, 4, self._key.public_key().public_bytes_raw())
        # By origin: the log's keys, and the latest checkpoint that was cosigned.
        self.logs: dict[str, Vkey] = {}
        self.latest: dict[str, Checkpoint] = {}
        self.asked: list[Asked] = []
        self.fault: Answer | None = None
        self._server = RawTestServer(self._handle)

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return str(self._server.make_url("/prefix"))

    @property
    def key(self) -> str:
        """The verifier key, as witnesses publish it."""
        key = _base64(bytes([self.vkey.sig_type]) + self.vkey.pubkey)
        return f"{self.vkey.name}+{self.vkey.key_id:08x}+{key}"

    def know(self, vkey: str) -> None:
        """Take checkpoints of this log."""
        known = Vkey.from_string(vkey)
        self.logs[known.name] = known

    def cosign(self, checkpoint: Checkpoint, at: int | None = None) -> NoteSignature:
        """What it says about a checkpoint."""
        at = int(time.time()) if at is None else at
        message = f"cosignature/v1\ntime {at}\n{checkpoint.serialize_body()}".encode()
        payload = at.to_bytes(8, "big") + self._key.sign(message)
        return NoteSignature.from_vkey_signature(self.vkey, payload)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert (request.method, request.path) == ("POST", "/prefix/add-checkpoint")
        old, proof, checkpoint = parse(await request.read())
        if self.fault is not None:
            self.asked.append(Asked(old, checkpoint.size, 0))
            return await self.fault()
        answer = self._judge(old, proof, checkpoint)
        self.asked.append(Asked(old, checkpoint.size, answer.status))
        return answer

    def _judge(self, old: int, proof: list[bytes], checkpoint: Checkpoint) -> web.Response:
        """The rules, in their order."""
        key = self.logs.get(checkpoint.origin)
        if key is None:
            return web.Response(status=404)
        try:
            checkpoint.verify(key)
        except (RuntimeError, InvalidSignature):
            return web.Response(status=403)
        if old > checkpoint.size:
            return web.Response(status=400)
        latest = self.latest.get(checkpoint.origin)
        size, root = (0, _EMPTY) if latest is None else (latest.size, latest.root_hash)
        if old != size:
            return size_answer(size)
        if old == checkpoint.size and root != checkpoint.root_hash:
            return web.Response(status=409)
        try:
            ConsistencyProof(old, checkpoint.size, proof).check(root, checkpoint.root_hash)
        except ConsistencyProofInvalid:
            return web.Response(status=422)
        self.latest[checkpoint.origin] = checkpoint
        return signed_answer(self.cosign(checkpoint))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def signed_answer(*signatures: NoteSignature) -> web.Response:
    """The answer with signature lines."""
    return web.Response(text="".join(f"{one.serialize()}\n" for one in signatures))


def size_answer(size: int) -> web.Response:
    """The answer that tells the size that is known."""
    return web.Response(
        status=409, body=f"{size}\n".encode(), headers={"Content-Type": "text/x.tlog.size"}
    )


def parse(body: bytes) -> tuple[int, list[bytes], Checkpoint]:
    """A request: the old size, the proof, the checkpoint. Exactly as the protocol has it."""
    head, blank, signed = body.partition(b"\n\n")
    first, *lines = head.decode("ascii").split("\n")
    word, _, old = first.partition(" ")
    assert (word, str(int(old)), bool(blank)) == ("old", old, True)
    assert len(lines) <= 63
    proof = [base64.b64decode(line, validate=True) for line in lines]
    assert all(len(one) == 32 for one in proof)
    assert signed.endswith(b"\n")
    return int(old), proof, Checkpoint.from_text(signed.decode())
