"""ShardReader: rows of one shard, any of them in any order, gathered straight from the mapped file.

Always holds: only batches whose crc32 was checked are read. A row is found by address: where each column of a batch
begins is learned at the batch's first use, so that rows of many batches are one call of numpy, for little more than the
price of copying them. Made by `Dataset.shard`; called by the loader, and batch by batch by whoever reads whole shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.arrow_files import BATCH_ROWS, ArrowFile, ArrowReader
from data_pipeline.storage import ObjectStore

Rows = Mapping[str, Any]  # column -> numpy array [n, ...], or a list of str / bytes for columns of varying length

Columns = dict[str, Any]  # Rows that are being filled

ARROW_ALIGNMENT = 8  # bytes, of every buffer in an Arrow file
WIDE_BYTES = 4096  # of a value: copied by itself straight to its place, not with others through an array between


class ShardReader(ArrowReader):
    """One shard of one family. `rows` in it; every batch but the last has `batch_rows` rows."""

    batch_rows = BATCH_ROWS

    def __init__(
        self, store: ObjectStore, key: str, schema: pa.Schema, description: ArrowFile, cached: bool = True
    ) -> None:
        """Raises as ArrowReader does."""
        super().__init__(store, key, schema, description, cached=cached)
        self._located = np.zeros(len(self), np.bool_)
        self._begins = {name: np.zeros((len(self), 2), np.int64) for name in schema.names}  # in the file

    @property
    def rows(self) -> int:
        return self.description.rows

    def take(self, names: Sequence[str], rows: NDArray[np.int64]) -> Rows:
        """The named columns of `rows`, int64 [n], in that order. Raises ShardDamaged."""
        columns = empty_columns(self.schema, names, len(rows))
        self.take_into(columns, np.arange(len(rows)), rows)
        return columns

    def take_into(self, columns: Columns, places: NDArray[np.intp], rows: NDArray[np.int64]) -> None:
        """Put each of `rows`, int64 [n], into its place in `columns`, made by `empty_columns`. Raises ShardDamaged."""
        blocks, in_block = np.divmod(rows, self.batch_rows)
        if self._mapped is not None:
            for block in np.unique(blocks[~self._located[blocks]]):
                self._locate(int(block))
        mapped = self._mapped  # after that: a damaged copy in the cache is replaced, or lost, while it is checked
        if mapped is not None:
            for name, column in columns.items():
                begins = self._begins[name][blocks]
                _gather(mapped, begins, in_block, self.schema.field(name).type, column, places)
            return
        for block in np.unique(blocks):
            chosen = np.flatnonzero(blocks == block)
            message = self.message(int(block))
            found = _begins(message, self.schema)
            for name, column in columns.items():
                begins, kind = np.array([found[name]]), self.schema.field(name).type
                _gather(message, begins, in_block[chosen], kind, column, places[chosen])

    def _locate(self, block: int) -> None:
        message = self.message(block)
        for name, begins in _begins(message, self.schema).items():
            self._begins[name][block] = np.array(begins) + self.description.batches[block].offset
        self._located[block] = True


def empty_columns(schema: pa.Schema, names: Sequence[str], count: int) -> Columns:
    """Room for `count` values of each column."""
    columns: Columns = {}
    for name in names:
        kind = schema.field(name).type
        if _varies(kind):
            columns[name] = [None] * count
        else:
            columns[name] = np.empty((count, kind.list_size) if _is_list(kind) else count, _item(kind))
    return columns


def _begins(message: pa.Buffer, schema: pa.Schema) -> dict[str, tuple[int, int]]:
    """Where in a batch's bytes each column begins: its values; or where they end, and then their data."""
    begins = {}
    for field, column in zip(schema, pa.ipc.read_record_batch(message, schema).columns, strict=True):
        buffers = column.buffers()
        places = [buffer.address - message.address if buffer is not None else 0 for buffer in buffers[-2:]]
        begins[field.name] = (places[0], places[1]) if _varies(field.type) else (places[-1], 0)
    return begins


def _varies(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _item(kind: pa.DataType) -> np.dtype[Any]:
    # Not by pyarrow's own conversions, which import pandas, if it is installed, for 0.4 s at the first batch.
    value = kind.value_type if _is_list(kind) else kind
    letter = "f" if pa.types.is_floating(value) else "u" if pa.types.is_unsigned_integer(value) else "i"
    return np.dtype(f"{letter}{value.bit_width // 8}")


def _gather(
    data: pa.Buffer,
    begins: NDArray[np.int64],
    in_block: NDArray[np.int64],
    kind: pa.DataType,
    column: Any,
    places: NDArray[np.intp],
) -> None:
    """Copy values of one column out of `data`: begins int64 [n or 1, 2] of each one's batch, in_block [n] inside it."""
    if _varies(kind):
        # Where the value before it ends, and where it ends itself.
        ends = _at(data, begins[:, 0] + in_block * 4, 8, step=4).view(np.int32).reshape(-1, 2)
        view, decode = memoryview(data), pa.types.is_string(kind)
        spans = zip((begins[:, 1] + ends[:, 0]).tolist(), (begins[:, 1] + ends[:, 1]).tolist(), strict=True)
        for place, (start, end) in zip(places.tolist(), spans, strict=True):
            column[place] = str(view[start:end], "utf-8") if decode else bytes(view[start:end])
        return
    width = column.itemsize * (kind.list_size if _is_list(kind) else 1)
    addresses = begins[:, 0] + in_block * width
    if width >= WIDE_BYTES:
        source, target = memoryview(data).cast("B"), memoryview(column.reshape(-1)).cast("B")
        for to, start in zip((places * width).tolist(), addresses.tolist(), strict=True):
            target[to : to + width] = source[start : start + width]
        return
    values = _at(data, addresses, width, step=math.gcd(width, ARROW_ALIGNMENT))
    column.reshape(-1).view(values.dtype)[places] = values


def _at(data: pa.Buffer, addresses: NDArray[np.int64], width: int, step: int) -> NDArray[Any]:
    """`width` bytes at each of n addresses in `data`, multiples of `step`: [n] of one item each, copied."""
    # `data` as overlapping items, one at each possible address: a single fancy index takes them.
    item = f"u{width}" if width in (1, 2, 4, 8) else f"V{width}"
    items = np.ndarray((data.size - width) // step + 1, item, data, strides=step)
    return items[addresses // step]
