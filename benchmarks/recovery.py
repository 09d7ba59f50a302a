"""P7: how long from submit to the first step, and from the kill of a worker to the next step, part by part.

On a local stack of its own, with S3 and MLflow: `glidepath submit` from the command's start to the first update, and
the driver of a run of which a random worker is ended with SIGKILL, with and without standbys in turn. Every repetition
is printed. The parts:
  submit      the command's start to the job's        job       to the driver's first line
  driver      its imports, checks, attempt            detect    the kill to the end of the gang
  decide      to the launch of the next attempt       placed    places for the workers
  imported    workers that are warm                   met       all ranks at the rendezvous
  loaded      networks built, checkpoint restored     first_step  data, forward, backward, update
Run: python -m benchmarks.recovery [--repetitions 10] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.measuring import write_result
from cluster.drills.gang import quantile
from data_pipeline.config import find_config
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.manifest import committed

KILLS_PER_DRIVER = 5
LAUNCH_PARTS = ("placed", "imported", "met", "loaded", "first_step")
SUBMIT_PARTS = ("submit", "job", "driver", *LAUNCH_PARTS)
KILL_PARTS = ("detect", "decide", *LAUNCH_PARTS)
FIRST_STEP = re.compile(r"first step ([\d.]+) s after the launch: (.*)")
ENTERED = "driver in process"

DRIVER = """
import json, logging, sys, time
from cluster.cli import load_train_config
from cluster.training import train_run
logging.basicConfig(level=logging.INFO)
def report(event):
    if event["event"] != "progress" or event["images"] % 320 == 0:
        print("EVENT", json.dumps({"now": time.time()} | event), flush=True)
