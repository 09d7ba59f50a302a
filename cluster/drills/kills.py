"""R1 and R2: SIGKILL random workers at random moments: each start that trains goes on from the newest committed
checkpoint, and in the end no bit differs from a run that nobody killed.

One campaign serves both drills. A run that ends before it was killed is followed by another, until so many kills hit.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from cluster.drills.scoreboard import Score
from cluster.drills.scratch import Scratch, consumed_ids, losses, newest_manifest, resumes
from cluster.launch import Event, WorkerDied
from data_pipeline.storage import open_store
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import CheckpointName, newest_committed, part_key
from trainer.config import TrainConfig

KILLS = 20
DURING_START = 0.2  # of the kills
START_S = 5.0  # roughly what workers take to their first step
STEPS = 6  # a kill comes within so many steps of the start
STEP_S = 0.3


@dataclass
class Campaign:
    """What happened. `expected`: (run, attempt) -> the newest checkpoint when that attempt started; `trained`: those
    that made a step or came to their end."""

    kills: int = 0
    runs: list[TrainConfig] = field(default_factory=list)  # those that came to their end
    expected: dict[tuple[str, int], CheckpointName | None] = field(default_factory=dict)
    trained: set[tuple[str, int]] = field(default_factory=set)
    resumed: list[tuple[str, int, str]] = field(default_factory=list)  # run, attempt, what its log says
    failures: list[str] = field(default_factory=list)


def resume_drill(scratch: Scratch) -> Score:
    """R1."""
    campaign = kill_workers(scratch)
    wrong = []
    for run, attempt, text in campaign.resumed:
        newest = campaign.expected[run, attempt]
        if not text.startswith(f"from {newest},"):
            wrong.append(f"{run}, attempt {attempt}: {text}; the newest was {newest}")
    starts = {start: newest for start, newest in campaign.expected.items() if newest is not None}
    told = {(run, attempt) for run, attempt, _ in campaign.resumed}
    silent = [start for start in starts if start in campaign.trained and start not in told]
    lost = [f"{run}, attempt {number}: trained without going on from {starts[run, number]}" for run, number in silent]
    figures = {
        "kills": campaign.kills,
        "starts_with_a_checkpoint": len(starts),
        "killed_before_they_had_read_it": len(starts) - len(told) - len(silent),
        "resumed_from_the_newest": len(told) - len(wrong),
    }
    return Score(campaign.kills, figures, [*campaign.failures, *wrong, *lost])


def equality_drill(scratch: Scratch) -> Score:
    """R2."""
    campaign, whole = kill_workers(scratch), scratch.whole
    failures = list(campaign.failures)
    parts, ids, curve = digests(whole), consumed_ids(whole), losses(whole)
    for run in campaign.runs:
        if digests(run) != parts:
            failures.append(f"{run.run}: weights, EMA or optimiser differ from those of {whole.run}")
        if remembered(run) != remembered(whole):
            failures.append(f"{run.run}: guard, timesteps, counts or order differ from those of {whole.run}")
        if consumed_ids(run) != ids:
            failures.append(f"{run.run}: consumed other samples than {whole.run}")
        if losses(run) != curve:
            failures.append(f"{run.run}: its losses differ from those of {whole.run}")
    positions = [line["images"] for run in campaign.runs for line in resumes(run)]
    if not any(positions):
        failures.append("no run went on from a position above 0")
    figures = {
        "kills": campaign.kills,
        "runs_compared": len(campaign.runs),
        "resumed_at": positions,
        "batches_listed": len(ids),
        "sha256_of_the_parts": parts,
    }
    return Score(campaign.kills, figures, failures)


@cache
def kill_workers(scratch: Scratch) -> Campaign:
    campaign, chance = Campaign(), random.Random(scratch.wishes.seed)
    kills = KILLS if scratch.wishes.faults is None else scratch.wishes.faults
    while campaign.kills < kills:
        config = scratch.long_config(f"killed-{len(campaign.runs)}")
        attempt = 0
        ended = False
        while not ended:
            attempt += 1
            campaign.expected[config.run, attempt] = newest(config)
            murder = Murder(chance) if campaign.kills < kills else None
            try:
                scratch.train(config, partial(watch, campaign, (config.run, attempt), murder))
                campaign.trained.add((config.run, attempt))
                ended = True
            except WorkerDied as death:
                if murder is None or not murder.done:
                    # Kept with the campaign: the other drill would begin it again over these stores.
                    campaign.failures.append(f"{config.run}, attempt {attempt}: died, killed by nobody: {death}")
                    return campaign
                campaign.kills += 1
                scratch.tell(f"kill {campaign.kills} of {kills}: {config.run}, attempt {attempt}: {death.name}")
                campaign.failures += [f"after kill {campaign.kills}: {bad}" for bad in damages(config)]
            finally:
                if murder:
                    murder.give_up()
                mine = (line["text"] for line in resumes(config) if line["attempt"] == attempt)
                campaign.resumed += [(config.run, attempt, text) for text in mine]
        campaign.runs.append(config)
    return campaign


def watch(campaign: Campaign, start: tuple[str, int], murder: Murder | None, event: Event) -> None:
    if event["event"] == "progress":
        campaign.trained.add(start)
    if murder:
        murder(event)


class Murder:
    """An `on_event` that ends one worker, chosen with the moment by `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self._victim = chance.randrange(2)
        starting = chance.random() < DURING_START
        self._steps = 0 if starting else chance.randrange(1, STEPS)
        self._delay_s = chance.uniform(0, START_S if starting else STEP_S)
        self._timer: threading.Timer | None = None
        self._pid = 0
        self.done = False

    def __call__(self, event: Event) -> None:
        if event["event"] == "started":
            self._pid = event["pids"][self._victim]
        elif event["event"] == "progress":
            self._steps -= 1
        if self._timer is None and self._steps <= 0:
            self._timer = threading.Timer(self._delay_s, self._kill)
            self._timer.start()

    def give_up(self) -> None:
        """From now on it kills nobody."""
        if self._timer:
            self._timer.cancel()
            self._timer.join()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # it came to its end first
            os.kill(self._pid, signal.SIGKILL)
            self.done = True


def newest(config: TrainConfig) -> CheckpointName | None:
    assert config.store is not None
    return newest_committed(open_store(config.store))


def damages(config: TrainConfig) -> list[str]:
    assert config.store is not None
    return [f"{bad['part']}: found {bad['found']}" for bad in verify_checkpoints(config.store)]


def remembered(config: TrainConfig) -> dict[str, Any]:
    """What the newest checkpoint holds besides its parts."""
    state = {"guard", "recipe_state", "optimizer_steps", "loss_scale", "order"}
    return newest_manifest(config)[1].model_dump(include=state)


def digests(config: TrainConfig) -> list[str]:
    """sha256 of each stored part of the newest checkpoint: equal digests, equal masters, moments and EMA."""
    assert config.store is not None
    store = open_store(config.store)
    name, manifest = newest_manifest(config)
    return [hashlib.sha256(store.get(part_key(name, part))).hexdigest() for part in manifest.parts]
