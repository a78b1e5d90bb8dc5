"""Tiles, entry bundles, notes, checkpoints and proof files: strict, and as others write them."""

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmason_secrets.core import checkpoint, merkle, note, tiles, tlogproof
from flowmason_secrets.core.checkpoint import Checkpoint
from flowmason_secrets.core.merkle import EMPTY_ROOT, Unverified
from flowmason_secrets.core.note import COSIGNATURE, Note, Signature, Signer, Verifier
from flowmason_secrets.core.tiles import ENTRIES, Tile, TileHashes, parse_path
from flowmason_secrets.core.tlogproof import Proof

from .harness.trees import StaticLog

TESSERA = Path(__file__).parent / "vectors" / "tessera"
WORDS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eit", "nain", "ten"),
    *("ileven", "twelf", "threeten", "fourten", "fivten"),
)
LINES = [word.encode() for word in WORDS]
# Tessera published both keys of its test log.
VKEY = "example.com/log/testdata+33d7b496+AeHTu4Q3hEIMHNqc6fASMsq3rKNx280NI+oO5xCFkkSx"
SKEY = "PRIVATE+KEY+example.com/log/testdata+33d7b496+AeymY/SZAX0jZcJ8enZ5FY1Dz+wTML2yWSkK+9DSF3eg"
KEY = Verifier.decode(VKEY)
SIGNER = Signer.decode(SKEY)

# --- tiles ----------------------------------------------------------------------------------

PATHS = {
    "tile/0/000": Tile(0, 0),
    "tile/0/000.p/1": Tile(0, 0, 1),
    "tile/1/999.p/255": Tile(1, 999, 255),
    "tile/2/x001/000": Tile(2, 1000),
    "tile/63/x001/x234/067": Tile(63, 1234067),
    "tile/entries/x001/234.p/7": Tile(ENTRIES, 1234, 7),
    "tile/0/x999/x999/x999/x999/x999/x999/999": Tile(0, 10**21 - 1),
}


@pytest.mark.parametrize(("path", "tile"), PATHS.items())
def test_paths(path: str, tile: Tile) -> None:
    assert tile.path == path
    assert parse_path(path) == tile


@pytest.mark.parametrize(
    "path",
    [
        *("", "tile", "tile/0", "tile/0/", "tile/0/0", "tile/0/00", "tile/0/0000", "/tile/0/000"),
        *("tile/0/000/", "tile/00/000", "tile/01/000", "tile/64/000", "tile/-1/000"),
        *("tile/0/001/000", "tile/0/x000/000", "tile/0/x000/001", "tile/0/x001", "tile/0/X001/000"),
        *("tile/0/000.p/0", "tile/0/000.p/256", "tile/0/000.p/01", "tile/0/000.p/", "tile/0/000.p"),
        *("tile/0/000.p/1/", "tile/0/000\n", "tile/0/٠٠٠", "tile/entry/000", "tile/0/../0/000"),
        *("tile/0/000.p/-1", "tile/0/ 00", "tile/x/000", "tile/0/x1/000", "checkpoint"),
        "tile/0/x001" + "/x000" * 7 + "/000",
    ],
)
def test_what_is_no_path(path: str) -> None:
    with pytest.raises(Unverified):
        parse_path(path)


@given(st.integers(-1, 63), st.integers(0, 10**12), st.integers(1, 256))
def test_every_tile_has_one_path(level: int, number: int, width: int) -> None:
    tile = Tile(level, number, width)
    assert parse_path(tile.path) == tile
    assert tile.full == Tile(level, number)


def test_the_tiles_of_the_specifications_example() -> None:
    expected = [*(Tile(0, n) for n in range(273)), Tile(0, 273, 112), Tile(1, 0), Tile(1, 1, 17)]
    assert list(tiles.tiles_of(70_000)) == [*expected, Tile(2, 0, 1)]
    assert list(tiles.tiles_of(256)) == [Tile(0, 0), Tile(1, 0, 1)]
    assert list(tiles.tiles_of(0)) == []


@given(st.integers(0, 200_000), st.integers(0, 700))
def test_tiles_between_two_sizes(old: int, more: int) -> None:
    between = list(tiles.tiles_between(old, old + more))
    assert set(between) >= set(tiles.tiles_of(old + more)) - set(tiles.tiles_of(old))
    assert set(between) <= set(tiles.tiles_of(old + more))
    assert len(between) == len(set(between))
    assert all(tiles.exists_in(tile, old + more) for tile in between)
    assert not any(tiles.exists_in(tile, old) for tile in between)
    bundles = list(tiles.bundles_between(old, old + more))
    assert [(b.number, b.width) for b in bundles] == [
        (tile.number, tile.width) for tile in between if tile.level == 0
    ]


