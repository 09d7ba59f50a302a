"""The driver's notes of a run: what happens between the workers and it is an event of the run like any other."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import wait_for

import cluster.tracking
import trainer.run
import trainer.tracking.background
from cluster.faults import faulty_link
from cluster.tracking import TrackedRun
from cluster.utilisation import Utilisation
from data_pipeline.storage import LocalStore
from trainer.config import TrainConfig
from trainer.engine.group import Group
from trainer.plan.planning import plan
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, tracking_folder
from trainer.tracking.jsonl import read_curves, read_events
from trainer.tracking.leftovers import DRIVERS

ROOT = Path(__file__).resolve().parents[2]


def test_a_slow_and_a_hung_rank_are_events_of_the_run_where_they_happened(
    train_values: Callable[..., dict[str, Any]],
) -> None:
    config = parse_train_config(train_values(), "test")
    with TrackedRun(config) as tracked:
        tracked.begin(3, 2)
        tracked.watch({"event": "progress", "images": 48, "time/step_s": 0.1})
        tracked.watch({"event": "straggler", "rank": 1, "node": "node-b", "factor": 2.9})
        tracked.watch({"event": "hung", "rank": 0, "node": "node-a", "section": "data", "seconds": 601.0})
        tracked.end("FINISHED")
    [slow], [hung] = (read_events(tracking_folder(config), kind) for kind in ("straggler", "hung"))
    assert (slow["attempt"], slow["images"]) == (hung["attempt"], hung["images"]) == (3, 48)
    assert slow["text"] == "rank 1 on node-b: 2.9 times the others' work"
    assert hung["text"] == "rank 0 on node-a: in data"


@pytest.mark.usefixtures("one_thread")
def test_the_system_metrics_of_each_node_are_curves_of_the_run(train_values: Callable[..., dict[str, Any]]) -> None:
    config = parse_train_config(train_values(tracking={"system_s": 0.05}), "test")
    heard: list[dict[str, Any]] = []
    trainer.run.train(config.model_dump(mode="json"), prepare_run(config), Group(), heard.append)
    told = [event for event in heard if event["event"] == "system"]
    with TrackedRun(config) as tracked:
        tracked.begin(1, 2)
        for event in told:
            tracked.watch(event)
            tracked.watch(event | {"node": "node-b"})
        tracked.end("FINISHED")
    curves = read_curves(tracking_folder(config))
    positions = sorted({event["images"] for event in told})
    assert told and positions[-1] <= 64
    for node in (told[0]["node"], "node-b"):
        assert sorted(curves[f"system/{node}/cpu_utilization_percentage"]) == positions


def test_a_run_that_wants_no_system_metrics_has_no_thread_for_them(
    train_values: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a sampler")

    monkeypatch.setattr(trainer.run, "SystemSampler", refuse)
    config = parse_train_config(train_values(images=16, tracking={"system_s": None}), "test")
    trainer.run.train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)
    monkeypatch.setenv("LOCAL_RANK", "1")  # another rank of the node tells it
    config = parse_train_config(train_values(images=32), "test")
    trainer.run.train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)


def test_what_the_driver_says_outlives_a_dead_server_restarts_and_the_driver_itself(
    train_values: Callable[..., dict[str, Any]], stack_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(cluster.tracking, "NOTE_DEADLINE_S", 1.0)
    monkeypatch.setattr(trainer.tracking.background, "GATHER_S", 0.1)
    monkeypatch.setattr(trainer.tracking.background, "BACKOFF_S", (0.1,))

    def system(tracked: TrackedRun, images: int) -> None:
        figures = {"cpu_utilization_percentage": float(images)}
        tracked.watch({"event": "system", "node": "node-a", "images": images, "figures": figures, "gpu": None})

    def driver(config: TrainConfig, attempts: tuple[int, ...], end: int) -> str:
        with TrackedRun(config) as tracked:
            for attempt in attempts:
                tracked.begin(attempt, 2)
                system(tracked, 16 * attempt)
                system(tracked, 16 * attempt)  # a second sample at a position is not a second point
                if attempt == 1:
                    link.down = True
                    tracked.watch({"event": "progress", "images": 16, "time/step_s": 0.1})
                    tracked.watch({"event": "straggler", "rank": 1, "node": "node-b", "factor": 2.9})
            system(tracked, end)
            tracked.end("FINISHED")
        return str(tracked.mlflow_run_id)

    with faulty_link(stack_env.mlflow) as link:
        config = parse_train_config(train_values(run="driven", tracking={"uri": link.url}), "test")
        store = LocalStore(Path(config.store or ""))
        prepare_run(config)
        run_id = driver(config, (1, 2), 48)
        assert store.exists(DRIVERS)
        link.heal()
        monkeypatch.setattr(cluster.tracking, "NOTE_DEADLINE_S", 30.0)
        assert driver(config, (3,), 64) == run_id
        assert not store.exists(DRIVERS)
    client = MlflowClient(tracking_uri=stack_env.mlflow)
    history = client.get_metric_history(run_id, "system/node-a/cpu_utilization_percentage")
    assert Counter(point.step for point in history) == dict.fromkeys((16, 32, 48, 64), 1)
    assert client.get_run(run_id).data.tags["event/16/1/straggler"] == "rank 1 on node-b: 2.9 times the others' work"


def test_mfu_is_the_counted_arithmetic_of_the_steps_by_the_peak_of_the_gpus(
    train_values: Callable[..., dict[str, Any]],
) -> None:
    values = train_values(launcher={"workers": 4, "device": "cuda"}, precision="bf16")
    config = parse_train_config(values, "test")
    flops = plan(config)["flops_train_per_image"]
    system = {"event": "system", "node": "node-a", "figures": {}}
    with TrackedRun(config) as tracked:
        tracked.begin(1, 2)  # two of the four found room
        for number in range(1, 4):
            tracked.watch({"event": "progress", "images": 16 * number, "time/step_s": 2.0})
            wait_for(lambda: tracked._utilisation._flops_per_image)
            tracked.watch(system | {"images": 16 * number, "gpu": "NVIDIA H200"})
        tracked.watch({"event": "progress", "images": 64, "time/step_s": 6.0})
        tracked.watch(system | {"images": 64, "gpu": "Some other GPU"})
        tracked.end("FINISHED")
    expected = 16 / 2.0 * flops / (2 * 989e12)
    assert read_curves(tracking_folder(config))["mfu"] == {48: pytest.approx(expected)}


def test_nothing_is_counted_for_mfu_before_a_step_is_done(train_values: Callable[..., dict[str, Any]]) -> None:
    threads = threading.active_count()
    Utilisation(parse_train_config(train_values(launcher={"device": "cuda"}), "test"))
    assert threading.active_count() == threads


def test_a_driver_that_ends_while_mfu_is_counted_ends_with_its_own_exit_code() -> None:
    """As a daemon, the thread that counts had the interpreter abort: exit code 134 or 139."""
    code = """
import sys
from cluster.utilisation import Utilisation
from data_pipeline.config import find_config, read_values
from trainer.recipes import parse_train_config

values = read_values(find_config("train", "glide-base-released"), ["dataset=/nowhere", "launcher.device=cuda"])
Utilisation(parse_train_config(values, "test")).stepped({"event": "progress", "images": 16, "time/step_s": 0.1})
sys.exit(1)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (1, "")
