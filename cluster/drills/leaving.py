"""R7: a run is told to leave, in every way there is and at random moments: it saves at the step where it is, ends well
and soon, and the same command goes on exactly there.

One run serves all ways but the drain, here and on a small Ray cluster by turns; in the end no bit of it differs from
that of a run which nobody stopped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import yaml

from cluster.drills.kills import damages, digests, newest, remembered
from cluster.drills.scoreboard import CannotRun, Score
from cluster.drills.scratch import BATCH, Scratch, consumed_ids, resumes, tracking_of
from cluster.job import RESULT
from cluster.signals import AGAIN_AFTER_S
from cluster.stopping import stop_run
from data_pipeline.errors import UserError
from data_pipeline.storage import open_store
from trainer.checkpoint.attempts import newest_attempt
from trainer.checkpoint.manifest import CheckpointName
from trainer.config import TrainConfig
from trainer.loop import CONSUMED
from trainer.stop import read_end
from trainer.tracking.jsonl import read_lines

if TYPE_CHECKING:  # importing it takes Ray, which the ways without a cluster do not
    from cluster.drills.raylets import Raylets

CASES = 12
GRACE_S = 30.0  # Kubernetes' default, and what one spot market gives
START_S = 5.0  # roughly what workers take to their first step
STEPS, STEP_S = 6, 0.3  # a moment is so many steps after the start at most, and so much later
PATIENCE_S = 300.0  # for what has to come before, on a busy machine
POLL_S = 0.05
ENDLESS = 10**6
DRAINED = "a node of two is drained"


@dataclass
class Ended:
    """How a driver ended. `code` None: a job, of which Ray tells no exit code."""

    code: int | None
    document: dict[str, Any]
    seconds: float  # since it was told


class Driver:
    """`glidepath train` in a session of its own, as from a terminal."""

    def __init__(self, config: TrainConfig, folder: Path, variables: Mapping[str, str]) -> None:
        """`variables`: how it finds its cluster."""
        path = folder / f"{config.run}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self._log = (folder / f"{config.run}.log").open("a")
        command = [sys.executable, "-m", "cluster.cli", "train", str(path), "--json"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
            env={**os.environ, **variables},
        )  # fmt: skip
        self.pid = self._process.pid

    def over(self) -> bool:
        return self._process.poll() is not None

    def listens(self) -> bool:
        """Whether it heeds SIGTERM by now."""
        caught = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if "SigCgt" in line)
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def wait(self, began_s: float) -> Ended:
        stdout, _ = self._process.communicate(timeout=PATIENCE_S)
        return Ended(self._process.returncode, json.loads(stdout or "{}"), time.monotonic() - began_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Job:
    """The same as a Ray job."""

    def __init__(self, config: TrainConfig, address: str) -> None:
        from cluster.submit import Cluster
        from cluster.work import training_work

        cluster = Cluster(address)
        self.client, self.id = cluster.client, cluster.submit(training_work(config))

    @property
    def pid(self) -> int:
        info = self.client.get_job_info(self.id).driver_info
        assert info is not None
        return int(info.pid)

    def over(self) -> bool:
        return bool(self.client.get_job_status(self.id).is_terminal())

    def listens(self) -> bool:
        return self.client.get_job_info(self.id).driver_info is not None

    def wait(self, began_s: float) -> Ended:
        wait_for(self.over)
        seconds = time.monotonic() - began_s
        said = [line for line in self.client.get_job_logs(self.id).splitlines() if line.startswith(RESULT)]
        return Ended(None, json.loads(said[-1].removeprefix(RESULT)) if said else {}, seconds)

    def kill(self) -> None:
        if not self.over():
            self.client.stop_job(self.id)


@dataclass
class Leaver:
    """A run that is to leave: its driver, and the attempt that it takes."""

    config: TrainConfig
    driver: Driver | Job
    attempt: int
    told_s: float = 0.0

    def steps(self) -> list[int]:
        """Images consumed before each step that the attempt began."""
        path = tracking_of(self.config) / CONSUMED
        lines = read_lines(path) if path.exists() else []
        return [line["position"] for line in lines if line["attempt"] >= self.attempt]

    def workers(self) -> list[int]:
        return [
            child.pid for child in psutil.Process(self.driver.pid).children() if "cluster.worker" in child.cmdline()
        ]

    def sigterm(self) -> None:
        os.kill(self.driver.pid, signal.SIGTERM)

    def ctrl_c(self) -> None:
        os.killpg(self.driver.pid, signal.SIGINT)

    def sigterm_to_all(self) -> None:
        """As what ends a service, or a step of a batch job."""
        leader = psutil.Process(self.driver.pid)
        for process in (leader, *leader.children(recursive=True)):
            process.send_signal(signal.SIGTERM)

    def stop_command(self) -> None:
        assert self.config.store is not None
        stop_run(open_store(self.config.store), self.config.run)

    def stop_job(self) -> None:
        assert isinstance(self.driver, Job)
        self.driver.client.stop_job(self.driver.id)

    def sigterm_twice(self) -> None:
        """The first is of no use: a worker hangs, and the save never comes."""
        os.kill(self.workers()[1], signal.SIGSTOP)
        self.sigterm()
        time.sleep(AGAIN_AFTER_S + 0.1)
        self.told_s = time.monotonic()
        self.sigterm()


@dataclass(frozen=True)
class Way:
    name: str
    launch: Literal["local", "driver", "job"]
    tell: Callable[[Leaver], None]
    during_start: bool = False
    well: bool = True


WAYS = (
    Way("SIGTERM", "local", Leaver.sigterm),
    Way("a second signal, while a worker hangs", "local", Leaver.sigterm_twice, well=False),
    Way("Ctrl-C", "local", Leaver.ctrl_c),
    Way("SIGTERM to every process", "local", Leaver.sigterm_to_all),
    Way("SIGTERM during the start", "local", Leaver.sigterm, during_start=True),
    Way("glidepath stop", "local", Leaver.stop_command),
    Way("ray job stop", "job", Leaver.stop_job),
    Way("SIGTERM to a job's driver", "job", Leaver.sigterm),
    Way("glidepath stop of a job", "job", Leaver.stop_command),
    Way("ray job stop during the start", "job", Leaver.stop_job, during_start=True),
    Way("Ctrl-C to a driver of a cluster", "driver", Leaver.ctrl_c),
)


@dataclass
class Campaign:
    scratch: Scratch
    chance: random.Random
    stack: ExitStack
    config: TrainConfig
    cases: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    repeats: bool = False  # a run that ended at once passes some positions again
    nodes: Raylets | None = None  # of the cluster, once there is one

    def start(self, config: TrainConfig, launch: str, nodes: Raylets | None = None) -> Leaver:
        """`nodes`: of the cluster; by default one of the campaign's own, where a cluster is wanted."""
        attempt = newest_attempt(open_store(str(config.store))) + 1
        kind = "local" if launch == "local" else "ray"
        launcher = config.launcher.model_copy(update={"kind": kind})
        config = config.model_copy(update={"launcher": launcher})
        driver: Driver | Job
        if launch == "local":
            driver = Driver(config, self.scratch.folder, {})
        elif launch == "driver":
            driver = Driver(config, self.scratch.folder, (nodes or self.cluster()).environment)
        else:
            driver = Job(config, str(self.cluster().dashboard))
        self.stack.callback(driver.kill)
        return Leaver(config, driver, attempt)

    def cluster(self) -> Raylets:
        """Raises CannotRun."""
        if self.nodes is None:
            from cluster.drills.raylets import raylets

            self.scratch.tell("starting a Ray cluster of one node")
            self.nodes = self.stack.enter_context(raylets(2, dashboard=True))
        return self.nodes


