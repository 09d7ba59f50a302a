"""ShardTable: what a family's manifest says of its shards, in 48 bytes each.

Always holds: it reads like the list of the manifest that it was made of. As parsed JSON a shard takes 450 bytes in
every process that reads the family, which for 244,141 shards (a billion rows) is 107 MB. Called by Dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np


class ShardTable(Sequence[dict[str, Any]]):
    """Entries {name, rows, bytes, blake3}, in the order of the shards."""

    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        self.rows = np.array([entry["rows"] for entry in entries], np.int64)
        self.bytes = np.array([entry["bytes"] for entry in entries], np.int64)
        self._blake3 = b"".join(bytes.fromhex(entry["blake3"]) for entry in entries)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return {
            "name": shard_name(place),
            "rows": int(self.rows[place]),
            "bytes": int(self.bytes[place]),
            "blake3": self._blake3[32 * place : 32 * place + 32].hex(),
        }


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"
