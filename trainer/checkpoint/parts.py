"""Part files: the flat intervals of one rank as a safetensors file, with a crc32 per block and one digest.

Always holds: the digests are taken from memory before the bytes leave it, over the whole file, header included; a read
returns only bytes whose blocks were checked. Called by save.py, load.py and verify. The header is written here because
`safetensors.save` needs the whole file in memory a second time; any safetensors reader opens the result.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator

from data_pipeline import digests
from data_pipeline.config import Settings
from data_pipeline.storage import ObjectNotFound, ObjectStore
from trainer.engine.engine import Interval

# What is checked, and so read, at once. Small, for a change between ZeRO-3 and the others scatters what a rank wants:
# 64 ranks of a 3.5B model read 8 GB each by blocks of 1 MiB and 30 by 16.
BLOCK_BYTES = 2**20
REQUEST_BYTES = 4 * 2**20  # blocks that follow each other are asked for together
ELEMENT_BYTES = 4


class CheckpointDamaged(Exception):
    """Stored bytes are not what the manifest says, or the manifest is not whole. The loader tries an older
    checkpoint."""

    def __init__(self, part: str, expected: str, found: str) -> None:
        self.part, self.expected, self.found = part, expected, found
        super().__init__(f"{part}: expected {expected}, found {found}")


class StoredInterval(NamedTuple):
    """Where an interval lies: elements [offset, offset + length) of `name`, at byte `begin` of the part."""

    name: str
    kind: str
    offset: int
    length: int
    begin: int


class Layout(Settings):
    """Intervals that follow each other in a part: all pieces of the first kind, the same pieces of the next, and so on.

    Under ZeRO-3 every rank holds a piece of every parameter, so that the pieces, written once for all kinds, make most
    of a manifest.
    """

    kinds: tuple[str, ...]
    pieces: tuple[tuple[str, int, int], ...]  # parameter, offset, length; in elements

    def bytes_per_kind(self) -> int:
        return ELEMENT_BYTES * sum(length for _, _, length in self.pieces)


class PartInfo(Settings):
    """One part as the manifest, and the writing rank's receipt, describe it."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    # Of the checkpoint that it was stored for, where that is another: a rollback refers to what it went back to.
    folder: Annotated[str, Field(pattern=r"^checkpoints/images-\d{9,}/attempt-\d+/$")] | None = None
    bytes: int
    digest: str  # of the file: `blake3:` or, in format 1, `sha256:`, then hexadecimal digits
    block_bytes: Annotated[int, Field(gt=0)]
    crc32: tuple[int, ...]  # of each block; the last one is shorter
    begin: int  # byte of the first value; the rest follow without a gap
    layout: tuple[Layout, ...]

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, values: Any) -> Any:
        """Format 1 listed every interval of every kind with its place, and digested by sha256."""
        if not isinstance(values, dict) or "intervals" not in values:
            return values
        try:
            intervals = [StoredInterval(**interval) for interval in values["intervals"]]
            begin = at = intervals[0].begin if intervals else values["bytes"]
            digest = f"sha256:{values['sha256']}"
        except (TypeError, KeyError) as error:
            raise ValueError(f"intervals and a sha256, found {error}") from None
        for interval in intervals:
            if interval.begin != at:
                raise ValueError(f"{interval.kind} of {interval.name} at byte {at}, found {interval.begin}")
            at += interval.length * ELEMENT_BYTES
        rest = {name: value for name, value in values.items() if name not in ("intervals", "sha256")}
        return {**rest, "digest": digest, "block_bytes": 16 * 2**20, "begin": begin, "layout": layout_of(intervals)}

    def intervals(self) -> Iterator[StoredInterval]:
        """Every interval, in the order of the file."""
        begin = self.begin
        for layout in self.layout:
            for kind in layout.kinds:
                for name, offset, length in layout.pieces:
                    yield StoredInterval(name, kind, offset, length, begin)
                    begin += length * ELEMENT_BYTES


