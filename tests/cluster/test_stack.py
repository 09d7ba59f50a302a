"""The local stack: real servers, started, killed, repaired and ended by the command line."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from secret_places import beyond_loopback, listeners

from cluster import cli, processes, services
from cluster.services import PORTS, describe_services
from cluster.stack import Record, _answers, _launch_digest, choose_ports
from data_pipeline.errors import UserError

SERVICES = ("s3", "mlflow", "ray")

STORE_AND_TRACK = """
import boto3, mlflow
boto3.client("s3").put_object(Bucket="glidepath", Key="kept/object", Body=b"bytes that last")
mlflow.set_experiment("kept")
with mlflow.start_run(run_name="kept"):
    mlflow.log_metric("loss", 0.5, step=16)
    mlflow.log_text("through the server", "note.txt")
"""

FIND_AGAIN = """
import boto3, mlflow
assert boto3.client("s3").get_object(Bucket="glidepath", Key="kept/object")["Body"].read() == b"bytes that last"
run, = mlflow.search_runs(experiment_names=["kept"], output_format="list")
assert run.info.run_name == "kept" and run.data.metrics == {"loss": 0.5}
assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/note.txt") == "through the server"
keys = [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket="glidepath", Prefix="mlflow/")["Contents"]]
assert len(keys) == 1 and keys[0].endswith("note.txt"), keys
"""

JOB = """
import os, time, ray
ray.init()
@ray.remote
def environment():
    return dict(os.environ)
print("worker", "MLFLOW_TRACKING_URI" in ray.get(environment.remote()), flush=True)
time.sleep(600)
"""

# Takes longer to save than the three seconds that Ray gives by default.
SAVING_JOB = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(4)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""

SUBMIT = """
import pathlib, sys, time
from ray.job_submission import JobSubmissionClient
folder = pathlib.Path({folder!r})
(folder / "job.py").write_text({job!r})
jobs = JobSubmissionClient()
made = jobs.submit_job(
    entrypoint=f"python {{folder}}/job.py {{folder}}/saved",
    runtime_env={{"env_vars": {{"RAY_JOB_STOP_WAIT_TIME_S": "60"}}}},
)
until = time.monotonic() + 60
while "ready" not in jobs.get_job_logs(made):
    assert time.monotonic() < until, jobs.get_job_info(made)
    time.sleep(0.2)
