"""A worker on whom something happens, once: what drills and tests run in place of `cluster.worker`.

`GLIDEPATH_TRAP` in its environment says what, as JSON: {"rank", "section", "steps", "how", "note"}. The rank falls into
the trap when it enters that section after so many steps; before, it writes the time (seconds since 1970) to the file
`note`. Always holds: everything else is the real worker, and the hang is a real one.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cluster import worker
from trainer.watch import Watch

VARIABLE = "GLIDEPATH_TRAP"
LONG_S = 10**6

How = Literal["sleep", "lock", "memory", "raise"]


class Trap(NamedTuple):
    """`how`: sleep; keep Python's lock, as a call into a broken driver does; ask for too much memory; or raise."""

    rank: int
    section: str
    steps: int
    how: How
    note: str

    def variable(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(self._asdict())}


def set_up(trap: Trap) -> None:
    enter = Watch.enter

    def enter_and_fall(watch: Watch, name: str) -> None:
        enter(watch, name)
        if name == trap.section and watch.done.steps >= trap.steps and not Path(trap.note).exists():
            Path(trap.note).write_text(str(time.time()))
            fall(trap.how)

    setattr(Watch, "enter", enter_and_fall)  # noqa: B010  (a method: assignment is refused by mypy)


def fall(how: How) -> None:
    if how == "sleep":
        time.sleep(LONG_S)
    elif how == "lock":
        ctypes.PyDLL(None).sleep(LONG_S)
    elif how == "memory":
        torch.empty(2**50, dtype=torch.uint8)
    else:
        raise ArithmeticError("a defect, for the drill")


if __name__ == "__main__":
    if VARIABLE in os.environ:
        given = Trap(**json.loads(os.environ[VARIABLE]))
        if given.rank == int(sys.argv[2]):
            set_up(given)
    sys.exit(worker.main())
