"""A corpus of 1e9 rows and 1e5 shards as its driver sees it, within 4 GB: listing, judging, planning shards, order.

Always holds: what runs is the builder's own driver code; what a task would answer is made up here, of the size that it
has. Real: units and their manifests as the driver keeps them; the judge's shuffles with one answer for each task and
one piece for each pair of tasks; digest and shard plans of the first PIECES pieces of the order; SampleOrder of all
rows. Made up: what tasks answer, and the rows that they would have left in the store. What one task holds is measured
by `benchmarks.dedup hashes`. Called by benchmarks/dedup.py.
"""

from __future__ import annotations

import hashlib
import resource
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipeline.draws import mix64
from data_pipeline.emit import plan_shards
from data_pipeline.families import FAMILIES
from data_pipeline.judge import TASK_ROWS, HandedOn, KeepList, Ordered, judge
from data_pipeline.judge_rows import KEPT, JudgeSettings, Task
from data_pipeline.order import SampleOrder
from data_pipeline.shards import commit_dataset, commit_family
from data_pipeline.sources import Input, Unit
from data_pipeline.sources.files import SourceFile
from data_pipeline.spills import Piece, Spill
from data_pipeline.storage import LocalStore, ObjectStore

UNITS = 100_000  # tars of 10,000 pairs, as img2dataset writes them
NEAR = 4
PIECES = 12  # of some 500; memory does not grow from one to the next


