"""Exponential moving average of the masters, in the shards that the engine keeps.

Always holds: an EMA interval is averaged from the master interval of the same name and place on the same rank, so no
weight travels; the decay is a pure function of the number of updates.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.engine.engine import Interval


def ema_decay_at(updates: int, decay: float) -> float:
    """Decay of update number `updates` (from 0): rises as (1 + n) / (10 + n) so that short runs average their own
    weights and not their initialisation, then stays at `decay` (0.9999 in ADM and unCLIP)."""
    return min(decay, (1 + updates) / (10 + updates))


def update_ema(view: Iterable[Interval], decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * master, in place, for every interval of a shard view."""
    intervals = list(view)
    masters = {(interval.name, interval.offset): interval.values for interval in intervals if interval.kind == "master"}
    averages = [interval for interval in intervals if interval.kind == "ema"]
    if averages:  # a rank's share may be nothing; on a GPU all are one kernel
        current = [masters[interval.name, interval.offset] for interval in averages]
        get_ema_multi_avg_fn(decay)([interval.values for interval in averages], current, None)