def run(scratch: Scratch) -> Score:
    """R7."""
    with ExitStack() as stack:
        config = scratch.long_config("leaving").model_copy(update={"images": ENDLESS})
        campaign = Campaign(scratch, random.Random(scratch.wishes.seed), stack, config)
        for number in range(CASES if scratch.wishes.faults is None else scratch.wishes.faults):
            way = WAYS[number % CASES] if number % CASES < len(WAYS) else None
            name = way.name if way else DRAINED
            try:
                if way is None:
                    drain(campaign)
                elif not (way.launch != "local" and "Ray" in campaign.left_out):
                    leave(campaign, way)
            except CannotRun as reason:
                campaign.left_out["Ray"] = str(reason)
            except (UserError, TimeoutError, subprocess.TimeoutExpired) as error:
                campaign.failures.append(f"{name}: {error}")
            scratch.tell(f"{number + 1}: {name}: {campaign.cases[-1:]}")
        if newest(config) is not None:
            compare(campaign)
    longest_s = max((case["seconds"] for case in campaign.cases), default=0.0)
    figures: dict[str, Any] = {"longest_s": longest_s, "grace_s": GRACE_S, "cases": campaign.cases}
    if campaign.left_out:
        figures["left_out"] = campaign.left_out
    return Score(len(campaign.cases), figures, campaign.failures)


