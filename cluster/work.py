"""What a job is to do: a training run, a corpus build or an evaluation, as it is told to a cluster.

Always holds: nothing secret is in a job's entrypoint, environment or metadata, which everybody with the dashboard can
read; every folder has its absolute path, since jobs run elsewhere. Called by `submit` and by what makes manifests.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.package import refuse_credentials
from cluster.tracking import with_tracking_server
from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.sources import Input
from data_pipeline.sources.remote import is_remote, public_uri
from data_pipeline.storage import open_store
from trainer.checkpoint.manifest import is_checkpoint_uri, split_checkpoint_uri
from trainer.config import Datasets, TrainConfig
from trainer.run import store_uri
from trainer.tracking.registry import is_model_uri

STOP_WAIT_S = 600  # that Ray gives the driver between SIGTERM and SIGKILL: a step, a save and its commit


@dataclass(frozen=True)
class Node:
    """A live node and what it has in all."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Work:
    """What a job is to do. `store`: where its results go; `folders`: what it reads or writes outside object stores."""

    kind: str  # train, corpus-build or evaluate
    name: str  # of the run, or corpus-<configuration's name>, evaluate-<…>
    store: str
    values: dict[str, Any]
    workers: int = 1  # at once at least, of one CPU each
    gpus_per_worker: int = 0
    folders: Sequence[str] = field(default=())
    datasets: Sequence[str] = field(default=())  # that it reads

    def metadata(self) -> dict[str, str]:
        """By which a later submit knows the job."""
        return {"glidepath_kind": self.kind, "glidepath_run": self.name, "glidepath_store": self.store}

    def entrypoint(self, environment: Mapping[str, str]) -> str:
        """The command of the job's driver. Raises UserError if a credential of `environment` stands in it."""
        document = json.dumps({"name": self.name, "values": self.values})
        refuse_credentials(f"configuration of {self.name}", document.encode(), environment)
        return f"exec python -m cluster.job {self.kind} {shlex.quote(document)}"


def training_work(config: TrainConfig) -> Work:
    """The job of a training run: every folder by its absolute path, since jobs run elsewhere; the tracking server of
    this environment. Raises UsageError, for a URI that carries credentials as well."""
    config = with_tracking_server(config)
    store = open_store(store_uri(config)).uri
    changes: dict[str, Any] = {"store": store, "dataset": _absolute_datasets(config.dataset)}
    if config.parent:
        changes["parent"] = absolute_model(config.parent)
    if config.heldout:
        dataset = absolute_dataset(config.heldout.dataset)
        changes["heldout"] = config.heldout.model_copy(update={"dataset": dataset})
    if config.tracking.uri:
        changes["tracking"] = config.tracking.model_copy(update={"uri": absolute_uri(config.tracking.uri)})
    config = config.model_copy(update=changes)
    datasets = [*config.dataset_uris(), *([config.heldout.dataset] if config.heldout else [])]
    parent = [config.parent] if config.parent and _is_stored(config.parent) else []
    places = [store, *datasets, *parent, *([config.tracking.uri] if config.tracking.uri else [])]
    return Work(
        kind="train",
        name=config.run,
        store=store,
        values=config.model_dump(mode="json"),
        workers=(config.launcher.min_workers or config.launcher.workers) if config.launcher.kind == "ray" else 0,
        gpus_per_worker=1 if config.launcher.device == "cuda" else 0,
        datasets=datasets,
        folders=[place for place in places if is_folder(place)],
    )