"""


def glidepath(home: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and stderr of a command."""
    environment = os.environ | {"GLIDEPATH_HOME": str(home)}
    argv = [sys.executable, "-m", "cluster.cli", *arguments, "--json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, cwd=home, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def states(home: Path) -> dict[str, str]:
    return {row["service"]: row["state"] for row in glidepath(home, "status")[1]["services"]}


def client(env: dict[str, str], code: str) -> None:
    """Run a client as a user does who sourced the stack's `env`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def members(home: Path) -> list[processes.Row]:
    """Every process of the stack in `home`, jobs and workers included."""
    return [row for name in SERVICES for row in processes.members(None, f"{home}/stack/{name}")]


def is_running(row: processes.Row) -> bool:
    return processes.is_alive(processes.Identity(row.pid, row.started_ticks, processes.boot_id()))


def test_a_stack_that_is_killed_repaired_and_started_again_loses_nothing(stack_home: Path) -> None:
    home = stack_home
    broken = home / "stack" / "credentials"
    broken.parent.mkdir()
    broken.write_text("[nothing here]\n")
    code, told, _ = glidepath(home, "up", "--cpus", "2")
    assert code == 1
    assert told["error"].startswith("service s3: expected to keep running, found \"KeyError: 'default'\"")
    assert f"read {home}/stack/s3.log" in told["error"]
    others = {row["service"]: row["pid"] for row in glidepath(home, "status")[1]["services"]}
    broken.unlink()

    code, told, errors = glidepath(home, "up")
    assert code == 0, errors
    assert [row["service"] for row in told["services"]] == list(SERVICES)
    assert {row["state"] for row in told["services"]} == {"healthy"}
    for row in told["services"]:
        assert row["service"] == "s3" or row["pid"] == others[row["service"]]  # what was on its way was let go on
    env, pids = told["env"], {row["service"]: row["pid"] for row in told["services"]}
    client(env, STORE_AND_TRACK)

    for number, state in ((signal.SIGKILL, "down"), (signal.SIGSTOP, "unreachable")):
        servers = [row.pid for row in members(home) if row.parent == pids["s3"]]
        os.kill(pids["s3"] if state == "down" else servers[0], number)
        code, told, _ = glidepath(home, "status")
        assert code == 1 and told["error"] == f"s3 is {state}"
        code, told, errors = glidepath(home, "up")
        assert code == 0, errors
        repaired = {row["service"]: row["pid"] for row in told["services"]}
        assert {name for name in SERVICES if repaired[name] != pids[name]} == {"s3"}  # what was healthy stayed
        assert told["env"] == env
        pids = repaired
    client(env, FIND_AGAIN)

    client(env, SUBMIT.format(folder=str(home), job=SAVING_JOB))
    ran = members(home)
    assert glidepath(home, "down")[1]["ended"] == ["ray", "mlflow", "s3"]
    assert (home / "saved").read_text() == "saved"  # the job was asked, and waited for
    assert len(ran) > 20 and not any(is_running(row) for row in ran)
    assert members(home) == []
    assert states(home) == dict.fromkeys(SERVICES, "down")
    for port in json.loads((home / "stack" / "stack.json").read_text())["ports"].values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0

    code, told, errors = glidepath(home, "up")
    assert code == 0, errors
    client(told["env"], FIND_AGAIN)


def test_what_keeps_a_stack_from_starting_is_said_in_one_line(
    state_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> tuple[int, str]:
        code = cli.run([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)["error"]

    assert refused("status") == (1, "s3 is down, mlflow is down, ray is down")
    assert cli.run(["down"]) == 0 and capsys.readouterr().out.split() == ["ended", "nothing", "ran"]
    assert not state_folder.exists()  # asking makes nothing

    folder = state_folder / "stack"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ("up", "down"):
            code, error = refused(command)
            assert code == 1 and error.startswith(f"stack {folder}: expected one up or down at a time")

    (folder / "stack.json").write_text('{"ports": {}')
    for command in ("up", "down", "status"):
        code, error = refused(command)
        assert code == 1 and error.startswith(f"{folder}/stack.json: expected the record of a stack")

    monkeypatch.setitem(sys.modules, "ray", None)
    code, error = refused("up")
    assert code == 2 and "found no ray; pip install 'glidepath[cluster]'" in error


def test_swift_that_cannot_be_installed_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "SWIFT", tmp_path / "swift")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="No matching distribution found for swift"):
        services.install_swift(lambda note: None)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_left_to_who_has_it_and_a_port_once_given_is_kept() -> None:
    record = Record()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        record.ports["mlflow"] = taken
        choose_ports(record, kept={"ray", "s3"})
        assert set(record.ports) == {"mlflow"} and record.ports["mlflow"] != taken
        choose_ports(record, kept=set())
        assert len(set(record.ports.values())) == len(PORTS)
    again = dict(record.ports)
    choose_ports(record, kept=set())
    assert record.ports == again


@pytest.fixture
def job(stack_env: Any, tmp_path: Path) -> Iterator[str]:
    """A job that has used a worker and now waits."""
    from ray.job_submission import JobSubmissionClient

    script = tmp_path / "job.py"
    script.write_text(JOB)
    jobs = JobSubmissionClient()  # by the address in the environment
    made = jobs.submit_job(entrypoint=f"python {script}")
    try:
        assert wait_until(lambda: "worker True" in jobs.get_job_logs(made)), jobs.get_job_logs(made)
        yield made
    finally:
        jobs.stop_job(made)


def wait_until(done: Callable[[], bool], seconds: float = 60) -> bool:
    """Poll, since other processes cannot tell."""
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.2)
    return done()


def test_everything_listens_on_loopback_only_while_a_job_runs(stack: Any, job: str) -> None:
    listening = listeners(stack)
    assert len(listening) > 10  # four of Swift, MLflow's, and Ray's with the job's
    assert any("job.py" in program for program, _ in listening)
    assert not beyond_loopback(stack)


def test_the_secret_stands_in_two_private_files_and_nowhere_else(stack: Any, job: str) -> None:
    folder = stack.home / "stack"
    secret = (folder / "credentials").read_text().split()[-1].encode()
    assert len(secret) == 64
    ray_folder = Path(json.loads((folder / "stack.json").read_text())["ray_folder"])
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(ray_folder.parent.stat().st_mode) == 0o700
    files = [path for top in (folder, ray_folder) for path in top.rglob("*") if path.is_file()]
    holders = {path for path in files if secret in path.read_bytes()}
    assert holders == {folder / "credentials", folder / "s3" / "conf" / "proxy.conf"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in holders} == {0o600}
    for row in members(stack.home):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(row.pid)
            exposed = [*process.cmdline(), *process.environ().values()]
            assert not [text for text in exposed if secret.decode() in text], process


def test_another_path_in_the_shell_is_no_reason_to_end_a_running_ray(
    state_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {name: number for number, name in enumerate(PORTS, 9000)}
    digests = []
    for path in ("/usr/bin", "/opt/bin:/usr/bin"):
        monkeypatch.setenv("PATH", path)
        services = describe_services(state_folder, ports, 4, "/tmp/ray")
        assert any(path in service.environment.get("PATH", "") for service in services)
        digests.append([_launch_digest(service) for service in services])
    assert digests[0] == digests[1]
    assert digests[0] != [_launch_digest(s) for s in describe_services(state_folder, ports, 8, "/tmp/ray")]


def test_a_head_whose_raylet_is_not_there_yet_or_has_died_is_not_healthy() -> None:
    nodes: list[dict[str, str]] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = {"data": {"result": {"result": nodes}}} if self.path == "/api/v0/nodes" else {}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports = dict.fromkeys(PORTS, server.server_address[1])
        ray = describe_services(Path("/tmp"), ports, 4, "/tmp/ray")[-1]
        healthy = []
        for found in ([], [{"state": "DEAD"}], [{"state": "DEAD"}, {"state": "ALIVE"}]):
            nodes[:] = found
            healthy.append(_answers(ray))
        server.shutdown()
    assert healthy == [False, False, True]