def layout_of(intervals: Iterable[StoredInterval]) -> tuple[Layout, ...]:
    """The layout of intervals that follow each other."""
    found: list[tuple[list[str], list[tuple[str, int, int]]]] = []
    for kind, of_kind in groupby(intervals, key=lambda interval: interval.kind):
        pieces = [(interval.name, interval.offset, interval.length) for interval in of_kind]
        if found and found[-1][1] == pieces:
            found[-1][0].append(kind)
        else:
            found.append(([kind], pieces))
    return tuple(Layout(kinds=tuple(kinds), pieces=tuple(pieces)) for kinds, pieces in found)


def encode_part(file: str, intervals: Sequence[Interval]) -> tuple[PartInfo, list[memoryview]]:
    """The description and the bytes (in pieces, not copied) of a part. `intervals` must not change until it is
    stored."""
    head, layout = plan_part(intervals)
    chunks = [memoryview(head), *(_bytes_of(interval.values) for interval in intervals)]
    digest, checks = _digests(chunks)
    size = sum(len(chunk) for chunk in chunks)
    info = PartInfo(
        file=file,
        bytes=size,
        digest=digest,
        block_bytes=BLOCK_BYTES,
        crc32=tuple(checks),
        begin=len(head),
        layout=layout,
    )
    return info, chunks


def plan_part(intervals: Sequence[Interval]) -> tuple[bytes, tuple[Layout, ...]]:
    """What stands before the values of a part, and what follows: from names and lengths alone."""
    header: dict[str, Any] = {}
    stored, begin = [], 0
    for interval in intervals:
        length = len(interval.values)
        stored.append(StoredInterval(interval.name, interval.kind, interval.offset, length, begin))
        end = begin + length * ELEMENT_BYTES
        key = f"{interval.kind}/{interval.name}@{interval.offset}"
        header[key] = {"dtype": "F32", "shape": [length], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, layout_of(stored)


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.numpy().data.cast("B")


def _digests(chunks: Sequence[memoryview]) -> tuple[str, list[int]]:
    """(digest of all bytes, crc32 of each block), in one pass over pieces of any length."""
    digest, checks, check, room = digests.ContentHash(), [], 0, BLOCK_BYTES
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
    return f"blake3:{digest.hexdigest()}", checks


def digest_of_part(blocks: Iterable[bytes], like: str) -> str:
    """The digest of a part's bytes, by the algorithm of the digest `like`, and written like it."""
    algorithm = like.partition(":")[0]
    digest = hashlib.sha256() if algorithm == "sha256" else digests.ContentHash()
    for block in blocks:
        digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


class PartReader:
    """Checked reads of one stored part, by any number of threads."""

    def __init__(self, store: ObjectStore, key: str, info: PartInfo) -> None:
        self._store, self._key, self._info = store, key, info

    def blocks(self) -> Iterator[bytes]:
        """The whole part in order, checked, in pieces of several blocks."""
        at_once = max(1, REQUEST_BYTES // self._info.block_bytes)
        for first in range(0, len(self._info.crc32), at_once):
            yield self.read(first, min(first + at_once, len(self._info.crc32)))
        if self._store.get_range(self._key, self._info.bytes, 1):
            raise CheckpointDamaged(self._info.file, f"{self._info.bytes} bytes", "more")

    def read(self, first: int, end: int) -> bytes:
        """Blocks [first, end), checked. Raises CheckpointDamaged, which names the first that is not as it was."""
        size = self._info.block_bytes
        try:
            data = self._store.get_range(self._key, first * size, (end - first) * size)
        except ObjectNotFound:
            raise CheckpointDamaged(self._info.file, f"{self._info.bytes} bytes", "no such part") from None
        except OSError as error:
            if error.errno != errno.EIO:  # a disk that cannot read its own sectors any more
                raise
            raise CheckpointDamaged(f"{self._info.file} block {first}", "bytes that can be read", str(error)) from None
        for index in range(first, end):
            block = memoryview(data)[(index - first) * size : (index - first + 1) * size]
            expected = min(size, self._info.bytes - index * size)
            if len(block) != expected:
                raise CheckpointDamaged(f"{self._info.file} block {index}", f"{expected} bytes", f"{len(block)} bytes")
            check = digests.crc32(block)
            if check != self._info.crc32[index]:
                raise CheckpointDamaged(
                    f"{self._info.file} block {index}", f"crc32 {self._info.crc32[index]:08x}", f"{check:08x}"
                )
        return data