train_run(load_train_config(sys.argv[1], []), report)
"""


class Stack:
    """A local stack in a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base = {**os.environ, "GLIDEPATH_HOME": str(home)}
        document = json.loads(self.glidepath("up", "--cpus", "4", "--json"))
        self.environment = self.base | document["env"]
        self.dashboard = next(row["url"] for row in document["services"] if row["service"] == "ray")
        gcs = json.loads((home / "stack" / "stack.json").read_text())["ports"]["gcs"]
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
        os.environ.update(document["env"])  # to look into its store from here

    def glidepath(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        done = subprocess.run(command, env=environment or self.base, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"glidepath {arguments[0]}: {done.stderr[-2000:]}")
        return done.stdout

    def config(self, run: str, **changes: Any) -> Path:
        launcher = {"kind": "ray", "workers": 2} | changes.pop("launcher", {})
        values = {
            "extends": str(find_config("train", "tiny")),
            "run": run,
            "store": f"s3://glidepath/{run}",
            "launcher": launcher,
            **changes,
        }
        path = self.home / f"{run}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


@contextmanager
def local_stack() -> Iterator[Stack]:
    home = Path(tempfile.mkdtemp(prefix="gp-"))
    try:
        yield Stack(home)
    finally:
        base = {**os.environ, "GLIDEPATH_HOME": str(home)}
        subprocess.run([sys.executable, "-m", "cluster.cli", "down"], env=base, check=False)
        shutil.rmtree(home, ignore_errors=True)


def submitted(stack: Stack, run: str) -> dict[str, float]:
    """Seconds of the parts of one submit."""
    config = stack.config(run, images=160)
    began = time.time()
    environment = {name: value for name, value in stack.environment.items() if name != "RAY_ADDRESS"}
    said = json.loads(stack.glidepath("submit", "train", str(config), "--json", environment=environment))
    about = requests.get(f"{stack.dashboard}/api/jobs/{said['submission_id']}", timeout=10).json()
    logs = requests.get(f"{stack.dashboard}/api/jobs/{said['submission_id']}/logs", timeout=10).json()["logs"]
    lines = logs.splitlines()
    entered = next(_seconds_of(line, began) for line in lines if ENTERED in line)
    launched = next(_seconds_of(line, began) for line in lines if "launch of attempt" in line)
    parts = parts_of(next(line for line in lines if FIRST_STEP.search(line)))
    started = about["start_time"] / 1000
    return {"submit": started - began, "job": entered - started, "driver": launched - entered, **parts}


def parts_of(line: str) -> dict[str, float]:
    """Of the launcher's line about its first step."""
    found = FIRST_STEP.search(line)
    assert found is not None
    return {name: float(seconds) for name, seconds in (part.split() for part in found[2].split(", "))}


def _seconds_of(line: str, near: float) -> float:
    """Unix time of a log line that says its time of day."""
    found = re.search(r"(\d\d:\d\d:\d\d)[.,](\d{3})", line)
    assert found is not None, line
    moment = datetime.combine(datetime.fromtimestamp(near).date(), datetime.strptime(found[1], "%H:%M:%S").time())
    return moment.timestamp() + int(found[2]) / 1000


def newest_attempt_saved(store: ObjectStore) -> int:
    return max((name.attempt for name in committed(store)), default=0)


class Run:
    """A driver in a process of its own and what it tells."""

    def __init__(self, stack: Stack, name: str, standby: bool) -> None:
        changes = {"images": 10**9, "checkpoint": {"every_images": 160}, "launcher": {"standby": standby}}
        self.died = 0  # the newest attempt that was killed
        path = stack.config(name, **changes)
        self.store = open_store(f"s3://glidepath/{name}")
        self.log = (stack.home / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(path)], stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=stack.environment,
        )  # fmt: skip

    def until(self, *kinds: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("EVENT "):
                event: dict[str, Any] = json.loads(line.removeprefix("EVENT "))
                if event["event"] in kinds:
                    return event
        raise RuntimeError(f"the run ended; see {self.log.name}: {Path(self.log.name).read_text()[-2000:]}")

    def ready_to_die(self, standby: bool) -> None:
        """Standbys are warm, and this attempt has stored a checkpoint: what a fault meets on any other day."""
        if standby:
            self.until("standby")
        while newest_attempt_saved(self.store) <= self.died:
            self.until("progress")

    def killed(self, started: dict[str, Any], choice: random.Random) -> tuple[dict[str, float], dict[str, Any]]:
        """Kill a worker: seconds of the parts to the next step, and the next "started"."""
        self.died = newest_attempt_saved(self.store)
        killed_at = time.time()
        os.kill(choice.choice(started["pids"]), signal.SIGKILL)
        following = self.until("started")
        began = self.until("began")
        detect, decide = began["ended_at"] - killed_at, began["at"] - began["ended_at"]
        return {"detect": detect, "decide": decide, **began["seconds"]}, following

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def kills(stack: Stack, repetitions: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """By kind, every repetition; drivers of both kinds take turns."""
    choice = random.Random(seed)
    found: dict[str, list[dict[str, float]]] = {"standby": [], "cold": []}
    for turn in range(-(-repetitions // KILLS_PER_DRIVER)):
        for kind, measured in found.items():
            run = Run(stack, f"killed-{kind}-{turn}", kind == "standby")
            try:
                started = run.until("started")
                for _ in range(min(KILLS_PER_DRIVER, repetitions - len(measured))):
                    run.ready_to_die(kind == "standby")
                    parts, started = run.killed(started, choice)
                    measured.append(parts)
                    tell(f"kill, {kind}", len(measured), parts)
            finally:
                run.end()
    return found


def tell(what: str, number: int, parts: dict[str, float]) -> None:
    each = "  ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    print(f"{what:<14} {number:>3}  {sum(parts.values()):6.2f} s   {each}", flush=True)


def summary(measured: list[dict[str, float]], parts: tuple[str, ...]) -> dict[str, Any]:
    totals = [sum(one.values()) for one in measured]
    by_part = {name: round(statistics.median(one[name] for one in measured), 3) for name in parts}
    return {
        "n": len(totals),
        "p50_s": round(statistics.median(totals), 3),
        "p95_s": round(quantile(totals, 0.95), 3),
        "p50_by_part_s": by_part,
        "repetitions": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two repetitions, nothing written: to see that it works")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the stack goes first
    repetitions = 2 if options.quick else options.repetitions
    with local_stack() as stack:
        submits = []
        submitted(stack, "first")  # builds the demo dataset
        for number in range(repetitions):
            submits.append(submitted(stack, f"submitted-{number}"))
            tell("submit", number + 1, submits[-1])
        killed = kills(stack, repetitions, options.seed)
    document: dict[str, Any] = {"submit_to_first_step": summary(submits, SUBMIT_PARTS)}
    for kind, measured in killed.items():
        document[f"kill_to_next_step_{kind}"] = summary(measured, KILL_PARTS)
    for name, figures in document.items():
        print(
            f"{name}: p50 {figures['p50_s']} s, p95 {figures['p95_s']} s of {figures['n']}; {figures['p50_by_part_s']}"
        )
    if not options.quick:
        write_result("recovery", document)


if __name__ == "__main__":
    main()
