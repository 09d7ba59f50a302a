"""The sample order, whatever the shard sizes, batch, seed, epoch and world size."""

from __future__ import annotations

import gc
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.draws import U64, key64, mix64
from data_pipeline.errors import UserError
from data_pipeline.order import BLOCK, ROUNDS, WINDOW_ROWS, Feistel, SampleOrder, micro_batches

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


def mixed(word: int) -> int:
    return int(mix64(np.array([word], U64))[0])


def row_by_the_formula(shard_rows: tuple[int, ...], seed: int, batch: int, position: int) -> tuple[int, int]:
    """(shard, row) at a position, step by step as docs/formats.md has it, in Python's integers."""
    total, lanes = sum(shard_rows), math.gcd(batch, 64)
    lane_rows, width = total // lanes, batch // lanes
    epoch, in_epoch = divmod(position, lane_rows * lanes // batch * batch)
    step, place = divmod(in_epoch, batch)
    lane, in_strip = divmod(place, width)
    window, value = divmod(step * width + in_strip, 16384)
    size = min(16384, lane_rows - 16384 * window)
    key = mixed(mixed(lane << 40 | window) ^ key64("window", seed, epoch))
    bits = max(math.ceil(math.log2(max(size, 2))), 2)
    right_bits = bits - bits // 2
    while size > 1:
        left, right = value >> right_bits, value % (1 << right_bits)
        for number in range(ROUNDS):
            if number % 2 == 0:
                left ^= mixed(right ^ (key + number) % 2**64) % (1 << bits // 2)
            else:
                right ^= mixed(left ^ (key + number) % 2**64) % (1 << right_bits)
        value = left << right_bits | right
        if value < size:
            break
    virtual = (lane * lane_rows + 16384 * window + value + key64("rotation", seed, epoch) % total) % total
    words = np.random.Philox(key=key64("shards", seed, epoch)).random_raw(len(shard_rows)).tolist()
    for shard in sorted(range(len(shard_rows)), key=words.__getitem__):
        if virtual < shard_rows[shard]:
            return shard, virtual
        virtual -= shard_rows[shard]
    raise AssertionError(virtual)


@settings(deadline=None)
@given(
    st.one_of(SHARDS, st.lists(st.integers(1, 60_000), min_size=1, max_size=8).map(tuple)),
    st.one_of(BATCHES, st.sampled_from([128, 1000, 2048])),
    st.integers(0, 2**40),
    st.integers(0, 10**13),
    st.integers(-3, 3),
)
@example((70_000,), 2, 1, 5 * 10**12, 0)
@example((1,), 1, 0, 0, 0)
def test_rows_are_those_of_the_plain_formula_one_by_one_or_together(
    shard_rows: tuple[int, ...], batch: int, seed: int, around: int, off: int
) -> None:
    """Around where something changes: a batch, a block, a window, an epoch; asked in any order, across the change."""
    if not (order := order_of(shard_rows, batch, seed)):
        return
    window = WINDOW_ROWS * order.lanes
    for change in (1, batch, BLOCK, order.epoch_images, around // order.epoch_images * order.epoch_images + window):
        middle = max(0, around // change * change + off)
        positions = np.array([middle + 1, middle, middle + batch, max(0, middle - batch), max(0, middle - 1)])
        expected = [row_by_the_formula(shard_rows, seed, batch, int(position)) for position in positions]
        together = [values.tolist() for values in order.rows_at(positions)]
        assert list(zip(*together, strict=True)) == expected
        for position, row in zip(positions, expected, strict=True):
            shard, alone = order.rows_at(np.array([position]))
            assert (shard.tolist(), alone.tolist()) == ([row[0]], [row[1]])


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


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_feistel_permutes_its_range_for_every_key(size: int, keys: list[int]) -> None:
    bijections = Feistel(size, np.array(keys, np.uint64))
    for lane in range(len(keys)):
        permuted = bijections.permuted(np.arange(size), np.full(size, lane))
        assert sorted(permuted.tolist()) == list(range(size))


def test_feistel_leaves_no_visible_order() -> None:
    permuted = Feistel(4096, np.array([7], np.uint64)).permuted(np.arange(4096), np.zeros(4096, np.int64))
    correlation = np.corrcoef(np.arange(4096), permuted)[0, 1]
    assert abs(correlation) < 0.06


@given(st.integers(1, 4096), st.integers(1, 80), st.integers(1, 64))
def test_the_ranks_cut_a_global_batch_exactly_in_equally_many_micro_batches(batch: int, world: int, micro: int) -> None:
    cuts = [micro_batches(batch, rank, world, micro) for rank in range(world)]
    places = [place for cut in cuts for begin, end in cut for place in range(begin, end)]
    assert places == list(range(batch))
    assert len({len(cut) for cut in cuts}) == 1
    assert all(end - begin <= micro for cut in cuts for begin, end in cut)


def memory_of(shard_rows: tuple[int, ...], position: int) -> tuple[int, int]:
    """(most bytes, bytes that stay) of an order that gives the global batch of 2,048 at a position."""
    gc.collect()
    tracemalloc.start()
    try:
        order = SampleOrder("dataset", shard_rows, seed=0, batch=2048)
        shards, rows = order.rows_at(np.arange(position, position + 2048))
        stays, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == 2048
    assert (rows < np.asarray(shard_rows)[shards]).all()
    return most, stays


@pytest.mark.parametrize("position", [0, 5 * 10**12 // 2048 * 2048])
def test_memory_grows_by_three_integers_per_shard_from_ten_thousand_rows_to_a_billion(position: int) -> None:
    """Anywhere in the sequence: nothing is walked through, so the position changes nothing."""
    most, stays = memory_of((4096, 4096, 1808), position)
    assert most < 2 * 2**20
    for shards in (1_000, 100_000):
        most_of_many, stays_of_many = memory_of((10_000,) * shards, position)
        assert most_of_many - most < 2**20 + 5 * 8 * shards
        # Rows of each; and in the order of the epoch, which shard and where it ends.
        assert stays_of_many - stays < 2**20 + 3 * 8 * shards


def test_what_is_kept_of_windows_and_blocks_is_bounded_and_goes_with_its_order() -> None:
    order = SampleOrder("dataset", (10_000,) * 1000, seed=0, batch=64)
    for position in range(0, 40 * 10**6, 10**6):
        order.rows_at(np.arange(position, position + 8))
    kept = (order._located, order._window, order._shards_of)
    assert [cache.cache_info().currsize for cache in kept] == [8, 4, 2]


def test_the_order_never_changes_between_versions() -> None:
    """Resumes of runs begun by an older Glidepath depend on it."""
    order = SampleOrder("dataset", (4096, 4096, 1000), seed=1, batch=48)
    shards, rows = order.rows_at(np.array([0, 1, 47, 48, 9167, 9168, 10**9]))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == KNOWN
