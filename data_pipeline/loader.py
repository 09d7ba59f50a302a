"""Loader: the batches of one rank, in the order of SampleOrder, prepared ahead by threads.

Always holds: which rows a rank sees at a position depends only on the order, the rank and the world size; reading ahead
changes when rows are read, never which, and batches come in order whatever the threads do. Rows come straight from
memory-mapped shards; `prepare` (the recipe's pure function) runs in the threads. Called by the training loop and by
held-out evaluation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.ahead import HORIZON, Ahead, shards_needed
from data_pipeline.draws import Draws
from data_pipeline.families import KNOWN_FAMILIES
from data_pipeline.loader_settings import LoaderSettings
from data_pipeline.order import SampleOrder, micro_batches
from data_pipeline.shard_reader import Columns, Rows, empty_columns
from data_pipeline.shards import Dataset, ShardDamaged
from data_pipeline.storage.cache import machine_cache
from data_pipeline.substitutes import Integers, Place, Substitutes

Prepare = Callable[[Rows, Draws], Any]

DEFAULTS = LoaderSettings()


@dataclass(frozen=True)
class Column:
    """A column of one family of a dataset, such as Column("base", "image64")."""

    family: str
    name: str


@dataclass(frozen=True)
class MicroBatch:
    """What one micro step trains on. `positions` int64 [b] and `ids` uint64 [b].

    b is 0 where a rank's share is used up: `batch` then is a row that counts elsewhere, to go through the same
    collective calls with weight 0. `replaced`: of each row that took the place of a damaged or quarantined one, where
    that one is.
    """

    positions: NDArray[np.int64]
    ids: NDArray[np.uint64]
    draws: Draws
    batch: Any
    replaced: tuple[Place, ...] = ()


def read_rows(dataset: Dataset, columns: Sequence[Column], shards: NDArray[np.int64], rows: NDArray[np.int64]) -> Rows:
    """The named columns, and `id`, of rows given by (shard, row in shard), each int64 [b], in that order.

    Raises ShardDamaged (naming shard and batch) when stored bytes do not match the manifest.
    """
    by_shard = np.argsort(shards, kind="stable")
    parts = np.split(by_shard, np.flatnonzero(np.diff(shards[by_shard])) + 1)
    out: Columns = {}
    for family in dict.fromkeys(column.family for column in columns):
        names = ["id", *(column.name for column in columns if column.family == family)]
        room = empty_columns(KNOWN_FAMILIES[family].schema, names, len(rows))
        for part in parts:
            _take_into(room, part, dataset, family, int(shards[part[0]]), rows[part])
        out.update(room)
    return out


def _take_into(
    columns: Columns, places: NDArray[np.intp], dataset: Dataset, family: str, shard: int, rows: NDArray[np.int64]
) -> None:
    try:
        dataset.shard(family, shard).take_into(columns, places, rows)
    except ShardDamaged as damage:
        damage.shard = shard
        raise


class Loader:
    """Iterates over the micro batches of one rank, global batch after global batch, from a position on.

    `settings.ahead` global batches are prepared while the caller works. `ranks_here`: ranks of this run on this
    machine, which share its cores and its cache of shards. `quarantined`: shards of which no row is read, others take
    their place.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        columns: Sequence[Column],
        prepare: Prepare,
        cut: Sequence[tuple[int, int]],
        settings: LoaderSettings = DEFAULTS,
        ranks_here: int = 1,
        quarantined: Collection[int] = (),
    ) -> None:
        self.dataset, self.order, self.columns, self.prepare = dataset, order, columns, prepare
        self.cut, self.settings, self.ranks_here = cut, settings, ranks_here
        read: Callable[[Integers, Integers], Rows] = partial(read_rows, dataset, columns)
        self._substitutes = Substitutes(dataset.shard_rows, read, quarantined, settings.on_damage)

    def batches(self, position: int, until: int) -> Generator[list[MicroBatch], None, None]:
        """The rank's micro batches of each global batch in [position, until), both multiples of the batch.

        Closing the iterator ends its threads.
        """
        starts = iter(range(position, until, self.order.batch))
        pending: deque[tuple[int, list[Future[MicroBatch]]]] = deque()
        threads = self.settings.threads_of(self.ranks_here)
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="loader"))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            ahead = stack.enter_context(self._ahead(position, until)) if self.dataset.distant else None

            def submit(start: int) -> None:
                pending.append((start, [pool.submit(self._micro_batch, start, *places) for places in self.cut]))

            for start in islice(starts, self.settings.ahead):
                submit(start)
            while pending:
                start, futures = pending.popleft()
                ready = [future.result() for future in futures]
                for following in islice(starts, 1):
                    submit(following)
                if ahead:
                    ahead.reached(start + self.order.batch)
                yield ready

    def _ahead(self, position: int, until: int) -> Ahead:
        begin, end = self.cut[0][0], self.cut[-1][1]
        families = list(dict.fromkeys(column.family for column in self.columns))
        needs = shards_needed(self.order, (begin, max(end, begin + 1)), families, position, until)
        cache = machine_cache()
        share = cache.limit_bytes // 2 // self.ranks_here
        self.dataset.shard.limit_bytes = share
        return Ahead(self.dataset, needs, cache, share, position, HORIZON * self.order.batch)

    def _micro_batch(self, start: int, begin: int, end: int) -> MicroBatch:
        return self.micro_batch(np.arange(start + begin, start + end, dtype=np.int64), start + self.cut[0][0])

    def micro_batch(self, positions: Integers, stand_in: int) -> MicroBatch:
        """The micro batch of these positions, int64 [b]; without any, one of weight 0 of the position `stand_in`."""
        read = positions if len(positions) else np.array([stand_in])
        values, replaced = self._substitutes.read(*self.order.rows_at(read))
        draws, count = Draws(self.order.seed, read), len(positions)
        return MicroBatch(positions, values["id"][:count], draws, self.prepare(values, draws), replaced[:count])

    def shards_at(self, positions: Integers) -> Integers:
        """The shard that each of these positions is read from, substitutes included: int64 [b]."""
        shards, _, _ = self._substitutes.replaced(*self.order.rows_at(positions))
        return shards


__all__ = ["Column", "Loader", "LoaderSettings", "MicroBatch", "Rows", "micro_batches", "read_rows"]
