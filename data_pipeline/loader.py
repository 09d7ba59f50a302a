"""Loader: the batches of one rank, in the order of SampleOrder, prepared ahead by threads.

Always holds: which rows a rank sees at a position depends only on the order, the rank and the world size; reading ahead
changes when rows are read, never which. Rows come straight from memory-mapped shards; `prepare` (the recipe's pure
function) runs in the threads. Called by the training loop and by held-out evaluation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.draws import Draws
from data_pipeline.order import SampleOrder, micro_batches
from data_pipeline.shards import Dataset

Rows = Mapping[str, Any]  # column -> numpy array [b, ...], or a list of str / bytes for columns of varying length
Prepare = Callable[[Rows, Draws], Any]


@dataclass(frozen=True)
class Column:
    """A column of one family of a dataset, such as Column("base", "image64")."""

    family: str
    name: str


@dataclass(frozen=True)
class MicroBatch:
    """What one micro step trains on. `positions` int64 [b] and `ids` uint64 [b].

    b is 0 where a rank's share is used up: `batch` then is a row of another rank, to go through the same collective
    calls with weight 0.
    """

    positions: NDArray[np.int64]
    ids: NDArray[np.uint64]
    draws: Draws
    batch: Any


def read_rows(dataset: Dataset, columns: Sequence[Column], shards: NDArray[np.int64], rows: NDArray[np.int64]) -> Rows:
    """The named columns, and `id`, of rows given by (shard, row in shard), each int64 [b], in that order.

    Raises ShardDamaged (naming shard and batch) when stored bytes do not match the manifest.
    """
    out: dict[str, Any] = {}
    for family in dict.fromkeys(column.family for column in columns):
        names = ["id", *(column.name for column in columns if column.family == family)]
        for name, values in _read_family(dataset, family, names, shards, rows).items():
            out[name] = values
    return out


def _read_family(
    dataset: Dataset, family: str, names: Sequence[str], shards: NDArray[np.int64], rows: NDArray[np.int64]
) -> dict[str, Any]:
    """One pass over the record batches that hold the rows, so that each is looked up and checked once."""
    out: dict[str, Any] = {}
    batch_rows = dataset.shard(family, int(shards[0])).batch_rows
    blocks = np.stack([shards, rows // batch_rows])
    for shard, block in np.unique(blocks, axis=1).T:
        chosen = np.flatnonzero((blocks[0] == shard) & (blocks[1] == block))
        record_batch = dataset.shard(family, int(shard)).batch(int(block))
        for name in names:
            values = _take(record_batch.column(name), rows[chosen] % batch_rows)
            if isinstance(values, list):
                column = out.setdefault(name, [None] * len(rows))
                for place, value in zip(chosen, values, strict=True):
                    column[place] = value
            else:
                column = out.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))
                column[chosen] = values
    return out


def _take(array: pa.Array, rows: NDArray[np.int64]) -> Any:
    if pa.types.is_fixed_size_list(array.type):
        flat = array.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(array), array.type.list_size)[rows]
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return array.to_numpy(zero_copy_only=True)[rows]
    return array.take(pa.array(rows)).to_pylist()


class Loader:
    """Iterates over the micro batches of one rank, global batch after global batch, from a position on.

    `ahead` global batches are prepared by `threads` threads while the caller works.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        columns: Sequence[Column],
        prepare: Prepare,
        cut: Sequence[tuple[int, int]],
        ahead: int = 4,
        threads: int = 1,
    ) -> None:
        self.dataset, self.order, self.columns, self.prepare = dataset, order, columns, prepare
        self.cut, self.ahead, self.threads = cut, ahead, threads

    def batches(self, position: int, until: int) -> Iterator[list[MicroBatch]]:
        """The rank's micro batches of each global batch in [position, until), both multiples of the batch.

        Closing the iterator ends its threads.
        """
        starts = iter(range(position, until, self.order.batch))
        pending: deque[list[Future[MicroBatch]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="loader") as pool:

            def submit(start: int) -> None:
                pending.append([pool.submit(self._micro_batch, start + begin, start + end) for begin, end in self.cut])

            try:
                for start in islice(starts, self.ahead):
                    submit(start)
                while pending:
                    ready = [future.result() for future in pending.popleft()]
                    for following in islice(starts, 1):
                        submit(following)
                    yield ready
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _micro_batch(self, begin: int, end: int) -> MicroBatch:
        positions = np.arange(begin, end, dtype=np.int64)
        stand_in = np.array([begin - begin % self.order.batch])
        read = positions if begin < end else stand_in
        rows = read_rows(self.dataset, self.columns, *self.order.rows_at(read))
        draws = Draws(self.order.seed, read)
        return MicroBatch(positions, rows["id"][: len(positions)], draws, self.prepare(rows, draws))


__all__ = ["Column", "Loader", "MicroBatch", "Rows", "micro_batches", "read_rows"]
