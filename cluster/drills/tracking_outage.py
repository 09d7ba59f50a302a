"""R10: while a run trains its tracking server is killed, and then its database locked, in turn with times in which it
answers: no step is slower for it, and afterwards every curve has each update once.

Always holds: the server is the local stack's MLflow with its sqlite, on loopback, in the scratch folder, and ends with
the drill; step times are compared within one run, by whether the server answered while they were made. How much the
times in which it answers differ among themselves is the noise.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.drills.gang import metric_steps
from cluster.drills.scoreboard import CannotRun, Score
from cluster.drills.scratch import BATCH, Scratch
from cluster.drills.servers import await_health, free_ports
from cluster.launch import Event
from cluster.services import PORTS, Service, describe_services, service_environment
from cluster.training import train_run
from data_pipeline.errors import UserError
from trainer.tracking.mlflow import MlflowServer, check_server, list_runs
from trainer.tracking.system import SYSTEM

FAULTS = 4
SETTLED_AFTER = 10  # steps: the first ones warm caches
LEAST_NOISE = 0.02  # of a step's median time
PATIENCE_S = 240.0  # for what has to come, on a busy machine
LOCK_S = 30.0  # to get hold of a database that is written to
SYSTEM_S = 1.0
OF_THE_EVENT = ("event", "images", "loss", "at")  # keys of progress that are no metric
POLL_S = 0.2

# returning: it answers again, and what had waited is on its way.
Phase = Literal["start", "answering", "killed", "locked", "returning"]


@dataclass
class TrackingServer:
    """MLflow as the local stack runs it, but for its artifacts, which lie in a folder."""

    folder: Path
    service: Service
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises CannotRun."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.service.argv, env=service_environment(self.service, "drill"), stdout=log, stderr=log,
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        await_health(self.service, self.process)

    def kill(self) -> None:
        """The server and its workers, at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Meanwhile nobody can write to its database, nor read it."""
        with closing(sqlite3.connect(self.folder / "mlflow.db", LOCK_S, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            yield
            database.execute("ROLLBACK")


@contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """A running one. Raises CannotRun where there is no MLflow or it does not start."""
    folder.mkdir(parents=True)
    ports = dict.fromkeys(PORTS, 0) | {"mlflow": free_ports(1)[0]}
    service = describe_services(folder, ports, None, str(folder))[1]
    argv = list(service.argv)
    argv[argv.index("--artifacts-destination") + 1] = str(folder / "artifacts")
    server = TrackingServer(folder, replace(service, argv=tuple(argv)))
    try:
        server.start()
        check_server(service.url)
        yield server
    except UserError as error:
        raise CannotRun(str(error)) from None
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@dataclass
class Observed:
    """What was seen. A step is one of the phase in which it began and ended; `stretch` counts the phases."""

    phase: Phase = "start"
    stretch: int = 0
    began_in: int = -1  # the stretch in which the newest step ended
    images: int = 0
    steps: list[tuple[int, Phase, float]] = field(default_factory=list)  # stretch, phase, seconds
    logged: dict[str, set[int]] = field(default_factory=dict)  # metric -> positions at which the run had a value for it
    settled: threading.Event = field(default_factory=threading.Event)

    def enter(self, phase: Phase) -> None:
        self.phase, self.stretch = phase, self.stretch + 1

    def saw(self, event: Event) -> None:
        if event["event"] == "system":
            names = [f"{SYSTEM}{event['node']}/{name}" for name in event["figures"]]
        elif event["event"] == "progress":
            names = [name for name in event if name not in OF_THE_EVENT]
        else:
            return
        for name in names:
            self.logged.setdefault(name, set()).add(event["images"])
        if event["event"] == "progress":
            self.saw_step(event)

    def saw_step(self, event: Event) -> None:
        if self.began_in == self.stretch:
            self.steps.append((self.stretch, self.phase, event["time/step_s"]))
        self.began_in, self.images = self.stretch, event["images"]
        if self.images >= SETTLED_AFTER * BATCH:
            self.settled.set()

    def medians(self, phase: Phase) -> list[float]:
        """A step's median time in each stretch of that phase that has some."""
        stretches: dict[int, list[float]] = {}
        for stretch, found, seconds in self.steps:
            if found == phase:
                stretches.setdefault(stretch, []).append(seconds)
        return [statistics.median(seconds) for seconds in stretches.values() if len(seconds) >= 3]


