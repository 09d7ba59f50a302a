"""Arrow files: tables in the store whose every record batch can be found, mapped and checked by itself.

Always holds: what a batch read returns has the crc32 that was taken when it was written; the same rows give the same
bytes. The description of a file (ArrowFile) is kept by the caller in a manifest: pyarrow does not expose where batches
lie, and a file that describes itself cannot vouch for itself. A file of a distant store is read through this machine's
cache. Called by shards.py.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline import digests
from data_pipeline.digests import ContentHash
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, ObjectStore, canonical_json
from data_pipeline.storage.cache import CacheFull, machine_cache

log = logging.getLogger(__name__)

BATCH_ROWS = 256
VERIFY_CHUNK_BYTES = 8 * 2**20


class ShardDamaged(UserError):
    """Stored rows are not what was written. `name` is the object and the batch.

    `batch`: the record batch; None: the whole file. `shard`: which one of its dataset, where the reader knows that.
    """

    batch: int | None = None
    shard: int | None = None


@dataclass(frozen=True)
class Batch:
    """Where one record batch lies in its file, in bytes, and the crc32 of those bytes (8 hex digits)."""

    offset: int
    length: int
    rows: int
    crc32: str


@dataclass(frozen=True)
class ArrowFile:
    """All that a manifest says of one Arrow file."""

    rows: int
    bytes: int
    blake3: str  # hex
    batches: tuple[Batch, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"batches": [asdict(batch) for batch in self.batches]}

    @staticmethod
    def from_json(document: dict[str, Any]) -> ArrowFile:
        batches = tuple(Batch(**batch) for batch in document["batches"])
        return ArrowFile(document["rows"], document["bytes"], document["blake3"], batches)


def write_arrow(store: ObjectStore, key: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> ArrowFile:
    """Store `batches` as one uncompressed Arrow IPC file, in memory one batch at a time."""
    description: list[Batch] = []
    digest, size = ContentHash(), 0

    def chunks() -> Iterator[memoryview]:
        nonlocal size
        for chunk in _serialise(schema, batches, description):
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    store.put(key, chunks())
    rows = sum(batch.rows for batch in description)
    return ArrowFile(rows, size, digest.hexdigest(), tuple(description))


def _serialise(schema: pa.Schema, batches: Iterable[pa.RecordBatch], description: list[Batch]) -> Iterator[memoryview]:
    sink = _Sink()
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            pieces = sink.drain()
            # The first write puts the schema before the batch, so a batch is counted back from its end.
            length = pa.ipc.get_record_batch_size(batch)
            crc32 = _crc32_of_last(pieces, length)
            description.append(Batch(sink.tell() - length, length, batch.num_rows, f"{crc32:08x}"))
            yield from pieces
    yield from sink.drain()


def _crc32_of_last(pieces: list[memoryview], length: int) -> int:
    """crc32 of the last `length` bytes of `pieces`."""
    before = sum(map(len, pieces)) - length
    crc32 = 0
    for piece in pieces:
        if before < len(piece):
            crc32 = digests.crc32(piece[max(before, 0) :], crc32)
        before -= len(piece)
    return crc32


class _Sink(io.RawIOBase):
    """Hands on what the Arrow writer writes, uncopied; positions count from the file's start, as its padding needs."""

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []
        self.position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")
        self.pieces.append(piece)
        self.position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self.position

    def drain(self) -> list[memoryview]:
        pieces, self.pieces = self.pieces, []
        return pieces


