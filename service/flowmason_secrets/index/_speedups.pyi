from collections.abc import Sequence

from .terms import Mappings

def read_columns(
    data: bytes, place: int, seq: int, known: Mappings, /
) -> tuple[int, list[list[int]]]: ...
def postings(
    column: Sequence[int], places: Sequence[int], block: int, few: int, /
) -> dict[int, bytes]: ...
