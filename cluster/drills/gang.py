"""A run as a Ray job on a local stack of the drill's own - Ray, MLflow and S3, of which it reaches the last two over
links that can fail - and what is done to it: processes killed or stopped, the same submit again.

Always holds: the stack listens on loopback, on ports that were free, under the scratch folder, and is gone when the
`with` block is left; what the drill looks at, it reaches directly. Called by the drills of killed jobs and of the soak.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

import psutil

from cluster import processes, stack
from cluster.drills import poked_gang
from cluster.drills.kills import damages
from cluster.drills.scoreboard import CannotRun
from cluster.drills.scratch import BATCH, Scratch, consumed_ids, environment
from cluster.drills.servers import free_ports
from cluster.faults import FaultyLink, faulty_link
from cluster.services import BUCKET, FOREIGN, PORTS
from cluster.stopping import stop_run
from data_pipeline.errors import UserError
from data_pipeline.storage import open_store
from trainer.checkpoint.manifest import CheckpointName, committed, newest_committed
from trainer.loop import CONSUMED
from trainer.run import tracking_folder

if TYPE_CHECKING:  # importing it takes Ray
    from cluster.drills.leaving import Job

CPUS = 4
ENDLESS = 10**9
PATIENCE_S = 240.0  # for what has to come, on a busy machine
POLL_S = 0.05
HISTORY_PAGE = 20_000
LOOK_BACK = 500  # steps: more than are made before one is looked for
# Larger than that of other drills: steps that take longer than what a drill does to look at them.
NETWORK = {"image_size": 32, "channels": 64, "channel_mult": (1, 1)}


@dataclass(frozen=True)
class Step:
    """A step whose end was seen, and when (monotonic seconds). `position`: images before it."""

    seen_s: float
    attempt: int
    position: int


class DrillStack:
    """The stack. `s3` and `mlflow` are the links over which jobs reach those servers."""

    def __init__(self, scratch: Scratch, exit_: ExitStack) -> None:
        self.folder, self._tell = stack.stack_folder(), scratch.tell
        self.folder.mkdir(parents=True, mode=0o700)
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        (self.folder / "stack.json").write_text(json.dumps(asdict(stack.Record(ports=ports))))
        self.pokes = scratch.folder / "pokes.json"
        exit_.enter_context(environment(poked_gang.variables(self.pokes)))
        exit_.callback(self._remove_folders)
        exit_.callback(stack.down)
        urls = {row["service"]: row["url"] for row in stack.up(CPUS, lambda done, of, note: None)}
        self.dashboard, self.mlflow_url, self._s3_url = urls["ray"], urls["mlflow"], urls["s3"]
        self.s3: FaultyLink = exit_.enter_context(faulty_link(self._s3_url, scratch.wishes.seed))
        self.mlflow: FaultyLink = exit_.enter_context(faulty_link(self.mlflow_url, scratch.wishes.seed))
        direct = scratch.folder / "aws-direct"
        direct.write_text(self._link_jobs())
        mine = dict.fromkeys(FOREIGN) | stack.environment() | {"AWS_CONFIG_FILE": str(direct)}
        exit_.enter_context(environment({**mine, "MLFLOW_TRACKING_URI": None}))
        exit_.callback(self.kill_ray)  # `down` would wait for a save that nobody wants, over links that are gone

    def _remove_folders(self) -> None:
        """Ray's does not lie in the stack's: its path must be short. Another drill may want a stack as well."""
        folder = json.loads((self.folder / "stack.json").read_text())["ray_folder"]
        if folder:
            shutil.rmtree(Path(folder).parent, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def up(self) -> None:
        """`glidepath up` once more: what died is started. Raises UserError."""
        stack.up(CPUS, lambda done, of, note: None)
        self._link_jobs()

    def _link_jobs(self) -> str:
        """From now on jobs reach S3 over the link; the settings of who does not."""
        file = self.folder / "config"
        direct = file.read_text()
        file.write_text(direct.replace(self._s3_url, self.s3.url))
        return direct

    def kill_ray(self) -> None:
        """Every process of it and of its jobs, at once."""
        for process in self.processes_of_ray():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes_of_ray(self) -> list[psutil.Process]:
        found = []
        for row in processes.members(None, f"{self.folder}/ray"):
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(row.pid))
        return found

    def find(self, name: str) -> list[int]:
        """Pids of Ray's processes whose command begins so, or is a program of that name."""
        found = []
        for process in self.processes_of_ray():
            with suppress(psutil.NoSuchProcess):
                first = next(iter(process.cmdline()), "")
                if first.startswith(name) or first.endswith(f"/{name}"):
                    found.append(process.pid)
        return found


