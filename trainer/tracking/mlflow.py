"""Everything that speaks to MLflow: one run on its server per training run, found again by tag.

Always holds: params are logged once, what an attempt may change stands in tags; the metrics of the run have one point
per update, held-out figures go to a child run; MLflow's step is images; nothing here retries: the driver refuses to
start, the tracker's thread has its own back-off. Called by the driver (`open_run`, `end_run`), by rank 0's tracker
(`MlflowServer`), by the registry, and by the command line and the demo, which read. Importing mlflow takes seconds, so
that happens in `mlflow_client`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

import yaml
from PIL import Image

from data_pipeline.errors import UserError
from trainer.tracking.charts import VIEW_TAG, charts_address, layout
from trainer.tracking.runs import RunFigures, flat_text
from trainer.tracking.spool import Point, ServerFailed
from trainer.tracking.tracker import HELDOUT, Record

log = logging.getLogger(__name__)

EXPERIMENT = "glidepath"
RUN, STORE, ATTEMPT = "glidepath.run", "glidepath.store", "glidepath.attempt"
IDENTITY, PART = "glidepath.identity", "glidepath.part"
PARENT = "mlflow.parentRunId"
CAME_FROM, FAMILY = "glidepath.from_runs", "glidepath.family"  # MLflow ids: of what it came from; of the oldest of all
# MLflow's own limits (mlflow/utils/validation.py); older servers have the smaller one of tags.
PARAM_CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS, ENTITIES = 6000, 5000, 36, 100
RUNS_PER_PAGE = 1000
NO_PARAMS: Mapping[str, str] = MappingProxyType({})

# One try per request: by default the client retries for minutes, during which nobody is told anything. It reads these
# from the environment only.
CHECK_TIMEOUT_S, TIMEOUT_S = 8, 20
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetUse:
    """A dataset of a run. `context`: training or evaluation."""

    name: str
    id: str
    uri: str
    context: str


@dataclass(frozen=True)
class RunAbout:
    """What the driver knows of a run and this attempt. `identity`: of the run's store, the same at each attempt."""

    identity: str
    run: str
    store: str
    config: dict[str, Any]
    attempt: int
    datasets: tuple[DatasetUse, ...]
    restart_reason: str  # why this driver started it again; else empty
    attempt_tags: dict[str, str]  # world_size, zero_stage, job, code_version: what attempts differ in
    parents: tuple[str, ...] = ()  # identities of the runs whose checkpoints it began from


def check_server(uri: str) -> None:
    """Raise UserError if the server does not answer, within about 10 s."""
    with refusing(uri):
        _experiment(mlflow_client(uri, CHECK_TIMEOUT_S))


def open_run(uri: str, about: RunAbout) -> str:
    """The id of the run on the server, made if it is not there yet; it is RUNNING now, and of this attempt, unless a
    newer one claimed it meanwhile. Raises UserError."""
    with refusing(uri):
        client = mlflow_client(uri)
        experiment = _experiment(client)
        tags = {IDENTITY: about.identity, RUN: about.run, STORE: about.store}
        run_id = _find_or_create(client, experiment, f"tags.`{IDENTITY}` = '{about.identity}'", tags, about.run)
        run = client.get_run(run_id)
        if _newer_than(about.attempt, run):
            return run_id
        client.set_tag(run_id, ATTEMPT, str(about.attempt))  # first: an older driver that ends now leaves it alone
        for key, value in _lineage_tags(client, experiment, about.parents).items():
            client.set_tag(run_id, key, value)
        if about.config.get("heldout"):
            _heldout_run(client, run_id)
        _set_status(client, run, "RUNNING")
        _log_settings(client, run_id, about)
        _log_datasets(client, run_id, about)
        if client.get_experiment(experiment).tags.get(VIEW_TAG) != layout():
            client.set_experiment_tag(experiment, VIEW_TAG, layout())
    log.info("tracked as %s/#/experiments/%s/runs/%s", uri, experiment, run_id)
    log.info("charts of all runs: %s", charts_address(uri, experiment))
    _store_config(uri, run_id, about)
    return run_id


def end_run(uri: str, run_id: str, status: Status, attempt: int) -> None:
    """Note how the run stands after `attempt`, unless a newer one goes on with it. Raises ServerFailed."""
    with _failing():
        client = mlflow_client(uri, CHECK_TIMEOUT_S)
        run = client.get_run(run_id)
        if not _newer_than(attempt, run):
            _set_status(client, run, status)


