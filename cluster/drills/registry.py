"""Every drill by the name of its promise. Called by the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.drills import corruption, crash_points, faulty_store, full_disk, kills, zero_chain
from cluster.drills.scoreboard import Score
from cluster.drills.scratch import Scratch


@dataclass(frozen=True)
class Drill:
    """`promise` for the help; `run` keeps it or says what was broken."""

    promise: str
    run: Callable[[Scratch], Score]


DRILLS: dict[str, Drill] = {
    "R1": Drill("a killed worker's run goes on from the newest committed checkpoint", kills.resume_drill),
    "R2": Drill("a killed run ends as an uninterrupted one, to the bit", kills.equality_drill),
    "R3": Drill("a stop anywhere in a commit leaves nothing unreadable and no orphan", crash_points.run),
    "R4": Drill("a store that fails costs no run and no save once it is back", faulty_store.run),
    "R5": Drill("damaged bytes are found, and loading falls back past them", corruption.run),
    "R6": Drill("a full disk under store, cache or builder costs no run", full_disk.run),
    "R12": Drill("a run changes ZeRO stage and world size with no conversion and the same samples", zero_chain.run),
}