@contextmanager
def drill_stack(scratch: Scratch) -> Iterator[DrillStack]:
    """Raises CannotRun where it cannot be started."""
    scratch.tell("starting a local stack of the drill's own")
    with ExitStack() as exit_:
        try:
            started = DrillStack(scratch, exit_)
        except UserError as error:
            raise CannotRun(str(error)) from None
        yield started


class Gang:
    """A run of two workers that is submitted, and submitted again. Watches its steps on a thread."""

    def __init__(self, scratch: Scratch, stack_: DrillStack, run: str, **changes: Any) -> None:
        """`changes`: top-level settings."""
        self.stack, self._tell = stack_, scratch.tell
        settings: dict[str, Any] = {
            "images": ENDLESS,
            "store": f"s3://{BUCKET}/{run}",
            "launcher": {"kind": "ray", "workers": 2},
            "tracking": {"uri": stack_.mlflow.url, "consumed_ids": True},
        }
        config = scratch.config(run, **(settings | changes))
        self.config = config.model_copy(update={"model": config.model.model_copy(update=NETWORK)})
        self.store = open_store(str(self.config.store))
        self.job: Job | None = None
        self.jobs = 0
        self.steps: list[Step] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def submit(self, images: int = ENDLESS) -> None:
        """The same submit as ever, once the job before has ended, which nothing of the drill brings about. Raises
        UserError as it does."""
        from cluster.drills.leaving import Job

        if self.job is not None:
            self.wait("the end of the job before", self.job.over)
        self.config = self.config.model_copy(update={"images": images})
        self.job = Job(self.config, self.stack.dashboard)
        self.jobs += 1

    def stop(self) -> None:
        """`glidepath stop`, and the end of its job. Raises UserError."""
        stop_run(self.store, self.config.run)
        self.wait("the end of the job", self.ended)

    def finish(self, more_steps: int = 10) -> dict[str, Any]:
        """Stop, and go on to an end so many steps on; what the job tells then. Raises UserError."""
        from cluster.submit import result_of

        self.stop()
        name = self.newest()
        assert name is not None
        self.submit(name.position + more_steps * BATCH)
        self.wait("the end of the run", self.ended)
        assert self.job is not None
        client, job = self.job.client, self.job.id
        return result_of(job, str(client.get_job_status(job)), client.get_job_logs(job))

    def ended(self) -> bool:
        return self.job is not None and self.job.over()

    def kill_driver(self) -> None:
        assert self.job is not None
        os.kill(self.job.pid, signal.SIGKILL)

    def forget_job(self) -> None:
        """It went with its cluster."""
        self.job = None

    @property
    def attempt(self) -> int:
        """The newest one that made a step."""
        return self.steps[-1].attempt if self.steps else 0

    def newest(self) -> CheckpointName | None:
        return newest_committed(self.store)

    def ranks(self) -> list[int]:
        """Processes that train now."""
        return self.stack.find("ray::Worker.train")

    def kill_rank(self, number: int) -> None:
        self.signal_rank(number, signal.SIGKILL)

    def signal_rank(self, number: int, what: signal.Signals) -> None:
        """To one of the processes that train."""
        self.wait("two ranks that train", lambda: len(self.ranks()) == 2)
        os.kill(self.ranks()[number], what)

    def first_step(self, after_attempt: int = 0) -> Step:
        """Of an attempt newer than that one, once it is made. Raises TimeoutError when none comes, or the job ended."""

        def made() -> list[Step]:
            return [step for step in self.steps[-LOOK_BACK:] if step.attempt > after_attempt]

        self.wait(f"a step after attempt {after_attempt}", lambda: bool(made()), self.ended)
        return made()[0]

    def pass_steps(self, count: int) -> None:
        """Until so many more were made. Raises TimeoutError."""
        until = len(self.steps) + count
        self.wait(f"{count} more steps", lambda: len(self.steps) >= until, self.ended)

    def wait(self, what: str, done: Callable[[], bool], over: Callable[[], bool] = lambda: False) -> None:
        """Polled, since other processes cannot tell. Raises TimeoutError."""
        until, looked_s = time.monotonic() + PATIENCE_S, 0.0
        while not done():
            now_s = time.monotonic()
            if now_s - looked_s > 2.0:  # asks a server
                looked_s = now_s
                if over() and not done():
                    raise TimeoutError(f"{what}: the job ended before: {self.last_words()}")
            if now_s > until:
                raise TimeoutError(f"{what}: not in {PATIENCE_S:.0f} s: {self.last_words()}")
            time.sleep(POLL_S)

    def last_words(self) -> str:
        if self.job is None:
            return "no job"
        try:
            return " / ".join(self.job.client.get_job_logs(self.job.id).splitlines()[-3:])
        except (RuntimeError, OSError) as error:
            return f"no log: {error}"

    def resumed_wrongly(self, attempt: int) -> str | None:
        """Whether the first step of that attempt was where the newest checkpoint before it ends."""
        names = [name for name in committed(self.store) if name.attempt < attempt]
        expected = names[0].position if names else 0
        began = next(step.position for step in self.steps if step.attempt == attempt)
        return None if began == expected else f"attempt {attempt} began at {began} images, the newest were {expected}"

    def _watch(self) -> None:
        path, offset = tracking_folder(self.config) / CONSUMED, 0
        while not self._over.wait(POLL_S):
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                *whole, _ = file.read().split(b"\n")
            offset += sum(len(line) + 1 for line in whole)
            now_s = time.monotonic()
            for line in whole:
                with suppress(ValueError):  # of a killed process
                    found = json.loads(line)
                    self.steps.append(Step(now_s, found["attempt"], found["position"]))


