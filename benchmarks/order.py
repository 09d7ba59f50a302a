"""The sample order measured: what a global batch, a micro batch and a start cost at up to a billion rows.

    python -m benchmarks.order [--repetitions 7]

CPU time of one process, medians over the batches of a repetition; every repetition is kept. A batch follows the one
before, as in training, 5e12 positions into the sequence; what passing into a window costs is in it. `start` is a new
order until its first rows there are known; `epoch` is that first batch of a later epoch, for which the shards are put
into another order. `family` is what reading and keeping the manifest of a family of so many shards takes. Writes
results/order.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import write_result
from data_pipeline import manifests
from data_pipeline.digests import content_digest
from data_pipeline.mixture import Mixture
from data_pipeline.order import SampleOrder
from data_pipeline.shards import FORMAT, Dataset
from data_pipeline.storage import LocalStore

BATCH = 2048
FAR = 5 * 10**12 // BATCH * BATCH
BATCHES = 600  # of a repetition: more than pass through one window
SHAPES = {
    "1e4": (10_000, 4096),
    "1e7": (10**7, 4096),
    "1e9, 1e5 shards": (10**9, 10_000),
    "1e9, 244,141": (10**9, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    figures: dict[str, Any] = {}
    for name, (rows, shard_rows) in SHAPES.items():
        sizes = (*[shard_rows] * (rows // shard_rows), *([rows % shard_rows] if rows % shard_rows else []))
        figures[name] = order_figures(partial(SampleOrder, "0" * 64, sizes, 0, BATCH), repetitions)
        print(name, figures[name], flush=True)
    for name, weights in (("3:1", (3, 1)), ("70:29:1", (70, 29, 1))):
        figures[f"mixture {name} of 1e9"] = order_figures(partial(mixed, weights), repetitions)
        print(name, figures[f"mixture {name} of 1e9"], flush=True)
    figures["family of 244,141 shards"] = family_figures(244_141)
    print(figures["family of 244,141 shards"], flush=True)
    write_result("order", {"batch": BATCH, "figures": figures})


def mixed(weights: tuple[int, ...]) -> SampleOrder:
    store = LocalStore(Path("nothing"))
    sizes = (10_000,) * (100_000 // len(weights))
    documents = ({"id": f"{number:064x}", "rows": sum(sizes), "shard_rows": sizes} for number in range(len(weights)))
    datasets = [Dataset(store, "", document) for document in documents]
    return Mixture(datasets, [Fraction(weight) for weight in weights]).order(0, BATCH)


def order_figures(make: Callable[[], SampleOrder], repetitions: int) -> dict[str, Any]:
    """CPU microseconds of a global batch, of a micro batch of 8 and of a rank's 32 rows of each batch; milliseconds of
    a start and of a new epoch; bytes that stay."""
    tracemalloc.start()
    order = make()
    order.rows_at(np.arange(FAR, FAR + BATCH))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    figures: dict[str, Any] = {"kept_bytes": kept, "start_ms": [], "epoch_ms": []}
    shares = {"batch_us": (BATCH, BATCH, 0), "micro_batch_of_8_us": (8, 8, 0), "share_of_32_us": (BATCH, 32, 64)}
    for name in shares:
        figures[name] = []
    for number in range(repetitions):
        began = time.process_time()
        order = make()
        order.rows_at(np.arange(FAR, FAR + BATCH))
        figures["start_ms"].append((time.process_time() - began) * 1e3)
        began = time.process_time()
        order.rows_at(np.arange(FAR, FAR + BATCH) + (number + 1) * order.epoch_images)
        figures["epoch_ms"].append((time.process_time() - began) * 1e3)
        for name, (stride, count, first) in shares.items():
            begin = FAR + number * BATCHES * BATCH + first
            began = time.process_time()
            for step in range(BATCHES):
                order.rows_at(np.arange(begin + step * stride, begin + step * stride + count))
            figures[name].append((time.process_time() - began) / BATCHES * 1e6)
    rounded = {name: [round(value, 2) for value in values] for name, values in figures.items() if name != "kept_bytes"}
    medians = {f"median_{name}": round(statistics.median(values), 2) for name, values in rounded.items()}
    return {"kept_bytes": kept, **medians, **rounded}


def family_figures(shards: int) -> dict[str, Any]:
    """A synthetic manifest of a family."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        entries = [
            {"name": f"shard-{n:05d}", "rows": 4096, "bytes": 5 * 10**7 + n, "blake3": content_digest(b"%d" % n).hex()}
            for n in range(shards)
        ]
        document = {"format": FORMAT, "dataset_id": "0" * 64, "family": "base", "schema": "", "producer": ""}
        family = manifests.commit(store, "base/manifest.json", document | {"shards": entries})
        rows = [entry["rows"] for entry in entries]
        families = {"base": family["sha256"]}
        del entries, family
        dataset = Dataset(store, "", {"id": "0" * 64, "rows": sum(rows), "shard_rows": rows, "families": families})
        tracemalloc.start()
        dataset.family_manifest("base")
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        dataset._families.clear()
        began = time.process_time()
        dataset.family_manifest("base")
        seconds = time.process_time() - began
    return {"kept_bytes": kept, "most_bytes": most, "seconds": round(seconds, 2)}


if __name__ == "__main__":
    main()