def list_runs(uri: str) -> list[RunFigures]:
    """Every training run of the server, newest first. Raises UserError."""
    with refusing(uri):
        client = mlflow_client(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:  # nothing was tracked there yet, and reading makes nothing
            return []
        found = runs_where(client, experiment.experiment_id, f"tags.`{RUN}` LIKE '%'")
        parts = runs_where(client, experiment.experiment_id, f"tags.`{PART}` = 'heldout'")
        children = {part.data.tags[PARENT]: part for part in parts if PARENT in part.data.tags}
        return [_figures(run, children.get(run.info.run_id)) for run in reversed(found)]


def first_heldout(uri: str, run_id: str) -> dict[str, float]:
    """The run's first held-out figures, by term; none without a child run. Raises ServerFailed."""
    with _failing():
        client = mlflow_client(uri)
        children = heldout_runs(client, client.get_run(run_id))
        histories = {
            name: client.get_metric_history(child.info.run_id, name)
            for child in children
            for name in child.data.metrics
        }
    first = {name: min(history, key=lambda metric: metric.step).value for name, history in histories.items()}
    return {name.removeprefix(HELDOUT): value for name, value in first.items()}


def event_positions(uri: str, run_id: str, kind: str) -> list[int]:
    """Images at which events of a kind happened, ascending. Raises ServerFailed."""
    with _failing():
        tags = mlflow_client(uri).get_run(run_id).data.tags
    parts = [key.split("/") for key in tags if key.startswith("event/")]
    return sorted(int(images) for _, images, _, found in parts if found == kind)


def store_results(
    uri: str,
    part: str,
    identity: str,
    name: str,
    step: int,
    metrics: dict[str, float],
    files: Path,
    parents: Sequence[str] = (),
    params: Mapping[str, str] = NO_PARAMS,
) -> str:
    """Metrics, and the files of a folder, in a run of their own that is no training run: `part` is its kind, `identity`
    finds it again. It is a child of the first of the training runs with the identities `parents` that are on the
    server, and its tags name all of them. Its id. Raises UserError."""
    with refusing(uri):
        client = mlflow_client(uri)
        experiment = _experiment(client)
        tags = {IDENTITY: identity, PART: part} | _lineage_tags(client, experiment, parents)
        run_id = _find_or_create(client, experiment, f"tags.`{IDENTITY}` = '{identity}'", tags, name)
        there = client.get_run(run_id).data
        for key, text in params.items():
            if key not in there.params:  # a param never changes on a server; a store that moved has another URI
                client.log_param(run_id, key, text[:PARAM_CHARACTERS])
        for key, value in metrics.items():
            if there.metrics.get(key) != value:  # the same again is no further point
                client.log_metric(run_id, key, value, step=step)
        with artifacts_failing():
            client.log_artifacts(run_id, str(files))
        client.set_terminated(run_id)
    return run_id


class MlflowServer:
    """See PictureServer. Made on the tracker's thread."""

    def __init__(self, uri: str, run_id: str) -> None:
        """Raises ServerFailed when mlflow is not installed."""
        with _failing():
            self._client = mlflow_client(uri)
        self._run_id = run_id
        self._heldout: str | None = None

    def claim(self, attempt: int) -> int:
        with _failing():
            newest = int(self._client.get_run(self._run_id).data.tags.get(ATTEMPT, 0))
            if newest < attempt:
                self._client.set_tag(self._run_id, ATTEMPT, str(attempt))
            return max(newest, attempt)

    def newest_steps(self) -> dict[str, int]:
        with _failing():
            steps = {}
            run = self._client.get_run(self._run_id)
            for part in (run, *heldout_runs(self._client, run)):
                # The server keeps the newest point of each metric by step; only the message has the step of it.
                for metric in part.data.to_proto().metrics:
                    steps[metric.key] = metric.step
            return steps

    def send(self, points: list[Point], events: list[Record]) -> None:
        from mlflow.entities import Metric, RunTag

        tags = [RunTag(event_tag(event), event["text"][:TAG_CHARACTERS]) for event in events]
        metrics: dict[bool, list[Metric]] = {False: [], True: []}
        for point in points:
            metric = Metric(point.name, point.value, point.ms, point.images)
            metrics[point.name.startswith(HELDOUT)].append(metric)
        with _failing():
            if metrics[True]:
                self._client.log_batch(self._heldout_id(), metrics=metrics[True])
            if metrics[False] or tags:
                self._client.log_batch(self._run_id, metrics=metrics[False], tags=tags)

    def send_picture(self, images: int, key: str, png: bytes) -> None:
        """Under `key`, and once more as the page's own image grid wants it, by which grids of several positions and
        runs are seen side by side: samples/images-000000064-ema.png is samples/ema at step 64."""
        name = f"{Path(key).parent}/{Path(key).stem.rpartition('-')[2]}"
        with artifacts_failing(), TemporaryDirectory(prefix="glidepath-") as folder:
            path = Path(folder, Path(key).name)
            path.write_bytes(png)
            self._client.log_artifact(self._run_id, str(path), str(Path(key).parent))
            with Image.open(path) as picture:
                self._client.log_image(self._run_id, picture, key=name, step=images, synchronous=True)

    def _heldout_id(self) -> str:
        if self._heldout is None:
            self._heldout = _heldout_run(self._client, self._run_id)
        return self._heldout


def event_tag(event: Record) -> str:
    """The tag that holds an event: the same when it is sent again."""
    return f"event/{event['images']}/{event['attempt']}/{event['event']}"


def mlflow_client(uri: str, timeout_s: int = TIMEOUT_S) -> Any:
    """mlflow's client; the timeout holds for all clients of this process. Raises UserError when it is not installed."""
    os.environ.update(CLIENT_ENVIRONMENT | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)})
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UserError(
            f"tracking server {uri}", "mlflow to be installed", str(error), "pip install 'glidepath[cluster]'"
        ) from None
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _failing() -> Iterator[None]:
    """Whatever the client raises as ServerFailed, in one line; also that there is no client."""
    try:
        import requests
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ServerFailed(f"mlflow is not installed: {error}") from None
    try:
        yield
    except (MlflowException, requests.RequestException, OSError, UserError) as error:
        raise ServerFailed(_one_line(error)) from None


