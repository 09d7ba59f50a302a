"""Staging: the finished columns of a unit's surviving records, kept so that no picture is decoded twice.

Always holds: a staged row is one run of bytes with a crc32 per family over the values that the family takes, checked
when the row is taken out. Rows are taken in shuffled order, few of them from each unit, so a reader asks for those
bytes and no others. Written by the score pass, read by the emit pass and by scorers.

    rows.bin     row 0 | row 1 | … | where each begins and the last one ends: uint64 [rows + 1]
    a row        bytes of each value: uint32 [columns] | crc32 by family: uint32 [families] | the values

All numbers are little-endian; columns are those of all families, values are as Arrow holds them.
"""

from __future__ import annotations

import logging
import struct
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from typing_extensions import Buffer

from data_pipeline.arrow_files import VERIFY_CHUNK_BYTES, ShardDamaged, damaged
from data_pipeline.digests import crc32
from data_pipeline.families import FAMILIES, Family
from data_pipeline.images import Pixels
from data_pipeline.manifests import Document, digest_of
from data_pipeline.storage import ObjectNotFound, ObjectStore
from data_pipeline.storage.cache import CacheFull, machine_cache
from data_pipeline.tokenizer import encode_batch

log = logging.getLogger(__name__)

STAGED_SCHEMA = pa.schema({field.name: field.type for family in FAMILIES.values() for field in family.schema})
STAGED_FILE = "rows.bin"
INDEX_ROWS = 512  # of the index that are read together
# A reader that takes fewer of a distant unit's rows than one in so many asks for them one by one.
FEW = 16

# One row of one family: column name -> the value's bytes as Arrow holds them; numbers are little-endian.
Row = Mapping[str, Buffer]

_HEADER = struct.Struct(f"<{len(STAGED_SCHEMA) + len(FAMILIES)}I")
_OFFSET = np.dtype("<u8")


@dataclass(frozen=True)
class Survivor:
    """A record that passed every filter, computed but for its tokens. image64 uint8 [64, 64, 3]; image256 is a JPEG."""

    id: int
    caption: str
    image64: Pixels
    image256: bytes


def write_staged(store: ObjectStore, prefix: str, batches: Iterable[Sequence[Survivor]]) -> Document:
    """Store the survivors as the unit's staged rows; their number, and the file's bytes and crc32.

    The captions of a batch are tokenised together; one batch is in memory at a time.
    """
    ends, checksum = array("Q", [0]), 0

    def chunks() -> Iterator[bytes]:
        for batch in batches:
            for row in _packed(batch):
                ends.append(ends[-1] + len(row))
                yield row
        yield np.array(ends, _OFFSET).tobytes()

    def summed() -> Iterator[bytes]:
        nonlocal checksum
        for chunk in chunks():
            checksum = crc32(chunk, checksum)
            yield chunk

    store.put(f"{prefix}{STAGED_FILE}", summed())
    rows = len(ends) - 1
    return {"rows": rows, "bytes": ends[-1] + len(ends) * _OFFSET.itemsize, "crc32": f"{checksum:08x}"}


