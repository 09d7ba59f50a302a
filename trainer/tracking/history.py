"""A run's history from its MLflow server alone: settings, curves and grids, without the run's store.

Always holds: nothing is written; a file that the server's artifact store does not give is said and done without. Called
by the command line, where runs are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from trainer.tracking.mlflow import PARENT, PART, artifacts_failing, heldout_runs, mlflow_client, refusing, runs_where
from trainer.tracking.runs import Curves, Grid, RunFigures, evaluation_curves, grids_of, param_value
from trainer.tracking.spool import ServerFailed

log = logging.getLogger(__name__)


class MlflowHistory:
    """See RunHistory: of a run that the server listed."""

    def __init__(self, uri: str, run: RunFigures) -> None:
        assert run.mlflow_run_id is not None
        self._uri, self._figures, self._run_id = uri, run, run.mlflow_run_id
        self._client = mlflow_client(uri)

    def settings(self) -> dict[str, Any]:
        """As in the stored file; where that cannot be had, from the params: flat, and text of limited length."""
        keys = [key for key in self._files("config") if key.endswith(".yaml")]
        text = self._file(max(keys)) if keys else None
        try:
            values = yaml.safe_load(text or b"")
        except yaml.YAMLError as error:
            values = None
            log.warning("run %s: %s is no YAML: %s", self._figures.run, max(keys), " ".join(str(error).split()))
        if isinstance(values, dict):
            return values
        log.warning("run %s: its settings are read from the params, since there is no file of them", self._figures.run)
        return {key: param_value(value) for key, value in self._figures.params.items()}

    def curves(self, names: Sequence[str]) -> Curves:
        with refusing(self._uri):
            run = self._client.get_run(self._run_id)
            curves: Curves = {}
            for part in (run, *heldout_runs(self._client, run)):
                for name in set(names) & part.data.metrics.keys():
                    history = self._client.get_metric_history(part.info.run_id, name)
                    curves[name] = {metric.step: metric.value for metric in sorted(history, key=lambda m: m.timestamp)}
            return curves

    def evaluations(self) -> Curves:
        with refusing(self._uri):
            experiment = self._client.get_run(self._run_id).info.experiment_id
            condition = f"tags.`{PARENT}` = '{self._run_id}' AND tags.`{PART}` = 'evaluation'"
            found = runs_where(self._client, experiment, condition)
            steps = ({metric.step for metric in run.data.to_proto().metrics} for run in found)
            return evaluation_curves(
                (max(step), run.data.params, run.data.metrics) for run, step in zip(found, steps, strict=True) if step
            )

    def grids(self) -> list[Grid]:
        return grids_of(self._files("samples"))

    def picture(self, grid: Grid) -> bytes | None:
        return self._file(grid.key)

    def _files(self, folder: str) -> list[str]:
        """The keys of the run's files in a folder; none where they cannot be listed."""
        try:
            with artifacts_failing():
                return [file.path for file in self._client.list_artifacts(self._run_id, folder) if not file.is_dir]
        except ServerFailed as error:
            log.warning("run %s: no files of %s: %s", self._figures.run, folder, error)
            return []

    def _file(self, key: str) -> bytes | None:
        try:
            with artifacts_failing(), TemporaryDirectory(prefix="glidepath-") as folder:
                return Path(self._client.download_artifacts(self._run_id, key, folder)).read_bytes()
        except ServerFailed as error:
            log.warning("run %s: no %s: %s", self._figures.run, key, error)
            return None
