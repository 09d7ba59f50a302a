"""Blaming shards: whatever is in a batch, exactly the shards that are refused alone are found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.quarantine import MOST_TO_BLAME, bisect, blamed

LIMIT = 20.0


@st.composite
def batches(draw: st.DrawFn) -> tuple[NDArray[np.int64], dict[int, float]]:
    """The shard of each position, and what each shard adds to the loss: of those beyond the limit not too many."""
    count = draw(st.integers(1, 300))
    shards = draw(st.lists(st.integers(0, count), min_size=count, max_size=count))
    there = sorted(set(shards))
    bad = draw(st.sets(st.sampled_from(there), max_size=MOST_TO_BLAME))
    worth = {s: draw(st.one_of(st.just(math.nan), st.floats(21, 1e6))) if s in bad else 0.01 for s in there}
    return np.array(shards, np.int64), worth


@given(batches())
def test_bisection_blames_the_shards_that_are_bad_alone_and_looks_at_few_sets(
    batch: tuple[NDArray[np.int64], dict[int, float]],
) -> None:
    shards, worth = batch
    looks = []

    def refused(positions: NDArray[np.int64]) -> str:
        some = np.unique(shards[positions]).tolist()
        looks.append(some)
        loss = sum(worth[shard] for shard in some)
        return "" if loss <= LIMIT else f"{some}"

    found = bisect(sorted(worth), np.arange(len(shards)), shards, refused)
    assert found == {shard: f"[{shard}]" for shard, value in worth.items() if not value <= LIMIT}
    assert len(looks) <= 1 + 2 * len(found) * math.ceil(math.log2(len(worth)) if len(worth) > 1 else 1)


@pytest.mark.parametrize(
    ("worth", "expected"),
    [
        ([0.1, 400.0, 0.1], {1}),
        ([math.nan, 0.1, 30.0, 0.1], {0, 2}),
        ([25.0, 30.0, 40.0], set()),  # all of it
        ([25.0, 15.0, 15.0], set()),  # the rest is refused without the worst as well
        ([8.0, 8.0, 8.0], set()),  # none alone
        ([0.1, 0.1], set()),
        ([400.0], set()),
    ],
)
def test_shards_are_blamed_only_where_the_rest_is_good_without_them(worth: list[float], expected: set[int]) -> None:
    shards = np.arange(len(worth))

    def refused(positions: NDArray[np.int64]) -> str:
        return "" if sum(worth[shard] for shard in positions) <= LIMIT else "loss"

    assert blamed(shards.tolist(), np.arange(len(worth)), shards, refused).keys() == expected


@given(st.integers(MOST_TO_BLAME + 1, 300))
def test_it_gives_up_once_more_shards_are_bad_than_data_explains(count: int) -> None:
    looks = []

    def refused(positions: NDArray[np.int64]) -> str:
        looks.append(positions)
        return "loss is nan"

    assert len(bisect(list(range(count)), np.arange(count), np.arange(count), refused)) == MOST_TO_BLAME + 1
    assert len(looks) <= 2 * (MOST_TO_BLAME + 1) + math.ceil(math.log2(count))
