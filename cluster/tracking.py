"""The driver's side of tracking: one MLflow run for a training run, over all its attempts, and what the driver alone
knows of it: slow and hung ranks, the system metrics of all nodes, MFU.

Always holds: a server that does not answer refuses the first attempt, before a worker or a record of it exists; once
the run's id is known a dead server holds up no restart, and the end for NOTE_DEADLINE_S at most; metrics of the driver
and of rank 0 have different names, so each has one sender. Called by cluster.training and the demo.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from types import TracebackType

from cluster.launch import Event
from cluster.utilisation import Utilisation
from data_pipeline.errors import UserError
from data_pipeline.shards import open_dataset
from data_pipeline.storage import open_store
from trainer.checkpoint.attempts import first_record_key, read_record
from trainer.checkpoint.manifest import split_checkpoint_uri
from trainer.config import TrainConfig
from trainer.run import dataset_uri, run_identity, run_lineage, store_uri, tracking_folder
from trainer.tracking.background import BackgroundTracker
from trainer.tracking.jsonl import JsonlTracker, read_curves, read_events
from trainer.tracking.leftovers import DRIVERS, keep_undelivered, read_undelivered
from trainer.tracking.mlflow import (
    DatasetUse,
    MlflowServer,
    RunAbout,
    Status,
    check_server,
    end_run,
    event_positions,
    first_heldout,
    open_run,
)
from trainer.tracking.server import is_server, tracking_uri
from trainer.tracking.spool import ServerFailed
from trainer.tracking.system import SYSTEM
from trainer.tracking.tracker import HELDOUT

log = logging.getLogger(__name__)

NOTE_DEADLINE_S = 10.0  # how long the end of a run waits for what the driver has to say, twice


def with_tracking_server(config: TrainConfig) -> TrainConfig:
    """The configuration with the tracking server of the environment, where it names none itself. Workers may have
    another environment. Raises UsageError as `tracking_uri` does."""
    uri = tracking_uri(config.tracking.uri, os.environ)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


class TrackedRun:
    """A training run on its tracking server, if it has one. A context: leaving it notes how the run ended."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises UserError if there is a server and it does not answer."""
        self._config = config
        self._uri = config.tracking.uri if config.tracking.uri and is_server(config.tracking.uri) else None
        self._notes: list[threading.Thread] = []
        self._restart_reason = ""
        self._attempt = 0  # the newest that this driver began
        self._images = 0  # that its last progress told of
        self.mlflow_run_id: str | None = None
        self._tracker: BackgroundTracker | JsonlTracker | None = None
        self._utilisation = Utilisation(config)
        if self._uri:
            check_server(self._uri)

    def begin(self, attempt: int, workers: int) -> None:
        """Open the run, or note another attempt of it. Raises UserError if the first of this driver cannot."""
        self._attempt, self._utilisation.workers = attempt, workers
        if self._tracker is not None:
            self._tracker.attempt = attempt  # before the run is claimed for it
        if self._uri and self.mlflow_run_id is None:
            self.mlflow_run_id = open_run(self._uri, self._about(attempt, workers))
        elif self._uri:
            # Not waited for: recovery is not for a tracking server to hold up.
            uri = self._uri
            self._note(lambda: open_run(uri, self._about(attempt, workers)))
        self._tracker = self._tracker or self._open_tracker(attempt)

    def _open_tracker(self, attempt: int) -> BackgroundTracker | JsonlTracker:
        """The driver's own, with what the driver before could not deliver."""
        uri, run_id = self._uri, self.mlflow_run_id
        if uri is None or run_id is None:
            return JsonlTracker(tracking_folder(self._config), attempt)
        tracker = BackgroundTracker(lambda: MlflowServer(uri, run_id), attempt, NOTE_DEADLINE_S)
        tracker.replay(read_undelivered(open_store(store_uri(self._config)), DRIVERS))
        return tracker

    def watch(self, event: Event) -> None:
        """Of the driver's events, what the next attempt's notes say, and what is noted at once."""
        kind = event["event"]
        if kind in ("restart", "resize"):
            self._restart_reason = event["reason"]
        elif kind == "progress":
            self._images = event["images"]
            self._utilisation.stepped(event)
        elif kind in ("straggler", "hung") and self._tracker:
            how = f"{event['factor']} times the others' work" if kind == "straggler" else f"in {event['section']}"
            self._tracker.event(self._images, kind, f"rank {event['rank']} on {event['node']}: {how}")
        elif kind == "system" and self._tracker:
            figures = {f"{SYSTEM}{event['node']}/{name}": value for name, value in event["figures"].items()}
            mfu = self._utilisation.figure(event["gpu"])
            self._tracker.log(event["images"], figures | ({"mfu": mfu} if mfu is not None else {}))

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            return
        self.end("FAILED" if issubclass(kind, Exception) else "KILLED")  # what is no Exception is an interruption

    def end(self, status: Status) -> None:
        """Note how the run stands, unless a newer driver has it. Without an answer it stays as it was, with a
        warning."""
        for note in self._notes:
            note.join(NOTE_DEADLINE_S)
        left = self._tracker.close() if self._tracker else []
        if self._uri and self.mlflow_run_id:
            keep_undelivered(open_store(store_uri(self._config)), left, DRIVERS)
        if self._uri and self.mlflow_run_id:
            try:
                end_run(self._uri, self.mlflow_run_id, status, self._attempt)
            except ServerFailed as failure:
                log.warning("tracking server %s: the run's status %s was not noted: %s", self._uri, status, failure)

    def _note(self, call: Callable[[], object]) -> None:
        def run() -> None:
            try:
                call()
            except (UserError, ServerFailed, OSError) as error:  # the latter of a store that cannot be read right now
                log.warning("not noted on the tracking server: %s", error)

        self._notes.append(threading.Thread(target=run, name="tracking-note", daemon=True))
        self._notes[-1].start()

    def _about(self, attempt: int, workers: int) -> RunAbout:
        config = self._config
        uses = [(name, "training") for name in config.dataset_uris()]
        uses += [(config.heldout.dataset, "evaluation")] if config.heldout else []
        datasets = []
        for name, context in uses:
            dataset = open_dataset(dataset_uri(name))
            uri = f"{dataset.store.uri}/{dataset.prefix}".rstrip("/")
            datasets.append(DatasetUse(name, dataset.id, uri, context))
        tags = {
            "world_size": str(workers),
            "launcher": config.launcher.kind,
            "zero_stage": str(config.zero.stage),
            "code_version": metadata.version("glidepath"),
        }
        lineage = run_lineage(open_store(store_uri(config)))
        if parents := [facts["parent"] for facts in lineage.values()]:
            tags["parent"] = " ".join(parents)
        if job := ray_job():
            tags["job"] = job
        return RunAbout(
            identity=run_identity(config),
            run=config.run,
            store=open_store(store_uri(config)).uri,
            config=config.model_dump(mode="json"),
            attempt=attempt,
            datasets=tuple(datasets),
            attempt_tags=tags,
            restart_reason=self._restart_reason,
            parents=tuple(identity for uri in parents if (identity := identity_of_parent(uri))),
        )


