"""What a family's manifest says of its shards: as the manifest has it, in little memory."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import manifests
from data_pipeline.digests import content_digest
from data_pipeline.shard_table import ShardTable
from data_pipeline.shards import Dataset
from data_pipeline.storage import LocalStore


def entries_of(shards: int) -> list[dict[str, Any]]:
    digests = (content_digest(b"%d" % number).hex() for number in range(shards))
    return [
        {"name": f"shard-{number:05d}", "rows": 4096 - number % 2, "bytes": 2**33 + number, "blake3": blake3}
        for number, blake3 in enumerate(digests)
    ]


def test_a_shard_table_reads_like_the_list_it_was_made_of() -> None:
    entries = entries_of(5)
    table = ShardTable(entries)
    assert (list(table), table[-1], table[1:3], len(table)) == (entries, entries[-1], entries[1:3], 5)
    with pytest.raises(IndexError):
        table[5]
    assert list(ShardTable([])) == []


def test_a_dataset_keeps_less_than_a_hundred_bytes_of_each_shard(tmp_path: Path) -> None:
    store, shards = LocalStore(tmp_path), 20_000
    document = {"dataset_id": "d" * 64, "schema": "", "producer": "", "shards": entries_of(shards)}
    family = manifests.commit(store, "base/manifest.json", document)
    rows = [entry["rows"] for entry in document["shards"]]
    manifests.commit(store, "manifest.json", {"id": "d" * 64, "rows": sum(rows), "shard_rows": rows, "families": {}})
    gc.collect()
    tracemalloc.start()
    manifest = manifests.read(store, "manifest.json")
    assert manifest is not None
    dataset = Dataset(store, "", manifest)
    del manifest
    found = dataset.family_manifest("base")
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["sha256"] == family["sha256"] and list(found["shards"]) == document["shards"]
    assert list(dataset.shard_rows) == rows
    assert kept < 100 * shards
