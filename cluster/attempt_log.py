"""What a driver notes of one attempt while it runs: workers, nodes, images, how long, and what for.

Always holds: durations are of one clock of the driver; the time of day is for people only. Called by the driver
(cluster/supervise.py), which shows it while the attempt runs (cluster/lease.py) and keeps it when that ended.
"""

from __future__ import annotations

import datetime
from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from cluster.launch import Event, WorkerDied
from cluster.policy import Death
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.manifest import CheckpointName
from trainer.stop import AttemptEnd, Outcome


class AttemptLog:
    """One attempt of a run. `saw` every event; then `end`."""

    def __init__(self, attempt: int, workers: int, clock: Callable[[], float]) -> None:
        self.attempt, self.workers = attempt, workers
        self.outcome: Outcome = "failed"
        self.error: str | None = None
        self.death: WorkerDied | None = None
        self.resize: str | None = None  # why the driver asked for its end, if it did
        self.nodes: list[str] = []  # by rank; empty where the launcher tells none
        self._clock, self._begun_s = clock, clock()
        self._began_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._loaded: int | None = None  # images that it began from
        self._step_ends = array("q")  # images consumed by then: 16 bytes per step, for weeks
        self._steps_s = array("d")  # seconds of steps so far, without those that a rollback has undone

    def saw(self, event: Event) -> None:
        if event["event"] == "started":
            self.nodes = list(event.get("node_ids", ()))
        elif event["event"] == "loaded":
            self._loaded = event["images"]
        elif event["event"] == "progress":
            before_s = self._steps_s[-1] if self._steps_s else 0.0
            self._step_ends.append(event["images"])
            self._steps_s.append(before_s + event["time/step_s"])
        elif event["event"] == "rollback":
            kept_s = self.counted_s(event["to_images"])  # what came after it was for nothing
            self._step_ends.append(event["images"])
            self._steps_s.append(kept_s)

    @property
    def images(self) -> int | None:
        """Consumed so far; None before the state is loaded."""
        return self._step_ends[-1] if self._step_ends else self._loaded

    def counted_s(self, position: int | None) -> float:
        """Seconds of the steps that the run keeps when it goes on from `position`."""
        steps = bisect_right(self._step_ends, position or 0)
        return self._steps_s[steps - 1] if steps else 0.0

    def figures(self) -> dict[str, Any]:
        """What of its record is known while it runs, and the seconds of its steps that were not undone."""
        return {
            "workers": self.workers,
            "began_at": self._began_at,
            "seconds": round(self._clock() - self._begun_s, 3),
            "from_images": self._loaded,
            "images": self.images,
            "steps_s": round(self._steps_s[-1], 3) if self._steps_s else 0.0,
        }

    def as_death(self, death: WorkerDied, committed: bool) -> Death:
        """For the policy. A node says something only where the workers were on several."""
        node = death.node if len(set(self.nodes)) > 1 else None
        return Death(self.attempt, committed, death.cause, death.found, node, self.images)

    def end(self, newest: CheckpointName | None, store: ObjectStore) -> AttemptEnd:
        """Its record. `newest`: the run's newest committed checkpoint."""
        position = newest.position if newest else None
        figures = self.figures()
        del figures["steps_s"]
        return AttemptEnd(
            attempt=self.attempt,
            outcome=self.outcome,
            position=position,
            checkpoint=newest.uri(store) if newest else None,
            cause=self.death.cause if self.death else None,
            error=self.error,
            rank=self.death.rank if self.death else None,
            node=self.death.node if self.death else None,
            counted_s=round(self.counted_s(position), 3),
            **figures,
        )
