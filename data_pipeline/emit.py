"""Emit: the third pass, over one shard: gather its rows from the staged units, write and commit every family.

Always holds: a shard's bytes depend on its plan alone, so any worker, at any time, writes the same; a committed shard
is not written again. Called by the corpus builder, once per shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from data_pipeline import manifests
from data_pipeline.arrow_files import BATCH_ROWS, damaged
from data_pipeline.families import FAMILIES, Family
from data_pipeline.judge import KeepList
from data_pipeline.manifests import Document
from data_pipeline.shards import read_shard_manifest, write_shard
from data_pipeline.staging import STAGED_FILE, Row, StagedUnit, column_of
from data_pipeline.storage import ObjectStore

READS_AT_ONCE = 16  # of a distant store


@dataclass(frozen=True)
class ShardPlan:
    """The rows of one shard: `units` are the folders that they come from; row i is rows[i] of units[unit_of[i]]."""

    dataset_id: str
    index: int
    units: tuple[str, ...]
    ids: Sequence[int]
    unit_of: Sequence[int]
    rows: Sequence[int]

    @property
    def name(self) -> str:
        return f"shard {self.index}"


def plan_shards(dataset_id: str, keep: KeepList, prefixes: Sequence[str], shard_rows: int) -> Iterator[ShardPlan]:
    """One plan for each `shard_rows` rows of the keep list; a plan names only the units that it needs."""
    for index, part in enumerate(keep.slices(shard_rows)):
        needed, unit_of = np.unique(part["unit"], return_inverse=True)
        units = tuple(prefixes[number] for number in needed.tolist())
        yield ShardPlan(dataset_id, index, units, part["id"].tolist(), unit_of.tolist(), part["row"].tolist())


def emit_shard(store: ObjectStore, plan: ShardPlan) -> list[Document]:
    """Write and commit one shard in every family; their manifests. Raises ShardDamaged if a staged row is damaged."""
    committed = []
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        staged: list[StagedUnit] = []
        for family in FAMILIES.values():
            manifest = read_shard_manifest(store, plan.dataset_id, family, plan.index)
            if manifest is None:
                staged = staged or _open_units(store, plan, pool)
                manifest = write_shard(store, plan.dataset_id, family, plan.index, _gather(plan, family, staged, pool))
            committed.append(manifest)
    return committed


def _open_units(store: ObjectStore, plan: ShardPlan, pool: Executor) -> list[StagedUnit]:
    wanted = np.bincount(plan.unit_of, minlength=len(plan.units)).tolist()
    return list(pool.map(partial(_open_unit, store), plan.units, wanted))


def _open_unit(store: ObjectStore, prefix: str, wanted: int) -> StagedUnit:
    manifest = manifests.read(store, f"{prefix}manifest.json")
    if manifest is None:
        raise damaged(f"{store.uri}/{prefix}manifest.json", "a manifest", "nothing")
    return StagedUnit(store, prefix, manifest["rows"], wanted)


def _gather(plan: ShardPlan, family: Family, staged: Sequence[StagedUnit], pool: Executor) -> Iterator[pa.RecordBatch]:
    def row_at(place: int) -> Row:
        [row] = staged[plan.unit_of[place]].rows(family, plan.rows[place], plan.rows[place] + 1)
        if (found := int.from_bytes(row["id"], "little")) != plan.ids[place]:
            name = f"{plan.units[plan.unit_of[place]]}{STAGED_FILE} row {plan.rows[place]}"
            raise damaged(name, f"id {plan.ids[place]:016x}", f"{found:016x}")
        return row

    # From a disk of this machine threads would only cost time.
    in_order = pool.map if any(unit.distant for unit in staged) else map
    for start in range(0, len(plan.ids), BATCH_ROWS):
        rows = list(in_order(row_at, range(start, min(start + BATCH_ROWS, len(plan.ids)))))
        yield pa.RecordBatch.from_arrays([column_of(field, rows) for field in family.schema], schema=family.schema)