def leave(campaign: Campaign, way: Way) -> None:
    """Start, wait for the moment, tell; then look at everything."""
    config, before = campaign.config, newest(campaign.config)
    leaver = campaign.start(config, way.launch)
    await_moment(campaign.chance, leaver, way.during_start)
    leaver.told_s = time.monotonic()
    way.tell(leaver)
    ended = leaver.driver.wait(leaver.told_s)
    case = {"way": way.name, "steps": len(leaver.steps()), "seconds": round(ended.seconds, 2), "exit_code": ended.code}
    campaign.cases.append(case)
    wrong = [*resumed_wrongly(leaver, before), *damages(config)]
    wrong += left_badly(leaver, ended, before) if way.well else ended_late(ended)
    campaign.repeats = campaign.repeats or not way.well
    campaign.failures += [f"{way.name}, attempt {leaver.attempt}: {fault}" for fault in wrong]


def await_moment(chance: random.Random, leaver: Leaver, during_start: bool) -> None:
    steps, delay_s = chance.randrange(1, STEPS), chance.uniform(0, START_S if during_start else STEP_S)
    wait_for(lambda: leaver.driver.listens() if during_start else len(leaver.steps()) >= steps, leaver.driver.over)
    time.sleep(delay_s)


def left_badly(leaver: Leaver, ended: Ended, before: CheckpointName | None) -> Iterator[str]:
    """What is wrong with an end that should have been good."""
    said, now, steps = ended.document, newest(leaver.config), leaver.steps()
    if ended.code not in (None, 0) or "error" in said or not said.get("stopped"):
        yield f"exit code {ended.code}, {said.get('error') or said.get('stopped')}"
    if ended.seconds > GRACE_S:
        yield f"it took {ended.seconds:.1f} s to end"
    position = steps[-1] + BATCH if steps else before.position if before else 0
    if (now.position if now else 0) != position or said.get("images") != position:
        yield f"the last step ended at {position} images, the newest checkpoint is {now}, told was {said.get('images')}"
    newest_end = read_end(open_store(str(leaver.config.store)), newest_attempt(open_store(str(leaver.config.store))))
    if steps and (newest_end is None or newest_end.outcome != "stopped"):
        yield f"recorded as {newest_end.outcome if newest_end else 'under way'}"


def ended_late(ended: Ended) -> Iterator[str]:
    """What is wrong with an end that should have come at once."""
    if ended.code != 1 or "interrupted" not in ended.document.get("error", ""):
        yield f"exit code {ended.code}, {ended.document}"
    if ended.seconds > GRACE_S / 3:
        yield f"it took {ended.seconds:.1f} s to end"


