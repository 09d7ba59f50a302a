"""`glidepath models`: a checkpoint under a name, found by it wherever a checkpoint is given, on the stack's server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.run
from cluster.tracking import TrackedRun, with_tracking_server
from cluster.work import training_work
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed
from trainer.checkpoint.retention import protected
from trainer.config import TrainConfig
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, run_lineage
from trainer.tracking.registry import register
from trainer.weights import open_checkpoint

Cli = Callable[..., tuple[int, Any, str]]


def config_of(values: dict[str, Any]) -> TrainConfig:
    return with_tracking_server(parse_train_config(values, "test"))


def tags_of(server: str, run_id: str | None) -> dict[str, str]:
    from mlflow.tracking import MlflowClient

    return dict(MlflowClient(tracking_uri=server).get_run(str(run_id)).data.tags)


@pytest.mark.usefixtures("one_thread")
def test_a_registered_checkpoint_stays_is_found_by_its_name_and_a_fine_tune_of_it_is_a_child_run(
    train_values: Callable[..., dict[str, Any]], stack_env: Any, cli: Cli, tmp_path: Path
) -> None:
    base = config_of(train_values(run="named", images=16))
    with TrackedRun(base) as tracked:
        attempt = prepare_run(base)
        tracked.begin(attempt, 1)
        trainer.run.train(base.model_dump(mode="json"), attempt, Group(), lambda event: None, tracked.mlflow_run_id)
        tracked.end("FINISHED")
    store = LocalStore(Path(base.store or ""))
    [name] = committed(store)
    uri = name.uri(store)

    code, row, _ = cli("models", "register", str(base.store), "people", "--alias", "best")
    assert code == 0 and (row["version"], row["uri"], row["checkpoint"]) == (1, "models:/people@best", uri)
    assert row["mlflow_run_id"] == tracked.mlflow_run_id and (row["run"], row["images"]) == ("named", 16)
    assert protected(store) == {name}, "what has a name is not removed by retention"
    assert cli("models", "register", uri, "people")[1] == row
    assert [(found["name"], found["aliases"]) for found in cli("models", "list", "people")[1]] == [("people", ["best"])]

    assert open_checkpoint("models:/people@best").uri == open_checkpoint("models:/people/1").uri == uri
    code, _, error = cli("checkpoints", "export", "models:/people@best", "--out", str(tmp_path / "exported"))
    assert code == 0, error
    code, document, _ = cli("sample", "models:/people@worst", "--prompt", "a dog")
    assert code == 1 and document["error"].startswith("model people: expected the alias worst, found best there; ")

    register(stack_env.mlflow, "people", uri, "0" * 64, "stale", None, {})
    code, document, _ = cli("sample", "models:/people@stale", "--prompt", "a dog")
    assert code == 1 and "expected the manifest 000000000000 that was registered" in document["error"]

    tuned = config_of(train_values(run="tuned", parent="models:/people@best"))
    assert training_work(tuned).values["parent"] == "models:/people@best"
    attempt = prepare_run(tuned)
    [facts] = run_lineage(LocalStore(Path(tuned.store or ""))).values()
    assert facts["parent"] == uri
    with TrackedRun(tuned) as child:
        child.begin(attempt, 1)
        child.end("FINISHED")
    tags = tags_of(stack_env.mlflow, child.mlflow_run_id)
    assert tags["mlflow.parentRunId"] == tags["glidepath.family"] == tracked.mlflow_run_id
    assert tags["glidepath.parent"] == uri


def test_without_a_server_a_registered_name_says_what_to_set(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, document, _ = cli("checkpoints", "export", "models:/people@best", "--out", "exported")
    assert code == 2 and "found none; set MLFLOW_TRACKING_URI" in document["error"]
    code, document, _ = cli("models", "list")
    assert code == 2 and document["error"].startswith("models: expected a tracking server")
