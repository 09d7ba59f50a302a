"""R8: a rank hangs, in each of the ways that ranks hang, or is three times as slow: it is named, and nobody else is.

A hang is a stopped process (SIGSTOP), one that sleeps in a section, or one whose call keeps all of Python's threads; a
slow rank is one that is stopped two thirds of the time. Each hang ends its attempt, and the run goes on with the next.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.drills.hanging_worker import How, Trap
from cluster.drills.scoreboard import Score
from cluster.drills.scratch import Scratch, environment, resumes
from cluster.launch import Event, WorkerDied
from cluster.local_launch import LocalLauncher
from cluster.watching import Hung
from trainer.config import TrainConfig
from trainer.run import prepare_run

HANGS: tuple[tuple[How | None, str], ...] = (
    (None, "silent"),  # SIGSTOP
    ("sleep", "data"),
    ("sleep", "forward"),
    ("lock", "silent"),  # in forward
    ("sleep", "save"),
)
ROUNDS, SLOW_RANKS = 2, 4  # in full
LIMIT_S = 10.0  # of each section and of silence
WORKERS = 2
STOPPED_S, RUNNING_S = 0.2, 0.1  # of a slow rank, in turn
CLEAN_S = 60.0
SLOW_PATIENCE_S = 60.0
FACTOR, WINDOW_S, WINDOWS = 2.0, 3.0, 2


@dataclass
class Campaign:
    """What happened. `detected_s`: from the hang to the end of its attempt, in which all workers were gone."""

    named: int = 0
    detected_s: list[float] = field(default_factory=list)
    slow_named: int = 0
    factors: list[float] = field(default_factory=list)
    slow_detected_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(scratch: Scratch) -> Score:
    wishes, campaign = scratch.wishes, Campaign()
    chance = random.Random(wishes.seed)
    hangs = list(HANGS) * ROUNDS if wishes.faults is None else [HANGS[n % len(HANGS)] for n in range(wishes.faults)]
    slow = SLOW_RANKS if wishes.faults is None else max(1, wishes.faults // 3)
    clean_s = CLEAN_S if wishes.faults is None else CLEAN_S / 6
    config = watched_config(scratch)
    for number, (how, section) in enumerate(hangs):
        hang(scratch, campaign, config, how, section, chance.randrange(WORKERS), number)
    for number in range(slow):
        slow_down(scratch, campaign, config, chance.randrange(WORKERS), number)
    alarms = false_alarms(scratch, config, clean_s)
    campaign.failures += [f"alarm without a cause: {alarm}" for alarm in alarms]
    went_on = len(resumes(config))
    if went_on < len(hangs):  # of more attempts than that
        campaign.failures.append(f"only {went_on} attempts went on from a checkpoint")
    figures = {
        "hangs": len(hangs),
        "hung_rank_named": campaign.named,
        "deadline_s": LIMIT_S,
        "ended_after_s": [round(seconds, 1) for seconds in campaign.detected_s],
        "went_on_from_a_checkpoint": went_on,
        "slow_ranks": slow,
        "slow_rank_named": campaign.slow_named,
        "slow_after_s": [round(seconds, 1) for seconds in campaign.slow_detected_s],
        "slow_factors": campaign.factors,
        "clean_s": clean_s,
        "false_alarms": len(alarms),
    }
    return Score(len(hangs) + slow, figures, campaign.failures)


def watched_config(scratch: Scratch) -> TrainConfig:
    """A run that ends only by what is done to it."""
    sections = dict.fromkeys(("data_s", "forward_s", "backward_s", "update_s", "save_s", "silent_s"), LIMIT_S)
    watch = sections | {"straggler_factor": FACTOR, "straggler_window_s": WINDOW_S, "straggler_windows": WINDOWS}
    return scratch.config("watched", images=10**9, launcher={"workers": WORKERS}, watch=watch)


def attempt(config: TrainConfig, worker: str, on_event: Callable[[Event], None]) -> WorkerDied:
    """One attempt; how it ended."""
    spec = {"values": config.model_dump(mode="json"), "attempt": prepare_run(config), "mlflow_run_id": None}
    try:
        LocalLauncher(worker).launch(spec, WORKERS, on_event)
    except WorkerDied as death:
        return death
    raise AssertionError(f"{config.run} came to its end")


def hang(
    scratch: Scratch, campaign: Campaign, config: TrainConfig, how: How | None, section: str, rank: int, number: int
) -> None:
    note, pids = scratch.folder / f"hang-{number}", list[int]()
    where = "forward" if how == "lock" else section
    name = f"hang {number}: rank {rank}, {'SIGSTOP' if how is None else f'{how} in {where}'}"

    def stop_process(event: Event) -> None:
        if event["event"] == "started":
            pids.extend(event["pids"])
        if how is None and event["event"] == "progress" and not note.exists() and resumed(event):
            note.write_text(str(time.time()))
            os.kill(pids[rank], signal.SIGSTOP)

    first: list[int] = []

    def resumed(event: Event) -> bool:
        """Whether this is at least the third step of the attempt."""
        first.append(event["images"])
        return len(first) >= 3

    trap = Trap(rank, where, 2, how, str(note)).variable() if how else {}
    with environment(trap):
        death = attempt(config, "cluster.drills.hanging_worker", stop_process)
    took_s = time.time() - float(note.read_text()) if note.exists() else float("nan")
    scratch.tell(f"{name}: {death}")
    right = isinstance(death, Hung) and (death.rank, death.section) == (rank, section)
    campaign.named += right
    if not right:
        campaign.failures.append(f"{name}: told as {death}")
    campaign.detected_s.append(took_s)
    if not took_s <= 2 * LIMIT_S:
        campaign.failures.append(f"{name}: its attempt ended after {took_s:.1f} s; two deadlines are {2 * LIMIT_S} s")
    if left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        campaign.failures.append(f"{name}: processes {left} are left")


class Ended(Exception):
    """Enough was seen of an attempt."""


def slow_down(scratch: Scratch, campaign: Campaign, config: TrainConfig, rank: int, number: int) -> None:
    found, begun_s, brake = list[Event](), 0.0, None

    def watch(event: Event) -> None:
        nonlocal begun_s, brake
        if event["event"] == "started":
            brake = Brake(event["pids"][rank])
        elif event["event"] == "progress" and brake and not begun_s:
            begun_s = time.monotonic()
            brake.thread.start()
        if event["event"] == "straggler":
            found.append(event)  # and perhaps another at once
        elif found or (begun_s and time.monotonic() - begun_s > SLOW_PATIENCE_S):
            raise Ended

    try:
        death = attempt(config, "cluster.worker", watch)
        campaign.failures.append(f"slow rank {number}: {death}")
    except Ended:
        campaign.slow_detected_s.append(time.monotonic() - begun_s)
    finally:
        if brake:
            brake.over.set()
    named = [event["rank"] for event in found]
    scratch.tell(f"slow rank {number}: rank {rank}, named {named} after {time.monotonic() - begun_s:.1f} s")
    campaign.slow_named += named == [rank]
    campaign.factors += [event["factor"] for event in found]
    if named != [rank]:
        campaign.failures.append(f"slow rank {number}: it was rank {rank}, named {named or 'nobody'}")


class Brake:
    """Stops a process two thirds of the time, until `over`."""

    def __init__(self, pid: int) -> None:
        self._pid, self.over = pid, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with suppress(ProcessLookupError):
            while not self.over.is_set():
                os.kill(self._pid, signal.SIGSTOP)
                self.over.wait(STOPPED_S)
                os.kill(self._pid, signal.SIGCONT)
                self.over.wait(RUNNING_S)


def false_alarms(scratch: Scratch, config: TrainConfig, seconds: float) -> list[Any]:
    """What is told of a run to which nothing is done, for so long after its first step."""
    alarms, begun_s = list[Any](), 0.0

    def watch(event: Event) -> None:
        nonlocal begun_s
        if event["event"] in ("hung", "straggler"):
            alarms.append(event)
        if event["event"] == "progress":
            begun_s = begun_s or time.monotonic()
            if time.monotonic() - begun_s > seconds:
                raise Ended

    with suppress(Ended):
        alarms.append(str(attempt(config, "cluster.worker", watch)))
    scratch.tell(f"{seconds:.0f} s with nothing done to it: {len(alarms)} alarms")
    return alarms
