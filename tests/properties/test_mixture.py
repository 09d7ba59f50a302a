"""Mixtures, whatever the weights, shard sizes, batch, seed and position."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UsageError, UserError
from data_pipeline.mixture import LONGEST_PATTERN, Mixture, MixtureOrder, pattern_of, smallest_whole
from data_pipeline.shards import Dataset
from data_pipeline.storage import LocalStore

WEIGHTS = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 900)), min_size=1, max_size=7)
KNOWN = [(0, 2, 41), (0, 0, 0), (0, 2, 9), (1, 4, 7), (0, 0, 27), (0, 0, 45), (0, 0, 12), (1, 4, 0)]


def mixture_of(shard_rows: list[tuple[int, ...]], weights: list[Fraction]) -> Mixture:
    """Of datasets of which nothing is stored, for nothing is read."""
    store = LocalStore(Path("nothing"))
    manifests = ({"id": f"{number:064x}", "rows": sum(s), "shard_rows": s} for number, s in enumerate(shard_rows))
    return Mixture([Dataset(store, "", manifest) for manifest in manifests], weights)


def order_of(shard_rows: list[tuple[int, ...]], weights: list[int], seed: int = 0, batch: int = 8) -> MixtureOrder:
    order = mixture_of(shard_rows, [Fraction(weight) for weight in weights]).order(seed, batch)
    assert isinstance(order, MixtureOrder)
    return order


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**15))
@example([1] * 6 + [54], 10**12)  # the heavy one must not be put off by six light ones at once
def test_at_every_position_each_dataset_has_had_its_share_to_within_one_sample(weights: list[int], start: int) -> None:
    order = order_of([(64,)] * len(weights), weights)
    weights = list(order.mixture.weights)
    total = sum(weights)
    had = []  # of each dataset, before `start`: the position in its own order of the next sample of it
    datasets, own = order.split(np.arange(start, start + 2 * total, dtype=np.int64))
    for number, weight in enumerate(weights):
        places = np.flatnonzero(datasets == number)
        own_here = own[places]
        assert (np.diff(own_here) == 1).all(), "none is left out or comes twice"
        had.append(int(own_here[0]))
        before = had[-1] + np.searchsorted(places, np.arange(2 * total))
        share = [int(position) * weight for position in range(start, start + 2 * total)]
        assert all(abs(int(count) * total - exact) < total for count, exact in zip(before.tolist(), share, strict=True))
    assert sum(had) == start


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.integers(1, 24),
    st.integers(0, 2**40),
)
def test_in_an_epoch_of_its_own_no_row_of_a_dataset_comes_twice_and_few_sit_out(
    shard_rows: list[tuple[int, ...]], weights: list[int], batch: int, seed: int
) -> None:
    try:
        order = order_of(shard_rows, weights[: len(shard_rows)], seed, batch)
    except UserError:
        assume(False)
    weights = list(order.mixture.weights)
    longest = max(-(-own.epoch_images // weight) for own, weight in zip(order.orders, weights, strict=True))
    shards, rows = order.rows_at(np.arange((longest + 1) * sum(weights)))
    first = order.mixture.first_shards
    for number, own in enumerate(order.orders):
        mine = (shards >= first[number]) & (shards < first[number + 1])
        pairs = list(zip((shards[mine] - first[number]).tolist(), rows[mine].tolist(), strict=True))
        epoch = pairs[: own.epoch_images]
        assert len(set(epoch)) == own.epoch_images > sum(shard_rows[number]) - own.batch - own.lanes
        assert all(0 <= row < shard_rows[number][shard] for shard, row in pairs)


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 96), st.integers(0, 10**12), st.integers(1, 60))
def test_the_row_at_a_position_does_not_depend_on_what_is_asked_with_it(
    weights: list[int], batch: int, position: int, count: int
) -> None:
    shard_rows = [(700, 300 + number) for number in range(len(weights))]
    together = order_of(shard_rows, weights, batch=batch).rows_at(np.arange(position, position + count))
    fresh = order_of(shard_rows, weights, batch=batch)
    for number in reversed(range(count)):
        shard, row = fresh.rows_at(np.array([position + number]))
        assert (shard[0], row[0]) == (together[0][number], together[1][number])


@pytest.mark.parametrize(
    ("weights", "batch", "batches"),
    [([3, 1], 2048, [1536, 512]), ([1, 2], 2048, [1, 1]), ([1, 1, 2], 2, [1, 1, 1]), ([1, 1, 2], 4, [1, 1, 2])],
)
def test_a_dataset_has_its_share_of_the_global_batch_as_its_own_batch_where_that_is_whole(
    weights: list[int], batch: int, batches: list[int]
) -> None:
    order = order_of([(4096,)] * len(weights), weights, batch=batch)
    assert [own.batch for own in order.orders] == batches


def test_a_mixture_of_a_billion_rows_starts_anywhere() -> None:
    """A walk to that position would not end."""
    shard_rows = [(10_000,) * 75_000, (10_000,) * 25_000, (500, 500)]
    order = order_of(shard_rows, [70, 29, 1], batch=2000)
    position = 5 * 10**12
    shards, rows = order.rows_at(np.arange(position, position + 2000))
    counts = np.histogram(shards, [0, 75_000, 100_000, 100_002])[0]
    assert counts.tolist() == [1400, 580, 20]
    assert rows.max() < 10_000


def test_weights_are_exact_however_they_are_written() -> None:
    written = [Fraction("0.7"), Fraction("2e-1"), Fraction("1/10")]
    assert smallest_whole(written) == (7, 2, 1) == smallest_whole([Fraction(n) for n in (70, 20, 10)])
    assert smallest_whole([Fraction(5)]) == (1,)
    assert pattern_of((3, 1)).tolist() == [0, 0, 0, 1]
    assert pattern_of((5, 2, 1)).tolist() == [0, 0, 1, 0, 0, 1, 0, 2]


def test_weights_that_make_too_long_a_pattern_are_refused() -> None:
    with pytest.raises(UsageError, match=f"at most {LONGEST_PATTERN} .* found 123456789:1;"):
        smallest_whole([Fraction(123_456_789), Fraction(1)])


def test_the_mixed_order_never_changes_between_versions() -> None:
    """Resumes of runs begun by an older Glidepath depend on it."""
    order = order_of([(50, 20, 60), (30, 10)], [3, 1], seed=1, batch=8)
    datasets, _ = order.split(np.arange(10**9, 10**9 + 8))
    shards, rows = order.rows_at(np.arange(10**9, 10**9 + 8))
    assert list(zip(datasets.tolist(), shards.tolist(), rows.tolist(), strict=True)) == KNOWN