def scale(rows: int, shards: int) -> dict[str, Any]:
    """Seconds and peak memory after each stage, in one process."""
    stages: dict[str, Any] = {}
    began = time.perf_counter()

    def done(name: str, **figures: Any) -> None:
        nonlocal began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        stages[name] = figures | {"seconds": round(time.perf_counter() - began, 1), "peak_rss_mib": peak}
        print(name, stages[name], flush=True)
        began = time.perf_counter()

    done("imports")
    prefixes, scored, units = _listed(rows)
    done("listing", units=len(units))
    tasks = _MadeUpTasks(rows, -(-rows // TASK_ROWS))
    keep = judge(cast(ObjectStore, _NoStore()), prefixes, scored, JudgeSettings(near=NEAR), tasks)
    done("judging", tasks_by_step=dict(tasks.count), sections=tasks.sections)
    keep = KeepList(replace(keep.work, store=cast(ObjectStore, _MadeUpRows(rows))), _pieces(rows, tasks.sections), ())
    done("digest of the ids", rows=len(keep), digest=keep.digest()[:16])
    shard_rows = -(-rows // shards)
    plans = planned = 0
    for plan in plan_shards("0" * 64, keep, prefixes, shard_rows):
        plans, planned = plans + 1, planned + len(plan.ids)
    assert planned == len(keep)
    done("plans of shards", shards=plans)
    with tempfile.TemporaryDirectory() as folder:
        done("manifests", **_committed(LocalStore(Path(folder)), prefixes, scored, rows, shards))
    order = SampleOrder("0" * 64, (shard_rows,) * (rows // shard_rows), seed=0, batch=2048)
    positions = np.arange(order.epoch_images // 2, order.epoch_images // 2 + 2048)
    order.rows_at(positions)
    done("sample order, first batch")
    return {"rows": rows, "shards": shards, "limit_mib": 4096, "stages": stages}


def _listed(rows: int) -> tuple[list[str], list[dict[str, Any]], list[Unit]]:
    """Folders and manifests of units, and the units, as build.py keeps them."""
    names = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(UNITS)]
    reasons = ("caption_too_short", "image_too_small", "image_aspect", "image_damaged")
    scored = [
        {
            "format": "glidepath-unit-3",
            "unit": name,
            "bytes": 300_000_000 + number,
            "settings": name,
            "in": rows // UNITS + 500,
            "out": rows // UNITS,
            "dropped": dict.fromkeys(reasons, 125 + number % 7),
            "quarantined": 30,
            "bad": [
                {"key": f"{number:09d}{bad}", "reason": reasons[3], "detail": "Premature end"} for bad in range(10)
            ],
            "verdicts": {"bytes": 2_000_000, "sha256": name},
            "quarantine": {"bytes": 9_000, "sha256": name},
        }
        for number, name in enumerate(names)
    ]
    units = []
    for number, name in enumerate(names):
        uri = f"s3://bucket/of/some/length/corpus/{number:05d}.tar"
        entry = Input(kind="img2dataset", uri="s3://bucket/of/some/length/corpus")
        units.append(Unit("img2dataset", uri, 0, name, 300_000_000, entry, SourceFile(uri, None, name, 300_000_000)))
    return [f"units/{name}-0123456789abcdef/" for name in names], scored, units


def _committed(
    store: LocalStore, prefixes: list[str], scored: list[dict[str, Any]], rows: int, shards: int
) -> dict[str, int]:
    """Sizes of the manifests of families and dataset, in bytes."""
    size = rows // shards
    families = []
    for name, family in FAMILIES.items():
        entries = [
            {"family": name, "shard": shard, "file": {"rows": size, "bytes": 10**8 + shard, "blake3": f"{shard:064x}"}}
            for shard in range(shards)
        ]
        families.append(commit_family(store, "0" * 64, family, entries))
    identity = {"units": [unit["unit"] for unit in scored], "rows": rows}
    facts = {
        "units": [
            {"digest": unit["unit"], "uri": f"s3://bucket/of/some/length/corpus/{number:05d}.tar", "folder": prefix}
            | {key: unit[key] for key in ("bytes", "in", "out")}
            for number, (prefix, unit) in enumerate(zip(prefixes, scored, strict=True))
        ]
    }
    commit_dataset(store, identity, families, facts)
    return {info.key.removeprefix("datasets/")[64:].lstrip("/"): info.bytes for info in store.list("datasets/")}


class _MadeUpTasks:
    """An executor whose tasks answer at once, in the sizes that real ones would."""

    def __init__(self, rows: int, sections: int) -> None:
        self.rows, self.sections = rows, sections
        self.count: dict[str, int] = {}

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        name = getattr(function, "func", function).__name__.strip("_")
        for item in items:
            self.count[name] = self.count.get(name, 0) + 1
            yield getattr(self, name)(item)

    def _spill(self, key: str, sections: int, rows: int) -> Spill:
        counts = np.full(sections, max(1, rows // sections), np.int64)
        return Spill(f"judge/scratch-{'0' * 32}/{key}", counts, np.zeros(sections, np.uint32))

    def gather(self, task: Task) -> HandedOn:
        return self.judge_step(task)

    def judge_step(self, task: Task) -> HandedOn:
        rows, dropped = (
            self._spill(f"{task.step}-{task.number:05d}.{kind}", self.sections, self.rows // self.sections)
            for kind in ("rows", "dropped")
        )
        return HandedOn(task.number, rows, dropped, {"duplicate": 1})

    def collapse(self, task: Task) -> tuple[int, Spill, Any]:
        blocks = NEAR + 1
        spill = self._spill(f"nodes-{task.number:05d}", blocks * self.sections, TASK_ROWS)
        return task.number, spill, mix64(np.arange(64, dtype=np.uint64) + np.uint64(64 * task.number))

    def pairs(self, task: Task) -> tuple[int, Spill]:
        return task.number, self._spill(f"edges-{task.number:05d}", -(-self.sections // 8), TASK_ROWS)

    def resolve(self, task: Task) -> tuple[Spill, Spill]:
        ranges = -(-self.sections // 8)
        lost = self._spill(f"range-{task.number:05d}.lost", self.sections, TASK_ROWS)
        later = self._spill(f"range-{task.number:05d}.later", ranges, TASK_ROWS)
        return lost, later

    def order(self, task: Task) -> Ordered:
        piece = Piece(f"judge/scratch-{'0' * 32}/order-{task.number:05d}.rows", 0, self.rows // self.sections, 0)
        return Ordered(task.number, piece, piece, np.empty(0, KEPT))


class _NoStore:
    """Nothing is stored by the driver while it judges."""

    uri = "nowhere"


class _MadeUpRows:
    """A store whose pieces hold KEPT rows that are a function of their place; crc32 is turned off by being right."""

    uri = "nowhere"

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def get_range(self, key: str, start: int, length: int) -> bytes:
        first, count = int(key) + start // KEPT.itemsize, length // KEPT.itemsize
        rows = np.zeros(count, KEPT)
        numbers = np.arange(first, first + count, dtype=np.uint64)
        rows["id"] = mix64(numbers)
        rows["unit"], rows["row"] = rows["id"] % np.uint64(UNITS), numbers % np.uint64(10_000)
        return rows.tobytes()


def _pieces(rows: int, sections: int) -> tuple[Piece, ...]:
    """The first PIECES pieces of the order, of the size that they have."""
    store = _MadeUpRows(rows)
    borders = [rows * section // sections for section in range(min(PIECES, sections) + 1)]
    return tuple(
        Piece(str(start), 0, end - start, zlib.crc32(store.get_range(str(start), 0, (end - start) * KEPT.itemsize)))
        for start, end in pairwise(borders)
    )
