"""Judge: the second pass, over metadata alone: which of the surviving records the dataset keeps, and in which order.

Always holds: the result depends on the set of scored records and the seed, not on the order of units or on workers; of
equal records the one with the smallest id stays. Called by the corpus builder, once per build.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from data_pipeline.arrow_files import damaged
from data_pipeline.draws import key64, mix64
from data_pipeline.errors import UserError
from data_pipeline.manifests import Document
from data_pipeline.storage import ObjectStore


@dataclass(frozen=True)
class KeepList:
    """The rows of the dataset in their order: id, number of the unit, row among the unit's staged rows; each [n]."""

    ids: NDArray[np.uint64]
    units: NDArray[np.int64]
    rows: NDArray[np.int64]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """sha256 of the ids in order."""
        return hashlib.sha256(self.ids.astype("<u8").tobytes()).hexdigest()


def judge(store: ObjectStore, prefixes: Sequence[str], scored: Sequence[Document], seed: int) -> KeepList:
    """The keep list of units stored under `prefixes`, with their manifests. Raises UserError on an id collision."""
    tables = [
        _survivors(store, prefix, unit, number)
        for number, (prefix, unit) in enumerate(zip(prefixes, scored, strict=True))
    ]
    survivors = pa.concat_tables(tables).sort_by("id")
    ids = survivors["id"].to_numpy()
    _refuse_collisions(ids, survivors)
    keep = _first_of_equals(survivors)
    ids, units, rows = (survivors[name].to_numpy()[keep] for name in ("id", "unit", "row"))
    # mix64 is a bijection, so distinct ids get distinct keys and the order has no ties.
    order = np.argsort(mix64(ids ^ np.uint64(key64("row order", seed))), kind="stable")
    dropped = {"duplicate": len(survivors) - len(ids)} if len(survivors) > len(ids) else {}
    return KeepList(ids[order], units[order], rows[order], dropped)


def _survivors(store: ObjectStore, prefix: str, unit: Document, number: int) -> pa.Table:
    key = f"{prefix}verdicts.parquet"
    data = store.get(key)
    if (found := hashlib.sha256(data).hexdigest()) != unit["verdicts"]["sha256"]:
        raise damaged(f"{store.uri}/{key}", f"sha256 {unit['verdicts']['sha256'][:12]}", found[:12])
    table = pa.parquet.read_table(io.BytesIO(data), columns=["id", "key", "image_sha256", "caption", "row"])
    table = table.filter(pa.compute.is_valid(table["row"]))
    return table.append_column("unit", pa.array(np.full(len(table), number, np.int64)))


def _first_of_equals(survivors: pa.Table) -> NDArray[np.int64]:
    """Positions of the records whose picture bytes and caption did not come before; `survivors` is sorted by id."""
    seen: set[Any] = set()
    keep = []
    pairs = zip(survivors["image_sha256"].to_pylist(), survivors["caption"].to_pylist(), strict=True)
    for position, pair in enumerate(pairs):
        if pair not in seen:
            seen.add(pair)
            keep.append(position)
    return np.array(keep, np.int64)


def _refuse_collisions(ids: NDArray[np.uint64], survivors: pa.Table) -> None:
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        keys = survivors["key"].slice(int(twice[0]), 2).to_pylist()
        found = f"id {ids[twice[0]]:016x} for {keys[0]!r} and {keys[1]!r}"
        raise UserError("corpus", "one id per record", found, "rename one of the two in its input")
