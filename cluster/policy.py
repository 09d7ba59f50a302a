"""Restart policy: what a driver does after its workers died, when nodes leave and when there is room for more.

Always holds: pure functions over what happened; a run that commits checkpoints between its deaths goes on for ever, one
that does not is given up once the budget of a cause is spent, or at once when it dies again at the same step of the
same error; nothing runs on fewer workers than the least or more than the most. Called by the driver
(cluster/supervise.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.launch import Cause
from trainer.config import LauncherSettings, RestartSettings

# The others may well be the machines' doing: two at the same step say nothing of the run, for it resumes at the same
# step each time, and a bad node or network can hang the first collective every time.
THE_RUNS_OWN: tuple[Cause, ...] = ("raised", "out-of-memory")


@dataclass(frozen=True)
class Death:
    """An attempt whose workers died. `committed`: it had stored a checkpoint of its own."""

    attempt: int
    committed: bool
    cause: Cause = "killed"
    error: str = ""  # one line
    node: str | None = None  # where it began, if that is known and the workers were on several
    images: int | None = None  # consumed at the step that it died in; None: before the first one


@dataclass(frozen=True)
class Sizes:
    """How many workers a run may have."""

    least: int
    most: int


@dataclass(frozen=True)
class Restart:
    """Go on with another attempt after `pause_s`."""

    pause_s: float


@dataclass(frozen=True)
class GiveUp:
    """Start nothing more, and say why: what was expected, and what was found."""

    expected: str
    found: str


def sizes(settings: LauncherSettings) -> Sizes:
    return Sizes(settings.min_workers or settings.workers, settings.workers)


def after_death(deaths: Sequence[Death], settings: RestartSettings) -> Restart | GiveUp:
    """Whether to start again after `deaths` (oldest first; the last one is now), and when."""
    if (loop := _crash_loop(deaths)) is not None:
        return loop
    fruitless = _fruitless(deaths)
    if not fruitless:
        return Restart(0.0)
    last = fruitless[-1]
    budget = getattr(settings.budgets, last.cause.replace("-", "_"))
    spent = sum(death.cause == last.cause for death in fruitless)
    if spent > budget:
        return GiveUp(
            f"at most {budget} restarts of the cause {last.cause} between two checkpoints",
            f"death {spent} of it: {last.error}",
        )
    return Restart(backoff_s(len(fruitless), settings))


def backoff_s(fruitless: int, settings: RestartSettings) -> float:
    """Seconds before the restart after so many deaths without a checkpoint: 0, then doubling."""
    if fruitless < 2:
        return 0.0
    return min(settings.backoff_s * 2.0 ** min(fruitless - 2, 60), settings.backoff_most_s)


def node_to_exclude(deaths: Sequence[Death], settings: RestartSettings) -> str | None:
    """The node that the newest deaths all began on, while the others of the gang were fine. None: no such node."""
    newest = deaths[-settings.exclude_after :]
    nodes = {death.node for death in newest}
    if len(newest) < settings.exclude_after or len(nodes) > 1:
        return None
    return nodes.pop()


def size_for(room: int, allowed: Sizes) -> int | None:
    """Workers of the next attempt where so many would fit; None: it has to wait for room."""
    return min(room, allowed.most) if room >= allowed.least else None


def reason_to_resize(
    workers: int, room: int, roomy_s: float, leaving: Mapping[str, float], allowed: Sizes, grow_after_s: float
) -> str | None:
    """Why the running attempt of `workers` is to save and end, so that the run goes on with another size; None: it is
    not. `room`: workers that would fit on nodes that stay; `roomy_s`: for how long that has been more than there are;
    `leaving`: nodes of the gang that are being drained, with the seconds that are left to them."""
    if leaving:
        node, left_s = min(leaving.items(), key=lambda item: item[1])
        when = f"in {left_s:.0f} s" if math.isfinite(left_s) else "soon"
        others = f" and {len(leaving) - 1} more" if len(leaving) > 1 else ""
        return f"node {node}{others} leaves {when}"
    if min(room, allowed.most) > workers and roomy_s >= grow_after_s:
        return f"room for {min(room, allowed.most)} workers instead of {workers}"
    return None


def signature(error: str) -> str:
    """What an error of a run has in common with the same one of another attempt: its text without numbers and
    addresses."""
    return re.sub(r"0x[0-9a-f]+|\b(?=\w*\d)[0-9a-f]{8,}\b|\d+(\.\d+)?", "#", error.lower())


def _crash_loop(deaths: Sequence[Death]) -> GiveUp | None:
    """Two deaths in a row at the same step of the same error. A checkpoint between them changes nothing about it."""
    if len(deaths) < 2:
        return None
    before, last = deaths[-2:]
    alike = (before.images, before.cause, signature(before.error)) == (last.images, last.cause, signature(last.error))
    if last.images is None or last.cause not in THE_RUNS_OWN or not alike:
        return None
    return GiveUp(
        f"to get past the step at {last.images} images",
        f"the same end there in attempts {before.attempt} and {last.attempt}: {last.error}",
    )


def _fruitless(deaths: Sequence[Death]) -> list[Death]:
    """Those since the run last got on: since the newest attempt that had stored a checkpoint of its own."""
    getting_on = [number for number, death in enumerate(deaths) if death.committed]
    return list(deaths[getting_on[-1] + 1 :] if getting_on else deaths)
