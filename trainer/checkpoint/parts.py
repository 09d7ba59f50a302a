"""Part files: the flat intervals of one rank as a safetensors file, with a crc32 per block and one digest.

Always holds: the digests are taken from memory before the bytes leave it, over the whole file, header included; a read
returns only bytes whose blocks were checked. Called by save.py, load.py and verify. The header is written here because
`safetensors.save` needs the whole file in memory a second time; any safetensors reader opens the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data_pipeline import digests
from data_pipeline.config import Settings
from data_pipeline.storage import ObjectNotFound, ObjectStore
from trainer.engine.engine import Interval

BLOCK_BYTES = 16 * 2**20
ELEMENT_BYTES = 4


class CheckpointDamaged(Exception):
    """Stored bytes are not what the manifest says, or the manifest is not whole. The loader tries an older
    checkpoint."""

    def __init__(self, part: str, expected: str, found: str) -> None:
        self.part, self.expected, self.found = part, expected, found
        super().__init__(f"{part}: expected {expected}, found {found}")


class StoredInterval(Settings):
    """Where an interval lies: elements [offset, offset + length) of `name`, at byte `begin` of the part."""

    name: str
    kind: str
    offset: int
    length: int
    begin: int


class PartInfo(Settings):
    """One part as the manifest, and the writing rank's receipt, describe it."""

    file: str
    bytes: int
    sha256: str
    crc32: tuple[int, ...]  # of each block of BLOCK_BYTES
    intervals: tuple[StoredInterval, ...]


def encode_part(file: str, intervals: Sequence[Interval]) -> tuple[PartInfo, list[memoryview]]:
    """The description and the bytes (in pieces, not copied) of a part. `intervals` must not change until it is
    stored."""
    header: dict[str, Any] = {}
    begin = 0
    for interval in intervals:
        end = begin + len(interval.values) * ELEMENT_BYTES
        key = f"{interval.kind}/{interval.name}@{interval.offset}"
        header[key] = {"dtype": "F32", "shape": [len(interval.values)], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    chunks = [memoryview(head), *(_bytes_of(interval.values) for interval in intervals)]
    stored, at = [], len(head)
    for interval in intervals:
        length = len(interval.values)
        stored.append(
            StoredInterval(name=interval.name, kind=interval.kind, offset=interval.offset, length=length, begin=at)
        )
        at += length * ELEMENT_BYTES
    digest, checks = _digests(chunks)
    return PartInfo(file=file, bytes=at, sha256=digest, crc32=tuple(checks), intervals=tuple(stored)), chunks


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.numpy().data.cast("B")


def _digests(chunks: Sequence[memoryview]) -> tuple[str, list[int]]:
    """(sha256 of all bytes, crc32 of each block), in one pass over pieces of any length."""
    digest, checks, check, room = hashlib.sha256(), [], 0, BLOCK_BYTES
    for chunk in chunks:
        while len(chunk):
            piece, chunk = chunk[:room], chunk[room:]
            digest.update(piece)
            check = digests.crc32(piece, check)
            room -= len(piece)
            if room == 0:
                checks.append(check)
                check, room = 0, BLOCK_BYTES
    if room < BLOCK_BYTES:
        checks.append(check)
    return digest.hexdigest(), checks


class PartReader:
    """Checked ranged reads of one stored part; keeps the last block, so reads in file order touch each block once."""

    def __init__(self, store: ObjectStore, key: str, info: PartInfo) -> None:
        self._store, self._key, self._info = store, key, info
        self._block_index, self._block = -1, b""

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the part. Raises CheckpointDamaged naming part and block."""
        pieces = []
        for index in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            block = self._checked_block(index)
            base = index * BLOCK_BYTES
            pieces.append(block[max(begin - base, 0) : end - base])
        return b"".join(pieces)

    def blocks(self) -> Iterator[bytes]:
        """Every block of the part in order, checked."""
        for index in range(len(self._info.crc32)):
            yield self._checked_block(index)

    def _checked_block(self, index: int) -> bytes:
        if index == self._block_index:
            return self._block
        try:
            block = self._store.get_range(self._key, index * BLOCK_BYTES, BLOCK_BYTES)
        except ObjectNotFound:
            raise CheckpointDamaged(self._info.file, f"{self._info.bytes} bytes", "no such part") from None
        expected = min(BLOCK_BYTES, self._info.bytes - index * BLOCK_BYTES)
        if len(block) != expected:
            raise CheckpointDamaged(f"{self._info.file} block {index}", f"{expected} bytes", f"{len(block)} bytes")
        check = digests.crc32(block)
        if check != self._info.crc32[index]:
            raise CheckpointDamaged(
                f"{self._info.file} block {index}", f"crc32 {self._info.crc32[index]:08x}", f"{check:08x}"
            )
        self._block_index, self._block = index, block
        return block
