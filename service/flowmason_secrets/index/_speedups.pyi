from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from .plain import Columns, Events, Wanted
from .terms import Mappings

def union(postings: list[Events], size: int, /) -> Events: ...
def read_columns(
    data: bytes, place: int, seq: int, known: Mappings, /
) -> tuple[int, list[list[int]]]: ...
def postings(
    column: Sequence[int], places: Sequence[int], block: int, few: int, /
) -> dict[int, bytes]: ...
def among(
    blocks: Mapping[int, Events | None], postings: dict[int, Events], size: int, /
) -> dict[int, Events]: ...
def without(
    blocks: dict[int, Events], postings: dict[int, Events], size: int, /
) -> dict[int, Events]: ...
def unlike(
    lines: Sequence[bytes], seqs: Sequence[int], wanted: Wanted, /
) -> tuple[list[int], set[bytes]]: ...
def matching(
    columns: Columns,
    terms: Sequence[int],
    names: AbstractSet[int] | None,
    times: tuple[int, int],
    low: int,
    high: int,
    /,
) -> list[int]: ...