def identity_of_parent(checkpoint: str) -> str | None:
    """Of the run that wrote a checkpoint; None where nothing tells it: an imported release, a store that is gone."""
    store = open_store(split_checkpoint_uri(checkpoint)[0])
    try:
        first = first_record_key(store)
        return read_record(store, first).get("identity") if first else None
    except (UserError, OSError) as error:
        log.warning("parent %s: its run is not linked on the tracking server: %s", checkpoint, error)
        return None


def heldout_of(config: TrainConfig, result: Event, mlflow_run_id: str | None) -> dict[str, dict[str, float]]:
    """The first and the last held-out losses of a run; {} for a first one that a dead tracking server keeps."""
    uri = config.tracking.uri
    if mlflow_run_id and uri:
        first = result["heldout_at_0"]
        if not first:  # an attempt before this one was at 0
            with suppress(ServerFailed):
                first = first_heldout(uri, mlflow_run_id)
        return {"first": first, "last": result["heldout"]}
    curves = read_curves(tracking_folder(config))
    heldout = {name.removeprefix(HELDOUT): curve for name, curve in curves.items() if name.startswith(HELDOUT)}
    return {
        "first": {name: curve[min(curve)] for name, curve in heldout.items()},
        "last": {name: curve[max(curve)] for name, curve in heldout.items()},
    }


def resumed_at(config: TrainConfig, mlflow_run_id: str | None) -> list[int]:
    """Images at which the run went on after an interruption, ascending. Raises UserError if its server is dead."""
    uri = with_tracking_server(config).tracking.uri
    if mlflow_run_id is None or uri is None:
        return sorted(event["images"] for event in read_events(tracking_folder(config), "resume"))
    try:
        return event_positions(uri, mlflow_run_id, "resume")
    except ServerFailed as failure:
        raise UserError(f"tracking server {uri}", "an answer", str(failure), "start it and run again") from None


def ray_job() -> str | None:
    """The submission id of the Ray job that this process drives. None elsewhere."""
    job_config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submission = job_config.get("metadata", {}).get("job_submission_id")
    return str(submission) if submission else None
