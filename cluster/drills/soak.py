"""R13: one run through forty faults of seven kinds in a seeded order - killed and stopped workers, gradients that are
no number, a store and a tracking server that fail, stops, killed drivers - and to its end, without a person.

A fault begins once the run trains again after the one before. Each is done to a job on a stack of the drill's own; what
the drill does besides are the commands of a user who knows of no fault: `stop`, and the same submit.
"""

from __future__ import annotations

import json
import math
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from cluster.drills.gang import DrillStack, Gang, broken_promises, drill_stack, quantile, reference_ids, usage
from cluster.drills.poked import Poke
from cluster.drills.scoreboard import Score
from cluster.drills.scratch import BATCH, Scratch
from cluster.status_run import run_status
from data_pipeline.errors import UserError
from trainer.quarantine import read_skipped

FAULTS = 40
QUIET_STEPS = (5, 40)  # between two faults: in steps, so that a slow machine has as many saves between them
SAVE_STEPS = 10
SILENT_S = 10.0  # a rank that is stopped is one that hangs
LINK_S = 8.0  # that a link fails
ROLLBACK_AFTER = 4  # bad updates
AHEAD_STEPS = 25  # before gradients go wrong: all ranks have read of it by then
MORE_STEPS = 30  # after the last fault


@dataclass
class Soak:
    gang: Gang
    stack: DrillStack
    chance: random.Random
    pokes: list[Poke] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    by_hand: list[str] = field(default_factory=list)  # what would have needed a person

    def await_next(self, attempt: int, since_s: float) -> dict[str, Any]:
        """The step with which the run goes on under another attempt."""
        first = self.gang.first_step(after_attempt=attempt)
        if wrong := self.gang.resumed_wrongly(first.attempt):
            self.failures.append(wrong)
        return {"on_from": first.position, "recovery_s": round(first.seen_s - since_s, 2)}

    def worker_killed(self) -> dict[str, Any]:
        return self._signalled(signal.SIGKILL)

    def worker_hangs(self) -> dict[str, Any]:
        return self._signalled(signal.SIGSTOP)

    def _signalled(self, what: signal.Signals) -> dict[str, Any]:
        attempt, rank, began_s = self.gang.attempt, self.chance.randrange(2), time.monotonic()
        self.gang.signal_rank(rank, what)
        return self.await_next(attempt, began_s)

    def bad_gradients(self) -> dict[str, Any]:
        """A few are refused; more, and the run goes back."""
        updates = self.chance.choice((1, 2, ROLLBACK_AFTER))
        begin = self.gang.steps[-1].position + AHEAD_STEPS * BATCH
        self.pokes.append((begin, begin + updates * BATCH, math.nan))
        fresh = self.stack.pokes.with_suffix(".new")
        fresh.write_text(json.dumps(self.pokes))
        fresh.replace(self.stack.pokes)
        self.gang.wait(
            f"images {self.pokes[-1][1]}", lambda: self.gang.steps[-1].position > self.pokes[-1][1], self.gang.ended
        )
        return {"updates": updates, "recovery_s": self._gap_around(begin)}

    def _gap_around(self, begin: int) -> float:
        """The longest time between two steps from there on."""
        steps = [step for step in self.gang.steps if step.position >= begin - BATCH]
        return round(max(b.seen_s - a.seen_s for a, b in pairwise(steps)), 2)

    def store_fails(self) -> dict[str, Any]:
        """503 to a third, resets, or no connection at all; until a save has been committed again."""
        link, how = self.stack.s3, self.chance.choice(("503", "resets", "outage"))
        attempt, refused = self.gang.attempt, link.busy + link.resets + link.refused
        if how == "outage":
            link.down = True
        else:
            link.busy_share, link.reset_share = (0.3, 0.0) if how == "503" else (0.0, 0.2)
        time.sleep(LINK_S)
        link.heal()
        before, healed_s = self.gang.newest(), time.monotonic()
        self.gang.wait("a save after the store answers", lambda: self.gang.newest() != before, self.gang.ended)
        recovery_s = round(time.monotonic() - healed_s, 2)
        if self.gang.attempt != attempt:
            self.failures.append(f"S3 {how}: it ended attempt {attempt}")
        met = link.busy + link.resets + link.refused - refused
        return {"how": how, "requests_hit": met, "recovery_s": recovery_s}

    def tracking_fails(self) -> dict[str, Any]:
        link, attempt, refused = self.stack.mlflow, self.gang.attempt, self.stack.mlflow.refused
        before = len(self.gang.steps)
        link.down = True
        time.sleep(LINK_S)
        link.heal()
        if self.gang.attempt != attempt or len(self.gang.steps) == before:
            self.failures.append(f"MLflow outage: it ended attempt {attempt}, or no step was made")
        return {"steps_meanwhile": len(self.gang.steps) - before, "requests_hit": link.refused - refused}

    def stop(self) -> dict[str, Any]:
        attempt, began_s = self.gang.attempt, time.monotonic()
        self.gang.stop()
        stopped_s = time.monotonic() - began_s
        self.gang.submit()
        return {"stopped_after_s": round(stopped_s, 2)} | self.await_next(attempt, began_s)

    def driver_killed(self) -> dict[str, Any]:
        attempt, began_s = self.gang.attempt, time.monotonic()
        self.gang.kill_driver()
        self.gang.submit()
        return self.await_next(attempt, began_s)