def _packed(survivors: Sequence[Survivor]) -> list[bytes]:
    tokens, n_tokens = encode_batch([survivor.caption for survivor in survivors])
    packed = []
    for index, survivor in enumerate(survivors):
        row: dict[str, Buffer] = {
            "id": survivor.id.to_bytes(8, "little"),
            "caption": survivor.caption.encode(),
            "tokens": memoryview(tokens[index]).cast("B"),
            "n_tokens": n_tokens[index].tobytes(),
            "image64": survivor.image64.tobytes(),
            "image256": survivor.image256,
        }
        values = [row[name] for name in STAGED_SCHEMA.names]
        sizes = (memoryview(value).nbytes for value in values)
        checksums = (crc32_of(family, row) for family in FAMILIES.values())
        packed.append(b"".join((_HEADER.pack(*sizes, *checksums), *values)))
    return packed


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
    """The staged rows of one unit, read from the store as they are asked for; safe to share between threads.

    Of a distant unit of which the reader wants many rows the whole file is copied to this machine's cache.
    """

    def __init__(self, store: ObjectStore, prefix: str, staged: Document, wanted: int) -> None:
        """`staged`: what `write_staged` returned. `wanted`: about how many of the rows will be asked for."""
        self._store, self._key, self._staged = store, f"{prefix}{STAGED_FILE}", staged
        self._index_begin = staged["bytes"] - (staged["rows"] + 1) * _OFFSET.itemsize
        self._ends: dict[int, NDArray[np.uint64]] = {}
        self._reads_index = threading.Lock()  # many threads ask for rows of one piece at once
        self._cached: pa.Buffer | None = None
        self.distant = store.local_path(self._key) is None
        if self.distant and wanted * FEW >= staged["rows"] > 0:
            self._cached = self._open_cached()

    def rows(self, family: Family, start: int, stop: int) -> list[Row]:
        """The values of rows `start` to `stop` for one family, in one read. Raises ShardDamaged.

        What arrives damaged over a network is asked for once more; a damaged copy in the cache is taken out of it.
        """
        try:
            return self._rows(family, start, stop)
        except ShardDamaged as damage:
            if not self.distant:
                raise
            log.warning("%s as it arrived; reading it from the store once more", damage)
        if self._cached is not None:
            machine_cache().forget(self._cache_name())
            self._cached = None
        with self._reads_index:
            self._ends.clear()
        return self._rows(family, start, stop)

    @property
    def _name(self) -> str:
        return f"{self._store.uri}/{self._key}"

    def _rows(self, family: Family, start: int, stop: int) -> list[Row]:
        ends = [self._end(row) for row in range(start, stop + 1)]
        if not all(begin + _HEADER.size <= end <= self._index_begin for begin, end in pairwise(ends)):
            raise self._damaged(start, f"rows that follow each other in {self._index_begin} bytes", f"ends at {ends}")
        data = self._read(ends[0], ends[-1] - ends[0])
        return [
            self._unpacked(family, data[begin - ends[0] : end - ends[0]], row)
            for row, (begin, end) in enumerate(pairwise(ends), start)
        ]

    def _unpacked(self, family: Family, data: memoryview, row: int) -> Row:
        """The family's values in a row's bytes. Damaged sizes give wrong values, which have another crc32."""
        if len(data) < _HEADER.size:
            raise self._damaged(row, f"{_HEADER.size} bytes and more", f"{len(data)}")
        numbers = _HEADER.unpack_from(data)
        ends = accumulate(numbers[: len(STAGED_SCHEMA)], initial=_HEADER.size)
        places = dict(zip(STAGED_SCHEMA.names, pairwise(ends), strict=True))
        values = {name: data[slice(*places[name])] for name in family.schema.names}
        expected = numbers[len(STAGED_SCHEMA) + list(FAMILIES).index(family.name)]
        if (found := crc32_of(family, values)) != expected:
            raise self._damaged(row, f"crc32 {expected:08x}", f"{found:08x}")
        return values

    def _damaged(self, row: int, expected: str, found: str) -> ShardDamaged:
        return damaged(f"{self._name} row {row}", expected, found)

    def _end(self, row: int) -> int:
        """Where row `row` begins, and the one before it ends."""
        piece, place = divmod(row, INDEX_ROWS)
        with self._reads_index:
            if piece not in self._ends:
                first = piece * INDEX_ROWS
                count = min(INDEX_ROWS, self._staged["rows"] + 1 - first)
                data = self._read(self._index_begin + first * _OFFSET.itemsize, count * _OFFSET.itemsize)
                if len(data) != count * _OFFSET.itemsize:
                    raise self._damaged(row, f"{self._staged['bytes']} bytes", "less")
                self._ends[piece] = np.frombuffer(data, _OFFSET)
            return int(self._ends[piece][place])

    def _read(self, start: int, length: int) -> memoryview:
        if (cached := self._cached) is not None:
            return memoryview(cached)[start : start + length]
        try:
            return memoryview(self._store.get_range(self._key, start, length))
        except ObjectNotFound:
            raise damaged(self._name, f"{self._staged['bytes']} bytes", "nothing") from None

    def _open_cached(self) -> pa.Buffer | None:
        """The whole file; None where it has no room."""
        size = self._staged["bytes"]

        def pieces() -> Iterator[bytes]:
            for start in range(0, size, VERIFY_CHUNK_BYTES):
                yield bytes(self._read(start, min(VERIFY_CHUNK_BYTES, size - start)))

        try:
            return machine_cache().open(self._cache_name(), size, pieces, _mapped)
        except CacheFull as full:
            log.warning("%s: %s; reading it from the store, row by row", self._name, full)
            return None
        except ValueError as error:
            raise damaged(self._name, f"{size} bytes", str(error)) from None

    def _cache_name(self) -> str:
        """By content: the key holds the digests of the unit and of all that its rows depend on."""
        return digest_of([self._key, self._staged])


def _mapped(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:  # the mapping outlives the descriptor
        return file.read_buffer()
