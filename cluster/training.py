"""A training run from its configuration to its result: datasets, attempt, launcher, summary.

Always holds: bad configuration, dataset or store is refused here, before any worker starts. Called by the command line
and the demo.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.launch import Event, launch_local
from data_pipeline.build import CorpusConfig, build_corpus, resolve_output, sweep_build
from data_pipeline.build import Progress as BuildProgress
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.shards import dataset_ids
from data_pipeline.storage import open_store
from trainer.config import TrainConfig
from trainer.run import prepare_run, store_uri, tracking_folder
from trainer.tracking.jsonl import read_curves

log = logging.getLogger(__name__)

DEMO_DATASETS = ("demo", "demo-heldout")  # built in the state folder when absent
SETTLED_AFTER = 5  # steps before speed counts: the first ones warm caches


def train_run(config: TrainConfig, on_event: Callable[[Event], None] = lambda event: None) -> dict[str, Any]:
    """Train (or go on) until `images`; the keys of `glidepath train --json`. Raises UserError."""
    for name in (config.dataset, config.heldout.dataset if config.heldout else None):
        if name in DEMO_DATASETS:
            build_demo_dataset(name)
    attempt = prepare_run(config)
    steps: list[Event] = []

    def watch(event: Event) -> None:
        if event["event"] == "progress":
            steps.append(event)
        on_event(event)

    result = launch_local(config.model_dump(mode="json"), attempt, config.launcher.workers, watch)
    curves = read_curves(tracking_folder(config))
    settled = [step["images_per_s"] for step in steps[SETTLED_AFTER:] or steps]
    return {
        "run": config.run,
        "mlflow_run_id": None,
        "images": result["images"],
        "loss": steps[-1]["loss"] if steps and math.isfinite(steps[-1]["loss"]) else None,
        "heldout": {"first": _heldout(curves, _first), "last": _heldout(curves, _last)} if config.heldout else None,
        "images_per_s": statistics.median(settled) if settled else None,
        "checkpoint": result["checkpoint"],
        "samples": f"{open_store(store_uri(config)).uri}/{result['samples']}" if result["samples"] else None,
        "attempt": attempt,
        "failed_saves": result["failed_saves"],
    }


def build_demo_dataset(name: str, progress: BuildProgress = lambda stage, done, total: None) -> None:
    """Build the dataset of the corpus preset `name` in the state folder, when it is absent."""
    values = read_values(find_config("corpus", name))
    config = resolve_output(parse(CorpusConfig, values, name), name)
    assert config.output is not None
    if not dataset_ids(open_store(config.output)):
        build_swept(config, progress)


def build_swept(config: CorpusConfig, progress: BuildProgress) -> dict[str, Any]:
    """`build_corpus` after removing what killed builds left in the output. One at a time: another one waits.

    A sweep takes data whose manifest is not there yet, which is what a build under way has.
    """
    assert config.output is not None
    output = Path(open_store(config.output).uri)
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # ends with this process, however that ends
        if swept := sweep_build(open_store(config.output)):
            log.info("%s: removed %d leftovers of a build that was stopped", output, swept)
        return build_corpus(config, progress=progress)
    finally:
        os.close(descriptor)


def _heldout(curves: dict[str, dict[int, float]], pick: Callable[[dict[int, float]], float]) -> dict[str, float]:
    prefix = "heldout/"
    return {name.removeprefix(prefix): pick(curve) for name, curve in curves.items() if name.startswith(prefix)}


def _first(curve: dict[int, float]) -> float:
    return curve[min(curve)]


def _last(curve: dict[int, float]) -> float:
    return curve[max(curve)]
