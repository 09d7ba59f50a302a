"""What tracking costs a step: time of the training thread, with a tracking server that answers, is slow, or is dead.

    python -m benchmarks.tracking [--steps 200] [--repetitions 6]

A run as a worker has it logs to a real MLflow server over a link that passes everything, delays each answer by 2 s, or
refuses all connections; the three take turns within the run, so many steps each. For each turn, per step: CPU time of
the training thread in `tracker.log`, and in all that the loop does to log (figures of the step, memory, tracker, the
event to the launcher); both by the clock as well, where waiting for another thread of the process counts; and the step
itself. The same values also go to a tracker that writes to a folder, as without a server. Target: at most 0.3 ms of CPU
time per step for all logging, whatever the server does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measuring import write_result
from cluster.drills.scratch import build_dataset, environment
from cluster.drills.tracking_outage import tracking_server
from cluster.faults import FaultyLink, faulty_link
from cluster.tracking import TrackedRun
from data_pipeline.config import find_config, read_values
from trainer import loop, run
from trainer.config import TrainConfig
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.tracking import background
from trainer.tracking.background import BackgroundTracker
from trainer.tracking.jsonl import JsonlTracker
from trainer.watch import watched

TARGET_MS = 0.3
STATES = ("answers", "slow", "dead")
SLOW_S = 2.0
NEVER = 10**9
CALLS = ("tracker.log", "all logging", "to a folder")


def set_state(link: FaultyLink, state: str) -> None:
    link.down = state == "dead"
    link.latency_s = SLOW_S if state == "slow" else 0.0


class Turns:
    """Takes turns between the states; the run's `report`. Times in seconds, by call, of the steps of this turn."""

    def __init__(self, link: FaultyLink, steps: int, folder: Path) -> None:
        self.link, self.steps, self.rows = link, steps, list[dict[str, Any]]()
        self.folder_tracker = JsonlTracker(folder, 1)
        self.sink = Path(os.devnull).open("w")  # noqa: SIM115  (as long as the process)
        self.begin()

    @property
    def state(self) -> str:
        return STATES[len(self.rows) % len(STATES)]

    def begin(self) -> None:
        set_state(self.link, self.state)
        self.cpu: dict[str, list[float]] = {name: [] for name in CALLS}
        self.clock: dict[str, list[float]] = {name: [] for name in CALLS}
        self.step_s: list[float] = []

    def report(self, event: dict[str, Any]) -> None:
        self.sink.write(json.dumps(event) + "\n")  # as a worker does
        if event["event"] == "progress":
            self.step_s.append(event["time/step_s"])

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def call(*args: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.thread_time()
            try:
                return work(*args)
            finally:
                self.cpu[name].append(time.thread_time() - cpu_began)
                self.clock[name].append(time.perf_counter() - began)

        return call

    def after_step(self, images: int, values: dict[str, float]) -> None:
        self.timed("to a folder", self.folder_tracker.log)(images, values)
        if len(self.step_s) == self.steps:
            self.end_turn()

    def end_turn(self) -> None:
        row: dict[str, Any] = {"state": self.state, "steps": self.steps}
        for name in CALLS:
            row[f"{name}, cpu ms"] = 1000 * statistics.fmean(self.cpu[name])
            row[f"{name}, clock ms"] = 1000 * statistics.fmean(self.clock[name])
        row["step ms"] = 1000 * statistics.median(self.step_s)
        self.rows.append(row)
        shown = "  ".join(f"{name} {value:7.3f}" for name, value in row.items() if isinstance(value, float))
        print(f"{len(self.rows):3} {row['state']:<8} {shown}", flush=True)
        self.begin()


@contextmanager
def instrumented(turns: Turns) -> Iterator[None]:
    """The training thread's calls are timed; what is compared with them comes after, outside of all logging."""
    log_all, log_tracker = loop.TrainingLoop.log, BackgroundTracker.log
    newest: dict[str, float] = {}

    def tracker_log(self: BackgroundTracker, images: int, values: dict[str, float]) -> None:
        newest.clear()
        newest.update(values)
        turns.timed("tracker.log", log_tracker)(self, images, values)

    def loop_log(self: loop.TrainingLoop, figures: dict[str, float | str]) -> None:
        turns.timed("all logging", log_all)(self, figures)
        turns.after_step(self.position, dict(newest))

    # Else a server that was dead is left alone for most of the turn in which it answers.
    quick = patch.object(background, "BACKOFF_S", (0.5,))
    with quick, patch.object(BackgroundTracker, "log", tracker_log), patch.object(loop.TrainingLoop, "log", loop_log):
        yield


def benchmark_config(folder: Path, images: int, tracking: str) -> TrainConfig:
    values = read_values(find_config("train", "tiny"), ())
    values["model"] |= {"image_size": 16, "text_context": 8}
    values |= {"run": "tracking", "store": str(folder / "run"), "images": images, "tracking": {"uri": tracking}}
    values |= {"dataset": build_dataset(folder / "corpus", str(folder / "dataset")), "launcher": {"workers": 1}}
    values |= {"checkpoint": {"every_images": NEVER}, "samples": {"every_images": NEVER}}
    return parse_train_config(values, "benchmark")


def measure(folder: Path, steps: int, repetitions: int) -> list[dict[str, Any]]:
    with tracking_server(folder / "server") as server, faulty_link(server.service.url) as link:
        images = 16 * (len(STATES) * (repetitions + 1) * steps + 1)
        config = benchmark_config(folder, images, link.url)
        attempt, values = run.prepare_run(config), config.model_dump(mode="json")
        with TrackedRun(config) as tracked:
            tracked.begin(attempt, 1)
            turns = Turns(link, steps, folder / "curves")
            with instrumented(turns), watched(values, 0, turns.report) as watch:
                run.train(values, attempt, Group(watch=watch), turns.report, tracked.mlflow_run_id)
            set_state(link, "answers")
            tracked.end("FINISHED")
    return turns.rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By state, medians over turns without the first of each, which warms up."""
    found = {}
    for number, state in enumerate(STATES):
        mine = rows[number :: len(STATES)][1:]
        figures = [name for name, value in mine[0].items() if isinstance(value, float)]
        found[state] = {name: statistics.median(row[name] for row in mine) for name in figures}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each turn")
    parser.add_argument("--repetitions", type=int, default=6, help="turns of each state that count")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as a worker on a CPU
    with (
        tempfile.TemporaryDirectory(prefix="glidepath-") as name,
        environment({"GLIDEPATH_HOME": f"{name}/home", "MLFLOW_TRACKING_URI": None}),
    ):
        rows = measure(Path(name), arguments.steps, arguments.repetitions)
    found = summary(rows)
    print(json.dumps(found, indent=1))
    worst = max(figures["all logging, cpu ms"] for figures in found.values())
    print(f"all logging: {worst:.3f} ms of CPU time per step at most (target {TARGET_MS})")
    write_result("tracking", {"target_ms": TARGET_MS, "slow_s": SLOW_S, "summary": found, "turns": rows})


if __name__ == "__main__":
    main()