def reference_ids(scratch: Scratch, run: str, images: int) -> dict[int, list[int]]:
    """position -> ids, of a run of the same data, seed and batch that nobody interrupts, on one worker of this machine:
    a smaller model, since ids follow from the order alone."""
    scratch.tell(f"training {images} images without interruption")
    whole = scratch.config(f"{run}-whole", images=images, checkpoint={"every_images": ENDLESS})
    scratch.train(whole)
    return consumed_ids(whole)


def wrong_ids(gang: Gang, reference: dict[int, list[int]]) -> Iterator[str]:
    """Every time a position was passed, with the ids of the uninterrupted run."""
    for line in (tracking_folder(gang.config) / CONSUMED).read_text().splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if found["ids"] != reference.get(found["position"]):
                yield f"attempt {found['attempt']} consumed other samples at {found['position']} images"
    missing = set(reference) - {step.position for step in gang.steps}
    if missing:
        yield f"{len(missing)} positions were never passed, the first {min(missing)}"


def wrong_tracking(gang: Gang, images: int) -> Iterator[str]:
    """One MLflow run, each update once."""
    from trainer.tracking.mlflow import list_runs

    runs = [found for found in list_runs(gang.stack.mlflow_url) if found.run == gang.config.run]
    if len(runs) != 1 or runs[0].mlflow_run_id is None:
        yield f"{len(runs)} MLflow runs"
        return
    for key in ("loss/total", "time/step_s"):
        found = metric_steps(gang.stack.mlflow_url, runs[0].mlflow_run_id, key)
        expected = list(range(BATCH, images + 1, BATCH))
        if sorted(found) != expected:
            lost, twice = len(set(expected) - set(found)), len(found) - len(set(found))
            yield f"{key}: {len(found)} points for {len(expected)} updates, {lost} lost, {twice} twice"


def metric_steps(url: str, run_id: str, key: str) -> list[int]:
    """Of every stored point."""
    found: list[int] = []
    token = ""
    while True:
        query = {"run_id": run_id, "metric_key": key, "max_results": HISTORY_PAGE, "page_token": token}
        query = {name: value for name, value in query.items() if value}
        with urlopen(f"{url}/api/2.0/mlflow/metrics/get-history?{urlencode(query)}", timeout=60) as answer:
            page = json.load(answer)
        found += [int(point["step"]) for point in page.get("metrics", ())]
        token = page.get("next_page_token", "")
        if not token:
            return found


def broken_promises(gang: Gang, reference: dict[int, list[int]], images: int) -> list[str]:
    """Of a run that came to its end."""
    return [*wrong_ids(gang, reference), *wrong_tracking(gang, images), *damages(gang.config)]


@dataclass(frozen=True)
class Usage:
    """How the time from the first step to the last was used. `step_s`: a step's mean."""

    wall_s: float
    counted_s: float
    step_s: float
    steps: int
    wasted_steps: int  # made again, or undone

    @property
    def goodput(self) -> float:
        return self.counted_s / self.wall_s


def usage(steps: list[Step], undone: Set[int] = frozenset()) -> Usage:
    """`undone`: positions of steps that were made and did not last. A step takes from the end of the one before; the
    first of an attempt, of which that is not known, as long as the mean. Of a position that was passed several times,
    the last one counts."""
    last = {step.position: step for step in steps}
    seconds = {
        after: after.seen_s - before.seen_s for before, after in pairwise(steps) if before.attempt == after.attempt
    }
    step_s = statistics.fmean(seconds.values())
    kept = [step for step in last.values() if step.position not in undone]
    counted_s = sum(seconds.get(step, step_s) for step in kept)
    wall_s = steps[-1].seen_s - steps[0].seen_s + step_s
    return Usage(wall_s, counted_s, step_s, len(steps), len(steps) - len(kept))


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
