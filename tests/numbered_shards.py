"""A dataset whose rows are their own numbers, in shards of any size, and stores that count, cut off and fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline import manifests
from data_pipeline.families import FAMILIES
from data_pipeline.shards import Dataset, commit_dataset, commit_family, open_from, write_shard
from data_pipeline.storage import LocalStore, ObjectStore
from data_pipeline.tokenizer import TOKENIZER_SHA256


def numbered(first: int, rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of the base family: id and n_tokens tell the number of a row, and so do its pixels and caption."""
    schema = FAMILIES["base"].schema
    for start in range(first, first + rows, 256):
        numbers = np.arange(start, min(start + 256, first + rows))
        pixels = np.repeat((numbers % 251).astype(np.uint8), 12288)
        tokens = np.repeat(numbers.astype(np.uint16), 128)
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(numbers.astype(np.uint64)),
                pa.array([f"caption {number:07d}" for number in numbers]),
                pa.FixedSizeListArray.from_arrays(pa.array(tokens), 128).cast(schema.field("tokens").type),
                pa.array((numbers % 129).astype(np.uint16)),
                pa.FixedSizeListArray.from_arrays(pa.array(pixels), 12288).cast(schema.field("image64").type),
            ],
            schema=schema,
        )


def write_numbered(store: ObjectStore, shard_rows: tuple[int, ...]) -> Dataset:
    """Row r of shard s has the id 10,000 s + r."""
    identity = {"tokenizer": TOKENIZER_SHA256, "rows": sum(shard_rows)}
    dataset_id = manifests.digest_of(identity)
    shards = [
        write_shard(store, dataset_id, FAMILIES["base"], index, numbered(10_000 * index, rows))
        for index, rows in enumerate(shard_rows)
    ]
    family = commit_family(store, dataset_id, FAMILIES["base"], shards)
    commit_dataset(store, identity, [family], {"funnel": {}, "quarantined": 0})
    return open_from(store)


class DistantStore(LocalStore):
    """A folder that passes for a store on the network. `reads`: bytes read of each object's file name."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.down = False

    def local_path(self, key: str) -> None:  # type: ignore[override]
        return None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if self.down and key.endswith(".arrow"):
            raise ConnectionResetError(f"{key}: the store is down")
        data = super().get_range(key, start, length)
        self.reads[key.rsplit("/", 1)[-1]] += len(data)
        return data
