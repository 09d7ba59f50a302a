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
import threading
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from cluster.executors import executor_of
from cluster.launch import Event, Launcher
from cluster.lease import refuse_second_driver
from cluster.local_launch import LocalLauncher
from cluster.scorers import scorer_pools
from cluster.supervise import SupervisedRun, supervise
from cluster.tracking import TrackedRun, heldout_of, with_tracking_server
from data_pipeline.build import CorpusConfig, build_corpus, resolve_output, sweep_build, unheard
from data_pipeline.build import Progress as BuildProgress
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.corpus import ExecutorSettings
from data_pipeline.enrich import enrich
from data_pipeline.shards import dataset_ids, open_dataset, output_of
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.attempts import read_record, record_key
from trainer.config import TrainConfig
from trainer.run import prepare_run, store_uri

log = logging.getLogger(__name__)

DEMO_DATASETS = ("demo", "demo-heldout")  # built in the state folder when absent
SETTLED_AFTER = 5  # steps before speed counts: the first ones warm caches


def train_run(
    config: TrainConfig,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """Train (or go on) until `images`; the keys of `glidepath train --json`. Raises UserError.

    Once `stop` is set the run saves and ends. `launcher`: one of the caller's, else one of the configured kind. With
    launcher.kind ray a run whose workers died is started again here, and takes another size when nodes leave or come.
    """
    config = with_tracking_server(config)
    tracked = TrackedRun(config)
    store = open_store(store_uri(config))
    store.check()
    refuse_second_driver(store, config.run)
    for name in (*config.dataset_uris(), config.heldout.dataset if config.heldout else None):
        if name in DEMO_DATASETS:
            build_demo_dataset(name)
    speeds, losses = array("d"), deque[float](maxlen=1)

    def watch(event: Event) -> None:
        if event["event"] == "progress":
            speeds.append(event["images_per_s"])
            losses.append(event["loss"])
        tracked.watch(event)
        on_event(event)

    def begin(attempt: int, workers: int) -> dict[str, Any]:
        tracked.begin(attempt, workers)
        return {"values": config.model_dump(mode="json"), "attempt": attempt, "mlflow_run_id": tracked.mlflow_run_id}

    with tracked, launcher_of(config) if launcher is None else nullcontext(launcher) as launcher:
        drawn = uuid.uuid4().hex
        run = SupervisedRun(
            store, config.launcher, lambda: prepare_run(config, drawn), begin, watch,
            lambda attempt: read_record(store, record_key(attempt)).get("identity") == drawn,
        )  # fmt: skip
        attempt, result = supervise(run, launcher, config.launcher.kind == "ray", stop or threading.Event())
        tracked.end("KILLED" if result["stopped"] else "FINISHED")
    settled = speeds[SETTLED_AFTER:] or speeds
    return {
        "run": config.run,
        "mlflow_run_id": tracked.mlflow_run_id,
        "images": result["images"],
        "loss": losses[0] if losses and math.isfinite(losses[0]) else None,
        "heldout": heldout_of(config, result, tracked.mlflow_run_id) if config.heldout else None,
        "images_per_s": statistics.median(settled) if settled else None,
        "checkpoint": result["checkpoint"],
        "samples": f"{open_store(store_uri(config)).uri}/{result['samples']}" if result["samples"] else None,
        "attempt": attempt,
        "failed_saves": result["failed_saves"],
        "delayed_saves": result["delayed_saves"],
        "substituted_rows": result["substituted_rows"],
        "removed_checkpoints": result["removed_checkpoints"],
        "failed_removals": result["failed_removals"],
        "stopped": result["stopped"],
        "stop_reason": result.get("stop_reason"),  # of a run that stopped by itself
    }


@contextmanager
def launcher_of(config: TrainConfig) -> Iterator[Launcher]:
    """The launcher of the configured kind. Raises UserError where there is no cluster."""
    if config.launcher.kind == "local":
        yield LocalLauncher()
        return
    from cluster.ray_launch import RayLauncher

    with RayLauncher(config.model_dump(mode="json")) as launcher:
        yield launcher


def build_demo_dataset(name: str, progress: BuildProgress = unheard) -> None:
    """Build the dataset of the corpus preset `name` in the state folder, when it is absent."""
    values = read_values(find_config("corpus", name))
    config = resolve_output(parse(CorpusConfig, values, name), name)
    assert config.output is not None
    if not dataset_ids(open_store(config.output)):
        build_swept(config, progress)


def build_swept(config: CorpusConfig, progress: BuildProgress) -> dict[str, Any]:
    """`build_corpus` by the executor that the configuration asks for, after removing what killed builds left in the
    output. In a folder, one at a time: another waits.

    A sweep takes data whose manifest is not there yet, which is what a build under way has. A bucket has no lock that
    dies with its holder, so there leftovers stay, unseen, until somebody who knows that no build runs calls
    `sweep_output`. Two builds at once are harmless, for they write the same bytes.
    """
    assert config.output is not None
    with executor_of(config.executor) as executor:
        store = open_store(config.output)
        store.check()
        with only_writer(store) as locked:
            if locked and (swept := sweep_build(store)):
                log.info("%s: removed %d leftovers of a build that was stopped", store.uri, swept)
            return build_corpus(config, executor, progress, scorers=scorer_pools(config))


def sweep_output(uri: str) -> int:
    """Remove what stopped builds left in an output; how many objects. In a bucket the caller knows that none runs."""
    store = open_store(uri)
    store.check()
    with only_writer(store):
        return sweep_build(store)


def enrich_alone(
    dataset: str, family: str, labels: str | None, settings: ExecutorSettings, progress: BuildProgress
) -> dict[str, Any]:
    """`enrich` with such an executor. In a folder no build runs meanwhile: its sweep would take half-made shards."""
    with executor_of(settings) as executor, only_writer(output_of(open_dataset(dataset))):
        return enrich(dataset, family, labels, executor, progress)


@contextmanager
def only_writer(store: ObjectStore) -> Iterator[bool]:
    """Whether this process alone writes to the output meanwhile: in a folder, where another waits; not in a bucket."""
    folder = store.local_path("units")
    if folder is None:
        yield False
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # ends with this process, however that ends
        yield True
    finally:
        os.close(descriptor)
