"""The MLflow tracker on a real server: one run over all attempts, one point per update, whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image

import trainer.tracking.background
import trainer.tracking.mlflow
from data_pipeline.errors import UsageError, UserError
from trainer.pictures import png_bytes
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
from trainer.tracking.registry import find_version, register, registered
from trainer.tracking.server import tracking_uri
from trainer.tracking.spool import Point, ServerFailed
from trainer.tracking.tracker import Record

START_S = 120


@dataclass
class RealServer:
    """An MLflow server of our own, to be killed: on `backend`, else sqlite in `folder`; always the same port."""

    folder: Path
    port: int
    backend: str | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        backend = self.backend or f"sqlite:///{self.folder}/mlflow.db"
        command += ["--workers", "1", "--backend-store-uri", backend]
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server = RealServer(tmp_path_factory.mktemp("mlflow"), free_port())
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
    ended = client.get_run(run_id).info
    assert ended.status == "FINISHED" and ended.end_time >= ended.start_time


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
    tracker.picture(position, "samples/images-6400-ema.png", png_bytes(Image.new("RGB", (300, 200), "red"), {}))
    assert tracker.close() == []
    assert server.steps(run_id, "loss") == server.steps(run_id, "time/step_s") == updates(400)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    assert client.get_run(run_id).data.tags["event/6400/1/resume"] == "it answers again"
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == ["samples/images-6400-ema.png"]
    shown = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    assert {Path(name).suffix for name in shown} == {".png", ".webp"}, "whole, and small for the page's grid"
    assert all(name.startswith("samples~ema+step+6400+") for name in shown)


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

    parent, upsampler = (open_run(server.uri, about(name)) for name in ("evaluated", "upsampler"))
    (tmp_path / "result.json").write_text("{}")
    figures = {"fid/noised-clip-ab12cd34": 12.5, "clip_score/noised-clip-ab12cd34": 0.25}
    run_ids = {
        store_results(
            server.uri, "evaluation", "digest-1", "evaluated, guidance 3", 64, figures, tmp_path,
            ["identity-evaluated", "identity-upsampler"],
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
    assert run.data.tags["glidepath.from_runs"] == f"{parent} {upsampler}"
    absent = ["identity-absent"]
    alone = store_results(server.uri, "evaluation", "digest-2", "of an import", 0, figures, tmp_path, absent)
    assert "mlflow.parentRunId" not in MlflowClient(tracking_uri=server.uri).get_run(alone).data.tags


def test_fine_tunes_and_evaluations_name_their_parents_and_the_oldest_run_of_the_family(
    server: RealServer, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    base = open_run(server.uri, about("base"))
    tuned = open_run(server.uri, replace(about("tuned"), parents=("identity-elsewhere", "identity-base")))
    again = replace(about("tuned-again"), parents=("identity-tuned",))
    inpainting = open_run(server.uri, again)
    assert open_run(server.uri, replace(again, attempt=2)) == inpainting
    judged = store_results(server.uri, "evaluation", "d", "e", 0, {}, tmp_path, ["identity-tuned-again"])
    for run_id, parent in ((tuned, base), (inpainting, tuned), (judged, inpainting)):
        tags = MlflowClient(tracking_uri=server.uri).get_run(run_id).data.tags
        assert (tags["mlflow.parentRunId"], tags["glidepath.from_runs"]) == (parent, parent)
        assert tags["glidepath.family"] == base


def test_an_alias_is_of_one_checkpoint_and_a_checkpoint_of_one_version_and_nothing_is_copied(
    server: RealServer,
) -> None:
    from mlflow.tracking import MlflowClient

    run_id = open_run(server.uri, about("registered"))
    folder, bucket = (f"{store}/checkpoints/images-000000064/attempt-1" for store in ("/runs/a b", "s3://runs/a"))
    known = ("identity-registered", {"glidepath.images": "64"})

    def stands_for(uri: str) -> str:
        return find_version(uri, server.uri).checkpoint

    first = register(server.uri, "people", folder, "sha-1", "best", *known)
    assert register(server.uri, "people", folder, "sha-1", None, *known) == first
    assert (first.version, first.uri, first.mlflow_run_id) == (1, "models:/people@best", run_id)
    second = register(server.uri, "people", bucket, "sha-2", "best", None, {})
    assert (second.version, second.aliases, second.mlflow_run_id) == (2, ("best",), None)
    assert register(server.uri, "people", bucket, "sha-3", None, None, {}).version == 3  # other bytes at that address
    assert stands_for("models:/people@best") == stands_for("models:/people/2") == bucket
    assert register(server.uri, "people", folder, "sha-1", "best", *known).aliases == ("best",)
    assert stands_for("models:/people@best") == folder
    MlflowClient(tracking_uri=server.uri).create_registered_model("somebody-elses")
    assert [found.version for found in registered(server.uri)] == [3, 2, 1] and not registered(server.uri, "none")
    stored = MlflowClient(tracking_uri=server.uri).get_model_version("people", "2")
    assert stored.source == bucket and stored.status == "READY"
    assert not list((server.folder / "artifacts").rglob("*people*"))


def test_what_no_registered_model_stands_for_is_said_in_one_line(server: RealServer) -> None:
    register(server.uri, "places", "s3://runs/b/checkpoints/images-000000064/attempt-1", "sha-1", "best", None, {})
    for uri, where, said in (
        ("models:/places@worst", server.uri, "^model places: expected the alias worst, found best there; "),
        ("models:/places/7", server.uri, "^model places: expected the version 7, found 1 there; "),
        ("models:/palaces@best", server.uri, "^model palaces: expected one of those on .*places"),
        ("models:/places", server.uri, "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/places@best", None, "expected a tracking server to look it up on, found none; set MLFLOW_TRACKING_"),
        ("models:/places@best", "runs/folder", "found runs/folder"),
    ):
        with pytest.raises(UserError, match=said):
            find_version(uri, where)
    for name, alias in (("pla/ces", "best"), ("places", "v1"), ("places", "latest"), ("places", "the best")):
        with pytest.raises(UsageError, match="correct it"):
            register(server.uri, name, "s3://a", "sha", alias, None, {})


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


class PostgreSQL:
    """A database of our own, on loopback. PostgreSQL refuses to run as root, so then as the user of its packages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.user = "postgres" if os.getuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user)
        self._run("initdb", "--auth", "trust", "--username", "glidepath", "--pgdata", str(folder / "data"))
        self.start()

    @property
    def uri(self) -> str:
        return f"postgresql://glidepath@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def kill(self) -> None:
        """As a crash: what was not committed is gone."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, *command: str) -> None:
        subprocess.run(command, user=self.user, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    if not all(map(shutil.which, ("initdb", "pg_ctl"))):
        pytest.skip("no PostgreSQL on this machine")
    with TemporaryDirectory(prefix="glidepath-postgresql-") as folder:
        os.chmod(folder, 0o755)
        database = PostgreSQL(Path(folder))
        try:
            yield database
        finally:
            with suppress(subprocess.CalledProcessError):
                database.kill()


@pytest.mark.drill
def test_all_of_it_holds_with_postgresql_also_when_the_database_is_killed(
    postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    server = RealServer(tmp_path_factory.mktemp("mlflow"), free_port(), postgresql.uri)
    server.start()
    try:
        test_a_run_is_found_again_with_its_params_datasets_and_the_tags_of_its_newest_attempt(server)
        test_a_batch_that_is_sent_twice_is_there_once(server)
        test_what_a_superseded_driver_notes_leaves_the_run_to_the_newer_attempt(server)
        test_the_child_run_of_held_out_figures_ends_with_its_run_and_exists_only_with_such_data(server)
        test_fine_tunes_and_evaluations_name_their_parents_and_the_oldest_run_of_the_family(server, tmp_path)
        test_an_alias_is_of_one_checkpoint_and_a_checkpoint_of_one_version_and_nothing_is_copied(server)
        test_a_server_that_hangs_and_one_that_is_killed_and_comes_back_lose_and_double_no_point(server)
        test_a_tracker_killed_at_any_moment_leaves_no_gap_and_no_double_behind_it(server)

        run_id = open_run(server.uri, about("database"))
        tracker = tracker_of(server, run_id)
        for images in range(16, 3216, 16):
            if images == 1600:
                postgresql.kill()
            tracker.log(images, {"loss": 1 / images})
            time.sleep(0.002)
        postgresql.start()
        assert tracker.close() == [] and server.steps(run_id, "loss") == updates(200)
    finally:
        server.kill()
