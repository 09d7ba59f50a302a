"""The guard: may this update be applied, and if not, does the run go back to a checkpoint or end? Decided from the
history of losses and gradient norms before weights change.

Always holds: pure functions of plain data, equal on all ranks because their inputs are; a refused update changes
nothing but the counts of what was refused. Called by the training step; what a rollback then does is in
trainer/rollback.py.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import GuardSettings


class Decision(enum.Enum):
    CONTINUE = "continue"
    SKIP = "skip"  # without this update
    ROLLBACK = "rollback"  # back to the newest checkpoint older than the first bad observation
    HALT = "halt"


@dataclass(frozen=True)
class GuardHistory:
    """What the guard remembers; kept in every checkpoint, so that a resumed run decides as the first would have."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    accepted: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    doubtful: int = 0  # updates in a row that were refused or had a high loss
    doubted_since: int | None = None  # images at which the first of those began
    rollbacks: int = 0  # since the run last got further than it had been
    furthest: int = 0  # the most updates it had accepted when it was taken back

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> GuardHistory:
        """The inverse of dataclasses.asdict through JSON."""
        return cls(**{**document, "losses": tuple(document["losses"]), "norms": tuple(document["norms"])})


@dataclass(frozen=True)
class Verdict:
    """A decision, why (empty for CONTINUE), and the history that includes it."""

    decision: Decision
    reason: str
    history: GuardHistory


def judge(history: GuardHistory, loss: float, norm: float, settings: GuardSettings, position: int) -> Verdict:
    """The verdict on the update that begins at `position` images, with this global loss and global gradient norm."""
    refused = objection(history, loss, norm, settings)
    doubts = refused or _height(history, loss, settings)
    after = _doubting(history, position) if doubts else replace(history, doubtful=0, doubted_since=None)
    after = _refused(after) if refused else _accepted(after, loss, norm, settings.window, remember=not doubts)
    if after.consecutive_skips >= settings.rollback_after:
        reason = f"{after.consecutive_skips} refused updates in a row, the last because {refused}"
    elif after.doubtful >= settings.sustained_after:
        reason = f"{after.doubtful} updates in a row of a high loss, the last because {doubts}"
    else:
        return Verdict(Decision.SKIP if refused else Decision.CONTINUE, refused, after)
    # Before and not after: a rollback has to be given the chance to help.
    halt = history.rollbacks >= settings.halt_after
    return Verdict(Decision.HALT if halt else Decision.ROLLBACK, reason, after)


def objection(history: GuardHistory, loss: float, norm: float, settings: GuardSettings) -> str:
    """Why an update with this loss and gradient norm is refused; empty if it is not."""
    for name, value, past in (("loss", loss, history.losses), ("gradient norm", norm, history.norms)):
        if not math.isfinite(value):
            return f"{name} is {value}"
        if over := _over(name, value, past, history, settings.spike_factor, settings.warmup):
            return over
    return ""


def after_rollback(restored: GuardHistory, left: GuardHistory) -> GuardHistory:
    """The history that a part goes on with: that of the checkpoint, and what must outlive a rollback of `left`, the
    history that led to it."""
    return replace(
        restored,
        skipped=left.skipped,
        consecutive_skips=0,
        doubtful=0,
        doubted_since=None,
        rollbacks=left.rollbacks + 1,
        furthest=max(left.furthest, left.accepted),
    )


def all_after_rollback(
    restored: Mapping[str, GuardHistory], left: Mapping[str, GuardHistory]
) -> dict[str, GuardHistory]:
    """`after_rollback` of every phase; one that the checkpoint does not know yet had no history then."""
    return {phase: after_rollback(restored.get(phase, GuardHistory()), history) for phase, history in left.items()}


def doubted_since(histories: Iterable[GuardHistory]) -> int | None:
    """The images at which the first bad observation began that no good one has followed yet; None without one."""
    return min((one.doubted_since for one in histories if one.doubted_since is not None), default=None)


def _height(history: GuardHistory, loss: float, settings: GuardSettings) -> str:
    """Why the loss of an update that is accepted is high all the same; empty if it is not."""
    return _over("loss", loss, history.losses, history, settings.sustained_factor, settings.warmup)


def _over(name: str, value: float, past: tuple[float, ...], history: GuardHistory, factor: float, warmup: int) -> str:
    if not past or history.accepted < warmup:
        return ""
    median = statistics.median(past)
    return f"{name} {value:.4g} is over {factor:g} times its median {median:.4g}" if value > factor * median else ""


def _doubting(history: GuardHistory, position: int) -> GuardHistory:
    since = position if history.doubted_since is None else history.doubted_since
    return replace(history, doubtful=history.doubtful + 1, doubted_since=since)


def _refused(history: GuardHistory) -> GuardHistory:
    return replace(history, skipped=history.skipped + 1, consecutive_skips=history.consecutive_skips + 1)


def _accepted(history: GuardHistory, loss: float, norm: float, window: int, remember: bool) -> GuardHistory:
    accepted = history.accepted + 1
    # A single update further is luck, as long as the history is that of a run which gets further.
    got_further = history.rollbacks > 0 and accepted >= history.furthest + window
    # A high loss that stays would become its own median, and be high no more, where the window is short.
    losses, norms = ((*history.losses, loss), (*history.norms, norm)) if remember else (history.losses, history.norms)
    return replace(
        history,
        losses=losses[-window:],
        norms=norms[-window:],
        accepted=accepted,
        consecutive_skips=0,
        rollbacks=0 if got_further else history.rollbacks,
        furthest=0 if got_further else history.furthest,
    )
