"""Postings against plain sets, whatever they are made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmason_secrets.index.database import Damaged
from flowmason_secrets.index.postings import (
    ALL,
    GROUP,
    Events,
    Posting,
    as_bits,
    between,
    checked,
    common,
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
WHOLE = frozenset(range(BLOCK))

few = st.frozensets(st.integers(0, BLOCK - 1), min_size=1, max_size=12)
# Up to 63 are stored as places, more as a bitmap.
some = st.frozensets(st.integers(0, BLOCK - 1), min_size=1, max_size=90)
many = st.integers(1, BLOCK // 64 * 64).map(lambda step: frozenset(range(0, BLOCK, step)))
sets = st.one_of(few, some, many, st.just(WHOLE))


def stored(places: frozenset[int]) -> tuple[int, bytes]:
    ((where, blob),) = checked(seal([[1] * len(places)], sorted(places), 7, BLOCK))
    assert where == key(7, 1)
    return where, blob


def posting(places: frozenset[int], bits: bool) -> Posting:
    where, blob = stored(places)
    found = decode(blob, where, BLOCK)
    return as_bits(found, BLOCK) if bits else found


def candidates(places: frozenset[int], bits: bool) -> Events:
    return sum(1 << place for place in places) if bits else tuple(sorted(places))


def places_of(events: Posting) -> frozenset[int]:
    bits = as_bits(events, BLOCK)
    return frozenset(place for place in range(BLOCK) if bits >> place & 1)


@given(sets, st.booleans())
def test_a_posting_is_what_was_sealed(places: frozenset[int], bits: bool) -> None:
    found = posting(places, bits)
    assert places_of(found) == places
    assert common(ALL, found, BLOCK) in (found, as_bits(found, BLOCK))


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


@given(sets, st.booleans(), sets, st.booleans())
def test_what_two_have_in_common_and_what_is_left(
    one: frozenset[int], bits: bool, other: frozenset[int], as_read: bool
) -> None:
    events = candidates(one, bits)
    both = common(events, posting(other, not as_read), BLOCK)
    assert places_of(both) == one & other
    # Nothing is what says that a block has none.
    assert bool(both) == bool(one & other)
    assert places_of(without(events, both, BLOCK)) == one - other


@given(st.lists(st.tuples(sets, st.booleans()), max_size=4))
def test_what_any_of_them_has(all_of_them: list[tuple[frozenset[int], bool]]) -> None:
    found = union([posting(places, bits) for places, bits in all_of_them], BLOCK)
    sets_ = [places for places, _ in all_of_them]
    assert places_of(found) == frozenset().union(*sets_)


@given(sets, st.booleans(), st.data())
def test_what_is_between_two_places(one: frozenset[int], bits: bool, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, BLOCK)] * 2)))
    found, left = (
        between(candidates(one, bits), low, high),
        {place for place in one if low <= place < high},
    )
    assert places_of(found) == left
    assert bool(found) == bool(left)
    assert count(found) == len(left)
    assert list(in_order(found, ascending=True)) == sorted(left)
    assert list(in_order(found, ascending=False)) == sorted(left, reverse=True)
