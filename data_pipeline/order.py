"""SampleOrder: the endless sequence of samples of a run, as a closed form from global position to (shard, row).

Always holds: within an epoch no row comes twice and at most batch + lanes rows sit out, different ones each epoch; the
row at a position depends on nothing but the shard sizes, the seed, the batch and that position - never on the world
size, the past or a saved shuffle. Memory is two integers per shard and epoch. Called by the loader.

How a position becomes a row, in epoch e:
1. the shards are put into an order keyed by (seed, e), and the rows, counted along that order and rotated by a keyed
   amount, form one virtual sequence v of N rows;
2. v is cut into L lanes of N // L rows; place i of every global batch reads lane i // (B / L), so that a rank, which
   owns a contiguous range of places, reads few shards at a time;
3. a lane advances through windows of WINDOW_ROWS rows, permuted within the window by a keyed Feistel bijection.

All lanes stand in the same window at the same time. So what a window needs (its bijections and the few shards it lies
in) is found once for the hundreds of batches that pass through it, and a batch costs some look-ups in small tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.draws import U64, key64, mix64
from data_pipeline.errors import UserError

ALGORITHM = "lanes-feistel-1"
WINDOW_BITS = 14
WINDOW_ROWS = 1 << WINDOW_BITS  # four shards of the builder's size
MAXIMUM_LANES = 64
ROUNDS = 6
BLOCK = 8192  # positions that are worked out together: fewer calls of numpy, and micro batches share them

Located = tuple[NDArray[np.int64], NDArray[np.int64]]  # (shard, row in shard), both of one shape


@dataclass(frozen=True)
class OrderState:
    """All that a checkpoint keeps of the order; equal states give equal sequences."""

    dataset_id: str
    algorithm: str
    seed: int
    batch: int
    lanes: int
    position: int


@dataclass(frozen=True)
class Window:
    """One window of all lanes: [L] per lane, [k] per shard that the window touches in any lane, in virtual order."""

    bijection: Feistel
    begins_L: NDArray[np.int64]  # virtual row at which each lane's window begins
    shards_k: NDArray[np.int64]
    begins_k: NDArray[np.int64]  # virtual row at which each shard begins
    ends_k: NDArray[np.int64]


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
        self.windows = -(-self.lane_rows // WINDOW_ROWS)  # in each lane
        self.block = min(BLOCK, self.epoch_images)  # of a tiny dataset not hundreds of epochs
        # Of the order itself, so that they end with it.
        self._located = lru_cache(maxsize=8)(self._locate_block)
        self._window = lru_cache(maxsize=4)(self._find_window)
        self._shards_of = lru_cache(maxsize=2)(self._permute_shards)

    def state(self, position: int) -> OrderState:
        return OrderState(self.dataset_id, ALGORITHM, self.seed, self.batch, self.lanes, position)

    def rows_at(self, positions: NDArray[np.int64]) -> Located:
        """(shard, row in shard) of global positions, each int64 of the shape of `positions` [n]."""
        if len(positions) == 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        number, last_number = (int(position) // self.block for position in (positions.min(), positions.max()))
        if number != last_number:
            return self._locate(positions)
        shards, rows = self._located(number)
        places = positions - number * self.block
        return shards[places], rows[places]

    def _locate_block(self, number: int) -> Located:
        return self._locate(np.arange(number * self.block, (number + 1) * self.block, dtype=np.int64))

    def _locate(self, positions: NDArray[np.int64]) -> Located:
        epoch, last_epoch = (int(position) // self.epoch_images for position in (positions.min(), positions.max()))
        if epoch != last_epoch:
            return _apart(positions, positions // self.epoch_images, self._locate)
        lane_width = self.batch // self.lanes
        in_epoch = positions - epoch * self.epoch_images
        strips = in_epoch // lane_width  # what one lane gives to one global batch
        steps = strips // self.lanes
        in_lane = in_epoch - (strips - steps) * lane_width
        windows = in_lane >> WINDOW_BITS
        first, last = int(windows.min()), int(windows.max())
        if first != last:
            return _apart(positions, windows, self._locate)
        lanes, offsets = strips - steps * self.lanes, in_lane - first * WINDOW_ROWS
        window = self._window(epoch * self.windows + first)
        virtual = window.bijection.permuted(offsets, lanes)
        virtual += window.begins_L[lanes]
        virtual[virtual >= self.rows] -= self.rows
        slots = np.searchsorted(window.ends_k, virtual, side="right")
        return window.shards_k[slots], virtual - window.begins_k[slots]

    def _find_window(self, number: int) -> Window:
        epoch, window = divmod(number, self.windows)
        rows = min(WINDOW_ROWS, self.lane_rows - window * WINDOW_ROWS)
        lanes = np.arange(self.lanes, dtype=np.int64)
        keys = mix64(mix64(lanes.astype(U64) << U64(40) | U64(window)) ^ U64(key64("window", self.seed, epoch)))
        rotation = key64("rotation", self.seed, epoch) % self.rows
        begins = (lanes * self.lane_rows + window * WINDOW_ROWS + rotation) % self.rows
        permuted, ends = self._shards_of(epoch)
        touched = _touched(ends, begins, begins + rows - 1, self.rows)
        shards, ends_k = permuted[touched], ends[touched]
        return Window(Feistel(rows, keys), begins, shards, ends_k - self.shard_rows[shards], ends_k)

    def _permute_shards(self, epoch: int) -> Located:
        """(shards in the epoch's order, virtual row at which each ends)."""
        generator = np.random.Generator(np.random.Philox(key=key64("shards", self.seed, epoch)))
        # argsort of raw words, not Generator.permutation, whose algorithm numpy does not promise to keep.
        permuted = np.argsort(generator.bit_generator.random_raw(len(self.shard_rows)), kind="stable").astype(np.int64)
        return permuted, np.cumsum(self.shard_rows[permuted])


def _apart(positions: NDArray[np.int64], groups: NDArray[np.int64], locate: Callable[..., Located]) -> Located:
    """`locate` of the positions of each group by themselves, put together again."""
    shards, rows = np.empty_like(positions), np.empty_like(positions)
    for group in np.unique(groups):
        chosen = groups == group
        shards[chosen], rows[chosen] = locate(positions[chosen])
    return shards, rows


def _touched(
    ends: NDArray[np.int64], begins_L: NDArray[np.int64], lasts_L: NDArray[np.int64], rows: int
) -> NDArray[np.int64]:
    """Slots, ascending, of the shards that hold any row of [begin, last]; a last row beyond `rows` counts from 0."""
    lowest = np.searchsorted(ends, begins_L, side="right")
    highest = np.searchsorted(ends, lasts_L % rows, side="right") + np.where(lasts_L >= rows, len(ends), 0)
    ranges = [np.arange(first, last + 1) % len(ends) for first, last in zip(lowest, highest, strict=True)]
    return np.unique(np.concatenate(ranges))


class Feistel:
    """Bijections of range(size), one for each key of `keys_L` uint64 [L].

    An alternating Feistel network over the next power of two (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002), walked until the result falls inside the range: fewer than two walks on average. A half has few
    values, so the rounds stand in tables, made once for all values that a bijection is asked for.
    """

    def __init__(self, size: int, keys_L: NDArray[np.uint64]) -> None:
        self.size = size
        self.bits = max((size - 1).bit_length(), 2)
        self.half_bits = self.bits - self.bits // 2  # of the right half; the left one may have a bit less
        halves_H = np.arange(1 << self.half_bits, dtype=U64)
        masks = [U64((1 << self.bits // 2) - 1), U64((1 << self.half_bits) - 1)]
        with np.errstate(over="ignore"):
            self.tables = [
                (mix64((keys_L[:, None] + U64(number)) ^ halves_H) & masks[number % 2]).astype(np.int64).ravel()
                for number in range(ROUNDS)
            ]

    def permuted(self, values: NDArray[np.int64], lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Value -> permuted value by the bijection of its lane, all int64 [n]."""
        if self.size < 2:
            return values.copy()
        out = self._walked(values, lanes)
        if self.size == 1 << self.bits:
            return out
        while len(pending := np.flatnonzero(out >= self.size)):
            out[pending] = self._walked(out[pending], lanes[pending])
        return out

    def _walked(self, values: NDArray[np.int64], lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        mask = (1 << self.half_bits) - 1
        # The lane stands above each half: a half then is its own index into the tables, and no round touches the lane.
        above = lanes << self.half_bits
        left, right = above | (values >> self.half_bits), above | (values & mask)
        for number, table in enumerate(self.tables):
            # A round replaces one half by itself plus a keyed function of the other: invertible whatever the function.
            if number % 2 == 0:
                left ^= table[right]
            else:
                right ^= table[left]
        left &= mask
        left <<= self.half_bits
        return left | (right & mask)


def micro_batches(batch: int, rank: int, world_size: int, micro_batch: int) -> list[tuple[int, int]]:
    """The places [begin, end) of the global batch that a rank takes, cut into micro batches of at most `micro_batch`.

    A rank owns [batch * rank // world_size, batch * (rank + 1) // world_size): exact for every world size. All ranks
    get the same number of micro batches, since each is a collective step; the last ones of a rank may be empty.
    """
    begin, end = batch * rank // world_size, batch * (rank + 1) // world_size
    largest_share = math.ceil(batch / world_size)
    steps = math.ceil(largest_share / micro_batch)
    return [(min(begin + i * micro_batch, end), min(begin + (i + 1) * micro_batch, end)) for i in range(steps)]
