"""The sample order, whatever the shard sizes, batch, seed, epoch and world size."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.order import WINDOW_ROWS, SampleOrder, feistel, micro_batches

KNOWN = [(0, 1060), (0, 1165), (0, 686), (0, 1336), (0, 763), (0, 1333), (0, 1431)]
SHARDS = st.lists(st.integers(1, 400), min_size=1, max_size=12).map(tuple)
BATCHES = st.integers(1, 96)


def order_of(shard_rows: tuple[int, ...], batch: int, seed: int = 0) -> SampleOrder | None:
    try:
        return SampleOrder("dataset", shard_rows, seed, batch)
    except UserError:
        assert sum(shard_rows) < batch + 64  # only a dataset too small for one batch is refused
        return None


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    positions = np.arange(epoch * order.epoch_images, (epoch + 1) * order.epoch_images)
    return list(zip(*(values.tolist() for values in order.rows_at(positions)), strict=True))


@given(SHARDS, BATCHES, st.integers(0, 2**40), st.integers(0, 1000))
def test_no_row_comes_twice_in_an_epoch_and_at_most_batch_plus_lanes_sit_out(
    shard_rows: tuple[int, ...], batch: int, seed: int, epoch: int
) -> None:
    if order := order_of(shard_rows, batch, seed):
        rows = epoch_of(order, epoch)
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < shard_rows[shard] for shard, row in rows)
        assert sum(shard_rows) - len(rows) < batch + order.lanes
        assert batch % order.lanes == 0


def test_other_rows_sit_out_in_other_epochs() -> None:
    order = SampleOrder("dataset", (100,), seed=3, batch=32)
    everything = {(0, row) for row in range(100)}
    left_out = [frozenset(everything - set(epoch_of(order, epoch))) for epoch in range(8)]
    assert all(len(rows) == 4 for rows in left_out)
    assert len(set(left_out)) == 8


def test_no_row_comes_twice_when_a_lane_has_many_windows() -> None:
    order = SampleOrder("dataset", (WINDOW_ROWS, 3 * WINDOW_ROWS + 17, 999), seed=1, batch=2)
    rows = epoch_of(order, 0)
    assert len(set(rows)) == len(rows) == order.epoch_images


@given(SHARDS, BATCHES, st.integers(0, 10**6), st.integers(1, 50))
def test_the_row_at_a_position_does_not_depend_on_what_was_asked_before(
    shard_rows: tuple[int, ...], batch: int, position: int, count: int
) -> None:
    if order := order_of(shard_rows, batch):
        together = order.rows_at(np.arange(position, position + count))
        fresh = order_of(shard_rows, batch)
        assert fresh is not None
        for number in range(count):
            alone = fresh.rows_at(np.array([position + number]))
            assert (alone[0][0], alone[1][0]) == (together[0][number], together[1][number])


def test_another_seed_or_epoch_is_another_order() -> None:
    orders = [SampleOrder("dataset", (500, 500), seed, 10) for seed in (0, 1)]
    assert epoch_of(orders[0], 0) != epoch_of(orders[1], 0)
    assert epoch_of(orders[0], 0) != epoch_of(orders[0], 1)


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_feistel_permutes_its_range(size: int, key: int) -> None:
    permuted = feistel(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(permuted.tolist()) == list(range(size))


def test_feistel_leaves_no_visible_order() -> None:
    permuted = feistel(np.arange(4096), np.full(4096, 4096), np.full(4096, 7, np.uint64))
    correlation = np.corrcoef(np.arange(4096), permuted)[0, 1]
    assert abs(correlation) < 0.06


@given(st.integers(1, 4096), st.integers(1, 80), st.integers(1, 64))
def test_the_ranks_cut_a_global_batch_exactly_in_equally_many_micro_batches(batch: int, world: int, micro: int) -> None:
    cuts = [micro_batches(batch, rank, world, micro) for rank in range(world)]
    places = [place for cut in cuts for begin, end in cut for place in range(begin, end)]
    assert places == list(range(batch))
    assert len({len(cut) for cut in cuts}) == 1
    assert all(end - begin <= micro for cut in cuts for begin, end in cut)


def test_the_order_of_a_billion_rows_needs_two_integers_per_shard() -> None:
    order = SampleOrder("dataset", (10_000,) * 100_000, seed=0, batch=2048)
    shards, rows = order.rows_at(np.arange(5 * 10**8, 5 * 10**8 + 2048))
    assert len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == 2048
    assert sum(values.nbytes for values in order._shards_of(0)) == 2 * 8 * 100_000


def test_the_order_never_changes_between_versions() -> None:
    """Resumes of runs begun by an older Glidepath depend on it."""
    order = SampleOrder("dataset", (4096, 4096, 1000), seed=1, batch=48)
    shards, rows = order.rows_at(np.array([0, 1, 47, 48, 9167, 9168, 10**9]))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == KNOWN