@contextmanager
def artifacts_failing() -> Iterator[None]:
    """The same for artifacts, whose stores have client libraries of their own with exceptions of any kind, or lack
    them. Their text stays out: it may hold a signed address."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (any kind)
        raise ServerFailed(f"its artifact store: {_known_sign(error) or type(error).__name__}") from None


@contextmanager
def refusing(uri: str) -> Iterator[None]:
    """The same as UserError, for the driver and the command line."""
    mlflow_client(uri)  # first: without mlflow, its exceptions cannot be imported either
    try:
        with _failing():
            yield
    except ServerFailed as error:
        raise UserError(
            f"tracking server {uri}",
            "an answer",
            str(error),
            "start it (glidepath up, or mlflow server), correct tracking.uri, or unset it to log to a folder",
        ) from None


def _one_line(error: Exception) -> str:
    """An exception's message without what surrounds it: the client nests three libraries' messages in each other."""
    return _known_sign(error) or " ".join(str(error).split())[:300]


def _known_sign(error: Exception) -> str | None:
    for sign, meaning in (("Connection refused", "connection refused"), ("timed out", "no answer in time")):
        if sign in str(error):
            return meaning
    return None


def _experiment(client: Any) -> str:
    """The id of the experiment, made if it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(client.create_experiment(EXPERIMENT))
        except MlflowException:
            found = client.get_experiment_by_name(EXPERIMENT)  # another driver was quicker
            if found is None:
                raise
    return str(found.experiment_id)


def runs_where(client: Any, experiment: str, condition: str) -> list[Any]:
    """All runs that meet a condition, oldest first."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment], condition, 1, RUNS_PER_PAGE, ["attributes.start_time ASC"], token)
        runs += page
        token = page.token
        if not token:
            return runs


def _find_or_create(client: Any, experiment: str, condition: str, tags: dict[str, str], name: str) -> str:
    """The oldest run that meets the condition, as one with these tags does. Where two make it at the same time, both
    then see the oldest, and it stays."""
    found = runs_where(client, experiment, condition)
    if not found:
        made = client.create_run(experiment, tags=tags, run_name=name)
        found = runs_where(client, experiment, condition)
        if found[0].info.run_id != made.info.run_id:
            client.delete_run(made.info.run_id)
    return str(found[0].info.run_id)


def _lineage_tags(client: Any, experiment: str, parents: Sequence[str]) -> dict[str, str]:
    """What ties a run to those that it came from, by their identities: MLflow's own link to the first of them, the ids
    of all, and the oldest run of the family. Runs that are not on this server are left out."""
    found = [run for parent in parents for run in runs_where(client, experiment, f"tags.`{IDENTITY}` = '{parent}'")[:1]]
    if not found:
        return {}
    ids = " ".join(dict.fromkeys(run.info.run_id for run in found))
    first = found[0]
    return {PARENT: first.info.run_id, CAME_FROM: ids, FAMILY: first.data.tags.get(FAMILY, first.info.run_id)}


def training_run(client: Any, identity: str) -> str | None:
    """The id of the training run with this identity; None where the server has none."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = runs_where(client, experiment.experiment_id, f"tags.`{IDENTITY}` = '{identity}'") if experiment else []
    return str(found[0].info.run_id) if found else None