def resumed_wrongly(leaver: Leaver, before: CheckpointName | None) -> Iterator[str]:
    """Whether the attempt went on from the checkpoint that the one before it left."""
    steps = leaver.steps()
    texts = [line["text"] for line in resumes(leaver.config) if line["attempt"] == leaver.attempt]
    if before and (texts or steps) and not (texts and texts[0].startswith(f"from {before},")):
        yield f"it went on {texts}; the newest was {before}"
    if steps and steps[0] != (before.position if before else 0):
        yield f"its first step began at {steps[0]} images; the newest was {before}"


def drain(campaign: Campaign) -> None:
    """The run saves where it is, goes on with one worker fewer, and is stopped there."""
    from cluster.drills.raylets import raylets

    scratch = campaign.scratch
    settings = {"workers": 2, "min_workers": 1, "kind": "ray"}
    config = scratch.config("drained", images=ENDLESS, launcher=settings, checkpoint={"every_images": ENDLESS})
    store = open_store(str(config.store))
    with raylets(1, 1) as nodes:
        leaver = campaign.start(config, "driver", nodes)
        await_moment(campaign.chance, leaver, during_start=False)
        began_s = time.monotonic()
        nodes.drain(nodes.nodes[1], within_s=GRACE_S)
        wait_for(lambda: read_end(store, 1) is not None, leaver.driver.over)
        end, seconds = read_end(store, 1), time.monotonic() - began_s
        assert end is not None
        wait_for(lambda: leaver.steps()[-1] > (end.images or 0), leaver.driver.over)
        gone_on_s = time.monotonic() - began_s
        leaver.told_s = time.monotonic()
        leaver.sigterm()
        ended = leaver.driver.wait(leaver.told_s)
    case = {"way": DRAINED, "steps": len(leaver.steps()), "seconds": round(seconds, 2), "exit_code": ended.code}
    campaign.cases.append(case | {"gone_on_after_s": round(gone_on_s, 2)})
    wrong = [*left_badly(leaver, ended, None), *damages(config)]
    if end.outcome != "resized" or end.position != end.images:
        wrong.append(f"recorded as {end.outcome} with {end.position} of {end.images} images saved")
    if seconds > GRACE_S:
        wrong.append(f"it took {seconds:.1f} s to save and end")
    if leaver.steps() != list(range(0, leaver.steps()[-1] + 1, BATCH)):
        wrong.append("some samples were repeated or left out")
    campaign.failures += [f"{DRAINED}: {fault}" for fault in wrong]


def compare(campaign: Campaign) -> None:
    """The run that left so often, taken to an end, with one that never did."""
    scratch, stopped = campaign.scratch, newest(campaign.config)
    images = (stopped.position if stopped else 0) + 2 * BATCH
    again = campaign.config.model_copy(update={"images": images})
    whole = scratch.long_config("never-left").model_copy(update={"images": images})
    for config in (again, whole):
        scratch.tell(f"training {config.run} to {images} images")
        scratch.train(config)
    if digests(again) != digests(whole) or remembered(again) != remembered(whole):
        campaign.failures.append(f"{again.run}: weights, moments, EMA or state differ from those of {whole.run}")
    if consumed_ids(again) != consumed_ids(whole):
        campaign.failures.append(f"{again.run}: consumed other samples than {whole.run}")
    lines = read_lines(tracking_of(again) / CONSUMED)
    if not campaign.repeats and len(lines) != images // BATCH:
        campaign.failures.append(f"{again.run}: made {len(lines)} steps for {images // BATCH}")


def wait_for(done: Callable[[], bool], over: Callable[[], bool] = lambda: False) -> None:
    """Polled, since other processes cannot tell. Raises TimeoutError."""
    until = time.monotonic() + PATIENCE_S
    while not done():
        if over() or time.monotonic() > until:
            raise TimeoutError("it ended, or took too long, before the moment came")
        time.sleep(POLL_S)
