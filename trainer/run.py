"""A training run: where its things lie, whether it may go on, and one attempt of it on one rank.

Always holds: what the run is follows from its configuration and its store alone; starting the same command again goes
on from the newest checkpoint that verifies. Called by a launcher's worker processes, after `prepare_run` in the driver.
"""

from __future__ import annotations

import importlib
import logging
import os
import uuid
from contextlib import ExitStack, suppress
from fractions import Fraction as Rational
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data_pipeline.config import state_folder
from data_pipeline.errors import UserError
from data_pipeline.manifests import digest_of
from data_pipeline.mixture import Mixture
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.attempts import Superseded, first_record_key, read_record, take_attempt
from trainer.checkpoint.manifest import committed
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import RunIdentity, Saver
from trainer.checkpoint.sweep import sweep
from trainer.config import TrainConfig, refuse_changed_keys
from trainer.engine.engine import Engine
from trainer.engine.group import Group
from trainer.engine.replicated import ReplicatedEngine
from trainer.loop import CONSUMED, Report, TrainingLoop
from trainer.recipes import make_recipe, parse_train_config
from trainer.recipes.recipe import Part, StateDict
from trainer.step import Trainee
from trainer.tracking.background import BackgroundTracker
from trainer.tracking.jsonl import JsonlTracker
from trainer.tracking.leftovers import keep_undelivered, read_undelivered
from trainer.tracking.mlflow import MlflowServer
from trainer.tracking.server import is_server
from trainer.tracking.system import SystemSampler
from trainer.tracking.tracker import NoTracker, Tracker
from trainer.weights import initial_module, lineage_of, start_of

log = logging.getLogger(__name__)

DATASETS = "datasets"  # of the state folder, by name


def store_uri(config: TrainConfig) -> str:
    """The run's store: the setting, or its folder under the state folder."""
    return config.store or str(state_folder() / "runs" / config.run)


def dataset_uri(name: str) -> str:
    """A dataset's URI: a name without a slash is a dataset of the state folder, anything else is a URI already."""
    return name if "/" in name else str(state_folder() / DATASETS / name)


def tracking_folder(config: TrainConfig) -> Path:
    """Where metrics.jsonl and consumed.jsonl lie: as set; without a setting, or with a server's, in the store when that
    is a folder, else where a folder store of the run would have them."""
    if config.tracking.uri and not is_server(config.tracking.uri):
        return Path(config.tracking.uri)
    here = open_store(store_uri(config)).local_path("tracking")
    return here or state_folder() / "runs" / config.run / "tracking"


def prepare_run(config: TrainConfig, drawn: str | None = None) -> int:
    """In the driver, before any worker starts: refuse what cannot go on, take an attempt, sweep. Returns the attempt.
    `drawn`: an identity to write into its record, by which a driver knows its own.

    Raises UserError when the store cannot be used, when the data cannot serve the run, or the store is of another run
    or its frozen keys differ. All of that comes before the attempt, whose record freezes the configuration.
    """
    store = open_store(store_uri(config))
    store.check()
    refuse_unusable_data(config)
    first = first_record_key(store)
    if first is not None:
        # Through the models of today, so that a setting added since counts with its default.
        began = parse_train_config(read_record(store, first)["config"], f"run {config.run} as it began")
        if began.run != config.run:
            raise UserError(
                f"run store {store.uri}", f"run {began.run}", f"run {config.run}", "give this run a store of its own"
            )
        refuse_changed_keys(began, config)
    lineage = lineage_of(config) if first is None else run_lineage(store)
    record = {"config": config.model_dump(mode="json"), "identity": drawn or uuid.uuid4().hex, "lineage": lineage}
    attempt = take_attempt(store, record)
    try:
        sweep(store, attempt)
    except OSError as error:
        # The attempt is taken: to refuse now would leave it without an end, and what is left over harms nobody.
        log.warning("leftovers of earlier attempts stay for now: %s", error)
    return attempt


def run_identity(config: TrainConfig) -> str:
    """What the run is told from others by, wherever it lies: drawn with its first attempt, lost with its store."""
    store = open_store(store_uri(config))
    first = first_record_key(store)
    record = read_record(store, first) if first else {}
    return str(record.get("identity") or digest_of([store.uri, config.run])[:32])  # runs of before it was drawn


def run_lineage(store: ObjectStore) -> dict[str, dict[str, Any]]:
    """By part, the checkpoint that the run began from, as its first attempt found it."""
    first = first_record_key(store)
    return dict(read_record(store, first).get("lineage", {})) if first else {}


def refuse_unusable_data(config: TrainConfig) -> None:
    """Raise UserError if a dataset does not open, lacks a family that the recipe reads, or is too small."""
    dataset = open_training_data(config)
    dataset.order(config.seed, config.batch)
    for opened in (dataset, *([open_dataset(dataset_uri(config.heldout.dataset))] if config.heldout else [])):
        for column in make_recipe(config).columns:
            opened.family_manifest(column.family)


def open_training_data(config: TrainConfig) -> Dataset:
    """The dataset that the run trains on, or the mixture. Raises UserError as `open_dataset` and Mixture do."""
    if isinstance(config.dataset, str):
        return open_dataset(dataset_uri(config.dataset))
    datasets = [open_dataset(dataset_uri(share.uri)) for share in config.dataset]
    return Mixture(datasets, [Rational(share.weight) for share in config.dataset])