class ArrowReader:
    """Random access to the batches of one stored file, memory-mapped; safe to share between threads.

    Of a distant store the file is copied to the cache first, checked on the way. Where that cannot be (no room, a
    damaged batch, `cached` False) each batch is read from the store at each use.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        schema: pa.Schema,
        description: ArrowFile,
        cached: bool = True,
    ) -> None:
        """Raises ShardDamaged if the object is absent or has another size."""
        self.name, self.schema, self.description = f"{store.uri}/{key}", schema, description
        self._store, self._key = store, key
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        path = store.local_path(key)
        self._distant = path is None
        self._mapped: pa.Buffer | None = None  # the whole file; None: batch by batch
        if path is not None:
            self._mapped = self._map(path)
        elif cached:
            self._mapped = self._open_cached()

    def __len__(self) -> int:
        return len(self.description.batches)

    def batch(self, index: int) -> pa.RecordBatch:
        """Batch `index`, sharing the mapped memory; its crc32 is checked at its first use. Raises ShardDamaged."""
        return pa.ipc.read_record_batch(self.message(index), self.schema)

    def message(self, index: int) -> pa.Buffer:
        """The bytes of batch `index`, as `batch` reads them."""
        if index not in self._checked and self._mapped is not None:
            with self._lock:
                if index not in self._checked:
                    self._check_mapped(index)
        mapped = self._mapped
        if mapped is None:
            return pa.py_buffer(self._fetch(index))
        place = self.description.batches[index]
        return mapped.slice(place.offset, place.length)

    def _check_mapped(self, index: int) -> None:
        """Raises ShardDamaged; but a damaged copy in the cache is replaced by a fresh one, which was checked."""
        if self._mapped is None:
            return
        place = self.description.batches[index]
        try:
            self._check(index, self._mapped.slice(place.offset, place.length))
        except ShardDamaged as damage:
            if not self._distant:
                raise
            log.warning("%s in the cache; taking it from the store again", damage)
            machine_cache().forget(self.cache_name())
            self._mapped = self._open_cached()
        self._checked.add(index)

    def _map(self, path: Path) -> pa.Buffer:
        found = os.stat(path).st_size if path.is_file() else None
        if found != self.description.bytes:
            # Reading past the end of a mapped file kills the process, so a short one is never mapped.
            raise damaged(
                self.name, f"{self.description.bytes} bytes", "nothing" if found is None else f"{found} bytes"
            )
        with pa.memory_map(str(path)) as file:  # the mapping outlives the descriptor
            return file.read_buffer()

    def _open_cached(self) -> pa.Buffer | None:
        try:
            return machine_cache().open(self.cache_name(), self.description.bytes, self._fetch_all, self._map)
        except CacheFull as full:
            log.warning("%s: %s; reading it from the store, batch by batch", self.name, full)
        except ShardDamaged as damage:
            if damage.batch is None:
                raise
            # The others are whole, and whoever needs this one is told then.
            log.warning("%s; the file is not cached, but read from the store, batch by batch", damage)
        except ValueError as error:
            raise damaged(self.name, f"{self.description.bytes} bytes", str(error)) from None
        return None

    @property
    def in_cache(self) -> bool:
        """Whether this is a distant file of which the cache has a copy."""
        return self._distant and self._mapped is not None

    def cache_name(self) -> str:
        """By content, not by place: two stores may have had one URI, and one content may lie in two."""
        return hashlib.sha256(canonical_json([str(self.schema), self.description.to_json()])).hexdigest()

    def _fetch_all(self) -> Iterator[bytes]:
        """The whole object, batch by batch, each checked."""
        position = 0
        for index, place in enumerate(self.description.batches):
            yield self._get(position, place.offset - position)
            yield self._fetch(index)
            position = place.offset + place.length
        yield self._get(position, self.description.bytes - position + 1)  # one more, to see that it ends there

    def _fetch(self, index: int) -> bytes:
        place = self.description.batches[index]
        message = self._get(place.offset, place.length)
        try:
            self._check(index, message)
        except ShardDamaged as damage:
            log.warning("%s as it arrived; reading it from the store once more", damage)
            message = self._get(place.offset, place.length)
            self._check(index, message)
        return message

    def _get(self, start: int, length: int) -> bytes:
        try:
            return self._store.get_range(self._key, start, length) if length else b""
        except ObjectNotFound:
            raise damaged(self.name, f"{self.description.bytes} bytes", "nothing") from None

    def _check(self, index: int, message: Any) -> None:
        expected, found = self.description.batches[index].crc32, f"{digests.crc32(message):08x}"
        if found != expected:
            damage = damaged(f"{self.name} batch {index}", f"crc32 {expected}", found)
            damage.batch = index
            raise damage


def damaged(name: str, expected: str, found: str) -> ShardDamaged:
    return ShardDamaged(name, expected, found, "restore that object, or delete its folder and build again")


def digest_of_object(store: ObjectStore, key: str, algorithm: Callable[[], Any] = ContentHash) -> str | None:
    """The digest (hex) of a stored object, one piece in memory at a time; None if there is no such object."""
    digest, position = algorithm(), 0
    try:
        while piece := store.get_range(key, position, VERIFY_CHUNK_BYTES):
            digest.update(piece)
            position += len(piece)
    except ObjectNotFound:
        return None
    return str(digest.hexdigest())
