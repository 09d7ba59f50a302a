"""The whole road on the local stack, with real photographs: corpus job, ZeRO training job, a worker killed, the run
submitted again, two runs compared, and no credential anywhere. CI takes shorter samples of it (tests/cluster)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests
from support import wait_for

from data_pipeline.storage import open_store
from trainer.checkpoint.manifest import committed

SHARED = Path(os.environ.get("GLIDEPATH_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
CORPORA = ("coco_original", "flickr8k_224")
IMAGES, BATCH, EVERY = 2048, 16, 256
MODEL = {
    "image_size": 32,
    "channels": 32,
    "res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [16],
    "head_channels": 32,
    "text_context": 24,
    "text_width": 64,
    "text_layers": 1,
    "text_heads": 2,
}


def glidepath(*arguments: str, **environment: str) -> dict[str, Any]:
    """The document of a command that must succeed."""
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def histories(server: str, mlflow_run_id: str) -> dict[str, list[int]]:
    """metric -> the steps of all its points, asked from the server."""
    api = f"{server}/api/2.0/mlflow"
    run = requests.get(f"{api}/runs/get", {"run_id": mlflow_run_id}, timeout=30).json()["run"]
    found = {}
    for name in sorted(metric["key"] for metric in run["data"]["metrics"]):
        asked = {"run_id": mlflow_run_id, "metric_key": name, "max_results": 25000}
        points = requests.get(f"{api}/metrics/get-history", asked, timeout=30).json()["metrics"]
        found[name] = [int(point["step"]) for point in points]
    return found


@pytest.mark.drill
def test_the_whole_road_on_a_cluster(stack_env: Any, tmp_path: Path) -> None:
    if not (SHARED / "corpus").is_dir():
        pytest.skip(f"no photographs in {SHARED}; set GLIDEPATH_SHARED to the folder that holds corpus/")
    jobs_listed = [sys.executable, "-m", "ray.scripts.scripts", "job", "list"]

    inputs = ", ".join(f"{{kind: img2dataset, uri: {SHARED / 'corpus' / name}}}" for name in CORPORA)
    dataset = "s3://glidepath/road/photos"
    built = glidepath("submit", "corpus", "build", "photos", f"inputs=[{inputs}]", f"output={dataset}")
    funnel = built["funnel"]
    assert funnel["in"] == funnel["out"] + sum(funnel["dropped"].values()) and built["rows"] > 2000
    assert glidepath("corpus", "verify", dataset)["ok"]

    values = {
        "run": "road",
        "recipe": "glide_base",
        "store": "s3://glidepath/road/runs/road",
        "dataset": dataset,
        "images": IMAGES,
        "batch": BATCH,
        "micro_batch": 8,
        "lr": 1e-3,
        "ema": 0.99,
        "caption_dropout": 0.1,
        "dropout": 0.1,
        "model": MODEL,
        "precision": "bf16",
        "zero": {"stage": 2},
        "launcher": {"workers": 2},
        "checkpoint": {"every_images": EVERY},
        "samples": {"prompts": ["a dog on the beach", "a red bus"], "sampling": {"spacing": "10"}},
        "heldout": {"dataset": dataset, "images": 64, "every_images": IMAGES // 2},
    }
    config = tmp_path / "road.json"  # JSON is YAML
    config.write_text(json.dumps(values))

    # One worker dies in the middle.
    submitted = glidepath("submit", "train", str(config), "--no-wait")["submission_id"]
    log_url = f"{stack_env.dashboard}/api/jobs/{submitted}/logs"
    store = open_store(values["store"])

    def job_log() -> str:
        return str(requests.get(log_url, timeout=30).json()["logs"])

    wait_for(lambda: [name for name in committed(store) if name.position >= 2 * EVERY], seconds=300)
    [victim] = re.findall(r"rank 1: process (\d+)", job_log())
    os.kill(int(victim), signal.SIGKILL)
    status_url = f"{stack_env.dashboard}/api/jobs/{submitted}"
    wait_for(lambda: requests.get(status_url, timeout=30).json()["status"] in ("SUCCEEDED", "FAILED", "STOPPED"), 300)
    log = job_log()
    assert requests.get(status_url, timeout=30).json()["status"] == "SUCCEEDED", log[-3000:]
    [resumed] = re.findall(r"resume: from images-0*(\d+)/attempt-1", log)
    of_the_first = [name.position for name in committed(store) if name.attempt == 1]
    assert int(resumed) == max(of_the_first) >= 2 * EVERY, "from the newest checkpoint of the attempt that died"

    # The same run again goes on with it, under the same MLflow run.
    further = glidepath("submit", "train", str(config), f"images={IMAGES + 256}")
    assert (further["images"], further["attempt"]) == (IMAGES + 256, 3)
    updates = list(range(BATCH, IMAGES + 256 + BATCH, BATCH))
    points = histories(stack_env.mlflow, further["mlflow_run_id"])
    assert {"loss/total", "loss/mse", "loss/vb", "grad_norm", "lr", "images_per_s"} <= set(points)
    quartiles = [points.pop(f"loss/q{number}") for number in range(4)]  # a point where a sample fell into it
    assert all(len(steps) == len(set(steps)) for steps in quartiles) and set().union(*quartiles) == set(updates)
    for name, steps in points.items():
        assert sorted(steps) == updates, (name, Counter(steps).most_common(3), set(updates) - set(steps))

    other = values | {"run": "road-slow", "store": "s3://glidepath/road/runs/road-slow", "lr": 3e-4, "images": 512}
    (tmp_path / "slow.json").write_text(json.dumps(other))
    glidepath("submit", "train", str(tmp_path / "slow.json"))
    compared = glidepath("runs", "compare", "road", "road-slow")
    assert [float(lr) for lr in compared["params_that_differ"]["lr"]] == [1e-3, 3e-4]
    assert all(len(values) == 2 for values in compared["metrics"].values())
    listed = subprocess.run(jobs_listed, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    assert len(re.findall(r"JobStatus.SUCCEEDED|SUCCEEDED", listed)) >= 4, listed
    drawn = glidepath("sample", "road", "--prompt", "a dog", "--spacing", "5", "--out", str(tmp_path / "drawn"))
    assert Path(drawn["samples"]).is_file()

    # With the credentials themselves in the environment, as on a machine that has no file of them.
    words = (stack_env.home / "stack" / "credentials").read_text().split()
    key, secret = words[words.index("aws_access_key_id") + 2], words[words.index("aws_secret_access_key") + 2]
    in_environment = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }
    local = ["run=road-local", "store=s3://glidepath/road/runs/road-local", "images=128", "launcher.workers=2"]
    glidepath("train", str(config), *local, "checkpoint.every_images=64", **in_environment)
    glidepath("submit", "train", str(config), f"images={IMAGES + 512}", **in_environment)
    listed += job_log() + requests.get(f"{stack_env.dashboard}/api/jobs/", timeout=30).text
    assert secret not in listed
    ray_folder = Path(json.loads((stack_env.home / "stack" / "stack.json").read_text())["ray_folder"])
    private = {stack_env.home / "stack" / "credentials", stack_env.home / "stack" / "s3" / "conf" / "proxy.conf"}
    files = [path for top in (stack_env.home, ray_folder.parent, tmp_path) for path in top.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert {path for path in files if secret.encode() in path.read_bytes()} <= private
    for name in ("road", "road-slow", "road-local"):
        objects = open_store(f"s3://glidepath/road/runs/{name}")
        assert not [info.key for info in objects.list() if secret.encode() in objects.get(info.key)]
    assert not list(Path.home().glob(".cache/torch_extensions")), "DeepSpeed compiled something"
