"""R11: what a job hangs on is killed - its driver, the raylet, the head - and the same submit goes on with the run.

After the raylet or the head `glidepath up` comes first, as it would for a user; nothing else is done by anybody. One
run serves all cases; in the end its samples are those of a run without interruption, and it is one run in MLflow.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from typing import Any

from cluster import stack as local_stack
from cluster.drills.gang import Gang, broken_promises, drill_stack, reference_ids, usage
from cluster.drills.scoreboard import Score
from cluster.drills.scratch import BATCH, Scratch
from data_pipeline.errors import UserError

EVERYTHING = "every process of Ray"  # and of its jobs
CASES = ("driver", "raylet", "gcs_server", "driver", "raylet", EVERYTHING)
STEPS = 40  # a kill comes within so many steps
SAVE_STEPS = 10


def run(scratch: Scratch) -> Score:
    wanted = len(CASES) if scratch.wishes.faults is None else scratch.wishes.faults
    chance = random.Random(scratch.wishes.seed)
    cases: list[dict[str, Any]] = []
    failures: list[str] = []
    by_hand: list[str] = []  # what would have needed a person
    checkpoint = {"every_images": SAVE_STEPS * BATCH, "keep_newest": 3}
    with drill_stack(scratch) as stack, Gang(scratch, stack, "lost", checkpoint=checkpoint) as gang:
        gang.submit()
        try:
            for number in range(wanted):
                what = CASES[number % len(CASES)]
                gang.pass_steps(chance.randrange(1, STEPS))
                time.sleep(chance.uniform(0, 1))
                cases.append(lose(gang, what))
                scratch.tell(f"{number + 1} of {wanted}: {cases[-1]}")
                failures += filter(None, [gang.resumed_wrongly(cases[-1]["attempt"])])
            images = gang.finish()["images"]
            failures += broken_promises(gang, reference_ids(scratch, gang.config.run, images), images)
        except (UserError, TimeoutError) as error:
            by_hand.append(f"case {len(cases) + 1}: would have needed a person: {error}")
        used = usage(gang.steps)
        figures = {
            "manual_repairs": len(by_hand),
            "jobs": gang.jobs,
            "batches_listed": len({step.position for step in gang.steps}),
            "wasted_steps": used.wasted_steps,
            "cases": cases,
        }
    return Score(len(cases), figures, [*by_hand, *failures])


def lose(gang: Gang, what: str) -> dict[str, Any]:
    """Kill it, submit again; from the kill to the next step. Raises UserError and TimeoutError."""
    attempt, position, lost_s = gang.attempt, gang.steps[-1].position, time.monotonic()
    up_s = None
    if what == "driver":
        gang.kill_driver()
    else:
        kill_processes(gang, what)
        gang.wait("a stack that is seen to be down", lambda: ray_state() != "healthy")
        began_s = time.monotonic()
        gang.stack.up()
        up_s = round(time.monotonic() - began_s, 1)
        gang.forget_job()
    gang.submit()
    first = gang.first_step(after_attempt=attempt)
    case = {"killed": what, "at_images": position, "on_from": first.position, "attempt": first.attempt}
    return case | {"recovery_s": round(first.seen_s - lost_s, 1)} | ({"up_s": up_s} if up_s is not None else {})


def kill_processes(gang: Gang, what: str) -> None:
    """At once."""
    if what == EVERYTHING:
        gang.stack.kill_ray()
        return
    for pid in gang.stack.find(what):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ray_state() -> str:
    return next(str(row["state"]) for row in local_stack.status() if row["service"] == "ray")
