"""Runs on a tracking server and in the state folder: followed over a killed worker, listed, compared."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import kill_worker_1_at

from cluster.cli import run
from cluster.launch import Event, WorkerDied
from cluster.training import train_run
from data_pipeline.errors import UserError
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, run_identity
from trainer.tracking.jsonl import METRICS

Values = Callable[..., dict[str, Any]]
HELDOUT = {"images": 16, "every_images": 32}


@pytest.fixture
def client(stack_env: Any) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=stack_env.mlflow)


def train(values: dict[str, Any], on_event: Callable[[Event], None] = lambda event: None) -> dict[str, Any]:
    return train_run(parse_train_config(values, "test"), on_event)


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON of a command that must succeed."""
    code = run([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def steps(client: Any, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def test_a_run_whose_worker_was_killed_is_one_mlflow_run_with_one_point_per_update(
    train_values: Values,
    dataset_uri: str,
    client: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = secrets.token_hex(16)
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)  # without the user and the key id that it would count with
    changes: dict[str, Any] = {"images": 96, "heldout": {"dataset": dataset_uri, **HELDOUT}}
    samples = {"every_images": 64, "sampling": {"spacing": 2}}
    values = train_values("tracked", launcher={"workers": 2}, samples=samples, **changes)
    with pytest.raises(WorkerDied):
        train(values, kill_worker_1_at(64))
    [found] = [row for row in asked(capsys, "runs", "list") if row["run"] == "tracked"]
    assert found["status"] == "FAILED"
    summary = train(values)
    run_id = summary["mlflow_run_id"]
    assert run_id == found["mlflow_run_id"] and summary["heldout"]["last"]["total"] > 0

    record = client.get_run(run_id)
    assert record.info.status == "FINISHED"
    assert len(record.data.metrics) > 10
    for name in record.data.metrics:
        assert steps(client, run_id, name) == list(range(16, 97, 16)), name
    [child] = client.search_runs([record.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert steps(client, child.info.run_id, "heldout/total") == [0, 32, 64, 96]

    tags = record.data.tags
    assert (tags["glidepath.attempt"], tags["glidepath.world_size"], tags["glidepath.zero_stage"]) == ("2", "2", "0")
    resumes = [key for key in tags if key.startswith("event/") and key.endswith("/2/resume")]
    assert len(resumes) == 1 and "images-" in tags[resumes[0]]
    pictures = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert pictures == ["samples/images-000000064-ema.png", "samples/images-000000096-ema.png"]
    assert not Path(values["store"], "tracking", METRICS).exists()
    stored = [path.read_bytes() for path in Path(values["store"]).rglob("*") if path.is_file()]
    assert len(stored) > 10 and not any(secret.encode() in content for content in stored)
    assert secret not in str(record.to_dictionary())

    # A run that was moved is the same run; one begun anew in its old place is another.
    config = parse_train_config(values, "test")
    moved = config.model_copy(update={"store": f"{values['store']}-moved"})
    identity = run_identity(config)
    shutil.move(values["store"], f"{values['store']}-moved")
    prepare_run(config)
    assert run_identity(moved) == identity != run_identity(config)


def test_runs_are_compared_by_the_settings_that_differ_and_their_newest_figures(
    train_values: Values, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    summaries = [train(train_values(name, images=32, lr=lr)) for name, lr in (("slow", 1e-4), ("fast", 1e-3))]
    document = asked(capsys, "runs", "compare", "slow", summaries[1]["mlflow_run_id"])
    assert [row["run"] for row in document["runs"]] == ["slow", "fast"]
    assert document["params_that_differ"] == {"lr": [1e-4, 1e-3]}
    assert document["metrics"]["lr"] == [1e-4, 1e-3]
    assert document["metrics"]["loss/total"] == pytest.approx([summary["loss"] for summary in summaries])
    assert run(["runs", "compare", "slow", "fast"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["slow", "fast"] in lines and ["lr", "0.0001", "0.001"] in lines
    # Its name alone finds a run's store, wherever that is.
    assert asked(capsys, "checkpoints", "list", "slow")[0]["images"] == 32


def test_without_a_tracking_server_the_same_is_read_from_the_state_folder(
    train_values: Values,
    state_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, lr in (("slow", 1e-4), ("fast", 1e-3)):
        train(train_values(name, images=32, lr=lr) | ({"store": None} if name == "slow" else {}))
    fast = train_values("fast")["store"]
    for name in ("empty", "damaged"):
        (state_folder / "runs" / name / "attempts").mkdir(parents=True)
    (state_folder / "runs" / "damaged" / "attempts" / "00001.json").write_text("{")
    assert [(row["run"], row["status"], row["images"]) for row in asked(capsys, "runs", "list")] == [
        ("slow", "FINISHED", 32)
    ]
    assert "left out: run " in caplog.text and "damaged/attempts/00001.json: expected" in caplog.text
    document = asked(capsys, "runs", "compare", "slow", fast)
    assert document["params_that_differ"] == {"lr": [1e-4, 1e-3]} and document["metrics"]["lr"] == [1e-4, 1e-3]
    assert run(["runs", "compare", "slow", "nowhere", "--json"]) == 1
    assert "run nowhere" in json.loads(capsys.readouterr().out)["error"]


def test_a_dead_tracking_server_is_refused_before_anything_of_the_run_exists(train_values: Values) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        values = train_values("dead", tracking={"uri": f"http://127.0.0.1:{probe.getsockname()[1]}"})
        with pytest.raises(UserError, match="found connection refused"):
            train(values)
    assert not Path(values["store"]).exists()
