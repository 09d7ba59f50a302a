"""Build: a corpus into a dataset, in three passes over an Executor: score each unit, judge all, emit each shard.

Always holds: the dataset's id and bytes depend on the content of the inputs and the settings in its identity, never on
the number of workers, on paths, on times or on how often the build was killed; every record that came in went out or
was dropped for a counted reason. Called by the command line and, with another Executor, by cluster jobs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol, cast

from data_pipeline import manifests
from data_pipeline.corpus import CorpusConfig, resolve_output
from data_pipeline.decontaminate import read_evaluation
from data_pipeline.dedup import DEDUP_VERSION
from data_pipeline.emit import ShardPlan, emit_shard, plan_shards
from data_pipeline.errors import UsageError, UserError
from data_pipeline.executor import Executor, InlineExecutor
from data_pipeline.families import CODEC_VERSIONS, FAMILIES, KNOWN_FAMILIES
from data_pipeline.judge import KeepList, judge
from data_pipeline.judge_rows import JudgeSettings
from data_pipeline.manifests import Document, digest_of
from data_pipeline.records import RECORDS_VERSION, text_key
from data_pipeline.score import UNIT_FILE, ScoreSettings, score_unit
from data_pipeline.scorers import ScorerPool, digests_in_force, refuse_unscored
from data_pipeline.shards import Dataset, commit_dataset, commit_family, dataset_ids, open_dataset
from data_pipeline.sources import Input, Unit, list_units
from data_pipeline.sources.remote import is_remote, public_uri
from data_pipeline.storage import ObjectStore, open_store
from data_pipeline.tokenizer import TOKENIZER_SHA256

__all__ = ["CorpusConfig", "build_corpus", "inspect_dataset", "resolve_output", "sweep_build"]

IDENTITY_VERSION = "corpus-2"  # of the judge's rules and the row order

# Of a configuration, what the dataset's manifest does not hold: where the passes run, and where their results go.
NOT_OF_CONTENT: Any = {"output": True, "executor": True, "scorers": {"__all__": {"device", "actors"}}}

# The names that builds and enrichments give in an output. A sweep touches nothing else: other people's files may lie in
# the same folder, and under `datasets/` as well.
HEX16, HEX32, HEX64 = (f"[0-9a-f]{{{digits}}}" for digits in (16, 32, 64))
UNIT = f"units/{HEX64}-{HEX16}"
FAMILY = f"datasets/{HEX64}/(?:{'|'.join(map(re.escape, KNOWN_FAMILIES))})"
COMMITTED_BY = {  # objects -> the manifest without which they are leftovers
    re.compile(rf"({UNIT})/(?:{UNIT_FILE}|scores-{HEX16}\.json)"): r"\1/manifest.json",
    re.compile(rf"({UNIT}/scores-{HEX16})\.parquet"): r"\1.json",
    re.compile(rf"({FAMILY}/shard-[0-9]{{5,}})\.arrow"): r"\1.json",
}
JUDGED = re.compile(rf"judge/(?:scratch-{HEX32}/[^/]+|({HEX16})/dropped\.parquet)")  # first digits of a dataset's id
MANIFEST = re.compile(rf"(?:{UNIT}|{FAMILY}|datasets/{HEX64})/manifest\.json|{FAMILY}/shard-[0-9]{{5,}}\.json")
OWN_NAMES = (*COMMITTED_BY, JUDGED, MANIFEST)


class Progress(Protocol):
    """Hears of each pass ("read", "score", "scorers", "judge", "emit"): items done, items in all, images done."""

    def __call__(self, stage: str, done: int, total: int, images: int = 0) -> None: ...


def unheard(stage: str, done: int, total: int, images: int = 0) -> None:
    """The Progress of a build that nobody watches."""


def build_corpus(
    config: CorpusConfig,
    executor: Executor | None = None,
    progress: Progress = unheard,
    store: ObjectStore | None = None,
    scorers: Sequence[ScorerPool] | None = None,
) -> dict[str, Any]:
    """Build, or find already built, the dataset of `config`; the summary that `inspect_dataset` gives.

    `executor`, `store` and `scorers` replace those that the configuration names. Raises UserError when an input is
    missing or holds no usable record, when a unit exceeds the budget of bad records, and when stored data is damaged;
    UsageError for an output that an input would read.
    """
    if executor is None:
        if config.executor.kind != "inline":
            raise ValueError(f"executor.kind {config.executor.kind}: the caller brings such an executor")
        with InlineExecutor(config.executor.workers) as own:
            return build_corpus(config, own, progress, store, scorers)
    if scorers is None and config.scorers:
        raise ValueError("scorers: the caller brings them")
    scorers = scorers or ()
    judged = config.filters.judged()
    refuse_unscored(judged, scorers)
    store = store or open_store(_output(config))
    _refuse_output_in_input(config, store)
    store.check()
    settings = ScoreSettings(config.filters.resolved(), config.captions, config.crop)

    # First: a set that is not there is to be found before the corpus is read and scored, not hours later.
    evaluation = read_evaluation(config.decontaminate, executor)
    units = list_units(config.inputs, executor, partial(progress, "read"))
    prefixes = [settings.prefix(unit.digest) for unit in units]
    uris = {unit.digest: text_key(unit.uri) for unit in units}

    def within_budget(unit: Document) -> None:
        _refuse_over_budget(config.budget, uris[unit["unit"]], unit)

    scored = _run(
        executor, partial(_score, store, settings), units, "score", progress, within_budget, lambda unit: unit["in"]
    )
    by_digest = {unit["unit"]: unit for unit in scored}
    scored = [by_digest[unit.digest] for unit in units]
    for pool in scorers:
        _run_scorer(pool, store, scored, prefixes, progress)

    judging = JudgeSettings(
        config.seed,
        config.dedup.exact,
        config.dedup.near,
        judged,
        tuple(digests_in_force(judged, scorers)),
        evaluation.rules if evaluation else None,
    )
    keep = judge(store, prefixes, scored, judging, executor, partial(progress, "judge"), evaluation)
    try:
        funnel = _funnel(scored, keep)
        identity = _identity(config, scored, keep, judging)
        families = _emit_all(store, config, keep, prefixes, digest_of(identity), executor, progress)
        dropped_rows = _write_dropped(store, digest_of(identity), keep)
    finally:
        keep.remove_scratch()
    facts = {
        "config": config.model_dump(mode="json", exclude=NOT_OF_CONTENT),
        "units": [
            {"digest": unit["unit"], "uri": uris[unit["unit"]], "folder": prefix.rstrip("/")}
            | {key: unit[key] for key in ("bytes", "in", "out")}
            for prefix, unit in zip(prefixes, scored, strict=True)
        ],
        "funnel": funnel,
        "dropped_rows": dropped_rows,
        "quarantined": sum(unit["quarantined"] for unit in scored),
    }
    manifest = commit_dataset(store, identity, families, facts)
    return summary(Dataset(store, f"datasets/{manifest['id']}/", manifest))


def _emit_all(
    store: ObjectStore,
    config: CorpusConfig,
    keep: KeepList,
    prefixes: Sequence[str],
    dataset_id: str,
    executor: Executor,
    progress: Progress,
) -> list[Document]:
    """Write and commit every shard, then the families; the families' manifests."""
    shards = _run(
        executor,
        partial(_emit, store),
        plan_shards(dataset_id, keep, prefixes, config.shard_rows),
        "emit",
        progress,
        images_in=lambda group: group[0]["file"]["rows"],
        total=-(-len(keep) // config.shard_rows),
    )
    return [
        commit_family(
            store, dataset_id, family, [shard for group in shards for shard in group if shard["family"] == name]
        )
        for name, family in FAMILIES.items()
    ]


def _write_dropped(store: ObjectStore, dataset_id: str, keep: KeepList) -> Document:
    """Store the table of what was judged out; what the manifest says of it.

    What a dataset was committed with stays: the same rows written by another version of Arrow can have other bytes.
    """
    key = f"judge/{dataset_id[:16]}/dropped.parquet"
    committed = manifests.read(store, f"datasets/{dataset_id}/manifest.json")
    if committed is not None and store.exists(key):
        return cast(Document, committed["dropped_rows"])
    return keep.write_dropped(key)


def inspect_dataset(uri: str) -> dict[str, Any]:
    """The summary of a committed dataset. Raises UserError as `open_dataset` does."""
    return summary(open_dataset(uri))


def summary(dataset: Dataset) -> dict[str, Any]:
    """What `corpus build` and `corpus inspect` report. `bytes`: of the rows of all families built with the dataset."""
    return {
        "dataset_id": dataset.id,
        "rows": dataset.rows,
        "shards": len(dataset.shard_rows),
        "bytes": dataset.manifest["bytes"],
        "funnel": dataset.manifest["funnel"],
        "quarantined": dataset.manifest["quarantined"],
        "uri": f"{dataset.store.uri}/{dataset.prefix}".rstrip("/"),
    }


def sweep_build(store: ObjectStore, prefix: str = "") -> int:
    """Remove what stopped builds left under `prefix`; how many objects. Not while a build writes there.

    Unfinished uploads go, and data whose manifest was never stored. Committed units and shards stay: the next build
    takes them up.
    """
    swept = store.sweep_uploads(prefix, owned=lambda key: any(name.fullmatch(key) for name in OWN_NAMES))
    keys = [info.key for info in store.list(prefix)]
    datasets = {id_[:16] for id_ in dataset_ids(store)}
    for key in keys:
        committed_by, judged = _manifest_of(key), JUDGED.fullmatch(key)
        left_by_judge = judged is not None and judged[1] not in datasets
        if left_by_judge or (committed_by is not None and not store.exists(committed_by)):
            store.delete(key)
            swept += 1
    return swept


def _manifest_of(key: str) -> str | None:
    """The manifest without which an object is a leftover; None for manifests and for what the builder does not own."""
    for name, manifest in COMMITTED_BY.items():
        if (found := name.fullmatch(key)) is not None:
            return found.expand(manifest)
    return None


def _score(store: ObjectStore, settings: ScoreSettings, unit: Unit) -> Document:
    """A unit's manifest without the places of its batches, which of 1e5 units would fill the driver's memory."""
    return {key: value for key, value in score_unit(store, settings, unit).items() if key != "rows"}


def _emit(store: ObjectStore, plan: ShardPlan) -> list[Document]:
    """The manifests of a shard, without the places of its batches for the same reason."""
    manifests_ = emit_shard(store, plan)
    return [
        {"family": manifest["family"], "shard": manifest["shard"]}
        | {"file": {key: value for key, value in manifest["file"].items() if key != "batches"}}
        for manifest in manifests_
    ]


def _run(
    executor: Executor,
    function: Callable[[Any], Any],
    items: Iterable[Any],
    stage: str,
    progress: Progress,
    check: Callable[[Any], None] = lambda result: None,
    images_in: Callable[[Any], int] = lambda result: 0,
    total: int | None = None,
) -> list[Any]:
    """All results, in order of completion; `check` may refuse each as it comes, before more work is done.

    `total` is the number of items where they are not a sequence.
    """
    results: list[Any] = []
    images = 0
    total = len(items) if isinstance(items, Sequence) else total or 0
    progress(stage, 0, total)
    for result in executor.map(function, items):
        check(result)
        results.append(result)
        images += images_in(result)
        progress(stage, len(results), total, images)
    return results


def _run_scorer(
    pool: ScorerPool, store: ObjectStore, scored: Sequence[Document], prefixes: Sequence[str], progress: Progress
) -> None:
    """Have every unit that kept rows scored; the results are read from the store."""
    rows_of = {unit["unit"]: unit["out"] for unit in scored}
    todo = [prefix for prefix, unit in zip(prefixes, scored, strict=True) if unit["out"]]
    images = 0
    progress("scorers", 0, len(todo))
    for done, scores in enumerate(pool.map(store, todo), start=1):
        images += rows_of[scores["unit"]]
        progress("scorers", done, len(todo), images)


def _output(config: CorpusConfig) -> str:
    if config.output is None:
        raise UsageError("corpus output", "a folder", "none", "set output=FOLDER")
    return config.output


def _refuse_output_in_input(config: CorpusConfig, store: ObjectStore) -> None:
    """Raise UsageError where the next build would read what this one writes, and so give another dataset."""
    for entry in (*config.inputs, *(entry for entry in config.decontaminate.sets if isinstance(entry, Input))):
        if _would_read(entry, store):
            expected, found = "a folder outside the inputs", f"one in {entry.kind} {public_uri(entry.uri)}"
            raise UsageError(f"output {store.uri}", expected, found, "choose another output")


def _would_read(entry: Input, store: ObjectStore) -> bool:
    """Whether `store` lies within an input that reads what a build writes.

    Of a folder of pictures that is everything, of parquets the tables of its units; but not what begins with a dot. A
    build writes no tars.
    """
    if entry.kind not in ("folder", "parquet"):
        return False
    uri, units = public_uri(entry.uri), store.local_path("units")
    folder: PurePath
    output: PurePath
    if units is None or is_remote(uri):
        folder, output = PurePosixPath(uri), PurePosixPath(store.uri)
    else:
        folder, output = Path(uri).resolve(), units.parent.resolve()
    if not output.is_relative_to(folder):
        return False
    return not any(part.startswith(".") for part in output.relative_to(folder).parts)


def _refuse_over_budget(budget: float | None, uri: str, unit: Document) -> None:
    if budget is not None and unit["quarantined"] > budget * unit["in"]:
        bad = ", ".join(f"{record['key']} ({record['reason']})" for record in unit["bad"])
        found = f"{unit['quarantined']} of {unit['in']}: {bad}"
        next_step = "repair the input, or raise budget (null: no limit)"
        raise UserError(f"unit {uri}", f"at most {budget:.1%} bad records", found, next_step)


def _funnel(scored: Sequence[Document], keep: KeepList) -> Document:
    """{in, out, dropped {reason: n}}. Raises UserError if nothing is left."""
    dropped = Counter(keep.dropped)
    for unit in scored:
        dropped.update(unit["dropped"])
    funnel = {"in": sum(unit["in"] for unit in scored), "out": len(keep), "dropped": dict(sorted(dropped.items()))}
    if funnel["in"] != funnel["out"] + dropped.total():
        raise AssertionError(f"records were lost without a reason: {funnel}")
    if not len(keep):
        reasons = (
            ", ".join(f"{reason} {count}" for reason, count in funnel["dropped"].items()) or "the inputs are empty"
        )
        raise UserError(
            "corpus", "at least one usable record", f"0 of {funnel['in']}: {reasons}", "check inputs and filters"
        )
    return funnel


def _identity(config: CorpusConfig, scored: Sequence[Document], keep: KeepList, judging: JudgeSettings) -> Document:
    """What the dataset id is the digest of: content and rules, no paths, times or numbers of workers."""
    return {
        "version": IDENTITY_VERSION,
        "units": sorted(unit["unit"] for unit in scored),
        "filters": asdict(config.filters.resolved()),
        "judged": asdict(judging),
        "dedup": DEDUP_VERSION,
        "records": RECORDS_VERSION,
        "captions": config.captions,
        "crop": config.crop,
        "tokenizer": TOKENIZER_SHA256,
        "codec": CODEC_VERSIONS,
        "families": {family.name: family.producer for family in FAMILIES.values()},
        "seed": config.seed,
        "shard_rows": config.shard_rows,
        "rows": len(keep),
        "ids": keep.digest(),
    }
