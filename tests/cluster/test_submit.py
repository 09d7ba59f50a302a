"""Jobs: what is refused before anything starts, and the same road through a real Ray, S3 and MLflow."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from secret_places import beyond_loopback, listeners, places_of, private_files
from support import wait_for

from cluster import package, submit
from cluster.cli import run
from cluster.job import RESULT, main
from cluster.package import working_tree, write_zip
from cluster.stop_jobs import stop_jobs
from cluster.submit import (
    Cluster,
    address_of,
    next_number,
    refuse_running,
    result_of,
)
from cluster.work import Node, Work, corpus_work, refuse_unfit, training_work
from data_pipeline.build import CorpusConfig, inspect_dataset
from data_pipeline.config import parse
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import LocalStore, StoreError, open_store
from trainer.checkpoint.manifest import committed
from trainer.recipes import parse_train_config
from trainer.stop import read_end

Values = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


def job(submission_id: str, status: JobStatus = JobStatus.SUCCEEDED, store: str = "") -> JobDetails:
    metadata = {"glidepath_run": "tiny", "glidepath_store": store}
    return JobDetails(
        type=JobType.SUBMISSION, submission_id=submission_id, status=status, metadata=metadata, entrypoint=""
    )


def work(workers: int = 1, gpus: int = 0, folders: tuple[str, ...] = ()) -> Work:
    return Work("train", "tiny", "s3://bucket/tiny", {}, workers, gpus, folders)


def test_work_that_cannot_run_on_the_nodes_is_refused_in_one_line() -> None:
    refuse_unfit([Node(2, 0), Node(2, 0)], work(4))
    with pytest.raises(UserError, match="room for 5 workers of 1 CPU each, found 4 CPUs and 0 GPUs on 2 nodes"):
        refuse_unfit([Node(2, 0), Node(2, 0)], work(5))
    refuse_unfit([Node(8, 2), Node(1, 8)], work(3, gpus=1))
    with pytest.raises(UserError, match="4 workers of 1 CPU and 1 GPU each"):
        refuse_unfit([Node(8, 2), Node(1, 8)], work(4, gpus=1))
    refuse_unfit([Node(2, 0)], work(folders=("/runs/tiny",)))
    with pytest.raises(UserError, match=r"folder /runs/tiny: expected a place that all 2 nodes .*; put it at s3://"):
        refuse_unfit([Node(2, 0), Node(2, 0)], work(folders=("/runs/tiny",)))


def test_a_job_id_is_never_taken_twice() -> None:
    jobs = [
        job("tiny-1"),
        job("tiny-7"),
        job("tiny-two-9"),
        job("tiny-1-30"),
        JobDetails(type=JobType.DRIVER, status=JobStatus.FAILED, entrypoint=""),
    ]
    assert next_number([], "tiny", 0) == 1
    assert next_number(jobs, "tiny", 3) == 8
    assert next_number(jobs, "tiny", 11) == 12


def test_a_run_whose_job_is_not_over_is_refused_by_its_name() -> None:
    store = work().store
    refuse_running([job("tiny-1", JobStatus.STOPPED, store), job("tiny-2", JobStatus.RUNNING, "s3://other")], work())
    for status in (JobStatus.PENDING, JobStatus.RUNNING):
        with pytest.raises(UserError, match=f"found job tiny-3, {status}; wait for it, or end it: ray job stop tiny-3"):
            refuse_running([job("tiny-3", status, store)], work())


def test_work_names_every_folder_by_its_absolute_path(train_values: Values, tmp_path: Path) -> None:
    values = train_values(store="runs/a", dataset="./shards", tracking={"uri": "curves"})
    config = parse_train_config(values | {"heldout": {"dataset": "demo-heldout"}}, "test")
    made = training_work(config)
    shares = [{"uri": "./shards", "weight": "3"}, {"uri": "demo", "weight": "1"}]
    mixed = training_work(parse_train_config({**values, "dataset": shares}, "test"))
    assert mixed.values["dataset"] == [{"uri": str(tmp_path / "shards"), "weight": "3"}, {"uri": "demo", "weight": "1"}]
    assert mixed.folders[1:3] == [str(tmp_path / "shards"), "demo"]
    assert made.store == made.values["store"] == str(tmp_path / "runs/a")
    assert made.values["dataset"] == str(tmp_path / "shards")
    assert made.values["tracking"]["uri"] == str(tmp_path / "curves")
    assert made.values["heldout"]["dataset"] == "demo-heldout"
    assert made.folders == [
        str(tmp_path / "runs/a"),
        str(tmp_path / "shards"),
        "demo-heldout",
        str(tmp_path / "curves"),
    ]
    corpus: dict[str, Any] = {
        "inputs": [{"kind": "folder", "uri": "in"}, {"kind": "demo", "uri": "train"}],
        "output": "s3://bucket/out",
    }
    corpus["filters"] = {"preset": "basic", "max_aspect": None}
    corpus["scorers"] = [
        {"kind": "noised_clip", "checkpoint": uri} for uri in ("runs/clip", "clip", "models:/clip@best")
    ]
    config = parse(CorpusConfig, corpus, "test")
    made = corpus_work(config, "photos")
    clip = str(tmp_path / "runs" / "clip")
    assert [entry["checkpoint"] for entry in made.values["scorers"]] == [clip, "clip", "models:/clip@best"]
    assert parse(CorpusConfig, made.values, "job").filters.resolved() == config.filters.resolved()
    assert [entry["uri"] for entry in made.values["inputs"]] == [str(tmp_path / "in"), "train"]
    assert made.folders == [str(tmp_path / "in"), clip] and made.store == "s3://bucket/out"


@pytest.mark.parametrize(
    ("spellings", "store"),
    [
        (("s3://bucket/runs/tiny", "s3://bucket/runs/tiny/", "s3://bucket//runs/tiny"), "s3://bucket/runs/tiny"),
        (("/runs/tiny", "/runs/tiny/", "file:///runs/tiny", "file:///runs/tiny/"), "/runs/tiny"),
    ],
)
def test_one_store_has_one_name_however_it_is_spelled(
    train_values: Values, spellings: tuple[str, ...], store: str
) -> None:
    for spelling in spellings:
        made = training_work(parse_train_config(train_values(store=spelling, dataset=spelling), "test"))
        assert made.store == made.values["store"] == made.values["dataset"] == store
        corpus = {"inputs": [{"kind": "demo", "uri": "train"}], "output": spelling}
        built = corpus_work(parse(CorpusConfig, corpus, "test"), "photos")
        assert built.store == built.values["output"] == store
        for again in (made, built):
            with pytest.raises(UserError, match="found job tiny-3, RUNNING"):
                refuse_running([job("tiny-3", JobStatus.RUNNING, store)], again)


def test_no_credential_gets_into_a_job(train_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    inputs = ["https://host/a.tar?X-Amz-Signature=SECRET", "s3://KEY:SECRET@bucket/in", "gs://KEY:SECRET@bucket/in"]
    for uri in inputs:
        corpus = parse(CorpusConfig, {"inputs": [{"kind": "webdataset", "uri": uri}], "output": "out"}, "test")
        with pytest.raises(UsageError) as refused:
            corpus_work(corpus, "photos")
        errors.append(refused)
    demo = [{"kind": "demo", "uri": "train"}]
    scorers = [{"kind": "noised_clip", "checkpoint": "s3://KEY:SECRET@bucket/clip"}]
    with pytest.raises(UsageError) as refused:
        corpus_work(parse(CorpusConfig, {"inputs": demo, "output": "out", "scorers": scorers}, "test"), "photos")
    errors.append(refused)
    for uri in ("s3://KEY:SECRET@bucket/run", "gs://KEY:SECRET@bucket/run", "s3://bucket/run?signature=SECRET"):
        for place in ({"store": uri}, {"dataset": uri}, {"heldout": {"dataset": uri}}):
            config = parse_train_config(train_values() | place, "test")
            with pytest.raises(UsageError) as refused:
                training_work(config)
            errors.append(refused)
        with pytest.raises(UsageError) as refused:
            corpus_work(parse(CorpusConfig, {"inputs": demo, "output": uri}, "test"), "photos")
        errors.append(refused)
        with pytest.raises(UsageError) as refused:
            open_store(uri)
        errors.append(refused)
    with pytest.raises(UsageError) as refused:
        address_of("http://user:SECRET@host:8265")
    errors.append(refused)
    assert not [str(error.value) for error in errors if "SECRET" in str(error.value)]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="RAY_API_SERVER_ADDRESS"):
        address_of(None)


def test_a_job_ends_for_submit_as_it_ended_there() -> None:
    log = f"lines\n{RESULT}" + json.dumps({"images": 64}) + "\n"
    assert result_of("tiny-1", "SUCCEEDED", log) == {"images": 64, "submission_id": "tiny-1"}
    error = {"error": "a: expected b, found c; d", "fields": ["a", "b", "c", "d"]}
    with pytest.raises(UserError, match=r"^a: expected b, found c; d$"):
        result_of("tiny-1", "FAILED", RESULT + json.dumps(error))
    with pytest.raises(UserError, match="job tiny-1: expected a result, found FAILED: Killed; see its log"):
        result_of("tiny-1", "FAILED", "lines\nKilled\n\n")


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (UsageError("a", "b", "c", "d"), UsageError, "a: expected b, found c; d"),
        (UserError("a", "b", "c", "d"), UserError, "a: expected b, found c; d"),
        (StoreError("s3://b/run/x", "no answer"), UserError, "found FAILED: s3://b/run/x: no answer; see its log"),
        (
            OSError(28, "No space left", "/runs/x"),
            UserError,
            "/runs/x: No space left; make room, and the same command goes",
        ),
    ],
)
def test_an_error_in_a_job_reaches_submit_as_what_it_was(
    error: Exception,
    kind: type[UserError],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(values: dict[str, Any], name: str) -> dict[str, Any]:
        raise error

    monkeypatch.setattr("sys.argv", ["cluster.job", "train", json.dumps({"values": {}, "name": "tiny"})])
    monkeypatch.setattr("cluster.job.connected", nullcontext)
    monkeypatch.setattr("cluster.job.train", fail)
    assert main() == 1
    captured = capsys.readouterr()
    with pytest.raises(UserError) as ended:
        result_of("tiny-1", "FAILED", captured.err + captured.out)
    assert type(ended.value) is kind and line in str(ended.value)


class Dashboard(ThreadingHTTPServer):
    """What a Ray dashboard answers about nodes and one job that is over. `refusals`: how often a path still fails."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refusals: Counter[str] = Counter()
        self.living = 1
        self.locked = False

    def answer(self, path: str, query: dict[str, list[str]]) -> Any:
        if path == "/api/v0/nodes":
            nodes = [node_row(number, "DEAD" if number < 120 else "ALIVE") for number in range(120 + self.living)]
            if query.get("filter_keys") == ["state"]:
                nodes = [node for node in nodes if [node["state"]] == query["filter_values"]]
            found = {"result": nodes[: int(query["limit"][0])], "total": len(nodes)}
            return {"result": True, "msg": "", "data": {"result": found}}
        over = json.loads(job("tiny-1").model_dump_json())
        logs = f"lines\n{RESULT}" + json.dumps({"images": 64}) + "\n"
        return {
            "/api/version": {"version": "4", "ray_version": "2.40.0", "ray_commit": ""},
            "/api/jobs/": [over],
            "/api/jobs/tiny-1": over,
            "/api/jobs/tiny-1/logs": {"logs": logs},
        }.get(path)


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        answer = self.server.answer(parts.path, parse_qs(parts.query))
        status = 401 if self.server.locked else 200 if answer is not None else 404
        if self.server.refusals[parts.path] > 0:
            self.server.refusals[parts.path] -= 1
            status, answer = 500, "Traceback (most recent call last):\n  a line\nRuntimeError: out of order\n"
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *about: Any) -> None:
        pass


