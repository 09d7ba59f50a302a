"""What a corpus build will need, from a sample of its input: storage, core-hours, tasks and sizes of manifests.

Always holds: rates and sizes of a record are measured here and now, on the first records of the first unit, with the
builder's own passes in a folder that is removed again; all else is arithmetic on them. Called by `glidepath plan`.
A plan is for one core of this kind: core-hours are processor time, whatever else the machine does meanwhile and however
many cores share the work; waiting for storage comes on top. Scorers and evaluation sets are named as not counted: a
scorer's rate is that of its device, which need not be here. The rows are those that the score pass keeps, so what
duplicates, scores and evaluation sets take is still among them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.config import find_config, read_values
from data_pipeline.corpus import CorpusConfig
from data_pipeline.dedup import choose_bands
from data_pipeline.emit import emit_shard, plan_shards
from data_pipeline.errors import UsageError, UserError
from data_pipeline.families import FAMILIES
from data_pipeline.judge import TASK_ROWS, judge
from data_pipeline.judge_rows import KEPT, ROW, JudgeSettings
from data_pipeline.near import NODE
from data_pipeline.records import Record, Rejected
from data_pipeline.score import ScoreSettings, score_unit
from data_pipeline.shards import open_dataset
from data_pipeline.sources import read_records
from data_pipeline.sources.units import Unit, find_units, public_uri, with_digest
from data_pipeline.storage import LocalStore

SAMPLE_RECORDS = 512
UNTIMED = "0" * 64  # digest of the unit that the sample stands for when it is scored for the first time
HOUR_S = 3600

# Rows of the judge pass per second and core, without and with near duplicates: benchmarks/results/dedup_hashes.json.
JUDGE_ROWS_PER_S, NEAR_ROWS_PER_S = 80_000, 55_000

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """What was measured; `per_row`: bytes of one kept row, `per_record` of one that came in."""

    unit: str
    records: int
    pairs: int
    rows: int
    unit_bytes: int
    record_bytes: float
    read_bytes_per_s: float
    score_pairs_per_s: float
    emit_rows_per_s: float
    staged_bytes_per_row: float
    verdict_bytes_per_pair: float
    family_bytes_per_row: dict[str, float]
    shard_manifest_bytes_per_batch: float


def is_corpus(name: str) -> bool:
    """Whether a configuration's name, or path, means a corpus and not a training."""
    try:
        path = find_config("corpus", name)
    except UsageError:
        return False
    return "inputs" in read_values(path)


def plan_corpus(config: CorpusConfig, pairs: int, records: int = SAMPLE_RECORDS) -> dict[str, Any]:
    """The document of `glidepath plan` for a corpus of `pairs` pictures with captions that are like its first ones.

    `not_counted` names the scorers and evaluation sets, whose work is in no figure. Raises UserError where the inputs
    or such a set are missing, or none of the sampled records is kept.
    """
    for entry in config.decontaminate.sets:  # found, not read
        if isinstance(entry, str):
            open_dataset(entry)
        else:
            find_units([entry])
    with tempfile.TemporaryDirectory(prefix="glidepath-plan-") as folder:
        sample = measured(config, records, LocalStore(Path(folder)))
    return planned(config, pairs, sample)


