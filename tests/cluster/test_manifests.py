"""Manifests of clusters, checked against the schemas that KubeRay and Ray publish, and what those cannot tell."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.manifests.kuberay import drain_command, kubernetes_name
from cluster.services import LOOPBACK_RAY
from cluster.spot_notice import seconds_left, wait_for_notice
from data_pipeline.config import PRESETS

Cli = Callable[..., tuple[int, Any, str]]
SCHEMAS = Path(os.environ.get("GLIDEPATH_SHARED", Path(__file__).resolve().parents[2].parent / "shared")) / "schemas"
NAMES = sorted(path.stem for path in (PRESETS / "cluster").glob("*.yaml"))
RUN = ("glide-base-3.5b", "dataset=s3://bucket/photos", "store=s3://bucket/run")
SECRET = "wJalrXUtnFEMIK7MDENG"


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Kind -> the schema of its newest version, in which an unknown field is an error; Kubernetes would drop it."""
    if not SCHEMAS.is_dir():
        pytest.skip(f"no schemas of KubeRay in {SCHEMAS}; set GLIDEPATH_SHARED to the folder that holds schemas/")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for path in SCHEMAS.glob("*.yaml"):
        definition = yaml.load(path.read_text(), loader)["spec"]
        [version] = [version for version in definition["versions"] if version["storage"]]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = {"properties": {"name": {}, "namespace": {}}}
        found[definition["names"]["kind"]] = refuse_unknown(schema)
    return found


def refuse_unknown(schema: Any) -> Any:
    if isinstance(schema, dict):
        for value in schema.values():
            refuse_unknown(value)
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        for value in schema:
            refuse_unknown(value)
    return schema


def made(cli: Cli, cluster: str, *arguments: str) -> dict[str, Any]:
    """File name -> document."""
    code, told, _ = cli("manifests", cluster, *arguments, "--out", "made")
    assert code == 0, told
    return {Path(path).name: yaml.safe_load(Path(path).read_text()) for path in told["files"]}