@pytest.mark.parametrize("size", [0, 31, 33, 64, 8192])
def test_a_tile_has_its_size(size: int) -> None:
    with pytest.raises(Unverified):
        tiles.split_hashes(bytes(size), 3)
    with pytest.raises(Unverified):
        TileHashes(3, lambda _: bytes(min(size, 95)))(0, 0)


@pytest.mark.parametrize(("height", "index"), [(0, 3), (1, 1), (2, 0), (0, -1), (9, 0)])
def test_no_hash_of_what_the_tree_has_not(height: int, index: int) -> None:
    with pytest.raises(Unverified):
        TileHashes(3, lambda tile: bytes(32 * tile.width))(height, index)


def test_more_of_a_tile_than_asked_for_is_fine() -> None:
    rows = merkle.leaf_hashes([bytes([n]) for n in range(256)])
    full = b"".join(rows)
    hashes = TileHashes(100, lambda tile: full if tile.level == 0 else b"")
    assert merkle.root_of(100, hashes) == merkle.root_of(
        100,
        lambda height, index: merkle.subtree_root(rows[index << height : (index + 1) << height]),
    )


@given(st.lists(st.binary(max_size=300), max_size=256))
def test_bundles(lines: list[bytes]) -> None:
    assert tiles.decode_bundle(tiles.encode_bundle(lines)) == lines


@pytest.mark.parametrize("data", [b"\0", b"\0\1", b"\0\2a", b"\0\1ab", b"\0\0" * 257])
def test_what_is_no_bundle(data: bytes) -> None:
    with pytest.raises(Unverified):
        tiles.decode_bundle(data)


# --- Tessera's log --------------------------------------------------------------------------


def test_tesseras_log_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    log = StaticLog(tmp_path, SIGNER)
    for size, line in enumerate(LINES, 1):
        signed = log.append([line])
        assert signed == (TESSERA / f"checkpoint.{size}").read_bytes()
        assert tlogproof.verify(line, _proof(log, size - 1), [KEY]).size == size
    published = {path.relative_to(TESSERA) for path in TESSERA.rglob("*") if path.is_file()}
    for path in published:
        if "." not in path.name:
            assert (tmp_path / path).read_bytes() == (TESSERA / path).read_bytes()
    ours = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert ours == {path for path in published if not path.name.startswith("checkpoint.")}


def test_tesseras_checkpoints() -> None:
    for size in range(len(LINES) + 1):
        found = checkpoint.verify((TESSERA / f"checkpoint.{size}").read_bytes(), [KEY])
        assert (found.origin, found.size) == (KEY.name, size)
        frontier = merkle.Frontier()
        frontier.extend(merkle.leaf_hashes(LINES[:size]))
        assert found.root == frontier.root()
        assert found.sign(SIGNER) == (TESSERA / f"checkpoint.{size}").read_bytes()


def test_tesseras_tiles_prove_everything() -> None:
    signed = (TESSERA / "checkpoint").read_bytes()
    found = checkpoint.verify(signed, [KEY])
    hashes = TileHashes(found.size, lambda tile: (TESSERA / tile.path).read_bytes())
    lines = tiles.decode_bundle((TESSERA / "tile/entries/000.p/15").read_bytes())
    assert lines == LINES
    for index, line in enumerate(lines):
        path = merkle.inclusion_proof(index, found.size, hashes)
        assert tlogproof.verify(line, Proof(index, tuple(path), signed), [KEY]) == found
    for size in range(1, found.size + 1):
        older = checkpoint.verify((TESSERA / f"checkpoint.{size}").read_bytes(), [KEY])
        path = merkle.consistency_proof(size, found.size, hashes)
        merkle.verify_consistency((size, found.size), (older.root, found.root), path)


# --- notes and checkpoints ------------------------------------------------------------------

TEXT = Checkpoint(KEY.name, 3, EMPTY_ROOT).text
SIGNED = Checkpoint.parse(TEXT).sign(SIGNER)
OTHER = Signer("witness.example/w1", bytes(range(32)))


def cosignature(text: str, timestamp: int) -> tuple[Verifier, Signature]:
    """What a witness answers for the text of a checkpoint."""
    verifier = Verifier(OTHER.name, OTHER.verifier.public, COSIGNATURE)
    made = OTHER.sign(note.cosigned(text, timestamp).decode())
    return verifier, Signature(OTHER.name, verifier.key_id, timestamp.to_bytes(8) + made.data)


