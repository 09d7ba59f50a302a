"""Dedup: which of equal and nearly equal pictures stay; pure functions over arrays of 64-bit perceptual hashes.

Always holds: every pair of hashes within the distance is found, once, and nothing else is; which picture stays depends
on the set of pictures alone. Called by the judge pass, one task for each range of hash blocks.

How near pairs are found: the 64 bits are cut into d + r blocks. Two hashes that differ in at most d bits differ in at
most d blocks, so they agree on r whole ones. For each choice of r blocks the hashes are sorted by those bits, and only
hashes that are equal there are compared (Manku et al. 2007, "Detecting near-duplicates for web crawling"). All choices
whose lowest block is b need only hashes with an equal block b: a task that holds a range of values of block b makes
them all, so the hashes are sent to tasks d + 1 times, not once for each choice.

Which picture stays: pictures are taken in a stated order, and one is dropped if a picture that stays is within d. So
what is lost is always near to what is kept: a chain a~b~c does not lose c to a. A mirrored copy is another picture; a
picture too plain to have a hash (0) is never compared.

Which distance: of copies of 2,120 photographs (benchmarks/results/dedup_photographs.json) those that were resized to
50-200%, saved at JPEG quality 30-90, recoloured or made grey are within 4 bits (99.8% and more); of those cropped by 5%
it is 59% within 4, 86% within 6 and 97% within 8. No two of the photographs are within 8. But every further picture
may be near by chance: from how many pairs are within 10 to 16, about 0.1% of 1e8 pictures would be within 4 of another
one and 7% within 6. So 4 for corpora from the web, and 6 for those under 1e6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb, log2
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline.config import Settings

DEDUP_VERSION = "dedup-1"  # raise it when the same pictures can lose to others than before

HASH_BITS = 64
LARGEST_DISTANCE = 12  # beyond it the tables get few bits and pictures that have nothing in common get equal
MOST_AGREEING = 5

Hashes = NDArray[np.uint64]


class DedupSettings(Settings):
    """What counts as the same picture. `exact`: of equal source bytes or equal pixels with an equal caption (pair), or
    whatever the caption (picture). `near`: perceptual hashes that differ in at most so many bits; null: not compared.
    """

    exact: Literal["pair", "picture", "none"] = "pair"
    near: int | None = Field(default=None, ge=0, le=LARGEST_DISTANCE)


@dataclass(frozen=True)
class Bands:
    """Blocks of the hash for a distance: any two hashes within `distance` agree on `agreeing` blocks."""

    distance: int
    agreeing: int

    @property
    def blocks(self) -> int:
        return self.distance + self.agreeing

    def mask(self, *blocks: int) -> np.uint64:
        """The bits of some blocks. Block i holds bits 64 i // blocks up to those of block i + 1."""
        value = 0
        for block in blocks:
            low, high = HASH_BITS * block // self.blocks, HASH_BITS * (block + 1) // self.blocks
            value |= (1 << high) - (1 << low)
        return np.uint64(value)

    def tables(self, lowest: int) -> list[tuple[int, ...]]:
        """The choices of agreeing blocks whose lowest is `lowest`, 0 <= lowest <= distance."""
        rest = combinations(range(lowest + 1, self.blocks), self.agreeing - 1)
        return [(lowest, *chosen) for chosen in rest]


def choose_bands(distance: int, hashes: int) -> Bands:
    """The bands that cost least for so many different hashes: more agreeing blocks, more tables, fewer comparisons.

    Costs were measured: sorting one hash into a table takes as long as 20 comparisons, times log2 of their number / 20.
    Real hashes are not evenly spread; a table is taken to tell them apart by three quarters of its bits.
    """

    def cost(agreeing: int) -> float:
        blocks = distance + agreeing
        key_bits = 0.75 * HASH_BITS * agreeing / blocks
        compared = hashes * hashes / 2 / 2**key_bits
        return comb(blocks, agreeing) * (hashes * log2(hashes + 2) + compared)

    return Bands(distance, min(range(1, MOST_AGREEING + 1), key=cost))


def near_pairs(hashes: Hashes, bands: Bands, lowest: int) -> Iterator[NDArray[np.int64]]:
    """Pairs within the distance as [m, 3] of (position, position, bits that differ), from the tables of `lowest`.

    `hashes` [n] are all different, and any two that have an equal block `lowest` are both there. Over all values of
    `lowest` each pair comes exactly once: from the first table on whose blocks the two agree.
    """
    for table in bands.tables(lowest):
        keys = hashes & bands.mask(*table)
        order = np.argsort(keys)
        keys, sorted_hashes = keys[order], hashes[order]
        earlier_blocks = [bands.mask(block) for block in range(table[-1]) if block not in table]
        # Within a run of equal keys every hash meets the next, then the next but one, …: no list of pairs is ever held.
        left, shift = np.flatnonzero(keys[1:] == keys[:-1]), 1
        while len(left):
            differing = sorted_hashes[left] ^ sorted_hashes[left + shift]
            bits = np.bitwise_count(differing)
            found = np.flatnonzero(bits <= bands.distance)
            for mask in earlier_blocks:
                found = found[differing[found] & mask != 0]
            if len(found):
                pairs = (order[left[found]], order[left[found] + shift], bits[found])
                yield np.stack([column.astype(np.int64) for column in pairs], 1)
            shift += 1
            left = left[left + shift < len(keys)]
            left = left[keys[left] == keys[left + shift]]


def near_join(queries: Hashes, targets: Hashes, distance: int) -> NDArray[np.int64]:
    """Bits by which each query [n] differs from the nearest target [m]; -1 where that is more than `distance`."""
    nearest = np.full(len(queries), HASH_BITS + 1, np.int64)
    bands = choose_bands(distance, len(targets))
    for lowest in range(distance + 1):
        for table in bands.tables(lowest):
            mask = bands.mask(*table)
            order = np.argsort(targets & mask)
            keys = (targets & mask)[order]
            begin, end = (np.searchsorted(keys, queries & mask, side) for side in ("left", "right"))
            open_, shift = np.flatnonzero(begin < end), 0
            while len(open_):
                bits = np.bitwise_count(queries[open_] ^ targets[order[begin[open_] + shift]])
                nearest[open_] = np.minimum(nearest[open_], bits)
                shift += 1
                open_ = open_[begin[open_] + shift < end[open_]]
    return np.where(nearest <= distance, nearest, -1)


def kept_in_order(nodes: int, early: NDArray[np.int64], late: NDArray[np.int64], dropped: NDArray[np.bool_]) -> None:
    """Drop every node that has an earlier neighbour which is not dropped, in place; `dropped` bool [nodes].

    `early` < `late` [m] are the ends of each edge; nodes are numbered in the order in which they are taken. Some may be
    dropped from the start. The answer is that of taking them one by one; here all that can be decided is, at once
    (Blelloch et al. 2012, "Greedy sequential maximal independent set and matching are parallel on average").
    """
    alive = ~(dropped[early] | dropped[late])
    early, late = early[alive], late[alive]
    while len(early):
        waiting = np.zeros(nodes, np.bool_)
        waiting[late] = True
        # An early end that waits for nobody stays, and everything that is near to it goes.
        dropped[late[~waiting[early]]] = True
        open_ = ~dropped[early] & ~dropped[late]
        early, late = early[open_], late[open_]
