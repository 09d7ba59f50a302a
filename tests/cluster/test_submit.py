"""Jobs: what is refused before anything starts, and the same road through a real Ray, S3 and MLflow."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from cluster.cli import run
from cluster.job import RESULT
from cluster.submit import (
    Node,
    Work,
    address_of,
    corpus_work,
    next_number,
    refuse_running,
    refuse_unfit,
    result_of,
    training_work,
)
from data_pipeline.build import CorpusConfig, inspect_dataset
from data_pipeline.config import parse
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed
from trainer.recipes import parse_train_config
from trainer.stop import read_end

Values = Callable[..., dict[str, Any]]


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
        "output": "s3://b/out",
    }
    corpus["filters"] = {"preset": "basic", "max_aspect": None}
    config = parse(CorpusConfig, corpus, "test")
    made = corpus_work(config, "photos")
    assert parse(CorpusConfig, made.values, "job").filters.resolved() == config.filters.resolved()
    assert [entry["uri"] for entry in made.values["inputs"]] == [str(tmp_path / "in"), "train"]
    assert made.folders == [str(tmp_path / "in")] and made.store == "s3://b/out"


def test_no_credential_gets_into_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = "https://host/a.tar?X-Amz-Signature=SECRET"
    corpus = parse(CorpusConfig, {"inputs": [{"kind": "webdataset", "uri": signed}], "output": "out"}, "test")
    with pytest.raises(UsageError) as refused:
        corpus_work(corpus, "photos")
    with pytest.raises(UsageError) as address:
        address_of("http://user:SECRET@host:8265")
    assert "SECRET" not in f"{refused.value} {address.value}"
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


def test_a_cluster_that_does_not_answer_is_one_line(train_values: Values, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert run(["submit", "train", config_file(train_values()), "--address", address, "--json"]) == 1
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error.startswith(f"Ray cluster {address}: expected a dashboard") and "Traceback" not in captured.err
    assert run(["submit", "train", config_file(train_values()), "batc=3", "--address", address, "--json"]) == 2
    assert run(["submit", "evaluate", "tiny", "--json"]) == 2


def config_file(values: dict[str, Any], name: str = "config") -> str:
    path = Path(f"{name}.yaml").absolute()
    path.write_text(yaml.safe_dump(values))
    return str(path)


def glidepath(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    """The document and stderr of a command that must end with `code`."""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in stderr, stderr
    return json.loads(stdout), stderr


def wait_for(done: Callable[[], Any], seconds: float = 120) -> Any:
    """Poll, since jobs cannot tell."""
    until = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


def test_a_corpus_and_a_run_go_through_the_cluster_and_the_run_goes_on(
    stack_env: Any, train_values: Values, picture_folder: Path, dataset_uri: str
) -> None:
    client = JobSubmissionClient(stack_env.dashboard)
    corpus = {
        "inputs": [{"kind": "folder", "uri": str(picture_folder)}],
        "output": "s3://glidepath/submitted/corpus",
        "shard_rows": 32,
        "filters": {"preset": "none"},
    }
    built, _ = ended(glidepath("submit", "corpus", "build", config_file(corpus, "pictures")))
    assert built["dataset_id"] == inspect_dataset(dataset_uri)["dataset_id"]
    assert client.get_job_status("corpus-pictures-1") == JobStatus.SUCCEEDED

    values = train_values(
        "submitted",
        store="s3://glidepath/submitted/run",
        dataset="s3://glidepath/submitted/corpus",
        launcher={"workers": 2},
        tracking={},
    )
    path = config_file(values, "submitted")
    both = [glidepath("submit", "train", path), glidepath("submit", "train", path)]
    outcomes = sorted((process.communicate(timeout=240), process.returncode) for process in both)
    assert sorted(code for _, code in outcomes) == [0, 1], outcomes
    documents = [json.loads(stdout) for (stdout, _), _ in outcomes]
    [summary] = [document for document in documents if "error" not in document]
    [error] = [document["error"] for document in documents if "error" in document]
    assert "submitted-1" in error and "\n" not in error
    assert (summary["images"], summary["submission_id"]) == (64, "submitted-1") and summary["mlflow_run_id"]

    further, log = ended(glidepath("submit", "train", path, "images=96"))
    assert (further["images"], further["submission_id"], further["attempt"]) == (96, "submitted-2", 2)
    assert further["mlflow_run_id"] == summary["mlflow_run_id"]
    assert "resume: from images-000000064/attempt-1" in log
    jobs = [details for details in client.list_jobs() if (details.submission_id or "").startswith("submitted-")]
    assert len(jobs) == 2 and all(details.status == JobStatus.SUCCEEDED for details in jobs)
    secret = (stack_env.home / "stack" / "credentials").read_text().rpartition("= ")[2].strip()
    assert all(secret not in f"{details} {client.get_job_logs(details.submission_id)}" for details in jobs)

    too_many, _ = ended(glidepath("submit", "train", path, "images=128", "launcher.workers=99"), 1)
    assert "room for 99 workers" in too_many["error"]
    no_bucket, _ = ended(glidepath("submit", "train", path, "store=s3://no-such-bucket/run"), 1)
    assert "no-such-bucket" in no_bucket["error"]


def test_stop_and_ray_job_stop_save_before_the_run_ends(stack_env: Any, train_values: Values) -> None:
    client = JobSubmissionClient(stack_env.dashboard)
    values = train_values("stopped", images=10**6, launcher={"workers": 1}, checkpoint={"every_images": 10**6})
    path = config_file(values | {"tracking": {"uri": str(Path("curves").absolute())}}, "stopped")
    store = LocalStore(Path(values["store"]))

    def started(submission_id: str) -> bool:
        assert not client.get_job_status(submission_id).is_terminal(), client.get_job_logs(submission_id)
        return "images, loss" in client.get_job_logs(submission_id)

    first, _ = ended(glidepath("submit", "train", path, "--no-wait"))
    assert first["submission_id"] == "stopped-1"
    refused, _ = ended(glidepath("submit", "train", path), 1)
    assert "job stopped-1, RUNNING" in refused["error"] or "job stopped-1, PENDING" in refused["error"]
    wait_for(lambda: started("stopped-1"))
    said, _ = ended(glidepath("stop", values["store"]))
    [saved] = committed(store)
    assert (said["outcome"], said["position"]) == ("stopped", saved.position) and saved.position > 0
    assert said["checkpoint"].endswith(saved.folder.rstrip("/"))
    wait_for(lambda: client.get_job_status("stopped-1").is_terminal())
    assert client.get_job_status("stopped-1") == JobStatus.SUCCEEDED
    not_running, _ = ended(glidepath("stop", values["store"]), 1)
    assert "its attempt 1, which stopped" in not_running["error"]

    ended(glidepath("submit", "train", path, "--no-wait"))
    wait_for(lambda: started("stopped-2"))
    client.stop_job("stopped-2")
    wait_for(lambda: client.get_job_status("stopped-2").is_terminal())
    log = client.get_job_logs("stopped-2")
    newest = committed(store)[0]
    assert newest.attempt == 2 and newest.position > saved.position, log
    end = read_end(store, 2)
    assert end is not None and end.outcome == "stopped"
    assert json.loads(log.rpartition(RESULT)[2])["stopped"]
