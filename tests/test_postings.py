"""Postings against plain sets, whatever they are made of."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmason_secrets.index.database import Damaged
from flowmason_secrets.index.plain import Events, as_bits, few_of, of_bits
from flowmason_secrets.index.postings import (
    GROUP,
    among,
    between,
    checked,
    count,
    decode,
    in_order,
    key,
    merged,
    seal,
    split,
    union,
    without,
)

BLOCK = 1024
SIZE = BLOCK // 8
WHOLE = frozenset(range(BLOCK))

few = st.frozensets(st.integers(0, BLOCK - 1), min_size=1, max_size=12)
# Up to 63 are kept as places, more as a bitmap.
some = st.frozensets(st.integers(0, BLOCK - 1), min_size=1, max_size=90)
many = st.integers(1, BLOCK // 64 * 64).map(lambda step: frozenset(range(0, BLOCK, step)))
sets = st.one_of(few, some, many, st.just(WHOLE))


def stored(places: frozenset[int]) -> tuple[int, bytes]:
    ((where, blob),) = checked(seal([[1] * len(places)], sorted(places), 7, BLOCK))
    assert where == key(7, 1)
    return where, blob


def posting(places: frozenset[int]) -> Events:
    where, blob = stored(places)
    return decode(blob, where, BLOCK)


def candidates(places: frozenset[int], bits: bool) -> Events:
    if len(places) <= few_of(SIZE) and not bits:
        return struct.pack(f"<{len(places)}H", *sorted(places))
    return sum(1 << place for place in places).to_bytes(SIZE, "little")


def places_of(events: Events) -> frozenset[int]:
    bits = as_bits(events, SIZE)
    return frozenset(place for place in range(BLOCK) if bits >> place & 1)


@given(sets)
def test_a_posting_is_what_was_sealed(places: frozenset[int]) -> None:
    found = posting(places)
    assert places_of(found) == places
    assert among({7: None, 8: None}, {7: found}, SIZE) == {7: found}


@given(st.dictionaries(st.integers(0, GROUP - 1), st.tuples(sets, sets)))
def test_what_was_merged_is_what_each_block_has(
    blocks: dict[int, tuple[frozenset[int], ...]],
) -> None:
    first = 3 * GROUP
    postings = [
        one
        for number, both in blocks.items()
        for term, places in enumerate(both, 1)
        for one in seal([[term] * len(places)], sorted(places), first + number, BLOCK)
    ]
    found = dict(merged(postings, 3))
    assert list(found) == [key(3, term) for term in (1, 2) if blocks]
    for where, blob in found.items():
        parts = split(blob, where, BLOCK)
        assert {number - first: places_of(posting) for number, posting in parts.items()} == {
            number: both[(where & 0xFF) - 1] for number, both in blocks.items()
        }
        with pytest.raises(Damaged):
            split(blob, where + 1, BLOCK)


@given(sets, st.booleans(), sets)
def test_what_two_have_in_common_and_what_is_left(
    one: frozenset[int], bits: bool, other: frozenset[int]
) -> None:
    events = candidates(one, bits)
    found = among({1: events, 2: events}, {1: posting(other), 3: posting(other)}, SIZE)
    assert {number: places_of(both) for number, both in found.items()} == (
        {1: one & other} if one & other else {}
    )
    left = without({1: events, 2: events}, {1: posting(other), 3: posting(other)}, SIZE)
    assert {number: places_of(rest) for number, rest in left.items()} == (
        {1: one - other, 2: one} if one - other else {2: one}
    )


@given(st.lists(sets, max_size=4))
def test_what_any_of_them_has(all_of_them: list[frozenset[int]]) -> None:
    found = union([posting(places) for places in all_of_them], SIZE)
    assert places_of(found) == frozenset().union(*all_of_them)


@given(sets)
def test_bits_and_back(places: frozenset[int]) -> None:
    events = of_bits(sum(1 << place for place in places), SIZE)
    assert places_of(events) == places
    assert len(events) == (SIZE if len(places) > few_of(SIZE) else 2 * len(places))


@given(sets, st.booleans(), st.data())
def test_what_is_between_two_places(one: frozenset[int], bits: bool, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, BLOCK)] * 2)))
    found, left = (
        between(candidates(one, bits), low, high, SIZE),
        {place for place in one if low <= place < high},
    )
    assert places_of(found) == left
    assert bool(found) == bool(left)
    assert count(found, SIZE) == len(left)
    skip = data.draw(st.integers(0, len(left) + 1))
    for ascending in (True, False):
        expected = sorted(left, reverse=not ascending)
        assert list(in_order(found, ascending, SIZE)) == expected
        assert list(in_order(found, ascending, SIZE, skip)) == expected[skip:]
