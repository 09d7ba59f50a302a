"""Spills: rows handed from the tasks of one step to those of the next, sorted into sections, through the store.

Always holds: what a section gives back has the crc32 that was taken when it was written; a task that is run again
writes the same object again. Rows have a fixed size in bytes, so a section is one ranged read, and no task or driver
holds more than its own share. Called by the judge pass; its spills lie in a scratch folder that no manifest names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import digests
from data_pipeline.arrow_files import damaged
from data_pipeline.storage import ObjectNotFound, ObjectStore

Rows = NDArray[Any]  # of a structured dtype, [n]


@dataclass(frozen=True)
class Piece:
    """One section of one object: `rows` rows from row `start`, and the crc32 of their bytes."""

    key: str
    start: int
    rows: int
    crc32: int


@dataclass(frozen=True)
class Spill:
    """One object: `counts` int64 and `crc32` uint32, both [sections]. Nothing is stored where there are no rows."""

    key: str
    counts: NDArray[np.int64]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        return int(self.counts.sum())

    def pieces(self) -> list[Piece | None]:
        """One for each section; None where it has no rows."""
        starts = np.cumsum(self.counts) - self.counts
        columns = zip(starts.tolist(), self.counts.tolist(), self.crc32.tolist(), strict=True)
        return [Piece(self.key, *column) if column[1] else None for column in columns]


def write_spill(store: ObjectStore, key: str, rows: Rows, section_of: NDArray[Any], sections: int) -> Spill:
    """Store `rows` [n] by section; `section_of` integer [n]. Rows keep their order within a section."""
    counts = np.bincount(section_of, minlength=sections).astype(np.int64)
    # Sections fit into 16 bits nearly always, and numpy then sorts by counting.
    by_section = section_of.astype(np.uint16) if sections <= 2**16 else section_of
    sorted_rows = rows[np.argsort(by_section, kind="stable")]
    pieces = np.split(sorted_rows, np.cumsum(counts)[:-1])
    crc32 = np.array([digests.crc32(piece.view(np.uint8).data) for piece in pieces], np.uint32)
    if len(rows):
        store.put(key, [sorted_rows.view(np.uint8).data])
    return Spill(key, counts, crc32)


def by_section(spills: Sequence[Spill]) -> list[list[Piece]]:
    """For each section its pieces in all `spills`."""
    columns = zip(*(spill.pieces() for spill in spills), strict=True)
    return [[piece for piece in column if piece] for column in columns]


def read_pieces(store: ObjectStore, pieces: Iterable[Piece], dtype: np.dtype[Any]) -> Rows:
    """The rows of all pieces, one after the other. Raises ShardDamaged."""
    return gather([_read(store, piece, dtype) for piece in pieces], dtype)


def gather(pieces: Sequence[Rows], dtype: np.dtype[Any]) -> Rows:
    """All pieces as one array, which may have no rows."""
    return np.concatenate(pieces) if pieces else np.empty(0, dtype)


def _read(store: ObjectStore, piece: Piece, dtype: np.dtype[Any]) -> Rows:
    name, length = f"{store.uri}/{piece.key} row {piece.start}", piece.rows * dtype.itemsize
    try:
        data = store.get_range(piece.key, piece.start * dtype.itemsize, length)
    except ObjectNotFound:
        raise damaged(name, f"{length} bytes", "nothing") from None
    if (found := digests.crc32(data)) != piece.crc32:
        raise damaged(name, f"crc32 {piece.crc32:08x}", f"{found:08x}")
    return np.frombuffer(data, dtype)


def section_of(mixed: NDArray[np.uint64], sections: int) -> NDArray[np.int64]:
    """The section [n] of evenly spread 64-bit words [n]: equal ranges of their values, in order."""
    return (((mixed >> np.uint64(32)) * np.uint64(sections)) >> np.uint64(32)).astype(np.int64)
