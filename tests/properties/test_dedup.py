"""Near pairs: all of them, each once, whatever the distance, the hashes and the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.dedup import LARGEST_DISTANCE, Bands, choose_bands, kept_in_order, near_join, near_pairs

FLIPS = st.lists(st.integers(0, 63), max_size=LARGEST_DISTANCE + 1, unique=True)


@st.composite
def hash_sets(draw: st.DrawFn) -> NDArray[np.uint64]:
    """Different hashes, many of them a few bits from another one."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flipped = draw(st.lists(st.tuples(st.sampled_from(centres), FLIPS), max_size=30))
    return np.array(sorted({*centres, *(hash_ ^ sum(1 << bit for bit in bits) for hash_, bits in flipped)}), np.uint64)


def bits_between(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.bitwise_count(left[:, None] ^ right[None]).astype(np.int64)


@given(hash_sets(), st.integers(0, LARGEST_DISTANCE), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_near_pair_is_found_once(hashes: NDArray[np.uint64], distance: int, agreeing: int) -> None:
    bands = Bands(distance, agreeing)
    found = [
        (min(i, j), max(i, j), bits)
        for lowest in range(distance + 1)
        for pairs in near_pairs(hashes, bands, lowest)
        for i, j, bits in pairs.tolist()
    ]
    bits = bits_between(hashes, hashes)
    expected = [(int(i), int(j), int(bits[i, j])) for i, j in np.argwhere(np.triu(bits <= distance, 1))]
    assert sorted(found) == expected


@given(hash_sets(), hash_sets(), st.integers(0, LARGEST_DISTANCE))
@settings(max_examples=60, deadline=None)
def test_the_nearest_of_another_set_is_found(
    queries: NDArray[np.uint64], targets: NDArray[np.uint64], distance: int
) -> None:
    nearest = bits_between(queries, targets).min(1)
    np.testing.assert_array_equal(near_join(queries, targets, distance), np.where(nearest <= distance, nearest, -1))
    assert (near_join(queries, targets[:0], distance) == -1).all()


@pytest.mark.parametrize("blocks", range(1, 18))
def test_blocks_cover_every_bit_once(blocks: int) -> None:
    masks = [int(Bands(blocks - 1, 1).mask(block)) for block in range(blocks)]
    assert sum(masks) == 2**64 - 1 and sum(mask.bit_count() for mask in masks) == 64


def test_more_hashes_get_more_tables_with_longer_keys() -> None:
    chosen = [choose_bands(4, 10**power).agreeing for power in (3, 5, 7, 9)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40), st.lists(st.booleans(), min_size=13))
def test_who_stays_is_decided_one_by_one(ends: list[tuple[int, int]], gone: list[bool]) -> None:
    edges = [(min(pair), max(pair)) for pair in ends if pair[0] != pair[1]]
    expected = gone[:13]
    for node in range(13):
        expected[node] |= any(late == node and not expected[early] for early, late in edges)
    dropped = np.array(gone[:13])
    early, late = np.array(edges, np.int64).reshape(-1, 2).T
    kept_in_order(13, early, late, dropped)
    assert dropped.tolist() == expected
