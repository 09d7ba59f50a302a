"""Restart policy: whether a run whose workers died is tried again. A pure function over what happened.

Always holds: a run that commits checkpoints between its deaths goes on; one that dies again and again at the same place
is given up, with its reason. Called by the driver (cluster/supervise.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FRUITLESS_DEATHS = 3  # in a row, before a run is given up


@dataclass(frozen=True)
class Death:
    """An attempt whose workers died. `committed`: it had stored a checkpoint of its own."""

    attempt: int
    committed: bool


def may_restart(deaths: Sequence[Death]) -> bool:
    """Whether to start again after `deaths` (oldest first; the last one is now)."""
    fruitless = 0
    for death in deaths:
        fruitless = 0 if death.committed else fruitless + 1
    return fruitless < FRUITLESS_DEATHS
