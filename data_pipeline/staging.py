"""Staging: the finished columns of a unit's surviving records, kept so that no picture is decoded twice.

Always holds: a staged row carries a crc32 per family over the values that the family takes, checked when the row is
taken out; rows are read one by one in shuffled order, so checking whole batches would read all staged data for every
shard. Written by the score pass, read by the emit pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.arrow_files import BATCH_ROWS, ArrowFile, ArrowReader, damaged
from data_pipeline.families import FAMILIES, Family
from data_pipeline.images import Pixels
from data_pipeline.storage import ObjectStore
from data_pipeline.tokenizer import encode_batch

_COLUMNS = {field.name: field for family in FAMILIES.values() for field in family.schema}
_CHECKSUMS = [pa.field(f"{name}_crc32", pa.uint32(), nullable=False) for name in FAMILIES]
STAGED_SCHEMA = pa.schema([*_COLUMNS.values(), *_CHECKSUMS])

# One row of one family: column name -> value as bytes, except `id` and `n_tokens`, which are integers.
Row = dict[str, Any]


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
    rows = [
        {
            "id": survivor.id,
            "caption": survivor.caption.encode(),
            "tokens": tokens[index].tobytes(),
            "n_tokens": int(n_tokens[index]),
            "image64": survivor.image64.tobytes(),
            "image256": survivor.image256,
        }
        for index, survivor in enumerate(survivors)
    ]
    checksums = [pa.array([crc32_of(family, row) for row in rows], pa.uint32()) for family in FAMILIES.values()]
    columns = [column_of(field, rows) for field in _COLUMNS.values()]
    return pa.RecordBatch.from_arrays([*columns, *checksums], schema=STAGED_SCHEMA)


def column_of(field: pa.Field, rows: Sequence[Row]) -> pa.Array:
    """The Arrow column of one field from rows of bytes and integers."""
    values = [row[field.name] for row in rows]
    if pa.types.is_fixed_size_list(field.type):
        dtype = np.dtype(str(field.type.value_type))
        flat = pa.array(np.frombuffer(b"".join(values), dtype))
        return pa.FixedSizeListArray.from_arrays(flat, type=field.type)
    if pa.types.is_string(field.type):
        return pa.array([value.decode() for value in values], field.type)
    return pa.array(values, field.type)


def crc32_of(family: Family, row: Row) -> int:
    """crc32 over the family's values in the order of its schema."""
    crc = 0
    for name in family.schema.names:
        value = row[name]
        crc = zlib.crc32(value.to_bytes(8, "little") if isinstance(value, int) else value, crc)
    return crc


class StagedUnit:
    """The staged rows of one unit."""

    def __init__(self, store: ObjectStore, key: str, file: ArrowFile) -> None:
        self._reader = ArrowReader(store, key, STAGED_SCHEMA, file, check_batches=False)
        self._batches: dict[int, pa.RecordBatch] = {}

    def row(self, family: Family, index: int) -> Row:
        """One row's values for one family. Raises ShardDamaged."""
        number, place = divmod(index, BATCH_ROWS)
        try:
            if number not in self._batches:
                self._batches[number] = self._reader.batch(number)
            batch = self._batches[number]
            row = {name: _value(batch.column(name), place) for name in family.schema.names}
            expected = batch.column(f"{family.name}_crc32")[place].as_py()
        except (pa.ArrowException, OSError) as error:
            raise damaged(f"{self._reader.name} row {index}", "an Arrow batch", str(error)) from None
        if (found := crc32_of(family, row)) != expected:
            self._reader.distrust()
            raise damaged(f"{self._reader.name} row {index}", f"crc32 {expected:08x}", f"{found:08x}")
        return row


def _value(column: pa.Array, place: int) -> Any:
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return column.values.to_numpy()[place * width : (place + 1) * width].tobytes()
    if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        return column[place].as_buffer().to_pybytes()
    return column[place].as_py()
