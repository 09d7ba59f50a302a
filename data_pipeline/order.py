"""SampleOrder: the endless sequence of samples of a run, as a closed form from global position to (shard, row).

Always holds: within an epoch no row comes twice and at most batch + lanes rows sit out, different ones each epoch; the
row at a position depends on nothing but the shard sizes, the seed, the batch and that position - never on the world
size, the past or a saved shuffle. Memory is two integers per shard. Called by the loader.

How a position becomes a row, in epoch e:
1. the shards are put into an order keyed by (seed, e), and the rows, counted along that order and rotated by a keyed
   amount, form one virtual sequence v of N rows;
2. v is cut into L lanes of N // L rows; place i of every global batch reads lane i // (B / L), so that a rank, which
   owns a contiguous range of places, reads few shards at a time;
3. a lane advances through windows of WINDOW_ROWS rows, permuted within the window by a keyed Feistel bijection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.draws import U64, key64, mix64
from data_pipeline.errors import UserError

ALGORITHM = "lanes-feistel-1"
WINDOW_ROWS = 4 * 4096
MAXIMUM_LANES = 64
ROUNDS = 6


@dataclass(frozen=True)
class OrderState:
    """All that a checkpoint keeps of the order; equal states give equal sequences."""

    dataset_id: str
    algorithm: str
    seed: int
    batch: int
    lanes: int
    position: int


class SampleOrder:
    """The order of one dataset under one seed and global batch. `shard_rows`: rows of each shard.

    Raises UserError if the dataset cannot fill one global batch.
    """

    def __init__(self, dataset_id: str, shard_rows: tuple[int, ...], seed: int, batch: int) -> None:
        self.dataset_id, self.seed, self.batch = dataset_id, seed, batch
        self.shard_rows = np.asarray(shard_rows, np.int64)
        self.rows = int(self.shard_rows.sum())
        self.lanes = math.gcd(batch, MAXIMUM_LANES)
        self.lane_rows = self.rows // self.lanes
        self.epoch_images = self.lane_rows * self.lanes // batch * batch
        if self.epoch_images == 0:
            raise UserError(
                f"dataset {dataset_id[:12]}",
                f"at least {batch + self.lanes - 1} rows for a global batch of {batch}",
                f"{self.rows} rows",
                "lower batch or use a larger dataset",
            )

    def state(self, position: int) -> OrderState:
        return OrderState(self.dataset_id, ALGORITHM, self.seed, self.batch, self.lanes, position)

    def rows_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row in shard) of global positions, each int64 of the shape of `positions` [n]."""
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        epochs, places = np.divmod(positions, self.epoch_images)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            virtual = self._virtual_row(int(epoch), places[chosen])
            permuted_shards, ends = self._shards_of(int(epoch))
            slot = np.searchsorted(ends, virtual, side="right")
            shards[chosen] = permuted_shards[slot]
            rows[chosen] = virtual - (ends[slot] - self.shard_rows[permuted_shards[slot]])
        return shards, rows

    def _virtual_row(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        steps, in_batch = np.divmod(places, self.batch)
        lane_width = self.batch // self.lanes
        lanes, in_lane = np.divmod(in_batch, lane_width)
        windows, offsets = np.divmod(steps * lane_width + in_lane, WINDOW_ROWS)
        window_rows = np.minimum(WINDOW_ROWS, self.lane_rows - windows * WINDOW_ROWS)
        with np.errstate(over="ignore"):
            lane_windows = mix64(lanes.astype(U64) << U64(40) | windows.astype(U64))
            keys = mix64(lane_windows ^ U64(key64("window", self.seed, epoch)))
        offsets = feistel(offsets, window_rows, keys)
        rotation = key64("rotation", self.seed, epoch) % self.rows
        return (lanes * self.lane_rows + windows * WINDOW_ROWS + offsets + rotation) % self.rows

    @lru_cache(maxsize=2)  # noqa: B019  (a batch can straddle two epochs; the order lives as long as its loader)
    def _shards_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        generator = np.random.Generator(np.random.Philox(key=key64("shards", self.seed, epoch)))
        # argsort of raw words, not Generator.permutation, whose algorithm numpy does not promise to keep.
        permuted = np.argsort(generator.bit_generator.random_raw(len(self.shard_rows)), kind="stable").astype(np.int64)
        return permuted, np.cumsum(self.shard_rows[permuted])


def feistel(values: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A bijection of range(size) for each element, chosen by its key: value -> permuted value, all arrays [n].

    An alternating Feistel network over the next power of two (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002), walked until the result falls inside the range: fewer than two walks on average.
    """
    out = values.astype(U64)
    bits = np.maximum(np.ceil(np.log2(np.maximum(sizes, 2))).astype(np.int64), 2)
    left_bits, right_bits = (bits // 2).astype(U64), (bits - bits // 2).astype(U64)
    pending = np.flatnonzero(sizes > 1)
    limits = sizes.astype(U64)
    while len(pending):
        walked = _feistel_rounds(out[pending], left_bits[pending], right_bits[pending], keys[pending])
        out[pending] = walked
        pending = pending[walked >= limits[pending]]
    return out.astype(np.int64)


def _feistel_rounds(
    values: NDArray[np.uint64], left_bits: NDArray[np.uint64], right_bits: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    one = U64(1)
    left, right = values >> right_bits, values & ((one << right_bits) - one)
    for number in range(ROUNDS):
        # Each round replaces one half by itself plus a keyed function of the other: invertible whatever the function.
        if number % 2 == 0:
            left = left ^ (mix64(right ^ (keys + U64(number))) & ((one << left_bits) - one))
        else:
            right = right ^ (mix64(left ^ (keys + U64(number))) & ((one << right_bits) - one))
    return (left << right_bits) | right


def micro_batches(batch: int, rank: int, world_size: int, micro_batch: int) -> list[tuple[int, int]]:
    """The places [begin, end) of the global batch that a rank takes, cut into micro batches of at most `micro_batch`.

    A rank owns [batch * rank // world_size, batch * (rank + 1) // world_size): exact for every world size. All ranks
    get the same number of micro batches, since each is a collective step; the last ones of a rank may be empty.
    """
    begin, end = batch * rank // world_size, batch * (rank + 1) // world_size
    largest_share = math.ceil(batch / world_size)
    steps = math.ceil(largest_share / micro_batch)
    return [(min(begin + i * micro_batch, end), min(begin + (i + 1) * micro_batch, end)) for i in range(steps)]
