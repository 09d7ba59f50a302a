"""R1 on a cluster: one submitted job whose workers are killed twenty times goes on by itself, each time from the newest
committed checkpoint, and loses no more time than that takes.

Goodput is the time of the steps that counted, of the time from the first step to the last. Its bound: each failure
costs its recovery and, on average, half of the interval between two checkpoints.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from cluster.drills import kills
from cluster.drills.gang import Gang, drill_stack, quantile, reference_ids, usage, wrong_ids, wrong_tracking
from cluster.drills.scoreboard import CannotRun, Score
from cluster.drills.scratch import BATCH, Scratch

KILLS = 20
BETWEEN_S = (10.0, 60.0)  # from a step of the new attempt to the next kill
SAVE_STEPS = 30  # longer than a save takes to be stored, or it would be put off
OF_BOUND = 0.9


def run(scratch: Scratch) -> Score:
    """R1: single starts, then the job. Where no stack can be started, the first only, and that is said."""
    alone = kills.resume_drill(scratch)
    try:
        together = on_cluster(scratch)
    except CannotRun as reason:
        return Score(alone.faults, alone.figures | {"left_out": {"cluster": str(reason)}}, alone.failures)
    figures = alone.figures | {"on_a_cluster": together.figures}
    return Score(alone.faults + together.faults, figures, [*alone.failures, *together.failures])


def on_cluster(scratch: Scratch) -> Score:
    wanted = KILLS if scratch.wishes.faults is None else scratch.wishes.faults
    chance = random.Random(scratch.wishes.seed)
    checkpoint = {"every_images": SAVE_STEPS * BATCH, "keep_newest": 3}
    recoveries: list[float] = []
    failures: list[str] = []
    wrong: list[str] = []  # resumes
    with drill_stack(scratch) as stack, Gang(scratch, stack, "killed-job", checkpoint=checkpoint) as gang:
        gang.submit()
        gang.first_step()
        for number in range(wanted):
            time.sleep(chance.uniform(*BETWEEN_S))
            attempt, rank, killed_s = gang.attempt, chance.randrange(2), time.monotonic()
            gang.kill_rank(rank)
            first = gang.first_step(after_attempt=attempt)
            recoveries.append(first.seen_s - killed_s)
            wrong += filter(None, [gang.resumed_wrongly(first.attempt)])
            scratch.tell(f"kill {number + 1} of {wanted}: on after {recoveries[-1]:.1f} s")
        gang.pass_steps(2 * SAVE_STEPS)
        jobs = gang.jobs
        gang.stop()
        last = gang.newest()
        assert last is not None
        failures += wrong_tracking(gang, last.position)
        failures += wrong_ids(gang, reference_ids(scratch, gang.config.run, last.position))
        figures = goodput_figures(gang, recoveries)
    if jobs != 1:
        failures.append(f"{jobs} jobs for one run")
    if figures["goodput"] < OF_BOUND * figures["bound"]:
        failures.append(f"goodput {figures['goodput']:.3f}, less than {OF_BOUND} of the bound {figures['bound']:.3f}")
    figures = {"kills": wanted, "resumed_from_the_newest": wanted - len(wrong), **figures}
    return Score(wanted, figures, [*wrong, *failures])


def goodput_figures(gang: Gang, recoveries: list[float]) -> dict[str, Any]:
    used = usage(gang.steps)
    interval_s = SAVE_STEPS * used.step_s
    mtbf_s = used.wall_s / len(recoveries)
    bound = 1 - (statistics.fmean(recoveries) + interval_s / 2) / mtbf_s
    figures = {
        "recovery_p50_s": statistics.median(recoveries),
        "recovery_p95_s": quantile(recoveries, 0.95),
        "save_interval_s": interval_s,
        "mtbf_s": mtbf_s,
        "bound": bound,
        "goodput": used.goodput,
        "goodput_of_bound": used.goodput / bound,
        "step_s": used.step_s,
        "wall_s": used.wall_s,
    }
    return {name: round(value, 4) for name, value in figures.items()} | {
        "steps": used.steps,
        "wasted_steps": used.wasted_steps,
        "recoveries_s": [round(value, 2) for value in recoveries],
    }
