"""That the search for secrets finds them: what test_submit.py and test_stack.py then do not find is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import requests
from ray.job_submission import JobSubmissionClient
from secret_places import beyond_loopback, places_of
from support import wait_for

# A word of its own for every way in which a program can give something away.
LEAKY = """
import os, socket, sys, time
import ray
ray.init()

@ray.remote
class Leaky:
    def pid(self):
        return os.getpid()

planted = dict(word.split("=") for word in sys.argv[1:])
print("log", planted["log"], flush=True)
actor = Leaky.options(name=planted["actor-name"], runtime_env={"env_vars": {"TOKEN": planted["actor-env"]}}).remote()
print("pid", ray.get(actor.pid.remote()), flush=True)
open_door = socket.create_server(("0.0.0.0", 0))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_secret_that_is_given_away_is_found_wherever_that_is(stack_env: Any, tmp_path: Path) -> None:
    assert not beyond_loopback(stack_env)
    ways = ("entrypoint", "metadata", "job-env", "log", "actor-name", "actor-env", "tag", "object", "file", "base64")
    planted = {way: f"planted-{way}-{os.urandom(8).hex()}" for way in ways}
    script = tmp_path / "leaky.py"
    script.write_text(LEAKY)
    jobs = JobSubmissionClient()
    words = " ".join(f"{way}={planted[way]}" for way in ("log", "actor-name", "actor-env", "entrypoint"))
    job = jobs.submit_job(
        entrypoint=f"{sys.executable} {script} {words}",
        metadata={"note": planted["metadata"]},
        runtime_env={"env_vars": {"SECRET": planted["job-env"]}},
    )
    try:
        wait_for(lambda: "ready" in jobs.get_job_logs(job))
        run = {"experiment_id": "0", "tags": [{"key": "mlflow.note", "value": planted["tag"]}]}
        requests.post(f"{stack_env.mlflow}/api/2.0/mlflow/runs/create", json=run, timeout=30).raise_for_status()
        boto3.client("s3").put_object(Bucket=stack_env.bucket, Key="planted", Body=planted["object"].encode())
        (tmp_path / "told").write_text(planted["file"])
        encoded = subprocess.run(["base64", "-w0"], input=planted["base64"], capture_output=True, text=True, check=True)
        (tmp_path / "encoded").write_text(encoded.stdout)

        nowhere = f"nowhere-{os.urandom(8).hex()}"
        places = places_of([*planted.values(), nowhere], stack_env, tmp_path)
        assert not places[nowhere]

        def found(way: str) -> str:
            return " ".join(sorted(places[planted[way]]))

        assert "dashboard /api/jobs/" in found("entrypoint") and "process " in found("entrypoint")
        assert "dashboard /api/jobs/" in found("metadata")
        assert "dashboard /api/jobs/" in found("job-env") and "dashboard runtime_envs" in found("job-env")
        assert "dashboard job logs" in found("log") and ".log" in found("log")
        assert "dashboard actors" in found("actor-name") and "process " in found("actor-env")
        assert "mlflow runs" in found("tag") and "mlflow.db" in found("tag")
        assert "bucket planted" in found("object")
        assert f"file {tmp_path / 'told'}" in found("file") and f"file {tmp_path / 'encoded'}" in found("base64")
        assert any("leaky.py" in program for program, _ in beyond_loopback(stack_env))
    finally:
        jobs.stop_job(job)