def refuse_unfit(nodes: Sequence[Node], work: Work) -> None:
    """Raise UserError if the work does not fit onto the nodes, were they empty, or lies where they cannot reach."""
    if work.gpus_per_worker:
        room = sum(min(node.cpus, node.gpus // work.gpus_per_worker) for node in nodes)
    else:
        room = sum(node.cpus for node in nodes)
    if room < work.workers:
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        each = "1 CPU" + (" and 1 GPU" if work.gpus_per_worker else "")
        raise UserError(
            "Ray cluster",
            f"room for {work.workers} workers of {each} each",
            f"{cpus} CPUs and {gpus} GPUs on {len(nodes)} nodes",
            "lower launcher.workers, or add nodes",
        )
    if len(nodes) > 1 and work.folders:
        raise UserError(
            f"folder {work.folders[0]}",
            f"a place that all {len(nodes)} nodes of the cluster reach",
            "a folder of one machine",
            "put it at s3://…",
        )


def job_environment() -> dict[str, str]:
    """What every job's processes need in their environment, wherever they run."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "RAY_COLOR_PREFIX": "0"}  # a log is a file


def corpus_work(config: CorpusConfig, name: str) -> Work:
    """The job of a corpus build; its output must be set. Raises UsageError, for a URI that carries credentials as
    well."""
    assert config.output is not None
    inputs = tuple(_absolute_input(entry) for entry in config.inputs)
    scorers = tuple(one.model_copy(update={"checkpoint": absolute_model(one.checkpoint)}) for one in config.scorers)
    changes = {"inputs": inputs, "output": open_store(config.output).uri} | ({"scorers": scorers} if scorers else {})
    config = config.model_copy(update=changes)
    models = [one.checkpoint for one in scorers if _is_stored(one.checkpoint)]
    places = [str(config.output), *(entry.uri for entry in inputs if entry.kind != "demo"), *models]
    return Work(
        kind="corpus-build",
        name=f"corpus-{name}",
        store=str(config.output),
        values=config.model_dump(mode="json", exclude_unset=True),  # a filter set to null is not one that is not set
        folders=[place for place in places if is_folder(place)],
    )


def is_folder(uri: str) -> bool:
    return "://" not in uri


def absolute_uri(uri: str) -> str:
    return str(Path(uri).absolute()) if is_folder(uri) else uri


def store_of_model(uri: str) -> str:
    """The store URI of the run of a checkpoint, or of a run. Raises UserError as `split_checkpoint_uri`."""
    return split_checkpoint_uri(uri)[0] if is_checkpoint_uri(uri) else uri


def absolute_model(uri: str) -> str:
    """A checkpoint's URI, or that of a run's store; a name or a registered model stays: the job looks for it. Raises
    UsageError, UserError as `store_of_model`."""
    if not _is_stored(uri):
        return uri
    open_store(store_of_model(uri))  # refuses credentials in it
    return absolute_uri(uri)


def _is_stored(model: str) -> bool:
    return "/" in model and not is_model_uri(model)


def absolute_dataset(name: str) -> str:
    """A name without a slash is one of the state folder, as trainer.run.dataset_uri has it. Raises UsageError."""
    return open_store(name).uri if "/" in name else name


def _absolute_datasets(datasets: Datasets) -> Datasets:
    """Of a mixture as well. Raises UsageError."""
    if isinstance(datasets, str):
        return absolute_dataset(datasets)
    return tuple(share.model_copy(update={"uri": absolute_dataset(share.uri)}) for share in datasets)


def _absolute_input(entry: Input) -> Input:
    """Raises UsageError for an address that a job must not show."""
    if public_uri(entry.uri) != entry.uri:
        raise UsageError(
            f"input {public_uri(entry.uri)}",
            "an address without query or user",
            "one that carries credentials, which a job would show to everybody with the dashboard",
            "build it here with `corpus build`, or give s3://…",
        )
    scheme, separator, _ = entry.uri.partition("://")
    if separator and not is_remote(entry.uri):
        # The rest is not shown: it may be key:secret@bucket.
        raise UsageError(
            f"input {scheme}://…", "a folder or tar, s3://… or http(s)://…", f"scheme {scheme}://", "correct uri"
        )
    return entry if entry.kind == "demo" else entry.model_copy(update={"uri": absolute_uri(entry.uri)})
