"""The MLflow tracker on a real server: one run over all attempts, one point per update, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import trainer.tracking.background
import trainer.tracking.mlflow
from data_pipeline.errors import UsageError, UserError
from trainer.tracking.background import BackgroundTracker
from trainer.tracking.mlflow import (
    DatasetUse,
    MlflowServer,
    RunAbout,
    check_server,
    end_run,
    first_heldout,
    list_runs,
    open_run,
    store_results,
)
from trainer.tracking.server import tracking_uri
from trainer.tracking.spool import Point, ServerFailed
from trainer.tracking.tracker import Record

START_S = 120


@dataclass
class RealServer:
    """An MLflow server of our own, to be killed: sqlite in `folder`, always the same port."""

    folder: Path
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        until = time.monotonic() + START_S
        while not self.answers():
            assert process.poll() is None and time.monotonic() < until, (self.folder / "server.log").read_text()
            time.sleep(0.2)  # a server tells nobody when it is up

    def answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers."""
        os.killpg(self.processes[-1].pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.processes[-1].wait()

    def steps(self, run_id: str, name: str) -> dict[int, int]:
        """step -> how many points of that metric the server has there."""
        from mlflow.tracking import MlflowClient

        history = MlflowClient(tracking_uri=self.uri).get_metric_history(run_id, name)
        return dict(Counter(metric.step for metric in history))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = RealServer(tmp_path_factory.mktemp("mlflow"), port)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def about(run: str, attempt: int = 1, **config: Any) -> RunAbout:
    values = {"run": run, "lr": 1e-3, "images": 64, "heldout": {"dataset": "demo-heldout"}, **config}
    datasets = tuple(DatasetUse(c, c[0] * 64, f"s3://bucket/{c}", c) for c in ("training", "evaluation"))
    tags = {"world_size": str(attempt)}
    return RunAbout(f"identity-{run}", run, f"s3://bucket/{run}", values, attempt, datasets, "", tags)


@pytest.fixture(autouse=True)
def quick_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tracker's thread waits for by the clock alone."""
    monkeypatch.setattr(trainer.tracking.background, "GATHER_S", 0.1)
    monkeypatch.setattr(trainer.tracking.background, "BACKOFF_S", (0.2,))


def tracker_of(server: RealServer, run_id: str, attempt: int = 1) -> BackgroundTracker:
    return BackgroundTracker(lambda: MlflowServer(server.uri, run_id), attempt)


def updates(until: int) -> dict[int, int]:
    """One point at each of that many updates."""
    return dict.fromkeys(range(16, 16 * until + 1, 16), 1)


def test_a_run_is_found_again_with_its_params_datasets_and_the_tags_of_its_newest_attempt(server: RealServer) -> None:
    from mlflow.tracking import MlflowClient

    run_id = open_run(server.uri, about("found", nested={"text": "x" * 9000, "nothing": None}))
    end_run(server.uri, run_id, "FAILED", 1)
    mixed = (*about("other").datasets, DatasetUse("more", "m" * 64, "s3://bucket/more", "training"))
    other = open_run(server.uri, replace(about("other", dataset=[{"uri": "a", "weight": "3"}]), datasets=mixed))
    assert open_run(server.uri, about("found", attempt=2, images=128)) == run_id != other
    client = MlflowClient(tracking_uri=server.uri)
    trained_on = client.get_run(other)
    assert trained_on.data.tags["glidepath.dataset.training"] == f"{'t' * 64} {'m' * 64}"
    assert len(trained_on.inputs.dataset_inputs) == 3 and "weight" in trained_on.data.params["dataset"]
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and run.info.run_name == "found"
    assert run.data.params | {"nested.text": ""} == {
        "run": "found", "lr": "0.001", "images": "64", "heldout.dataset": "demo-heldout",
        "nested.text": "", "nested.nothing": "null",
    }  # fmt: skip
    assert run.data.params["nested.text"] == "x" * 6000
    tags = run.data.tags
    assert (tags["glidepath.attempt"], tags["glidepath.world_size"], tags["config.images"]) == ("2", "2", "128")
    assert (tags["glidepath.run"], tags["glidepath.store"]) == ("found", "s3://bucket/found")
    assert run.inputs is not None and len(run.inputs.dataset_inputs) == 2
    inputs = {use.tags[0].value: use.dataset for use in run.inputs.dataset_inputs}
    assert inputs["training"].digest == "t" * 36 and json.loads(inputs["training"].source)["id"] == "t" * 64
    assert inputs["evaluation"].source_type == "s3"
    stored = [file.path for file in client.list_artifacts(run_id, "config")]
    assert stored == ["config/attempt-00001.yaml", "config/attempt-00002.yaml"]
    [listed] = [run for run in list_runs(server.uri) if run.run == "found"]
    assert listed.params["images"] == "128" and listed.mlflow_run_id == run_id


def test_a_batch_that_is_sent_twice_is_there_once(server: RealServer) -> None:
    run_id = open_run(server.uri, about("twice"))
    points = [Point(name, 0.5, 1000 + images, images) for images in range(16, 176, 16) for name in ("a", "heldout/b")]
    event: Record = {"images": 16, "attempt": 1, "event": "skip", "text": "spike"}
    connection = MlflowServer(server.uri, run_id)
    for _ in range(2):
        connection.send(points, [event])
    assert server.steps(run_id, "a") == updates(10)
    assert MlflowServer(server.uri, run_id).newest_steps() == {"a": 160, "heldout/b": 160}
    assert server.steps(run_id, "heldout/b") == {}, "held-out figures go to a child run"


def test_what_a_superseded_driver_notes_leaves_the_run_to_the_newer_attempt(server: RealServer) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    run_id = open_run(server.uri, about("superseded"))
    open_run(server.uri, about("superseded", attempt=3))
    end_run(server.uri, run_id, "FAILED", 1)
    open_run(server.uri, about("superseded", attempt=2, images=128))  # a note that comes late
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and "config.images" not in run.data.tags
    assert (run.data.tags["glidepath.attempt"], run.data.tags["glidepath.world_size"]) == ("3", "3")
    end_run(server.uri, run_id, "FINISHED", 3)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_the_child_run_of_held_out_figures_ends_with_its_run_and_exists_only_with_such_data(server: RealServer) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)

    def children(parent: str) -> dict[str, str]:
        experiment = client.get_run(parent).info.experiment_id
        found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        return {str(run.info.run_name): run.info.status for run in found}

    with_data, without = (
        open_run(server.uri, about(name, heldout=data)) for name, data in (("h", {"n": 1}), ("p", None))
    )
    nested = client.create_run(client.get_run(with_data).info.experiment_id, tags={"mlflow.parentRunId": with_data})
    nested_name = str(nested.info.run_name)
    MlflowServer(server.uri, with_data).send([Point("heldout/b", 0.5, 1, 16)], [])
    assert MlflowServer(server.uri, with_data).newest_steps() == {"heldout/b": 16}
    assert MlflowServer(server.uri, without).newest_steps() == first_heldout(server.uri, without) == {}
    for status in ("FINISHED", "RUNNING", "KILLED"):
        if status == "RUNNING":
            open_run(server.uri, about("h", attempt=2))
        else:
            end_run(server.uri, with_data, status, 2)
        assert children(with_data) == {"h held-out": status, nested_name: "RUNNING"}
    assert children(without) == {} and first_heldout(server.uri, with_data) == {"b": 0.5}


