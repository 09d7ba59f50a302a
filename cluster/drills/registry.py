"""Every drill by the name of its promise. Called by the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.drills import (
    bad_gradients,
    corruption,
    crash_points,
    faulty_store,
    full_disk,
    killed_gang,
    kills,
    leaving,
    lost_jobs,
    slow_ranks,
    soak,
    tracking_outage,
    zero_chain,
)
from cluster.drills.scoreboard import Score
from cluster.drills.scratch import Scratch


@dataclass(frozen=True)
class Drill:
    """`promise` for the help; `run` keeps it or says what was broken."""

    promise: str
    run: Callable[[Scratch], Score]


DRILLS: dict[str, Drill] = {
    "R1": Drill("a killed worker's run goes on from the newest committed checkpoint", killed_gang.run),
    "R2": Drill("a killed run ends as an uninterrupted one, to the bit", kills.equality_drill),
    "R3": Drill("a stop anywhere in a commit leaves nothing unreadable and no orphan", crash_points.run),
    "R4": Drill("a store that fails costs no run and no save once it is back", faulty_store.run),
    "R5": Drill("damaged bytes are found, and loading falls back past them", corruption.run),
    "R6": Drill("a full disk under store, cache or builder costs no run", full_disk.run),
    "R7": Drill("a run that is told to leave saves at its step, ends well and goes on there", leaving.run),
    "R8": Drill("a rank that hangs or is slow is named, no other is, and a hang ends in two deadlines", slow_ranks.run),
    "R9": Drill(
        "bad gradients and poisoned shards are passed over, and the run ends as without them", bad_gradients.run
    ),
    "R10": Drill("a tracking server that is away costs no step, and its curves no point", tracking_outage.run),
    "R11": Drill("a run whose driver, raylet or head is killed goes on with the same submit", lost_jobs.run),
    "R12": Drill("a run changes ZeRO stage and world size with no conversion and the same samples", zero_chain.run),
    "R13": Drill("a run goes through forty mixed faults to its end without a person", soak.run),
}
