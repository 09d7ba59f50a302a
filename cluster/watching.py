"""What the heartbeats of all ranks say together: which rank hangs, which one is slow, and where.

Always holds: pure over events and a clock. The one that is blamed is the one that is behind: all ranks enter the same
sections in the same order, so of two that do not get on, the one that has passed fewer is waited for by the other, in
whatever call that waits. No decision from a single late beat, nor from a pause of the driver itself. Called by the
launchers, at least once a second; trainer/watch.py says what a beat is.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.launch import Event, WorkerDied
from trainer.config import WatchSettings

log = logging.getLogger(__name__)

OWN_STALL_S = 10.0  # between two looks: the driver was stopped or busy, and heard nobody meanwhile
FEWEST_STEPS = 3  # of every rank in a window
COSTS = 0.1  # of a step: less lost time than that is not worth an alarm, whatever the factor
GOES_ON = "the run goes on from the newest checkpoint when it is started again"


class Hung(WorkerDied):
    """A rank that does not get on, or none in particular when all are stuck alike (`rank` None)."""

    def __init__(self, rank: int | None, node: str | None, section: str, seconds: float, limit_s: float, where: str):
        name = f"rank {rank} on {node}" if rank is not None else "all ranks"
        if section == "silent":  # of a stopped process or a dead host there are no stacks
            expected, found = f"a heartbeat within {limit_s:g} s", f"none for {seconds:.0f} s"
            next_step = f"see the end of its log, and its node; {GOES_ON}"
        else:
            expected, found = f"to leave {section} within {limit_s:g} s", f"there for {seconds:.0f} s"
            next_step = f"its stacks are in its log; {GOES_ON}"
        super().__init__(name, expected, f"{found}{where}", next_step, "hung", rank, node)
        self.section, self.seconds = section, seconds

    def event(self) -> Event:
        places = {"rank": self.rank, "node": self.node, "section": self.section, "seconds": self.seconds}
        return {"event": "hung", **places}


@dataclass
class _Window:
    """Sums of one rank over the steps of a window."""

    steps: int = 0
    step_s: float = 0.0
    own_s: float = 0.0  # work in which it waited for no other rank

    def add(self, beat: Event) -> None:
        self.steps += beat["steps"]
        self.step_s += beat["steps"] * beat["step_s"]
        self.own_s += beat["steps"] * sum(beat["busy_s"].values())


@dataclass
class _Rank:
    rank: int
    node: str | None
    seen_s: float  # when it was last heard of, by the driver's clock
    beat: Event | None = None
    window: _Window = field(default_factory=_Window)
    slow_windows: int = 0  # in a row

    @property
    def ended(self) -> bool:
        return self.beat is not None and self.beat["section"] == "ended"

    @property
    def passed(self) -> int:
        return -1 if self.beat is None else self.beat["passed"]


class GangWatch:
    """Of one gang. `nodes`: each rank's node, by rank; `clock` in seconds, monotonic."""

    def __init__(
        self,
        settings: WatchSettings,
        world_size: int,
        nodes: Sequence[str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._clock = settings, clock
        self._looked_s = self._window_began_s = clock()
        self._ranks = [_Rank(rank, nodes[rank], self._looked_s) for rank in range(world_size)]

    def saw(self, event: Event) -> None:
        """Take notice of a beat; other events say nothing here."""
        if event["event"] != "beat":
            return
        rank = self._ranks[event["rank"]]
        rank.beat, rank.seen_s = event, self._clock()
        if event["step"] > event["steps"]:  # else it holds the first step, which compiles
            rank.window.add(event)

    def hung(self) -> Hung | None:
        """The rank that hangs, if one does; the gang is to be ended then."""
        now, settings = self._clock(), self._settings
        if (pause_s := now - self._looked_s) > OWN_STALL_S:
            for rank in self._ranks:
                rank.seen_s = min(rank.seen_s + pause_s, now)
        self._looked_s = now
        running = [rank for rank in self._ranks if not rank.ended]
        for rank in running:
            quiet_s = now - rank.seen_s
            if rank.beat is not None and quiet_s > settings.silent_s:
                last = f" after {rank.beat['section']}"
                return Hung(rank.rank, rank.node, "silent", quiet_s, settings.silent_s, last)
        behind = min((rank.passed for rank in running), default=0)
        stuck = [rank for rank in running if rank.passed == behind and self._overstays(rank, now)]
        if not stuck:
            return None
        last_one = max(stuck, key=lambda rank: self._since_s(rank, now))
        section = last_one.beat["section"] if last_one.beat else "start"
        seconds, limit_s = self._since_s(last_one, now), self._limit_s(last_one) or 0.0
        where = f", at {last_one.beat['where']}" if last_one.beat and "where" in last_one.beat else ""
        if len(stuck) == len(self._ranks) > 1:
            return Hung(None, None, section, seconds, limit_s, where)
        return Hung(last_one.rank, last_one.node, section, seconds, limit_s, where)

    def _overstays(self, rank: _Rank, now: float) -> bool:
        limit_s = self._limit_s(rank)
        return limit_s is not None and self._since_s(rank, now) > limit_s

    def _since_s(self, rank: _Rank, now: float) -> float:
        return now - rank.seen_s if rank.beat is None else float(rank.beat["since_s"])

    def _limit_s(self, rank: _Rank) -> float | None:
        limit_s: float | None = self._settings.start_s if rank.beat is None else rank.beat["deadline_s"]
        return limit_s

    def tell_stragglers(self, on_event: Callable[[Event], None]) -> None:
        """`stragglers`, in the log as well."""
        for straggler in self.stragglers():
            log.warning("rank %(rank)d on %(node)s is slow: %(factor).1f times the others' work per step", straggler)
            on_event(straggler)

    def stragglers(self) -> list[Event]:
        """Ranks that turned out slow since the last call: {"event": "straggler", "rank", "node", "factor"}, the factor
        of their own work against the median of the others'. Each is told of once, until it is no longer slow."""
        now, ranks = self._clock(), self._ranks
        full = now - self._window_began_s >= self._settings.straggler_window_s
        if len(ranks) < 2 or not full or any(rank.window.steps < FEWEST_STEPS for rank in ranks):
            return []
        own_s = [rank.window.own_s / rank.window.steps for rank in ranks]
        step_s = statistics.median(rank.window.step_s / rank.window.steps for rank in ranks)
        found = []
        for rank, mine in zip(ranks, own_s, strict=True):
            others = statistics.median(own_s[: rank.rank] + own_s[rank.rank + 1 :])
            slow = mine > self._settings.straggler_factor * others and mine - others > COSTS * step_s
            rank.slow_windows = rank.slow_windows + 1 if slow else 0
            if rank.slow_windows == self._settings.straggler_windows:
                factor = round(mine / max(others, 1e-9), 2)
                found.append({"event": "straggler", "rank": rank.rank, "node": rank.node, "factor": factor})
            rank.window = _Window()
        self._window_began_s = now
        return found
