"""`glidepath runs`: what runs there are and what is known of each, from a tracking server or from the state folder.

Always holds: nothing is written; a run is named by its name, its store or its MLflow id, and a name that two runs have
is refused rather than guessed. Called by the command line.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from cluster.comparison import THROUGHPUT, Compared, cell, choose_metrics
from cluster.evaluation_config import FOLDER
from data_pipeline import manifests
from data_pipeline.config import state_folder
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.attempts import ATTEMPTS, newest_attempt, read_record
from trainer.config import flat_keys
from trainer.recipes import parse_train_config
from trainer.run import tracking_folder
from trainer.stop import read_end
from trainer.tracking.history import MlflowHistory
from trainer.tracking.jsonl import METRICS, read_curves
from trainer.tracking.mlflow import list_runs
from trainer.tracking.runs import (
    STEP_S,
    WORKERS,
    Curves,
    Grid,
    RunFigures,
    RunHistory,
    evaluation_curves,
    flat_text,
    grids_of,
    param_value,
)
from trainer.tracking.server import is_server, tracking_uri

log = logging.getLogger(__name__)

MLFLOW_STATUS = {
    None: "RUNNING", "resized": "RUNNING",  # another attempt is about to follow
    "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "died": "FAILED",
}  # fmt: skip
RESULT = re.compile(r"/result-[0-9a-f]+\.json$")
Row = dict[str, Any]


def known_runs(tracking: str | None) -> list[RunFigures]:
    """All runs, newest first: of the tracking server that is given or in the environment, else of the state folder.

    A run of the state folder that cannot be read is left out with a warning. Raises UserError if the server does not
    answer.
    """
    uri = tracking_uri(tracking, os.environ)
    if uri is not None and is_server(uri):
        return list_runs(uri)
    runs = []
    for attempts in (state_folder() / "runs").glob("*/attempts"):
        try:
            runs.append(run_of_folder(str(attempts.parent)))
        except (UserError, OSError) as error:
            log.warning("left out: %s", error)
    return sorted(runs, key=lambda run: -run.updated_ms)


def run_of_folder(uri: str) -> RunFigures:
    """A run as its store and its metrics.jsonl have it. Raises UserError if there is none."""
    history = FolderHistory(uri)
    metrics = history.folder / METRICS
    curves = history.all_curves
    return RunFigures(
        run=history.config.run,
        store=history.store.uri,
        mlflow_run_id=None,
        status=_status(history.store, history.attempt),
        images=max((max(curve) for curve in curves.values()), default=0),
        updated_ms=int(metrics.stat().st_mtime * 1000) if metrics.exists() else 0,
        params=flat_text(history.config.model_dump(mode="json")),
        metrics={name: curve[max(curve)] for name, curve in curves.items()},
    )


class FolderHistory:
    """See RunHistory: of a run whose curves are in a folder, and everything else in its store."""

    def __init__(self, uri: str) -> None:
        """Raises UserError if there is no run."""
        self.store = open_store(uri)
        self.attempt = newest_attempt(self.store)
        if not self.attempt:
            raise UserError(
                f"run {uri}", "a run's store", "no attempts in it", "glidepath runs list shows what there is"
            )
        record = read_record(self.store, f"{ATTEMPTS}{self.attempt:05d}.json")
        self.config = parse_train_config(record["config"], uri)
        self.folder = tracking_folder(self.config.model_copy(update={"store": self.store.uri}))

    @cached_property
    def all_curves(self) -> Curves:
        return {name: curve for name, curve in read_curves(self.folder).items() if curve}

    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    def curves(self, names: Sequence[str]) -> Curves:
        return {name: self.all_curves[name] for name in names if name in self.all_curves}

    def evaluations(self) -> Curves:
        """Those that are stored in the run's store, which is where they go by default."""
        keys = [info.key for info in self.store.list(f"{FOLDER}/") if RESULT.search(info.key)]
        results = [found for key in keys if (found := manifests.read(self.store, key))]
        return evaluation_curves((one["trained_images"], evaluation_facts(one), one["metrics"]) for one in results)

    def grids(self) -> list[Grid]:
        return grids_of(info.key for info in self.store.list("samples/"))

    def picture(self, grid: Grid) -> bytes | None:
        return self.store.get(grid.key)