def run(scratch: Scratch) -> Score:
    wishes, seen = scratch.wishes, Observed()
    faults = FAULTS if wishes.faults is None else wishes.faults
    with tracking_server(scratch.folder / "tracking-server") as server:
        url = server.service.url
        config = scratch.config(
            "tracked", images=10**9, tracking={"uri": url, "system_s": SYSTEM_S}, checkpoint={"every_images": 10**9}
        )
        stop, failures = threading.Event(), list[str]()
        script = threading.Thread(
            target=lambda: play(scratch, server, seen, faults, stop, failures), name="outages", daemon=True
        )
        script.start()
        try:
            result = train_run(config, seen.saw, stop)
        finally:
            stop.set()
            script.join(PATIENCE_S)
        figures = step_figures(seen)
        failures += slower_steps(figures) + wrong_curves(url, result["images"], seen)
    return Score(faults, {"outage_s": wishes.outage_s, "images": result["images"], **figures}, failures)


def play(
    scratch: Scratch,
    server: TrackingServer,
    seen: Observed,
    faults: int,
    stop: threading.Event,
    failures: list[str],
) -> None:
    """The outages, one after the other; then the run is asked to stop."""
    try:
        wait_for(seen.settled.is_set, stop)
        wait_for(lambda: caught_up(server.service.url, seen), stop)  # its client's import takes seconds
        for number in range(faults):
            seen.enter("answering")
            stop.wait(scratch.wishes.outage_s / 2)
            outage(server, seen, "locked" if number % 2 else "killed", scratch.wishes.outage_s, stop)
            scratch.tell(f"outage {number + 1} of {faults} is over: {seen.images} images")
            seen.enter("returning")
            wait_for(lambda: caught_up(server.service.url, seen), stop)
        seen.enter("answering")
        stop.wait(scratch.wishes.outage_s / 2)
    except Exception as error:  # noqa: BLE001  (of any kind: without this thread the run would never end)
        failures.append(f"the script of the outages ended by {type(error).__name__}: {error}")
    stop.set()


def outage(
    server: TrackingServer, seen: Observed, kind: Literal["killed", "locked"], seconds: float, stop: threading.Event
) -> None:
    if kind == "locked":
        with server.locked():
            seen.enter(kind)
            stop.wait(seconds)
        return
    server.kill()
    seen.enter(kind)
    stop.wait(seconds)
    seen.enter("returning")
    server.start()


def caught_up(url: str, seen: Observed) -> bool:
    """Whether the server has what was logged until just now."""
    position = seen.images
    [tracked] = list_runs(url)
    return MlflowServer(url, str(tracked.mlflow_run_id)).newest_steps().get("loss/total", -1) >= position


def wait_for(done: Callable[[], bool], stop: threading.Event) -> None:
    """Raises TimeoutError."""
    until = time.monotonic() + PATIENCE_S
    while not stop.is_set() and not done():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing of it for {PATIENCE_S:.0f} s")
        stop.wait(POLL_S)


def step_figures(seen: Observed) -> dict[str, Any]:
    """Of a step's median time, in milliseconds, and how it compares with the times in which the server answers."""
    answering = seen.medians("answering")
    if not answering:
        return {"steps": len(seen.steps)}
    usual = statistics.median(answering)
    figures: dict[str, Any] = {
        "steps": len(seen.steps),
        "answering_ms": rounded(answering),
        "noise": round(max(abs(median / usual - 1) for median in answering), 4),
    }
    for phase in ("killed", "locked", "returning"):
        if medians := seen.medians(phase):
            figures[f"{phase}_ms"] = rounded(medians)
            figures[f"{phase}_ratio"] = round(statistics.median(medians) / usual, 4)
    return figures


def rounded(seconds: Sequence[float]) -> list[float]:
    return [round(1000 * value, 2) for value in seconds]


def slower_steps(figures: dict[str, Any]) -> list[str]:
    """Of the outages themselves; what returning costs is told."""
    compared = [phase for phase in ("killed", "locked") if f"{phase}_ratio" in figures]
    if not compared:
        return ["too few steps to compare"]
    most = 1 + max(LEAST_NOISE, figures["noise"])
    return [
        f"steps slower while the server is {phase}: {figures[f'{phase}_ratio']} of the others, noise {figures['noise']}"
        for phase in compared
        if figures[f"{phase}_ratio"] > most
    ]


def wrong_curves(url: str, images: int, seen: Observed) -> list[str]:
    """Each metric must have each position at which the run told its driver a value, once, and no other."""
    [tracked] = list_runs(url)
    wrong = []
    if sorted(seen.logged["loss/total"]) != list(range(BATCH, images + 1, BATCH)):
        wrong.append("the drill did not see each update")
    if not any(key.startswith(SYSTEM) for key in seen.logged):
        wrong.append("no system metrics")
    for key, expected in sorted(seen.logged.items()):
        found = metric_steps(url, str(tracked.mlflow_run_id), key)
        if sorted(found) != sorted(expected):
            lost, twice = len(expected - set(found)), len(found) - len(set(found))
            wrong.append(f"{key}: {len(found)} points for {len(expected)}, {lost} lost, {twice} twice")
    return wrong