def pods(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(group, pod), the head first."""
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_gives_manifests_that_the_published_schemas_take(
    name: str, cli: Cli, schemas: dict[str, Any]
) -> None:
    documents = made(cli, name, *(RUN if "gpu" in name else ()))
    assert ("rayjob.yaml" in documents) == ("gpu" in name)
    for file, document in documents.items():
        if file == "ray-up.yaml":
            filled = prepare_config(document)
            validate_config(filled)
            assert (
                not filled["setup_commands"]
                and filled["head_start_ray_commands"] == document["head_start_ray_commands"]
            )
            continue
        validator = jsonschema.Draft202012Validator(schemas[document["kind"]])
        assert not [error.json_path + ": " + error.message[:200] for error in validator.iter_errors(document)]
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert spec["rayVersion"] == ray.__version__
        spec["headGroupSpec"]["template"]["spec"]["containers"][0]["lifecycle"]["prestop"] = {}
        assert list(validator.iter_errors(document)), "a misspelt field is found"


def test_a_pod_has_time_to_leave_room_to_talk_and_no_secret(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    settings = ["credentials_secret=bucket-keys", "store_endpoint=https://s3.example.org", "graces.save_s=300"]
    settings += ["workers.steady={kind: h100x8, min: 1, max: 4}"]
    documents = made(cli, "preemptible-gpu-nodes", *RUN, *[word for each in settings for word in ("--set", each)])
    cluster = documents["raycluster.yaml"]["spec"]
    assert cluster == documents["rayjob.yaml"]["spec"]["rayClusterSpec"]
    deadlines = {}
    for group, pod in pods(cluster):
        [container] = pod["containers"]
        leave = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        deadlines[group] = int(re.findall(r" (\d+)", leave)[-1 if group == "head" else 0])
        assert pod["terminationGracePeriodSeconds"] == 360 > deadlines[group]
        assert container["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
        assert pod["serviceAccountName"] == "glidepath"
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["AWS_ENDPOINT_URL"] == "https://s3.example.org"
        assert not [name for name in environment if "KEY" in name or "PASSWORD" in name or "TOKEN" in name]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["medium"] == "Memory" and environment["GLIDEPATH_HOME"] in mounts
        assert container["resources"]["limits"] == container["resources"]["requests"]
    # The head's jobs have their save; a spot node has what the cloud leaves it; one of ours has a save as well.
    assert deadlines == {"head": 300, "gpu": 115, "steady": 300}
    gpu = cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert gpu["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    up = documents["ray-up.yaml"]
    assert "--dashboard-host=127.0.0.1" in up["head_start_ray_commands"][-1]
    assert "--env=SPOT=1" in up["available_node_types"]["gpu"]["docker"]["worker_run_options"]
    assert "--env=SPOT=1" not in up["available_node_types"]["steady"]["docker"]["worker_run_options"]
    assert SECRET not in json.dumps(documents)


def test_a_rayjob_runs_what_submit_would_run_and_carries_no_credential(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    job = made(cli, "one-node-8gpu", *RUN, "run=Glide_3.5B")["rayjob.yaml"]
    assert job["metadata"]["name"] == "glide-3-5b"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:5] == ["exec", "python", "-m", "cluster.job", "train"]
    document = json.loads(words[5])
    assert document["name"] == "Glide_3.5B" and document["values"]["launcher"]["kind"] == "ray"
    assert document["values"]["tracking"]["uri"] == "http://mlflow.mlflow.svc:5000"
    assert job["spec"]["metadata"]["glidepath_store"] == "s3://bucket/run"
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert job["spec"]["submissionMode"] == "HTTPMode" and job["spec"]["backoffLimit"] == 20

    code, told, _ = cli("manifests", "one-node-8gpu", *RUN, f"samples.prompts=[{SECRET}]")
    assert code == 1 and "found the value of HF_TOKEN" in told["error"] and SECRET not in told["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("gpu-nodes",), 2, "cluster presets are: cpu-corpus, one-node-8gpu, preemptible-gpu-nodes"),
        (
            ("preemptible-gpu-nodes", "--set", "workers.gpu.kind=h100"),
            2,
            "expected workers.gpu.kind to be one of node_kinds (h100x8, small), found h100; did you mean h100x8?",
        ),
        (("one-node-8gpu", "--set", "node_kinds.h100x8.cpu=4"), 2, "found an unknown key; did you mean cpus?"),
        (("one-node-8gpu", "--set", "node_kinds.h100x8.memory_gib=68"), 2, "expected memory_gib above"),
        (("one-node-8gpu", "--set", f"tracking=http://me:{SECRET}@host"), 2, "key tracking: expected http(s)://HOST"),
        (
            ("one-node-8gpu", "--set", "aws={region: x}", "--set", "node_kinds.h100x8.instance_type=null"),
            2,
            "a type of",
        ),
        (("one-node-8gpu", *RUN, "launcher.workers=9"), 1, "room for 9 workers of 1 CPU and 1 GPU each, found 96 CPUs"),
        (("one-node-8gpu", *RUN[:2]), 1, "expected a place in a bucket, found a disk that goes with its pod"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(
    arguments: tuple[str, ...], code: int, line: str, cli: Cli
) -> None:
    found, told, _ = cli("manifests", *arguments)
    assert found == code and line in told["error"] and "\n" not in told["error"] and SECRET not in told["error"]
    assert not Path("manifests").exists()


def test_a_name_of_a_run_becomes_one_that_kubernetes_takes() -> None:
    assert kubernetes_name("glide-base-3.5b") == "glide-base-3-5b"
    assert kubernetes_name("3.5B_Base.") == "run-3-5b-base"
    assert re.fullmatch(r"[a-z][-a-z0-9]{0,45}[a-z0-9]", kubernetes_name("a" * 46 + "." + "b" * 40))


class MetadataService(BaseHTTPRequestHandler):
    """What Amazon's machines ask about themselves; `answers` are those about the notice, in order."""

    answers: ClassVar[deque[tuple[int, str]]] = deque()

    def do_PUT(self) -> None:
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        known = self.headers["X-aws-ec2-metadata-token"] == "a-token"
        self._answer(*(self.answers.popleft() if known else (401, "")))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *about: Any) -> None:
        pass


def test_a_spot_machine_hears_that_it_is_taken_back_and_when() -> None:
    notice = {"action": "terminate", "time": "2026-01-31T08:22:00Z"}
    MetadataService.answers.extend([(404, ""), (500, ""), (200, "{"), (200, json.dumps(notice))])
    with ThreadingHTTPServer(("127.0.0.1", 0), MetadataService) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        assert wait_for_notice(f"http://127.0.0.1:{server.server_port}/latest", 0.01) == notice
        server.shutdown()
        thread.join()
    now = datetime(2026, 1, 31, 8, 20, 0, 400000, tzinfo=timezone.utc)
    assert seconds_left(notice, now) == 114
    assert seconds_left(notice, datetime(2026, 1, 31, 9, tzinfo=timezone.utc)) == 0


# In a process of its own: whether Ray stays on loopback is settled when it is imported.
DRAINED = """
import subprocess, sys
import ray
from ray.cluster_utils import Cluster

size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
node = cluster.add_node(**size, resources={"leaves": 1})
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(resources={"leaves": 1})
class Worker:
    def ready(self):
        return True

worker = Worker.remote()
assert ray.get(worker.ready.remote())
program = f"{sys.prefix}/bin/ray drain-node --address {cluster.address} --node-id {node.node_id}"
subprocess.run(sys.argv[1].replace("ray drain-node", program), shell=True, check=True)
raylet = node.all_processes["raylet"][0].process
try:
    raylet.wait(5)
    sys.exit("the raylet ended under its work")
except subprocess.TimeoutExpired:
    ray.kill(worker)
raylet.wait(30)
[left] = [row for row in ray.nodes() if not row["Alive"]]
assert left["NodeID"] == node.node_id and "taken away" in left["DeathReasonMessage"], left
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.drill
def test_a_drained_node_stays_until_its_work_has_ended_and_then_ends_by_itself() -> None:
    environment = os.environ | LOOPBACK_RAY | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", DRAINED, drain_command(60)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
