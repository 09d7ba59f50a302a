"""P5: a step of the whole system against the same engine bare.

    python -m benchmarks.overhead [--size small|tiny] [--steps 5] [--repetitions 12] [--tracking URI]

The whole system is a run as a worker has it: loader, step, guard, EMA, curves, events to the launcher, watch with its
heartbeat, the stop and save decisions; no save, grid or held-out figure comes due, and consumed ids are not listed.
Bare is forward, backward and update of an engine of its own, on the batches that the run has just used. Both are in one
process and take turns, so many steps each; they begin from the same weights, and without EMA, guard or log in between
their losses must stay equal but for rounding. Target: the system takes at most 1.02 times as long, by the clock, where
a step takes half a second or more (`small`); `tiny` shows what a step costs in milliseconds, whatever it computes.

What the rest goes to is timed by part, by the clock and in CPU time of the main thread. CPU seconds of a turn are those
of all threads: the loader's and the tracker's as well, which overlap with computing where there are cores to spare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measuring import write_result
from cluster.drills.scratch import build_dataset, environment
from cluster.imports import quick_imports
from cluster.tracking import TrackedRun
from data_pipeline.config import find_config, read_values
from data_pipeline.loader import MicroBatch
from trainer import loop, run, step
from trainer.config import TrainConfig, lr_at
from trainer.engine.group import Group
from trainer.guard import Decision
from trainer.recipes import parse_train_config
from trainer.recipes.recipe import on_device, seed_dropout
from trainer.step import Trainee
from trainer.watch import watched

TARGET = 1.02
PRESETS = {"small": ("small-base", 16), "tiny": ("tiny", 16)}  # preset, batch
NEVER = 10**9
# What the system does beside the bare step, and where: each is timed where it is called, so they must not nest.
PARTS = {"ema": (step, "update_ema"), "guard": (step, "ask_guard"), "log": (loop.TrainingLoop, "log")}
PARTS |= {"save or stop": (loop.TrainingLoop, "save_or_stop")}


@dataclass
class Turns:
    """What was measured: seconds of each turn of so many steps, and of the parts within the system's."""

    steps: int
    system_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    system_cpu_s: list[float] = field(default_factory=list)
    bare_cpu_s: list[float] = field(default_factory=list)
    parts_s: list[dict[str, float]] = field(default_factory=list)
    parts_cpu_s: list[dict[str, float]] = field(default_factory=list)


class Bare:
    """The engine without the rest."""

    def __init__(self, config: TrainConfig) -> None:
        self.trainee: Trainee = run.make_trainee(config, Group())
        [self.phase] = self.trainee.recipe.phases()
        self.engine = self.trainee.engines[self.phase.part]

    def step(self, micro_batches: Sequence[MicroBatch], position: int) -> float:
        """Forward, backward, update; the loss."""
        config, total = self.trainee.config, 0.0
        for micro in micro_batches:
            seed_dropout(micro, 0)
            with self.engine.precision_context():
                losses = self.phase.loss(self.trainee.modules, on_device(micro.batch, torch.device("cpu")), micro.draws)
            self.engine.backward(losses["total"].sum() / config.batch)
            total += float(losses["total"].detach().double().sum())
        self.engine.update(lr_at(position, config.lr, config.warmup_images), lambda norm: Decision.CONTINUE)
        return total / config.batch


class Measurement:
    """Takes turns with a run, whose `report` it is; `step` takes the place of the loop's own."""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self.bare, self.turns, self.batch = Bare(config), Turns(steps), config.batch
        self.used: list[tuple[Sequence[MicroBatch], int]] = []
        self.losses: list[float] = []
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.parts_cpu: defaultdict[str, float] = defaultdict(float)
        self.sink = Path(os.devnull).open("w")  # noqa: SIM115  (as long as the process)
        self.bare_s = self.bare_main_cpu_s = 0.0  # so far: the loop reports from within its log
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def step(self, trainee: Trainee, micro_batches: Sequence[MicroBatch], position: int) -> dict[str, float | str]:
        self.used.append((micro_batches, position))
        return step.train_step(trainee, micro_batches, position)

    def report(self, event: dict[str, Any]) -> None:
        self.sink.write(json.dumps(event) + "\n")  # as a worker does, on the system's time
        if event["event"] != "progress":
            return
        self.losses.append(event["loss"])
        self.parts["data"] += event["time/data_s"]
        if len(self.used) == self.turns.steps:
            self.take_turn()

    def take_turn(self) -> None:
        now, now_cpu, main_cpu = time.perf_counter(), time.process_time(), time.thread_time()
        bare_losses = [self.bare.step(*used) for used in self.used]
        after, after_cpu = time.perf_counter(), time.process_time()
        assert all(abs(a - b) <= 1e-12 * abs(a) for a, b in zip(self.losses, bare_losses, strict=True)), (
            f"not the same work: losses {self.losses} and {bare_losses}"
        )
        turns = self.turns
        turns.system_s.append(now - self.began)
        turns.system_cpu_s.append(now_cpu - self.began_cpu)
        turns.bare_s.append(after - now)
        self.bare_s += after - now
        self.bare_main_cpu_s += time.thread_time() - main_cpu
        turns.bare_cpu_s.append(after_cpu - now_cpu)
        turns.parts_s.append(dict(self.parts))
        turns.parts_cpu_s.append(dict(self.parts_cpu))
        print(f"{len(turns.bare_s):4}  system {now - self.began:8.3f} s  bare {after - now:8.3f} s", flush=True)
        self.used, self.losses, self.parts, self.parts_cpu = [], [], defaultdict(float), defaultdict(float)
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def call(*args: Any, **kwargs: Any) -> Any:
            began, cpu_began = time.perf_counter() - self.bare_s, time.thread_time() - self.bare_main_cpu_s
            try:
                return work(*args, **kwargs)
            finally:
                self.parts[name] += time.perf_counter() - self.bare_s - began
                self.parts_cpu[name] += time.thread_time() - self.bare_main_cpu_s - cpu_began

        return call


