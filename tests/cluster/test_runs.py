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
from data_pipeline import manifests
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


def test_runs_are_compared_from_the_tracking_server_alone(
    train_values: Values,
    client: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Settings that differ, figures at equal images and GPU-hours, grids and the page, with the stores gone; then with
    a run that has no files on the server either, and the name of another."""
    samples = {"every_images": 32, "prompts": ["a cat", "2"], "sampling": {"spacing": 2}}
    runs = {"slow": {"lr": 1e-4, "images": 32, "samples": samples}, "fast": {"images": 64, "samples": samples}}
    summaries = [train(train_values(name, **changes)) for name, changes in runs.items()]
    # Its name alone finds a run's store, wherever that is.
    assert asked(capsys, "checkpoints", "list", "slow")[0]["images"] == 32
    shutil.rmtree(tmp_path / "runs")
    files = [tmp_path / "compared.html", tmp_path / "compared.png"]
    options = ["--price-per-gpu-hour", "2", "--smooth", "0", "--html", str(files[0]), "--png", str(files[1])]
    document = asked(capsys, "runs", "compare", "slow", summaries[1]["mlflow_run_id"], *options)
    assert [row["run"] for row in document["runs"]] == ["slow", "fast"]
    assert document["params_that_differ"] == {"images": [32, 64], "lr": [1e-4, 1e-3]}
    assert document["metrics"]["lr"] == [1e-4, 1e-3] and document["metrics"]["workers"] == [1, 1]
    assert document["metrics"]["loss/total"] == pytest.approx([summary["loss"] for summary in summaries])

    at_32 = document["equal_images"]["loss/total"]
    [logged] = [point.value for point in client.get_metric_history(summaries[1]["mlflow_run_id"], "loss/total")][1:2]
    assert at_32 == {"images": 32, "values": pytest.approx([summaries[0]["loss"], logged])}
    seconds = [point.value for point in client.get_metric_history(summaries[0]["mlflow_run_id"], "time/step_s")]
    hours = document["runs"][0]["gpu_hours"]
    assert hours == pytest.approx(sum(seconds) / 3600) == document["runs"][0]["cost"] / 2
    assert document["equal_gpu_hours"]["loss/total"]["gpu_hours"] <= hours
    assert document["curves"]["grad_norm"][1]["images"] == [16, 32, 48, 64]
    assert document["grids"][0] == {
        "weights": "ema", "images": [32, 32], "keys": ["samples/images-000000032-ema.png"] * 2
    }  # fmt: skip
    assert files[0].read_text().count("data:image/png") >= 2 and files[1].read_bytes()[:4] == b"\x89PNG"

    assert run(["runs", "compare", "slow", "fast", "--metric", "loss/*"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["slow", "fast"] in lines and ["lr", "0.0001", "0.001"] in lines
    assert any(line[:4] == ["loss/mse", "at", "32", "images"] for line in lines)
    for arguments, refusal in (
        (["slow", "fast", "--metric", "loss/totl"], "metric loss/totl: expected one that a run logged"),
        (["slow", summaries[0]["mlflow_run_id"]], "expected different runs, found slow and"),
    ):
        assert run(["runs", "compare", *arguments, "--json"]) in (1, 2)
        assert refusal in json.loads(capsys.readouterr().out)["error"]

    experiment = client.get_run(summaries[0]["mlflow_run_id"]).info.experiment_id
    twin = client.create_run(experiment, tags={"glidepath.run": "slow", "glidepath.store": "s3://gone"}).info.run_id
    client.log_param(twin, "lr", "0.5")
    client.log_metric(twin, "loss/total", 2.0, step=16)
    document = asked(capsys, "runs", "compare", "fast", twin)
    assert "run slow: its settings are read from the params" in caplog.text
    assert document["params_that_differ"]["lr"] == [1e-3, 0.5]
    assert document["equal_images"]["loss/total"]["values"][1] == 2.0 and document["runs"][1]["gpu_hours"] is None
    assert run(["runs", "compare", "slow", "fast", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert "run slow: expected one run of that name, found 2: " in error and twin in error and "\n" not in error
    client.delete_run(twin)


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
    result = {"trained_images": 32, "images": 8, "weights": "ema", "seed": 0, "sampling": {"guidance_scale": 2.0}}
    result |= {"dataset": {"id": "ab" * 32}, "metrics": {"fid/net": 7.5}}
    Path(fast, "evaluations", "cd").mkdir(parents=True)
    Path(fast, "evaluations", "cd", "result-0f.json").write_bytes(manifests.seal(result))
    document = asked(capsys, "runs", "compare", "slow", fast)
    assert document["params_that_differ"] == {"lr": [1e-4, 1e-3]} and document["metrics"]["lr"] == [1e-4, 1e-3]
    fid = document["equal_images"]["evaluation/fid/net (8 of abababab, guidance_scale=2.0)"]
    assert fid == {"images": 32, "values": [None, 7.5]}
    assert document["equal_images"]["loss/total"]["images"] == 32 and document["runs"][0]["gpu_hours"] > 0
    assert run(["runs", "compare", "slow", "nowhere", "--json"]) == 1
    assert "run nowhere" in json.loads(capsys.readouterr().out)["error"]


def test_a_dead_tracking_server_is_refused_before_anything_of_the_run_exists(train_values: Values) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        values = train_values("dead", tracking={"uri": f"http://127.0.0.1:{probe.getsockname()[1]}"})
        with pytest.raises(UserError, match="found connection refused"):
            train(values)
    assert not Path(values["store"]).exists()