def test_keys_are_encoded_as_go_encodes_them() -> None:
    assert KEY.encode() == VKEY == SIGNER.verifier.encode()
    assert SIGNER.encode() == SKEY
    assert SKEY.rpartition("+")[2] not in repr(SIGNER)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda key: "", lambda key: key + "=", lambda key: key[:-4], lambda key: "+" + key),
        lambda key: key.replace("33d7b496", "33d7b497"),
        *(lambda key: key.replace("+33d7b496", ""), lambda key: key.replace("33d7b496", "3d7b496")),
        *(lambda key: key.replace("example", "exam ple"), lambda key: key.replace("+Ae", "+Be")),
        *(
            lambda key: key.replace("example", "other"),
            lambda key: key.replace("33d7b496", "zzzzzzzz"),
        ),
    ],
)
def test_what_is_no_key(change: Callable[[str], str]) -> None:
    with pytest.raises(Unverified):
        Verifier.decode(change(VKEY))
    with pytest.raises(Unverified) as caught:
        Signer.decode(change(SKEY))
    assert SKEY.rpartition("+")[2][:8] not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u2003b", "a\tb", "a\nb", "a\x1fb"])
def test_what_is_no_name_of_a_key(name: str) -> None:
    with pytest.raises(Unverified):
        Signer(name, bytes(32))


def test_a_checkpoint_of_several_signatures() -> None:
    timestamp = 1679315147
    witness, cosigned = cosignature(TEXT, timestamp)
    unknown = Signature("somebody.example", b"abcd", b"whatever this is")
    log = SIGNER.sign(TEXT)
    data = Note(TEXT, (unknown, log, cosigned)).encode()
    # Those of others are ignored, and kept.
    found, parsed = checkpoint.read(data)
    assert parsed.signatures == (unknown, log, cosigned)
    assert parsed.encode() == data
    assert checkpoint.verify(data, [KEY]) == checkpoint.verify(data, [KEY, witness]) == found
    assert note.verify(parsed, [witness, KEY]) == [witness, KEY]
    assert Verifier.decode(witness.encode()) == witness
    # A witness alone does not make it the log's.
    with pytest.raises(Unverified, match="another log"):
        checkpoint.verify(data, [witness])
    # Another time than the one that was signed.
    later = cosigned._replace(data=(timestamp + 1).to_bytes(8) + cosigned.data[8:])
    with pytest.raises(Unverified):
        checkpoint.verify(Note(TEXT, (log, later)).encode(), [KEY, witness])
    # A signature of a known key that is wrong spoils the note.
    wrong = log._replace(data=bytes(64))
    for signatures in ((log, wrong), (wrong, log), (wrong,)):
        with pytest.raises(Unverified):
            checkpoint.verify(Note(TEXT, signatures).encode(), [KEY])
    with pytest.raises(Unverified, match="no known key"):
        checkpoint.verify(Note(TEXT, (unknown,)).encode(), [KEY])


def test_a_key_and_its_cosigning_twin_are_two() -> None:
    twin = Verifier(KEY.name, KEY.public, COSIGNATURE)
    assert twin.key_id != KEY.key_id
    with pytest.raises(Unverified, match="no known key"):
        checkpoint.verify(SIGNED, [twin])


def test_a_checkpoint_of_another_log() -> None:
    other = Checkpoint("example.com/other", 3, EMPTY_ROOT)
    with pytest.raises(Unverified, match="another log"):
        checkpoint.verify(other.sign(SIGNER), [KEY])


def test_extensions_are_signed_and_kept() -> None:
    extended = Checkpoint(KEY.name, 3, EMPTY_ROOT, ("more", "and more"))
    assert checkpoint.verify(extended.sign(SIGNER), [KEY]) == extended


@given(st.integers(0, len(SIGNED) * 8 - 1))
@settings(deadline=None)
def test_no_bit_of_a_checkpoint_can_be_changed(bit: int) -> None:
    changed = bytearray(SIGNED)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Unverified):
        checkpoint.verify(bytes(changed), [KEY])


def root_line(data: bytes) -> str:
    """A root as it stands in a checkpoint."""
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        f"{KEY.name}\n3\n",
        f"{KEY.name}\n3\n{root_line(EMPTY_ROOT)}",
        f"\n3\n{root_line(EMPTY_ROOT)}\n",
        f"{KEY.name}\n\n{root_line(EMPTY_ROOT)}\n",
        f"{KEY.name}\n3\n{root_line(EMPTY_ROOT)}\n\nmore\n",
        *(
            f"{KEY.name}\n{size}\n{root_line(EMPTY_ROOT)}\n"
            for size in ("03", "-3", "+3", "3 ", "3.0", "0x3", "", "٣", str(1 << 63), "9" * 5000)
        ),
        *(
            f"{KEY.name}\n3\n{root}\n"
            for root in ("", "=", root_line(bytes(31)), root_line(bytes(33)), root_line(bytes(64)))
        ),
        f"{KEY.name}\n3\n{root_line(EMPTY_ROOT)[:-1]}\n",
        f"{KEY.name}\n3\n{root_line(EMPTY_ROOT)[:-2]}V=\n",
    ],
)
def test_what_is_no_checkpoint(text: str) -> None:
    with pytest.raises(Unverified):
        Checkpoint.parse(text)


