"""The guard: may this update be applied? Decided from the history of losses and gradient norms before weights change.

Always holds: a pure function of plain data, equal on all ranks because its inputs are; a refused update changes nothing
but the history of skips. Rolling back to an older checkpoint is not here yet; a run that skips too often halts.
"""

from __future__ import annotations

import enum
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import GuardSettings


class Decision(enum.Enum):
    CONTINUE = "continue"
    SKIP = "skip"
    HALT = "halt"


@dataclass(frozen=True)
class GuardHistory:
    """What the guard remembers; kept in every checkpoint, so that a resumed run decides as the first would have."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    accepted: int = 0
    skipped: int = 0
    consecutive_skips: int = 0

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


def judge(history: GuardHistory, loss: float, norm: float, settings: GuardSettings) -> Verdict:
    """The verdict on an update with this global loss and global gradient norm."""
    reason = _objection(history, loss, norm, settings)
    if not reason:
        window = settings.window
        accepted = replace(
            history,
            losses=(*history.losses, loss)[-window:],
            norms=(*history.norms, norm)[-window:],
            accepted=history.accepted + 1,
            consecutive_skips=0,
        )
        return Verdict(Decision.CONTINUE, "", accepted)
    consecutive = history.consecutive_skips + 1
    skipped = replace(history, skipped=history.skipped + 1, consecutive_skips=consecutive)
    halt = consecutive >= settings.halt_after
    return Verdict(Decision.HALT if halt else Decision.SKIP, reason, skipped)


def _objection(history: GuardHistory, loss: float, norm: float, settings: GuardSettings) -> str:
    for name, value, past in (("loss", loss, history.losses), ("gradient norm", norm, history.norms)):
        if not math.isfinite(value):
            return f"{name} is {value}"
        if history.accepted >= settings.warmup and value > settings.spike_factor * statistics.median(past):
            return (
                f"{name} {value:.4g} is over {settings.spike_factor:g} times its median {statistics.median(past):.4g}"
            )
    return ""
