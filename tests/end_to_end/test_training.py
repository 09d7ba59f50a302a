"""Training in real worker processes: resume, world sizes, damage, death, blocked imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import consumed_ids, kill_worker_1_at

from cluster.launch import Event, WorkerDied
from cluster.training import train_run
from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, read_manifest
from trainer.recipes import parse_train_config
from trainer.tracking.jsonl import read_curves

Values = Callable[..., dict[str, Any]]


def run(values: dict[str, Any], workers: int, on_event: Callable[[Event], None] = lambda event: None) -> dict[str, Any]:
    return train_run(parse_train_config({**values, "launcher": {"workers": workers}}, "test"), on_event)


def manifest_at(store: str, position: int) -> Manifest:
    """Of the newest checkpoint there."""
    name = next(name for name in committed(LocalStore(Path(store))) if name.position == position)
    return read_manifest(LocalStore(Path(store)), name.manifest_key)


def digests(store: str, position: int) -> list[str]:
    """Digest of each part of the newest checkpoint at a position: equal digests, equal masters, moments and EMA."""
    manifest = manifest_at(store, position)
    assert {interval.kind for part in manifest.parts for interval in part.intervals()} == {
        "master",
        "exp_avg",
        "exp_avg_sq",
        "ema",
    }
    return [part.digest for part in manifest.parts]


def resumes(store: str) -> list[dict[str, Any]]:
    lines = map(json.loads, Path(store, "tracking", "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "resume"]


def test_a_run_killed_and_resumed_equals_an_uninterrupted_one_to_the_bit(train_values: Values) -> None:
    """With all that training remembers besides: losses by timestep, and a guard that has refused updates."""
    remembers = {
        "diffusion": {"steps": 4, "timesteps": "loss_second_moment"},  # which draws by its losses after some 50 of them
        "samples": {"sampling": {"spacing": "2"}},
        "guard": {"warmup": 1, "window": 3, "spike_factor": 1.02, "rollback_after": 100, "sustained_after": 100},
    }
    whole, killed = (train_values(name, images=96, **remembers) for name in ("whole", "killed"))
    run(whole, workers=2)
    with pytest.raises(WorkerDied, match=r"worker 1 \(process \d+\): expected exit code 0, found ended by SIGKILL"):
        run(killed, workers=2, on_event=kill_worker_1_at(80))
    result = run(killed, workers=2)
    (resume,) = resumes(killed["store"])
    assert resume["images"] > 0
    assert result["checkpoint"].endswith("images-000000096/attempt-2")
    assert digests(killed["store"], 96) == digests(whole["store"], 96)
    state = {"guard", "recipe_state", "optimizer_steps", "loss_scale", "order"}
    ends = [manifest_at(values["store"], 96).model_dump(include=state) for values in (whole, killed)]
    assert ends[0] == ends[1]
    resumed_from = manifest_at(killed["store"], resume["images"])
    assert resumed_from.guard["base"]["skipped"] > 0 and resumed_from.recipe_state["counts"]
    assert resumed_from.optimizer_steps["base"] < resume["images"] // 16, "refused updates are not counted"
    # What the first attempt consumed after its newest checkpoint is consumed again; the last time counts.
    assert dict(consumed_ids(killed["store"])) == dict(consumed_ids(whole["store"]))
    assert [position for position, _ in consumed_ids(whole["store"])] == list(range(0, 96, 16))
    curves = [read_curves(Path(values["store"], "tracking")) for values in (whole, killed)]
    assert curves[0]["loss/total"] == curves[1]["loss/total"]


def test_worlds_of_1_2_and_3_and_changes_between_them_consume_the_same_ids_in_the_same_batches(
    train_values: Values,
) -> None:
    changes: dict[str, Any] = {"dropout": 0.0}  # dropout inside the network is drawn per rank
    alone = train_values("alone", images=96, **changes)
    run(alone, workers=1)
    chained = train_values("chained", images=32, **changes)
    for images, workers in ((32, 2), (64, 3), (96, 1)):
        run({**chained, "images": images}, workers)
    assert [line["images"] for line in resumes(chained["store"])] == [32, 64]
    assert consumed_ids(chained["store"]) == consumed_ids(alone["store"])
    losses = [read_curves(Path(values["store"], "tracking"))["loss/total"] for values in (alone, chained)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    store = LocalStore(Path(chained["store"]))
    worlds = {name.position: read_manifest(store, name.manifest_key).world_size for name in committed(store)}
    assert (worlds[32], worlds[64], worlds[96]) == (2, 3, 1)


def test_a_damaged_checkpoint_is_passed_over_and_its_position_committed_again(train_values: Values) -> None:
    values = train_values("damaged", images=32)
    run(values, workers=2)
    store = LocalStore(Path(values["store"]))
    part = store.root / CheckpointName(32, 1).folder / "part-00001-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    result = run(values, workers=2)
    assert [line["text"].split(",")[0] for line in resumes(values["store"])] == ["from images-000000016/attempt-1"]
    assert result["checkpoint"].endswith("images-000000032/attempt-2")
    assert committed(store)[:2] == [CheckpointName(32, 2), CheckpointName(32, 1)]
    assert part.read_bytes() == data, "what is damaged stays for people to look at"


def test_training_needs_neither_ray_nor_mlflow_nor_any_other_service(
    train_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line and its workers, in bf16 as well; the block reaches them through their environment."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'mlflow', 'deepspeed', 'boto3'):\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, text=True, check=False)
    assert "ray is blocked" in probe.stderr
    values = train_values("blocked", precision="bf16", samples={"prompts": ["a cat"], "sampling": {"spacing": "3"}})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "cluster.cli", "train", str(config), "launcher.workers=2", "--json"]
    trained = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(trained.stdout)
    assert result["images"] == 64 and result["loss"] < 3
    assert Path(result["samples"]).read_bytes().startswith(b"\x89PNG")


def test_a_worker_that_refuses_is_heard_by_the_launcher(train_values: Values) -> None:
    # A rate at which nothing is learned: the losses go up and down, so one of them is above the median soon.
    guard = {"rollback_after": 1, "halt_after": 0, "warmup": 1, "spike_factor": 1.000001}
    values = train_values("refused", images=320, lr=1e-12, guard=guard)
    with pytest.raises(UserError, match=r"run refused, part base, at .* refused updates in a row"):
        run(values, workers=2)


def test_the_upsampler_trains_and_both_recipes_draw_grids_of_held_out_rows(
    train_values: Values, dataset_uri: str
) -> None:
    heldout = {"dataset": dataset_uri, "images": 32}
    model = {**train_values()["model"], "image_size": 32, "low_resolution": 16, "attention_resolutions": []}
    samples = {"sampling": {"spacing": "2", "guidance_scale": 1.0}}
    values = train_values(
        "upsampler", images=32, recipe="glide_upsampler", model=model, heldout=heldout, samples=samples
    )
    result = run(values, workers=2)
    assert set(result["heldout"]["last"]) == {"total", "mse", "vb", "q0", "q1", "q2", "q3"}
    assert result["heldout"]["last"]["mse"] < result["heldout"]["first"]["mse"]
    assert Path(result["samples"]).is_file()