def benchmark_config(size: str, folder: Path, steps: int, tracking: str | None) -> TrainConfig:
    preset, batch = PRESETS[size]
    values = read_values(find_config("train", preset), ())
    for key in ("heldout", "samples"):
        values.pop(key, None)
    values |= {"run": f"overhead-{size}", "store": str(folder / "run"), "batch": batch, "images": steps * batch}
    values |= {"dataset": build_dataset(folder / "corpus", str(folder / "dataset")), "launcher": {"workers": 1}}
    if size == "tiny":
        values["model"] |= {"image_size": 16, "text_context": 8}
    values |= {"checkpoint": {"every_images": NEVER}, "samples": {"every_images": NEVER}}
    return parse_train_config(values | {"tracking": {"uri": tracking}}, "benchmark")


@contextmanager
def instrumented(measurement: Measurement) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "train_step", measurement.step))
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(patch.object(owner, attribute, measurement.timed(name, getattr(owner, attribute))))
        yield


def measure(config: TrainConfig, steps: int) -> Turns:
    values = config.model_dump(mode="json")
    with quick_imports():
        run.warm(values)
    measurement = Measurement(config, steps)
    attempt = run.prepare_run(config)
    tracked = TrackedRun(config)
    beats = measurement.timed("heartbeat", lambda event: measurement.sink.write(json.dumps(event) + "\n"))
    with tracked, instrumented(measurement), watched(values, 0, beats) as watch:
        tracked.begin(attempt, 1)
        run.train(values, attempt, Group(watch=watch), measurement.report, tracked.mlflow_run_id)
        tracked.end("FINISHED")
    return measurement.turns


def summary(turns: Turns) -> dict[str, Any]:
    """Without the first turn, which warms up. Milliseconds are per step, medians over turns."""

    def median_ms(seconds: Sequence[float]) -> float:
        return 1000 * statistics.median(seconds[1:]) / turns.steps

    def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
        return statistics.median(x / y for x, y in zip(a[1:], b[1:], strict=True))

    rest_s = [a - b for a, b in zip(turns.system_s, turns.bare_s, strict=True)]
    names = [name for name in ("data", *PARTS, "heartbeat") if any(name in parts for parts in turns.parts_s)]
    parts = {name: median_ms([parts.get(name, 0.0) for parts in turns.parts_s]) for name in names}
    parts_cpu = {name: median_ms([parts.get(name, 0.0) for parts in turns.parts_cpu_s]) for name in names}
    named_s = [sum(seconds for name, seconds in parts.items() if name != "heartbeat") for parts in turns.parts_s]
    parts["the rest"] = median_ms([rest - named for rest, named in zip(rest_s, named_s, strict=True)])
    return {
        "ratio": median_ratio(turns.system_s, turns.bare_s),
        "ratio_of_cpu_seconds": median_ratio(turns.system_cpu_s, turns.bare_cpu_s),
        "bare_ms": median_ms(turns.bare_s),
        "system_ms": median_ms(turns.system_s),
        "more_ms": median_ms(rest_s),
        "more_cpu_ms": median_ms([a - b for a, b in zip(turns.system_cpu_s, turns.bare_cpu_s, strict=True)]),
        "where_ms": parts,
        "where_main_cpu_ms": parts_cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="small")
    parser.add_argument("--steps", type=int, default=5, help="of each turn")
    parser.add_argument("--repetitions", type=int, default=12, help="turns that count")
    parser.add_argument("--tracking", help="MLflow server; by default the curves go to a file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as a worker on a CPU
    with (
        tempfile.TemporaryDirectory(prefix="glidepath-") as name,
        environment({"GLIDEPATH_HOME": f"{name}/home", "MLFLOW_TRACKING_URI": None}),
    ):
        steps = arguments.steps * (arguments.repetitions + 1)
        config = benchmark_config(arguments.size, Path(name), steps, arguments.tracking)
        turns = measure(config, arguments.steps)
    found = summary(turns)
    print(json.dumps(found, indent=1))
    print(f"ratio {found['ratio']:.4f} (target {TARGET} for small)")
    suffix = "" if arguments.size == "small" else f"_{arguments.size}"
    model = config.model_dump(mode="json")["model"]
    document = {"model": model, "batch": config.batch, "micro_batch": config.micro_batch_size(), "target": TARGET}
    document |= {"tracking": "MLflow" if arguments.tracking else "file", "summary": found, "turns": vars(turns)}
    write_result(f"overhead{suffix}", document)


if __name__ == "__main__":
    main()