KINDS: dict[str, tuple[int, Callable[[Soak], dict[str, Any]]]] = {  # of 40: how many
    "worker killed": (10, Soak.worker_killed),
    "worker hangs": (5, Soak.worker_hangs),
    "NaN gradients": (5, Soak.bad_gradients),
    "S3 fails": (8, Soak.store_fails),
    "MLflow outage": (4, Soak.tracking_fails),
    "stop": (4, Soak.stop),
    "driver killed": (4, Soak.driver_killed),
}


def order(chance: random.Random, wanted: int) -> list[str]:
    """So many of the kinds, all of them before any is left out, in a random order."""
    kinds = [name for name, (count, _) in KINDS.items() for _ in range(count)]
    chance.shuffle(kinds)
    first = list(dict.fromkeys(kinds))[:wanted]
    for name in first:
        kinds.remove(name)
    rest = [kinds[number % len(kinds)] for number in range(wanted - len(first))]
    mixed = first + rest
    chance.shuffle(mixed)
    return mixed


def run(scratch: Scratch) -> Score:
    wanted = FAULTS if scratch.wishes.faults is None else scratch.wishes.faults
    chance = random.Random(scratch.wishes.seed)
    result: dict[str, Any] = {}
    with drill_stack(scratch) as stack, Gang(scratch, stack, "soak", **settings()) as gang:
        soak = Soak(gang, stack, chance)
        gang.submit()
        try:
            gang.pass_steps(2 * SAVE_STEPS)
            for name in order(chance, wanted):
                gang.pass_steps(chance.randrange(*QUIET_STEPS))
                soak.told.append({"fault": name, "at_images": gang.steps[-1].position, "attempt": gang.attempt})
                soak.told[-1] |= KINDS[name][1](soak)
                scratch.tell(f"{len(soak.told)} of {wanted}: {soak.told[-1]}")
            result = gang.finish(MORE_STEPS)
            if result["loss"] is None or not math.isfinite(result["loss"]):
                soak.failures.append(f"it ended with the loss {result['loss']}")
            soak.failures += wrong_skips(soak)
            reference = reference_ids(scratch, gang.config.run, result["images"])
            soak.failures += broken_promises(gang, reference, result["images"])
        except (UserError, TimeoutError) as error:
            soak.by_hand.append(f"fault {len(soak.told)}: would have needed a person: {error}")
        figures = figures_of(soak, result)
    return Score(len(soak.told), figures, [*soak.by_hand, *soak.failures])


def settings() -> dict[str, Any]:
    return {
        "checkpoint": {"every_images": SAVE_STEPS * BATCH, "keep_newest": 3},
        "watch": {"silent_s": SILENT_S},
        "guard": {"warmup": 6, "window": 10, "rollback_after": ROLLBACK_AFTER},
        "lr": 3e-4,
    }


def wrong_skips(soak: Soak) -> list[str]:
    """What is listed as skipped must hold every update that was bad, and nothing else but what was undone with it."""
    bad = {at for begin, end, _ in soak.pokes for at in range(begin, end, BATCH)}
    rows = read_skipped(soak.gang.store)
    listed = {at for row in rows for at in range(row["begin"], row["end"], BATCH)}
    wrong = [f"bad updates at {sorted(bad - listed)} are not listed as skipped"] if bad - listed else []
    for row in rows:
        if row["kind"] == "quarantine" or not bad & set(range(row["begin"], row["end"], BATCH)):
            wrong.append(f"skipped without a cause: {row}")
    return wrong


def figures_of(soak: Soak, result: dict[str, Any]) -> dict[str, Any]:
    document = run_status(soak.gang.store)
    undone = {at for row in document["skipped"] for at in range(row["begin"], row["end"], BATCH)}
    used = usage(soak.gang.steps, undone)
    ends = Counter(": ".join(filter(None, (row["outcome"], row["cause"]))) for row in document["attempts"])
    recoveries = [fault["recovery_s"] for fault in soak.told if "recovery_s" in fault]
    return {
        "manual_actions": len(soak.by_hand),
        "goodput": round(used.goodput, 4),
        "wasted_steps": used.wasted_steps,
        "steps": used.steps,
        "step_s": round(used.step_s, 4),
        "wall_s": round(used.wall_s, 1),
        "jobs": soak.gang.jobs,
        "attempts_by_end": dict(ends),
        "recovery_p50_s": round(statistics.median(recoveries), 2) if recoveries else None,
        "recovery_p95_s": round(quantile(recoveries, 0.95), 2) if recoveries else None,
        "images": result.get("images"),
        "loss": result.get("loss"),
        "skipped": [f"{row['kind']} {row['begin']}-{row['end']}" for row in document["skipped"]],
        "faults": soak.told,
    }