def node_row(number: int, state: str) -> dict[str, Any]:
    row = {"node_id": str(number), "node_ip": "127.0.0.1", "is_head_node": False, "state": state, "node_name": ""}
    return row | {"state_message": None, "resources_total": {"CPU": 2.0}, "labels": {}}


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_only_living_nodes_count_however_many_died_before_them(dashboard: Dashboard) -> None:
    dashboard.living = 103
    assert Cluster(dashboard.url).nodes == [Node(2, 0)] * 103


def test_a_cluster_that_asks_for_a_token_is_one_line(dashboard: Dashboard) -> None:
    dashboard.locked = True
    with pytest.raises(UserError, match="expected access, found a refusal without the right token; set RAY_AUTH_MODE"):
        Cluster(dashboard.url)


def test_a_dashboard_that_fails_for_a_while_does_not_end_the_waiting_for_a_job(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "STATUS_POLL_S", 0.01)
    cluster = Cluster(dashboard.url)
    dashboard.refusals.update({"/api/jobs/tiny-1": 3, "/api/jobs/tiny-1/logs": 2})
    assert cluster.follow("tiny-1") == {"images": 64, "submission_id": "tiny-1"}
    assert not +dashboard.refusals and "the log of tiny-1 is cut off here" in capsys.readouterr().err

    monkeypatch.setattr(submit, "PATIENCE_S", 0)
    for path in ("/api/jobs/tiny-1", "/api/jobs/tiny-1/logs"):
        dashboard.refusals[path] = 10**6
        with pytest.raises(UserError, match="found RuntimeError: out of order; the job may go on: ray job") as refused:
            cluster.follow("tiny-1")
        assert "\n" not in str(refused.value)
        dashboard.refusals[path] = 0


