"""Where a secret can be found by those who may look at a local stack: its files, processes, buckets and answers.

`places_of` is asked for secrets that must be nowhere, and once for words that were put everywhere (test_secrets.py).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import requests

from cluster import processes

SERVICES = ("s3", "mlflow", "ray")
LISTS = ("actors", "jobs", "nodes", "objects", "placement_groups", "runtime_envs", "tasks", "workers")
# "/events" for Ray's list cluster_events, which sorts by a time that some of Ray's programs write as a number and
# others as text: with one of each it answers 500 for good (Ray 2.60).
PAGES = ("/api/jobs/", "/logical/actors", "/nodes?view=summary", "/api/cluster_status", "/events?nocache=1")
EVERYTHING = {"limit": "10000", "detail": "1", "exclude_driver": "0"}


def places_of(secrets: Iterable[str], stack: Any, *folders: Path) -> dict[str, set[str]]:
    """Secret -> every place that shows it, as it is or in base64: "file …", "bucket …", "mlflow …", "dashboard …",
    "process …". The two files of the stack that must hold its own secret are looked at as well."""
    words = {secret: (secret.encode(), base64.b64encode(secret.encode())) for secret in secrets}
    found: dict[str, set[str]] = {secret: set() for secret in words}
    looked_at = 0
    for search in (_files(stack, folders), _bucket(stack), _mlflow(stack), _dashboard(stack), _processes(stack)):
        for place, content in search:
            looked_at += 1
            for secret, forms in words.items():
                if any(form in content for form in forms):
                    found[secret].add(place)
    assert looked_at > 100, f"a stack has more than {looked_at} places"
    return found


def private_files(stack: Any) -> set[str]:
    """The two places in which the stack's own secret stands by design."""
    folder = stack.home / "stack"
    return {f"file {folder / 'credentials'}", f"file {folder / 's3' / 'conf' / 'proxy.conf'}"}


def listeners(stack: Any) -> list[tuple[str, str]]:
    """(command line, address) of everything that listens, of all processes that came of the stack."""
    found = []
    for process in _members(stack):
        with suppress(psutil.NoSuchProcess):  # Ray runs small programs now and then
            found += [
                (" ".join(process.cmdline()), connection.laddr.ip)
                for connection in process.net_connections("inet")  # of both families
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def beyond_loopback(stack: Any) -> list[tuple[str, str]]:
    """Those `listeners` that other machines could reach."""
    return [entry for entry in listeners(stack) if entry[1] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]


def _members(stack: Any) -> Iterator[psutil.Process]:
    for service in SERVICES:
        for row in processes.members(None, f"{stack.home}/stack/{service}"):
            with suppress(psutil.NoSuchProcess):
                yield psutil.Process(row.pid)


def _files(stack: Any, folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    ray_folder = Path(json.loads((stack.home / "stack" / "stack.json").read_text())["ray_folder"])
    for top in (stack.home, ray_folder.parent, *folders):
        for path in sorted(top.rglob("*")):
            with suppress(FileNotFoundError):  # the stack is at work
                if path.is_file():
                    yield f"file {path}", path.read_bytes()


def _bucket(stack: Any) -> Iterator[tuple[str, bytes]]:
    client = boto3.client("s3")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=stack.bucket):
        for entry in page.get("Contents", ()):
            answer = client.get_object(Bucket=stack.bucket, Key=entry["Key"])
            yield f"bucket {entry['Key']}", answer["Body"].read() + json.dumps(answer["Metadata"]).encode()


def _mlflow(stack: Any) -> Iterator[tuple[str, bytes]]:
    """Experiments, runs with params, tags and dataset inputs, models. Artifacts lie in the bucket."""
    api = f"{stack.mlflow}/api/2.0/mlflow"
    answer = requests.post(f"{api}/experiments/search", json={"max_results": 1000}, timeout=30)
    yield "mlflow experiments", answer.content
    ids = [experiment["experiment_id"] for experiment in answer.json()["experiments"]]
    runs = requests.post(f"{api}/runs/search", json={"experiment_ids": ids, "max_results": 1000}, timeout=30)
    yield "mlflow runs", runs.content
    yield "mlflow models", requests.get(f"{api}/registered-models/search", timeout=30).content


def _dashboard(stack: Any) -> Iterator[tuple[str, bytes]]:
    def page(path: str, **query: str) -> requests.Response:
        answer = requests.get(f"{stack.dashboard}{path}", params=query, timeout=60)
        assert answer.status_code == 200, (path, answer.text[:300])
        return answer

    for path in PAGES:
        yield f"dashboard {path}", page(path).content
    for job in page("/api/jobs/").json():
        if job["submission_id"]:
            yield "dashboard job logs", page(f"/api/jobs/{job['submission_id']}/logs").content
    for name in LISTS:
        yield f"dashboard {name}", page(f"/api/v0/{name}", **EVERYTHING).content
    for node in page("/api/v0/nodes", **EVERYTHING).json()["data"]["result"]["result"]:
        yield "dashboard list of logs", page("/api/v0/logs", node_id=node["node_id"]).content


def _processes(stack: Any) -> Iterator[tuple[str, bytes]]:
    for process in _members(stack):
        with suppress(psutil.NoSuchProcess):
            told = [*process.cmdline(), *(f"{name}={value}" for name, value in process.environ().items())]
            yield f"process {process.pid}", "\n".join(told).encode()