def train(values: dict[str, Any], attempt: int, group: Group, report: Report, mlflow_run_id: str | None = None) -> None:
    """Train until `images`. `values`: the resolved configuration; `report` gets rank 0's progress and result.

    `mlflow_run_id`: the run on the tracking server of `tracking.uri`, which the driver has opened.
    """
    config = parse_train_config(values, "run")
    store = open_store(store_uri(config))
    lineage = run_lineage(store)
    # A run that has a checkpoint goes on from it; its parent may be gone by then.
    begins = group.broadcast(not committed(store))
    trainee = make_trainee(config, group, start_of(config, lineage) if begins else {})
    dataset = open_training_data(config)
    heldout = open_dataset(dataset_uri(config.heldout.dataset)) if config.heldout else None
    retention = Retention(store, config.run, attempt, config.checkpoint) if group.rank == 0 else None
    saver = Saver(store, identity_of(trainee, attempt, lineage), config.checkpoint.deadline_s, retention)
    waiting = read_undelivered(store) if group.rank == 0 else []
    tracker = make_tracker(config, attempt, mlflow_run_id) if group.rank == 0 else NoTracker()
    tracker.replay(waiting)
    consumed = tracking_folder(config) / CONSUMED if config.tracking.consumed_ids else None
    loop = TrainingLoop(trainee, dataset, heldout, saver, tracker, consumed, report)
    with ExitStack() as stack:
        if group.rank == 0:
            stack.callback(lambda: keep_undelivered(store, tracker.close()))
        every_s = config.tracking.system_s
        if every_s is not None and os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of each node
            stack.enter_context(SystemSampler(every_s, report, lambda: loop.position))
        loop.restore()
        if group.rank == 0:
            report({"event": "loaded", "images": loop.position})
        try:
            loop.train()
        except Exception as error:
            if saver.busy:
                log.error("%s: %s; ends once the save under way has", type(error).__name__, error)
            with group.watch.section("commit"), suppress(Superseded):  # what ended the run is to be told, not this
                saver.settle()  # a save that had begun may still commit
            loop.list_what_is_left()
            raise


def warm(values: dict[str, Any]) -> None:
    """Do what `train` with this configuration does once per process, whatever its rank: imports, and a store's client.

    Called by a worker that waits for its rank, so that nothing of it lies between a death and the next step.
    """
    config = parse_train_config(values, "run")
    open_store(store_uri(config))
    if config.zero.stage:
        importlib.import_module("trainer.engine.deepspeed_engine")
        torch.optim.AdamW([torch.zeros(1)])  # the first one imports torch._dynamo: two seconds


def make_tracker(config: TrainConfig, attempt: int, mlflow_run_id: str | None) -> Tracker:
    """Rank 0's tracker: of the run on the server, or of the folder."""
    uri = config.tracking.uri
    if mlflow_run_id is None or uri is None or not is_server(uri):
        return JsonlTracker(tracking_folder(config), attempt)
    return BackgroundTracker(lambda: MlflowServer(uri, mlflow_run_id), attempt)


def make_trainee(config: TrainConfig, group: Group, starts: dict[str, StateDict] | None = None) -> Trainee:
    """Every part in its engine, equal on all ranks: built from the seed, or with the weights of `starts`, which is
    emptied on the way."""
    recipe = make_recipe(config)
    engines: dict[str, Engine] = {}
    for name, part in recipe.parts().items():
        engines[name] = make_engine(name, part, config, group, (starts or {}).pop(name, None))
    return Trainee(recipe, config, group, engines)


def make_engine(name: str, part: Part, config: TrainConfig, group: Group, start: StateDict | None = None) -> Engine:
    """The engine that `zero.stage` and the part's own needs ask for. Raises UserError if DeepSpeed is not installed."""
    module = initial_module(name, part, config.seed, start)
    if config.zero.stage == 0 or part.hold == "replicated":
        return ReplicatedEngine(name, module, config, group)
    # Before the import, which else takes the GPU of a machine that has one.
    os.environ.setdefault("DS_ACCELERATOR", group.device.type)
    try:
        from trainer.engine.deepspeed_engine import DeepSpeedEngine
    except ModuleNotFoundError as error:
        raise UserError(
            f"zero.stage {config.zero.stage}",
            "DeepSpeed",
            str(error),
            "pip install 'glidepath[cluster]', or zero.stage=0",
        ) from None
    return DeepSpeedEngine(name, module, part.build, config, group)


def identity_of(trainee: Trainee, attempt: int, lineage: dict[str, dict[str, Any]] | None = None) -> RunIdentity:
    """What every manifest of this attempt says alike."""
    config, group = trainee.config, trainee.group
    return RunIdentity(
        run=config.run,
        attempt=attempt,
        rank=group.rank,
        world_size=group.world_size,
        zero_stage=config.zero.stage,
        parameters={name: size for engine in trainee.engines.values() for name, size in engine.parameter_sizes.items()},
        config=config.model_dump(mode="json"),
        code_version=metadata.version("glidepath"),
        lineage=lineage or {},
    )