def evaluation_facts(result: dict[str, Any]) -> dict[str, str]:
    """What a stored result is of, as its run on a tracking server has it for params."""
    facts = {key: str(result[key]) for key in ("weights", "seed", "images")}
    sampling = {f"sampling.{key}": str(value) for key, value in result["sampling"].items()}
    return {**facts, "dataset": result["dataset"]["id"], "upsampler": result.get("upsampler") or "", **sampling}


def compared_runs(
    runs: Sequence[RunFigures], uri: str | None, wanted: Sequence[str], told: Callable[[int, str], None]
) -> tuple[list[Compared], list[str], list[RunHistory]]:
    """Runs with the curves to compare, their names, and where their pictures are. Raises UserError for a metric in
    `wanted` that none of them logged."""
    histories: list[RunHistory] = [
        MlflowHistory(uri, run) if run.mlflow_run_id and uri else FolderHistory(run.store) for run in runs
    ]
    evaluations = [history.evaluations() for history in histories]
    logged = [name for run in runs for name in run.metrics] + [name for found in evaluations for name in found]
    names = choose_metrics(logged, wanted)
    compared = []
    for number, (run, history, evaluated) in enumerate(zip(runs, histories, evaluations, strict=True)):
        told(number, run.run)
        curves = history.curves([*names, STEP_S, WORKERS, THROUGHPUT]) | evaluated
        newest = {name: curve[max(curve)] for name, curve in evaluated.items()}
        settings = resolved(history.settings(), f"run {run.run}")
        compared.append(Compared(summary(run), {**run.metrics, **newest}, settings, curves, history.grids()))
    return compared, names, histories


def resolved(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A stored configuration, flat, with today's default of each setting that came since; as it was stored, which is
    said, where it is not one of today."""
    try:
        values = parse_train_config(values, name).model_dump(mode="json")
    except UserError as error:
        log.warning("its settings are compared as they were stored: %s", error)
    return dict(flat_keys(values))


def _status(store: ObjectStore, attempt: int) -> str:
    ended = read_end(store, attempt)
    return MLFLOW_STATUS[ended.outcome if ended else None]


def find_run(name: str, runs: Sequence[RunFigures]) -> RunFigures:
    """The one of `runs` with this name, store or MLflow id; else the run in that store. Raises UserError."""
    found = [run for run in runs if name in (run.run, run.store, run.mlflow_run_id)]
    if len(found) > 1:
        which = ", ".join(run.mlflow_run_id or run.store for run in found)
        raise UserError(f"run {name}", "one run of that name", f"{len(found)}: {which}", "name one of these instead")
    if found:
        return found[0]
    if "/" in name:
        uri = open_store(name).uri
        same = [run for run in runs if run.store == uri]
        return same[0] if len(same) == 1 else run_of_folder(uri)
    raise UserError(
        f"run {name}",
        "the name, store or MLflow id of a run",
        f"none such among {len(runs)}",
        "glidepath runs list shows what there is",
    )


def known_store(name: str) -> str | None:
    """The store of a run that the tracking server of the environment knows by this name; None without such a one."""
    uri = tracking_uri(None, os.environ)
    if uri is None:
        return None
    runs = list_runs(uri)
    return find_run(name, runs).store if any(name in (run.run, run.mlflow_run_id) for run in runs) else None


def summary(run: RunFigures) -> Row:
    """One run as a row of `runs list`."""
    losses = (value for name, value in sorted(run.metrics.items()) if re.search(r"(?<!heldout/)\bloss/total$", name))
    updated = datetime.datetime.fromtimestamp(run.updated_ms / 1000, datetime.timezone.utc)
    return {
        "run": run.run,
        "status": run.status,
        "images": run.images,
        "loss": next(losses, None),
        "lr": param_value(run.params.get("lr", "null")),
        "updated": updated.isoformat(timespec="seconds"),
        "mlflow_run_id": run.mlflow_run_id,
        "store": run.store,
    }


def list_rows(runs: Sequence[RunFigures]) -> list[Row]:
    """`runs list` for people."""
    shown = ({key: value for key, value in summary(run).items() if key != "mlflow_run_id"} for run in runs)
    return [{key: cell(value) for key, value in row.items()} for row in shown]
