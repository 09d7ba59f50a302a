"""Build: a corpus into a dataset, in three passes over an Executor: score each unit, judge all, emit each shard.

Always holds: the dataset's id and bytes depend on the content of the inputs and the settings in its identity, never on
the number of workers, on paths, on times or on how often the build was killed; every record that came in went out or
was dropped for a counted reason. Called by the command line and, with another Executor, by cluster jobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from data_pipeline.corpus import CorpusConfig, resolve_output
from data_pipeline.emit import emit_shard, plan_shards
from data_pipeline.errors import UsageError, UserError
from data_pipeline.executor import Executor, InlineExecutor
from data_pipeline.families import CODEC_VERSIONS, FAMILIES
from data_pipeline.judge import KeepList, judge
from data_pipeline.manifests import Document, digest_of
from data_pipeline.score import ScoreSettings, score_unit
from data_pipeline.shards import Dataset, commit_dataset, commit_family, open_dataset
from data_pipeline.sources import list_units
from data_pipeline.storage import ObjectStore, open_store
from data_pipeline.tokenizer import TOKENIZER_SHA256

__all__ = ["CorpusConfig", "build_corpus", "inspect_dataset", "resolve_output", "sweep_build"]

IDENTITY_VERSION = "corpus-1"  # of the judge's rules and the row order

OWN_FOLDERS = ("units/", "datasets/")  # what the builder keeps in its output; a sweep touches nothing else

# (pass, items done, items in all); passes are "read", "score", "judge" and "emit"
Progress = Callable[[str, int, int], None]


def build_corpus(
    config: CorpusConfig,
    executor: Executor | None = None,
    progress: Progress = lambda stage, done, total: None,
    store: ObjectStore | None = None,
) -> dict[str, Any]:
    """Build, or find already built, the dataset of `config`; the summary that `inspect_dataset` gives.

    `executor` and `store` replace those that the configuration names. Raises UserError when an input is missing or
    holds no usable record, when a unit exceeds the budget of bad records, and when stored data is damaged.
    """
    if executor is None:
        if config.executor.kind != "inline":
            raise ValueError(f"executor.kind {config.executor.kind}: the caller brings such an executor")
        with InlineExecutor(config.executor.workers) as own:
            return build_corpus(config, own, progress, store)
    store = store or open_store(_output(config))
    store.check()
    settings = ScoreSettings(config.filters.resolved(), config.captions, config.crop)

    units = list_units(config.inputs, executor)
    prefixes = [settings.prefix(unit.digest) for unit in units]
    uris = {unit.digest: unit.uri for unit in units}

    def within_budget(unit: Document) -> None:
        _refuse_over_budget(config.budget, uris[unit["unit"]], unit)

    scored = _run(executor, partial(score_unit, store, settings), units, "score", progress, within_budget)
    by_digest = {unit["unit"]: unit for unit in scored}
    scored = [by_digest[unit.digest] for unit in units]

    progress("judge", 0, 1)
    keep = judge(store, prefixes, scored, config.seed)
    funnel = _funnel(scored, keep)
    progress("judge", 1, 1)

    identity = _identity(config, scored, keep)
    plans = list(plan_shards(digest_of(identity), keep, prefixes, config.shard_rows))
    shards = _run(executor, partial(emit_shard, store), plans, "emit", progress)
    families = [
        commit_family(
            store,
            digest_of(identity),
            family,
            [shard for group in shards for shard in group if shard["family"] == name],
        )
        for name, family in FAMILIES.items()
    ]
    facts = {
        "config": config.model_dump(mode="json", exclude={"output", "executor"}),
        "units": [
            {"digest": unit["unit"], "bytes": unit["bytes"], "in": unit["in"], "out": unit["out"]} for unit in scored
        ],
        "funnel": funnel,
        "quarantined": sum(unit["quarantined"] for unit in scored),
    }
    manifest = commit_dataset(store, identity, families, facts)
    return summary(Dataset(store, f"datasets/{manifest['id']}/", manifest))


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
    swept = store.sweep_uploads(prefix, owned=lambda key: key.startswith(OWN_FOLDERS))
    keys = [info.key for info in store.list(prefix)]
    for key in keys:
        committed_by = _manifest_of(key)
        if committed_by is not None and not store.exists(committed_by):
            store.delete(key)
            swept += 1
    return swept


def _manifest_of(key: str) -> str | None:
    """The manifest without which an object is a leftover; None for manifests and for what the builder does not own."""
    parts = key.split("/")
    if parts[0] == "units" and len(parts) == 3 and parts[2] != "manifest.json":
        return f"units/{parts[1]}/manifest.json"
    if parts[0] == "datasets" and len(parts) == 4 and key.endswith(".arrow"):
        return key.removesuffix(".arrow") + ".json"
    return None


def _run(
    executor: Executor,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    stage: str,
    progress: Progress,
    check: Callable[[Any], None] = lambda result: None,
) -> list[Any]:
    """All results, in order of completion; `check` may refuse each as it comes, before more work is done."""
    results: list[Any] = []
    progress(stage, 0, len(items))
    for result in executor.map(function, items):
        check(result)
        results.append(result)
        progress(stage, len(results), len(items))
    return results


def _output(config: CorpusConfig) -> str:
    if config.output is None:
        raise UsageError("corpus output", "a folder", "none", "set output=FOLDER")
    return config.output


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


def _identity(config: CorpusConfig, scored: Sequence[Document], keep: KeepList) -> Document:
    """What the dataset id is the digest of: content and rules, no paths, times or numbers of workers."""
    return {
        "version": IDENTITY_VERSION,
        "units": sorted(unit["unit"] for unit in scored),
        "filters": asdict(config.filters.resolved()),
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
