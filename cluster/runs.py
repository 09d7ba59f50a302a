"""`glidepath runs`: what runs there are and in what they differ, from a tracking server or from the state folder.

Always holds: nothing is written; a run is named by its name, its store or its MLflow id, and a name that two runs have
is refused rather than guessed. Called by the command line.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from data_pipeline.config import state_folder
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.attempts import ATTEMPTS, newest_attempt, read_record
from trainer.recipes import parse_train_config
from trainer.run import tracking_folder
from trainer.stop import read_end
from trainer.tracking.jsonl import METRICS, read_curves
from trainer.tracking.mlflow import list_runs
from trainer.tracking.runs import RunFigures, flat_text
from trainer.tracking.server import is_server, tracking_uri

log = logging.getLogger(__name__)

IDENTIFIES = ("run", "store")  # settings that tell runs apart rather than compare them
MLFLOW_STATUS = {
    None: "RUNNING", "resized": "RUNNING",  # another attempt is about to follow
    "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "died": "FAILED",
}  # fmt: skip
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
    store = open_store(uri)
    attempt = newest_attempt(store)
    if not attempt:
        raise UserError(f"run {uri}", "a run's store", "no attempts in it", "glidepath runs list shows what there is")
    config = parse_train_config(read_record(store, f"{ATTEMPTS}{attempt:05d}.json")["config"], uri)
    folder = tracking_folder(config.model_copy(update={"store": store.uri}))
    curves = {name: curve for name, curve in read_curves(folder).items() if curve}
    metrics = folder / METRICS
    return RunFigures(
        run=config.run,
        store=store.uri,
        mlflow_run_id=None,
        status=_status(store, attempt),
        images=max((max(curve) for curve in curves.values()), default=0),
        updated_ms=int(metrics.stat().st_mtime * 1000) if metrics.exists() else 0,
        params=flat_text(config.model_dump(mode="json")),
        metrics={name: curve[max(curve)] for name, curve in curves.items()},
    )


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


def compare(runs: Sequence[RunFigures]) -> dict[str, Any]:
    """Settings that are not the same in all runs, and the newest value of each metric; None where a run has none."""
    keys = sorted({key for run in runs for key in run.params if key not in IDENTIFIES})
    settings = {key: [_value(run.params.get(key)) for run in runs] for key in keys}
    names = sorted({name for run in runs for name in run.metrics})
    return {
        "runs": [summary(run) for run in runs],
        "params_that_differ": {key: values for key, values in settings.items() if any(v != values[0] for v in values)},
        "metrics": {name: [run.metrics.get(name) for run in runs] for name in names},
    }


def summary(run: RunFigures) -> Row:
    """One run as a row of `runs list`."""
    losses = (value for name, value in sorted(run.metrics.items()) if re.search(r"(?<!heldout/)\bloss/total$", name))
    updated = datetime.datetime.fromtimestamp(run.updated_ms / 1000, datetime.timezone.utc)
    return {
        "run": run.run,
        "status": run.status,
        "images": run.images,
        "loss": next(losses, None),
        "lr": _value(run.params.get("lr")),
        "updated": updated.isoformat(timespec="seconds"),
        "mlflow_run_id": run.mlflow_run_id,
        "store": run.store,
    }


def list_rows(runs: Sequence[RunFigures]) -> list[Row]:
    """`runs list` for people."""
    shown = ({key: value for key, value in summary(run).items() if key != "mlflow_run_id"} for run in runs)
    return [{key: _cell(value) for key, value in row.items()} for row in shown]


def comparison_rows(document: dict[str, Any]) -> list[Row]:
    """`runs compare` for people: a line per figure, a column per run."""
    names = [row["run"] for row in document["runs"]]
    heads = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]

    def line(key: str, values: Sequence[Any]) -> Row:
        return {"": key} | {head: _cell(value) for head, value in zip(heads, values, strict=True)}

    rows = [line(key, [row[key] for row in document["runs"]]) for key in ("store", "status", "images")]
    for title in ("params_that_differ", "metrics"):
        rows += [line(key, values) for key, values in document[title].items()]
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(text: str | None) -> Any:
    """A setting as its JSON value; text that is none stays text."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text