LINE = SIGNER.sign(TEXT).line


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        TEXT.encode(),
        TEXT.encode() + b"\n",
        (TEXT + "\n" + LINE[:-1]).encode(),
        (TEXT + LINE).encode(),
        (TEXT + "\n" + LINE + "\n").encode(),
        (TEXT + "\n" + LINE[1:]).encode(),
        (TEXT + "\n-" + LINE[1:]).encode(),
        (TEXT + "\n" + LINE.replace("\u2014 ", "\u2014")).encode(),
        (TEXT + "\n" + LINE.replace("\u2014 ", "\u2014  ")).encode(),
        (TEXT + "\n" + LINE.replace("=", "")).encode(),
        (TEXT + "\n\u2014 name AAAA\n").encode(),
        (TEXT + "\n\u2014 name\n").encode(),
        (TEXT + "\n\u2014 na+me AAAAAAA=\n").encode(),
        (TEXT + "\r\n\n" + LINE).encode(),
        (TEXT + "\n" + LINE.replace("\n", "\r\n")).encode(),
        (TEXT + "\n" + LINE).encode().replace(b"e", b"\xff", 1),
        (TEXT + "\n" + LINE * 101).encode(),
    ],
)
def test_what_is_no_note(data: bytes) -> None:
    with pytest.raises(Unverified):
        checkpoint.verify(data, [KEY])


def test_as_many_signatures_as_there_may_be() -> None:
    others = "\u2014 other.example AAAAAAA=\n" * 99
    assert checkpoint.verify((TEXT + "\n" + others + LINE).encode(), [KEY]).size == 3


# --- proof files ----------------------------------------------------------------------------


def _proof(log: StaticLog, index: int) -> Proof:
    signed = (log.directory / "checkpoint").read_bytes()
    hashes = TileHashes(log.frontier.size, log.read)
    return Proof(index, tuple(merkle.inclusion_proof(index, log.frontier.size, hashes)), signed)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> StaticLog:
    """A log of 300 lines."""
    made = StaticLog(tmp_path_factory.mktemp("log"), SIGNER)
    made.append([f"line {n}".encode() for n in range(300)])
    return made


@pytest.mark.parametrize("extra", [None, b"", b"anything"])
def test_proof_files(log: StaticLog, extra: bytes | None) -> None:
    for index in (0, 1, 255, 256, 299):
        made = _proof(log, index)
        proof = tlogproof.parse(Proof(index, made.hashes, made.signed, extra).encode())
        assert (proof.index, proof.hashes, proof.extra) == (index, made.hashes, extra)
        assert tlogproof.verify(log.lines[index], proof, [KEY]).size == 300
        for line in (log.lines[index - 1], log.lines[index] + b"\n", b""):
            with pytest.raises(Unverified):
                tlogproof.verify(line, proof, [KEY])
        with pytest.raises(Unverified):
            tlogproof.verify(log.lines[index], proof, [OTHER.verifier])


def test_a_proof_without_hashes(tmp_path: Path) -> None:
    log = StaticLog(tmp_path, SIGNER)
    log.append([b"the only one"])
    data = _proof(log, 0).encode()
    assert data.startswith(b"c2sp.org/tlog-proof@v1\nindex 0\n\nexample.com/")
    assert tlogproof.verify(b"the only one", tlogproof.parse(data), [KEY]).size == 1


@given(st.data())
@settings(deadline=None)
def test_no_bit_of_a_proof_file_can_be_changed(log: StaticLog, data: st.DataObject) -> None:
    whole = _proof(log, 77).encode()
    changed = bytearray(whole)
    bit = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Unverified):
        tlogproof.verify(log.lines[77], tlogproof.parse(bytes(changed)), [KEY])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data.replace(b"@v1", b"@v2"),
        lambda data: data.replace(b"index 7\n", b""),
        lambda data: data.replace(b"index 7\n", b"index 07\n"),
        lambda data: data.replace(b"index 7\n", b"index -7\n"),
        lambda data: data.replace(b"index 7\n", b"index 7\nindex 7\n"),
        lambda data: data.replace(b"index 7\n", b"extra =\nindex 7\n"),
        lambda data: data.replace(b"index 7\n", b"index 7\nextra AAAA\n"),
        lambda data: data.replace(b"index 7\n", b"index 7\n" + b"AAAA\n"),
        lambda data: data.replace(b"index 7\n", b"index 7\n" + b"A" * 43 + b"=\n" * 64),
        lambda data: data.replace(b"index 7\n", b"index 7\n" + (b"A" * 43 + b"=\n") * 64),
        lambda data: data.replace(b"index 7\n", b"\xff\n"),
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.partition(b"\n\n")[0],
    ],
)
def test_what_is_no_proof_file(log: StaticLog, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Unverified):
        tlogproof.parse(change(_proof(log, 7).encode()))