def test_a_dashboard_that_cannot_list_jobs_is_one_line(
    dashboard: Dashboard, train_values: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.refusals["/api/jobs/"] = 1
    path = config_file(train_values())
    error, _ = answered(capsys, 1, "submit", "train", path, "--address", dashboard.url)
    assert "expected an answer of its Jobs API, found RuntimeError: out of order" in error["error"]
    assert "\n" not in error["error"]


def test_a_cluster_that_does_not_answer_is_one_line(train_values: Values, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert run(["submit", "train", config_file(train_values()), "--address", address, "--json"]) == 1
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error.startswith(f"Ray cluster {address}: expected a dashboard") and "Traceback" not in captured.err
    assert run(["submit", "train", config_file(train_values()), "batc=3", "--address", address, "--json"]) == 2
    assert run(["submit", "samples", "tiny", "--json"]) == 2


def config_file(values: dict[str, Any], name: str = "config") -> str:
    path = Path(f"{name}.yaml").absolute()
    path.write_text(yaml.safe_dump(values))
    return str(path)


def glidepath(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--json"]
    env = os.environ | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)


def changed_checkout(folder: Path) -> Path:
    """This checkout with a change: the lowest floor says that it was imported."""
    write_zip(working_tree(ROOT, []), folder / "tree.zip", {})
    with zipfile.ZipFile(folder / "tree.zip") as packed:
        packed.extractall(folder / "changed")
    with (folder / "changed" / "data_pipeline" / "__init__.py").open("a") as code:
        code.write("\nimport sys\nprint('this is the changed code', file=sys.stderr)\n")
    subprocess.run(["git", "init", "-q", folder / "changed"], check=True)
    return folder / "changed"


def credentials_in_the_environment(stack: Any) -> dict[str, str]:
    """As on a machine that has no files of them: the stack's own, and others that a user may have."""
    words = (stack.home / "stack" / "credentials").read_text().split()
    key, secret = words[words.index("aws_access_key_id") + 2], words[words.index("aws_secret_access_key") + 2]
    mine = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
    return mine | {"HF_TOKEN": f"hf_{os.urandom(12).hex()}", "RAY_AUTH_TOKEN": os.urandom(16).hex()}


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    """The document and stderr of a command that must end with `code`."""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in stderr, stderr
    return json.loads(stdout), stderr


def answered(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> tuple[dict[str, Any], str]:
    """`ended` of a command that waits for no job: in this process, which has imported Ray already."""
    capsys.readouterr()
    found = run([*arguments, "--json"])
    captured = capsys.readouterr()
    assert found == code and "Traceback" not in captured.err, captured.err
    return json.loads(captured.out), captured.err


def test_a_corpus_and_a_run_go_through_the_cluster_and_the_run_goes_on(
    stack_env: Any,
    train_values: Values,
    picture_folder: Path,
    dataset_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = JobSubmissionClient(stack_env.dashboard)
    corpus = {
        "inputs": [{"kind": "folder", "uri": str(picture_folder)}],
        "output": "s3://glidepath/submitted/corpus",
        "shard_rows": 32,
        "filters": {"preset": "none"},
    }
    credentials = credentials_in_the_environment(stack_env)
    changed = changed_checkout(tmp_path)
    path = config_file(corpus, "pictures")
    built, _ = ended(glidepath("submit", "corpus", "build", path, cwd=changed, **credentials))
    assert built["dataset_id"] == inspect_dataset(dataset_uri)["dataset_id"]
    assert client.get_job_status("corpus-pictures-1") == JobStatus.SUCCEEDED
    imported = [line for line in client.get_job_logs("corpus-pictures-1").splitlines() if "the changed code" in line]
    assert imported[0] == "this is the changed code" and any("pid=" in line for line in imported), imported

    values = train_values(
        "submitted",
        store="s3://glidepath/submitted/run",
        dataset="s3://glidepath/submitted/corpus",
        launcher={"workers": 2},
        tracking={},
    )
    path = config_file(values, "submitted")
    both = [glidepath("submit", "train", path, **credentials) for _ in range(2)]
    outcomes = sorted((process.communicate(timeout=240), process.returncode) for process in both)
    assert sorted(code for _, code in outcomes) == [0, 1], outcomes
    documents = [json.loads(stdout) for (stdout, _), _ in outcomes]
    [summary] = [document for document in documents if "error" not in document]
    [error] = [document["error"] for document in documents if "error" in document]
    assert "submitted-1" in error and "\n" not in error
    assert (summary["images"], summary["submission_id"]) == (64, "submitted-1") and summary["mlflow_run_id"]

    further, log = ended(glidepath("submit", "train", path, "images=96", **credentials))
    assert (further["images"], further["submission_id"], further["attempt"]) == (96, "submitted-2", 2)
    assert further["mlflow_run_id"] == summary["mlflow_run_id"]
    assert "resume: from images-000000064/attempt-1" in log
    jobs = [details for details in client.list_jobs() if (details.submission_id or "").startswith("submitted-")]
    assert len(jobs) == 2 and all(details.status == JobStatus.SUCCEEDED for details in jobs)
    secrets = [credentials[name] for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN")]
    stacks_own, *others = places_of(secrets, stack_env, tmp_path).values()
    assert stacks_own == private_files(stack_env) and not any(others), (stacks_own, others)

    too_many, _ = answered(capsys, 1, "submit", "train", path, "images=128", "launcher.workers=99")
    assert "room for 99 workers" in too_many["error"]
    no_bucket, _ = answered(capsys, 1, "submit", "train", path, "store=s3://no-such-bucket/run")
    assert "no-such-bucket" in no_bucket["error"]
    elsewhere = ["run=elsewhere", "store=s3://glidepath/submitted/elsewhere"]
    no_data, _ = answered(capsys, 1, "submit", "train", path, *elsewhere, "dataset=s3://glidepath/nowhere")
    assert "dataset s3://glidepath/nowhere: expected one committed dataset, found none" in no_data["error"]
    monkeypatch.setattr(package, "LIMIT_BYTES", 10_000)
    too_large, _ = answered(capsys, 1, "submit", "train", path, *elsewhere)
    assert f"working tree {ROOT}: expected at most 0 MiB" in too_large["error"]
    assert not [details for details in client.list_jobs() if (details.submission_id or "").startswith("elsewhere")]


def test_stop_and_ray_job_stop_save_before_the_run_ends(
    stack_env: Any, train_values: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    client = JobSubmissionClient(stack_env.dashboard)
    values = train_values("stopped", images=10**6, launcher={"workers": 1}, checkpoint={"every_images": 10**6})
    path = config_file(values | {"tracking": {"uri": str(Path("curves").absolute())}}, "stopped")
    store = LocalStore(Path(values["store"]))

    def started(submission_id: str) -> bool:
        assert not client.get_job_status(submission_id).is_terminal(), client.get_job_logs(submission_id)
        return "images, loss" in client.get_job_logs(submission_id)

    first, _ = answered(capsys, 0, "submit", "train", path, "--no-wait")
    assert first["submission_id"] == "stopped-1"
    refused, _ = answered(capsys, 1, "submit", "train", path, "--no-wait")
    assert "job stopped-1, RUNNING" in refused["error"] or "job stopped-1, PENDING" in refused["error"]
    wait_for(lambda: started("stopped-1"))
    assert not beyond_loopback(stack_env) and len(listeners(stack_env)) > 10
    said, _ = answered(capsys, 0, "stop", values["store"])
    [saved] = committed(store)
    assert (said["outcome"], said["position"]) == ("stopped", saved.position) and saved.position > 0
    assert said["checkpoint"].endswith(saved.folder.rstrip("/"))
    wait_for(lambda: client.get_job_status("stopped-1").is_terminal())
    assert client.get_job_status("stopped-1") == JobStatus.SUCCEEDED
    not_running, _ = answered(capsys, 1, "stop", values["store"])
    assert "its attempt 1, which stopped" in not_running["error"]

    answered(capsys, 0, "submit", "train", path, "--no-wait")
    wait_for(lambda: started("stopped-2"))
    assert stop_jobs(stack_env.dashboard, 240) == []  # as a head that is taken away does
    assert client.get_job_status("stopped-2").is_terminal()
    log = client.get_job_logs("stopped-2")
    newest = committed(store)[0]
    assert newest.attempt == 2 and newest.position > saved.position, log
    end = read_end(store, 2)
    assert end is not None and end.outcome == "stopped"
    assert json.loads(log.rpartition(RESULT)[2])["stopped"]
