"""Staging: the finished columns of a unit's surviving records, kept so that no picture is decoded twice.

Always holds: a staged row carries a crc32 per family over the values that the family takes, checked when the row is
taken out; rows are read one by one in shuffled order, so checking whole batches would read all staged data for every
shard. Written by the score pass, read by the emit pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
from typing_extensions import Buffer

from data_pipeline.arrow_files import BATCH_ROWS, ArrowFile, ArrowReader, damaged
from data_pipeline.digests import crc32
from data_pipeline.families import FAMILIES, Family
from data_pipeline.images import Pixels
from data_pipeline.storage import ObjectStore
from data_pipeline.tokenizer import encode_batch

_COLUMNS = {field.name: field for family in FAMILIES.values() for field in family.schema}
_CHECKSUMS = [pa.field(f"{name}_crc32", pa.uint32(), nullable=False) for name in FAMILIES]
STAGED_SCHEMA = pa.schema([*_COLUMNS.values(), *_CHECKSUMS])

# One row of one family: column name -> the value's bytes as Arrow holds them; numbers are little-endian.
Row = Mapping[str, Buffer]


@dataclass(frozen=True)
class Survivor:
    """A record that passed every filter, computed but for its tokens. image64 uint8 [64, 64, 3]; image256 is a JPEG."""

    id: int
    caption: str
    image64: Pixels
    image256: bytes


def stage(survivors: Sequence[Survivor]) -> pa.RecordBatch:
    """The staged batch of at most BATCH_ROWS survivors; their captions are tokenised together."""
    tokens, n_tokens = encode_batch([survivor.caption for survivor in survivors])
    rows: list[Row] = [
        {
            "id": survivor.id.to_bytes(8, "little"),
            "caption": survivor.caption.encode(),
            "tokens": memoryview(tokens[index]).cast("B"),
            "n_tokens": n_tokens[index].tobytes(),
            "image64": survivor.image64.tobytes(),
            "image256": survivor.image256,
        }
        for index, survivor in enumerate(survivors)
    ]
    checksums = [pa.array([crc32_of(family, row) for row in rows], pa.uint32()) for family in FAMILIES.values()]
    columns = [column_of(field, rows) for field in _COLUMNS.values()]
    return pa.RecordBatch.from_arrays([*columns, *checksums], schema=STAGED_SCHEMA)


def column_of(field: pa.Field, rows: Sequence[Row]) -> pa.Array:
    """The Arrow column of one field from rows of bytes, put together without a Python object per number."""
    values = [row[field.name] for row in rows]
    data = pa.py_buffer(b"".join(values))
    if pa.types.is_fixed_size_list(field.type):
        numbers = len(rows) * field.type.list_size
        flat = pa.Array.from_buffers(field.type.value_type, numbers, [None, data])
        return pa.FixedSizeListArray.from_arrays(flat, type=field.type)
    if pa.types.is_string(field.type) or pa.types.is_binary(field.type):
        ends = array("i", accumulate((memoryview(value).nbytes for value in values), initial=0))
        return pa.Array.from_buffers(field.type, len(rows), [None, pa.py_buffer(ends), data])
    return pa.Array.from_buffers(field.type, len(rows), [None, data])


def crc32_of(family: Family, row: Row) -> int:
    """crc32 over the family's values in the order of its schema."""
    value = 0
    for name in family.schema.names:
        value = crc32(row[name], value)
    return value


class StagedUnit:
    """The staged rows of one unit."""

    def __init__(self, store: ObjectStore, key: str, file: ArrowFile) -> None:
        self._reader = ArrowReader(store, key, STAGED_SCHEMA, file, check_batches=False)
        self._batches: dict[int, dict[str, _Values]] = {}

    def row(self, family: Family, index: int) -> Row:
        """One row's values for one family, sharing the mapped memory. Raises ShardDamaged."""
        number, place = divmod(index, BATCH_ROWS)
        columns = self._batches.get(number) or self._open_batch(number)
        row = {name: columns[name].at(place) for name in family.schema.names}
        expected = int.from_bytes(columns[f"{family.name}_crc32"].at(place), "little")
        if (found := crc32_of(family, row)) != expected:
            self._reader.distrust()
            raise damaged(f"{self._reader.name} row {index}", f"crc32 {expected:08x}", f"{found:08x}")
        return row

    def _open_batch(self, number: int) -> dict[str, _Values]:
        try:
            batch = self._reader.batch(number)
        except (pa.ArrowException, OSError) as error:
            raise damaged(f"{self._reader.name} batch {number}", "an Arrow batch", str(error)) from None
        self._batches[number] = {field.name: _Values(batch.column(field.name)) for field in STAGED_SCHEMA}
        return self._batches[number]


class _Values:
    """The bytes of each value of a column without nulls. Damaged offsets give wrong bytes, never a crash."""

    def __init__(self, column: pa.Array) -> None:
        data = column.buffers()[-1]
        self._data = memoryview(data if data is not None else b"").cast("B")
        self._ends, self._width = None, 0
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            self._ends = memoryview(column.buffers()[1]).cast("B").cast("i")
        elif pa.types.is_fixed_size_list(column.type):
            self._width = column.type.list_size * column.type.value_type.bit_width // 8
        else:
            self._width = column.type.bit_width // 8

    def at(self, place: int) -> memoryview:
        if self._ends is not None:
            return self._data[self._ends[place] : self._ends[place + 1]]
        return self._data[place * self._width : (place + 1) * self._width]