def _heldout_run(client: Any, parent: str) -> str:
    """The child run that held-out figures go to."""
    run = client.get_run(parent)
    tags = {PARENT: parent, PART: "heldout"}
    name = f"{run.info.run_name} held-out"
    return _find_or_create(client, run.info.experiment_id, _heldout_condition(parent), tags, name)


def heldout_runs(client: Any, parent: Any) -> list[Any]:
    """The child run of held-out figures, if there is one; nothing is made."""
    return runs_where(client, parent.info.experiment_id, _heldout_condition(parent.info.run_id))


def _heldout_condition(parent: str) -> str:
    return f"tags.`{PARENT}` = '{parent}' AND tags.`{PART}` = 'heldout'"  # users may nest runs of their own


def _newer_than(attempt: int, run: Any) -> bool:
    """Whether a newer attempt claimed the run, which is said."""
    newest = int(run.data.tags.get(ATTEMPT, 0))
    if newest > attempt:
        log.warning("tracking: attempt %d logs to this run now; attempt %d leaves it alone", newest, attempt)
    return newest > attempt


def _set_status(client: Any, run: Any, status: Status) -> None:
    """Of a run and its child."""
    for part in (run, *heldout_runs(client, run)):
        if status == "RUNNING":
            client.update_run(part.info.run_id, status=status)
        else:
            client.set_terminated(part.info.run_id, status)  # with its time, which update_run leaves unknown


def _log_settings(client: Any, run_id: str, about: RunAbout) -> None:
    """Params that are not there yet (a param never changes on a server), and the tags of this attempt."""
    from mlflow.entities import Param, RunTag

    data = client.get_run(run_id).data
    there = data.params
    flat = {key: value[:PARAM_CHARACTERS] for key, value in flat_text(about.config).items()}
    missing = [Param(key, value) for key, value in flat.items() if key not in there]
    for start in range(0, len(missing), ENTITIES):
        client.log_batch(run_id, params=missing[start : start + ENTITIES])
    changed = {
        f"config.{key}": value
        for key, value in flat.items()
        if there.get(key, value) != value or f"config.{key}" in data.tags  # also one that was changed back
    }
    tags = {ATTEMPT: str(about.attempt), STORE: about.store}
    tags |= {f"glidepath.{key}": value for key, value in about.attempt_tags.items()} | changed
    if about.restart_reason:
        tags[f"event/0/{about.attempt}/restart"] = about.restart_reason
    for context in dict.fromkeys(use.context for use in about.datasets):
        ids = [use.id for use in about.datasets if use.context == context]  # several of a mixture
        tags[f"glidepath.dataset.{context}"] = " ".join(ids)
    client.log_batch(run_id, tags=[RunTag(key, value[:TAG_CHARACTERS]) for key, value in tags.items()])


def _log_datasets(client: Any, run_id: str, about: RunAbout) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for use in about.datasets:
        source = json.dumps({"uri": use.uri, "id": use.id})
        kind = use.uri.partition("://")[0] if "://" in use.uri else "local"
        dataset = Dataset(use.name, use.id[:DIGEST_CHARACTERS], kind, source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", use.context)]))
    client.log_inputs(run_id, inputs)


def _store_config(uri: str, run_id: str, about: RunAbout) -> None:
    """The whole resolved configuration as a file of the run. A broken artifact store is no reason not to train."""
    try:
        with artifacts_failing():
            text = yaml.safe_dump(about.config, sort_keys=False)
            mlflow_client(uri).log_text(run_id, text, f"config/attempt-{about.attempt:05d}.yaml")
    except ServerFailed as error:
        log.warning("tracking server %s: the configuration was not stored as an artifact: %s", uri, error)


def _figures(run: Any, heldout: Any) -> RunFigures:
    """A run of the server as the command line shows it."""
    tags, message = run.data.tags, run.data.to_proto()
    metrics = dict(run.data.metrics) | (dict(heldout.data.metrics) if heldout else {})
    changed = {key.removeprefix("config."): value for key, value in tags.items() if key.startswith("config.")}
    return RunFigures(
        run=tags[RUN],
        store=tags.get(STORE, ""),
        mlflow_run_id=run.info.run_id,
        status=run.info.status,
        images=max((metric.step for metric in message.metrics), default=0),
        updated_ms=max((metric.timestamp for metric in message.metrics), default=run.info.start_time),
        params=run.data.params | changed,
        metrics=metrics,
    )
