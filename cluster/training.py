"""A training run from its configuration to its result: datasets, attempt, launcher, summary. For the command line and
demo.

Always holds: bad configuration, dataset or store is refused here, before any worker starts.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

from cluster.launch import Event, launch_local
from data_pipeline.build import CorpusConfig, build_corpus, resolve_output, sweep_build
from data_pipeline.build import Progress as BuildProgress
from data_pipeline.config import find_config, parse, read_values
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
        "loss": steps[-1]["loss"] if steps else None,
        "heldout": {"first": _heldout(curves, _first), "last": _heldout(curves, _last)} if config.heldout else None,
        "images_per_s": statistics.median(settled) if settled else None,
        "checkpoint": result["checkpoint"],
        "samples": f"{store_uri(config)}/{result['samples']}" if result["samples"] else None,
        "attempt": attempt,
        "failed_saves": result["failed_saves"],
    }


def build_demo_dataset(name: str, progress: BuildProgress = lambda stage, done, total: None) -> None:
    """Build the dataset of the corpus preset `name` in the state folder; what is built already is found."""
    values = read_values(find_config("corpus", name))
    build_swept(resolve_output(parse(CorpusConfig, values, name), name), progress)


def build_swept(config: CorpusConfig, progress: BuildProgress) -> dict[str, Any]:
    """`build_corpus` after removing what killed builds left in the output; for the only builder that writes there."""
    assert config.output is not None
    swept = sweep_build(open_store(config.output))
    if swept:
        log.info("%s: removed %d leftovers of a build that was stopped", config.output, swept)
    return build_corpus(config, progress=progress)


def _heldout(curves: dict[str, dict[int, float]], pick: Callable[[dict[int, float]], float]) -> dict[str, float]:
    prefix = "heldout/"
    return {name.removeprefix(prefix): pick(curve) for name, curve in curves.items() if name.startswith(prefix)}


def _first(curve: dict[int, float]) -> float:
    return curve[min(curve)]


def _last(curve: dict[int, float]) -> float:
    return curve[max(curve)]