def test_reading_runs_makes_no_experiment(server: RealServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(trainer.tracking.mlflow, "EXPERIMENT", "never-used")
    assert list_runs(server.uri) == []
    assert MlflowClient(tracking_uri=server.uri).get_experiment_by_name("never-used") is None


def test_an_artifact_store_that_cannot_be_used_costs_the_artifacts_and_nothing_else(
    server: RealServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    client.create_experiment("far-artifacts", artifact_location="gs://glidepath/artifacts")  # its client is not here
    monkeypatch.setattr(trainer.tracking.mlflow, "EXPERIMENT", "far-artifacts")
    monkeypatch.setattr(trainer.tracking.background, "PICTURE_TRIES", 2)
    run_id = open_run(server.uri, about("artless"))
    assert "the configuration was not stored as an artifact: its artifact store: " in caplog.text
    tracker = tracker_of(server, run_id)
    tracker.picture(16, "samples/a.png", b"png")
    tracker.log(16, {"loss": 1.0})
    assert tracker.close() == [] and server.steps(run_id, "loss") == {16: 1}
    assert "its artifact store: " in client.get_run(run_id).data.tags["event/16/1/picture-failed"]


def test_without_mlflow_a_tracker_waits_and_a_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mlflow.tracking", "mlflow.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ServerFailed, match="mlflow is not installed"):
        MlflowServer("http://127.0.0.1:1", "run")
    with pytest.raises(UserError, match=r"expected mlflow to be installed.*pip install"):
        list_runs("http://127.0.0.1:1")


def test_a_server_that_hangs_and_one_that_is_killed_and_comes_back_lose_and_double_no_point(server: RealServer) -> None:
    run_id = open_run(server.uri, about("outages"))
    tracker = tracker_of(server, run_id)
    position = 0

    def log(count: int) -> None:
        nonlocal position
        for _ in range(count):
            position += 16
            tracker.log(position, {"loss": 1 / position, "time/step_s": time.perf_counter()})
            time.sleep(0.001)

    log(100)
    server.signal(signal.SIGSTOP)
    log(100)
    waiting = tracker.undelivered()
    server.signal(signal.SIGCONT)
    log(100)
    server.kill()
    log(100)
    assert len(waiting) >= 100 and len(tracker.undelivered()) >= 100
    server.start()
    tracker.event(position, "resume", "it answers again")
    tracker.picture(position, "samples/images-6400-ema.png", b"\x89PNG")
    assert tracker.close() == []
    assert server.steps(run_id, "loss") == server.steps(run_id, "time/step_s") == updates(400)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    assert client.get_run(run_id).data.tags["event/6400/1/resume"] == "it answers again"
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == ["samples/images-6400-ema.png"]


LOGS_FOR_EVER = """
import json, sys, time
from trainer.tracking import background
from trainer.tracking.background import BackgroundTracker
background.GATHER_S = 0.1
from trainer.tracking.mlflow import MlflowServer
uri, run_id, attempt, position, undelivered = json.loads(sys.argv[1])
tracker = BackgroundTracker(lambda: MlflowServer(uri, run_id), attempt)
tracker.replay(undelivered)
for images in range(position + 16, 10**9, 16):
    tracker.log(images, {"loss": 1 / images, "time/step_s": time.perf_counter()})
    if images % 160 == 0:
        print(json.dumps([images, tracker.undelivered()]), flush=True)
    time.sleep(0.005)
"""


def test_a_tracker_killed_at_any_moment_leaves_no_gap_and_no_double_behind_it(server: RealServer) -> None:
    run_id = open_run(server.uri, about("killed"))
    checkpoints: list[tuple[int, list[Record]]] = [(0, [])]
    for attempt in (1, 2):
        position, undelivered = checkpoints[-2:][0]  # not the newest: some of what is done again has arrived
        arguments = [server.uri, run_id, attempt, position, undelivered]
        command = [sys.executable, "-c", LOGS_FOR_EVER, json.dumps(arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            begun = position
            for line in child.stdout:
                checkpoints.append(tuple(json.loads(line)))
                arrived = max(server.steps(run_id, "loss"), default=0)
                if checkpoints[-1][0] > begun + 320 and arrived > begun:
                    break
            child.kill()
    position, undelivered = checkpoints[-1]
    tracker = tracker_of(server, run_id, attempt=3)
    tracker.replay(undelivered)
    end = position + 1600
    for images in range(position + 16, end + 1, 16):
        tracker.log(images, {"loss": -1.0, "time/step_s": -1.0})
    assert tracker.close() == []
    assert server.steps(run_id, "loss") == server.steps(run_id, "time/step_s") == updates(end // 16)


def test_results_are_one_child_run_with_one_point_of_each_figure_however_often_they_are_sent(
    server: RealServer, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    parent = open_run(server.uri, about("evaluated"))
    (tmp_path / "result.json").write_text("{}")
    figures = {"fid/noised-clip-ab12cd34": 12.5, "clip_score/noised-clip-ab12cd34": 0.25}
    run_ids = {
        store_results(
            server.uri, "evaluation", "digest-1", "evaluated, guidance 3", 64, figures, tmp_path, "identity-evaluated",
            {"checkpoint": f"{store}/images-64", "sampling.guidance_scale": "3.0"},
        )
        for store in ("s3://runs", "s3://moved")
    }  # fmt: skip
    (run_id,) = run_ids
    run = MlflowClient(tracking_uri=server.uri).get_run(run_id)
    assert (run.data.tags["mlflow.parentRunId"], run.info.status) == (parent, "FINISHED")
    assert run.data.metrics == figures and run.data.params["sampling.guidance_scale"] == "3.0"
    assert server.steps(run_id, "fid/noised-clip-ab12cd34") == {64: 1}
    assert "evaluated, guidance 3" not in [known.run for known in list_runs(server.uri)]  # no training run
    alone = store_results(server.uri, "evaluation", "digest-2", "of an import", 0, figures, tmp_path, "identity-absent")
    assert "mlflow.parentRunId" not in MlflowClient(tracking_uri=server.uri).get_run(alone).data.tags


def test_a_server_that_does_not_answer_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.tracking.mlflow, "CHECK_TIMEOUT_S", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"^tracking server {uri}: expected an answer, found connection refused; "):
            check_server(uri)
        silent.listen()  # takes the request and says nothing
        with pytest.raises(UserError, match="found no answer in time") as refusal:
            check_server(uri)
        assert "\n" not in str(refusal.value)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    for setting, environment in (("https://me:secret@host/", {}), (None, {"MLFLOW_TRACKING_URI": "http://me@host:1"})):
        with pytest.raises(UsageError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
            tracking_uri(setting, environment)
        assert "secret" not in str(refusal.value) and "me@" not in str(refusal.value)
    with pytest.raises(UsageError, match=r"MLFLOW_TRACKING_URI: expected http\(s\)"):
        tracking_uri(None, {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"})
    assert tracking_uri(None, {}) is None and tracking_uri("folder", {"MLFLOW_TRACKING_URI": "http://h"}) == "folder"
    assert tracking_uri(None, {"MLFLOW_TRACKING_URI": "http://h/?a=b@c"}) == "http://h/?a=b@c"