def planned(config: CorpusConfig, pairs: int, sample: Sample) -> dict[str, Any]:
    """The arithmetic of `plan_corpus`."""
    rows = round(pairs * sample.rows / sample.pairs)
    source = pairs / sample.pairs * sample.records * sample.record_bytes
    # A slice of the demo corpus is drawn, not read: it has no bytes.
    units = max(1, round(source / sample.unit_bytes if sample.unit_bytes else pairs / sample.pairs))
    shards = -(-rows // config.shard_rows)
    sections = max(1, -(-rows // TASK_ROWS))
    near = config.dedup.near
    blocks = 0 if near is None else near + 1
    families = {name: round(rows * size) for name, size in sample.family_bytes_per_row.items()}
    storage = {
        "source": round(source),
        "staged": round(rows * sample.staged_bytes_per_row),
        "verdicts": round(pairs * sample.verdict_bytes_per_pair),
        # Each shuffle writes all rows; near duplicates send one node to every block besides.
        "judge_scratch": rows * (_shuffles(config) * ROW.itemsize + KEPT.itemsize + blocks * NODE.itemsize),
        "dataset": sum(families.values()),
    }
    seconds = {
        "read": source / sample.read_bytes_per_s if sample.unit_bytes else 0.0,
        "score": pairs / sample.score_pairs_per_s,
        "judge": rows / (JUDGE_ROWS_PER_S if near is None else NEAR_ROWS_PER_S),
        "emit": rows / sample.emit_rows_per_s,
    }
    core_hours = {name: round(value / HOUR_S, 2) for name, value in seconds.items()}
    batches = -(-config.shard_rows // 256)
    return {
        "pairs": pairs,
        "rows": rows,
        "shards": shards,
        "units": units,
        "tasks": {"read": units, "score": units, "judge": _judge_tasks(config, sections), "emit": shards},
        "core_hours": core_hours | {"total": round(sum(seconds.values()) / HOUR_S, 2)},
        "not_counted": _not_counted(config),
        "storage_bytes": storage | {"total": sum(storage.values()) - storage["source"]},
        "dataset_bytes": families,
        "bucket_reads": {"emit": round(shards * reads_of_a_shard(config.shard_rows, units))},
        "manifest_bytes": {
            "one_shard": round(sample.shard_manifest_bytes_per_batch * batches),
            "all_shards": round(sample.shard_manifest_bytes_per_batch * batches * shards * len(FAMILIES)),
            "family": 160 * shards,
            "dataset": 420 * units + 6 * shards,
        },
        "agreeing_blocks": None if near is None else choose_bands(near, max(rows, 2)).agreeing,
        "sample": {name: _rounded(value) for name, value in vars(sample).items()},
    }


def reads_of_a_shard(rows: int, units: int) -> float:
    """Requests to a bucket of one emit task, on average: the manifest and the index of every unit that a row of the
    shard comes from, and each row once for every family."""
    touched = units * (1 - (1 - 1 / units) ** rows)
    return 2 * touched + len(FAMILIES) * rows


def _not_counted(config: CorpusConfig) -> list[str]:
    scorers = [f"scorer {public_uri(settings.checkpoint)}" for settings in config.scorers]
    uris = (entry if isinstance(entry, str) else entry.uri for entry in config.decontaminate.sets)
    return [*scorers, *(f"evaluation set {public_uri(uri)}" for uri in uris)]


def _shuffles(config: CorpusConfig) -> int:
    judging = JudgeSettings(exact=config.dedup.exact, near=config.dedup.near, judged=config.filters.judged())
    return len(judging.steps())


def _judge_tasks(config: CorpusConfig, sections: int) -> int:
    near = config.dedup.near
    pairing = 0 if near is None else sections * (near + 2) + -(-sections // 8)
    return sections * (_shuffles(config) + 1) + pairing


def measured(config: CorpusConfig, records: int, store: LocalStore) -> Sample:
    """Rates and sizes of the first `records` records; `store` is empty, and is left full of them."""
    unit, read_s = _timed(lambda: with_digest(_first(config)))
    found: list[Record | Rejected] = list(islice(read_records(unit), records))
    settings = ScoreSettings(config.filters.resolved(), config.captions, config.crop)
    # Once untimed: the first pictures load the tokenizer and the language model, once in a process, which takes as long
    # as all others of a sample together.
    score_unit(store, settings, replace(unit, digest=UNTIMED), iter(found))
    scored, score_s = _timed(lambda: score_unit(store, settings, unit, iter(found)))
    if not scored["out"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(scored["dropped"].items()))
        reasons = reasons or "it is empty"
        name = f"sample of {unit.name}"
        raise UserError(name, "records that are kept", f"0 of {scored['in']}: {reasons}", "check inputs and filters")
    prefixes = [settings.prefix(unit.digest)]
    keep = judge(store, prefixes, [scored], JudgeSettings(exact="none"))
    # One shard of all, from one unit. In a build of many units a shard opens one for nearly every row, which takes half
    # as long again: 0.43 against 0.28 ms a row, where scoring takes 3 to 5.
    [plan] = plan_shards("0" * 64, keep, prefixes, len(keep))
    shards, emit_s = _timed(lambda: emit_shard(store, plan))
    rows = len(keep)
    sizes = [len(record.image_bytes) + sum(map(len, record.captions)) for record in found if isinstance(record, Record)]
    return Sample(
        unit=unit.name,
        records=len(found),
        pairs=scored["in"],
        rows=rows,
        unit_bytes=unit.bytes,
        record_bytes=sum(sizes) / len(found),
        read_bytes_per_s=unit.bytes / read_s,
        score_pairs_per_s=scored["in"] / score_s,
        emit_rows_per_s=rows / emit_s,
        staged_bytes_per_row=scored["rows"]["bytes"] / rows,
        verdict_bytes_per_pair=sum(table["bytes"] for table in (*scored["verdicts"], scored["quarantine"]))
        / scored["in"],
        family_bytes_per_row={shard["family"]: shard["file"]["bytes"] / rows for shard in shards},
        shard_manifest_bytes_per_batch=_manifest_bytes(store) / sum(len(shard["file"]["batches"]) for shard in shards),
    )


def _first(config: CorpusConfig) -> Unit:
    units = find_units(config.inputs)
    if not units:
        raise UserError("corpus", "at least one input", "none", "add inputs=[{kind: …, uri: …}]")
    return units[0]


def _manifest_bytes(store: LocalStore) -> int:
    return sum(info.bytes for info in store.list("datasets/") if info.key.endswith(".json"))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and processor time in seconds: what it waits for disks and for others is not of the core."""
    began = time.process_time()
    return work(), time.process_time() - began


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 1) if isinstance(value, float) else value
