"""The launcher seam: how the workers of a run come to run, and what is said when they end without a result.

Always holds: the workers of a run live and die together - one that ends badly ends all, since a collective would wait
for it for ever; a launcher restarts nothing, which is decided above it (cluster/supervise.py). Kept by
cluster/local_launch.py and cluster/ray_launch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from data_pipeline.errors import UserError

Event = dict[str, Any]  # "event": started | progress | result | error, and what belongs to it
END_GRACE_S = 5.0


Cause = Literal["killed", "node-lost", "hung", "out-of-memory", "raised"]


class WorkerDied(UserError):
    """The workers ended without a result, for a reason that starting them again may mend.

    `cause`: what came first, as far as it can be told; `rank` and `node` (its id) where, None if unknown.
    """

    def __init__(
        self,
        name: str,
        expected: str,
        found: str,
        next_step: str,
        cause: Cause = "killed",
        rank: int | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__(name, expected, found, next_step)
        self.cause, self.rank, self.node = cause, rank, node


class NoRoom(WorkerDied):
    """The workers could not be placed in time. Refuses a run that begins; one that runs waits for room."""

    def __init__(self, name: str, expected: str, found: str, next_step: str) -> None:
        super().__init__(name, expected, found, next_step, "node-lost")


class Launcher(Protocol):
    """Where the workers of a run come to run. Called by one driver: `launch` on its main thread, the rest also from
    others meanwhile."""

    def launch(self, spec: dict[str, Any], workers: int, on_event: Callable[[Event], None]) -> Event:
        """Train on `workers` workers. Returns rank 0's result event.

        `spec`: the arguments of `trainer.run.train` other than group and report. `on_event` is called on this thread
        for every event, first with {"event": "started", "pids": [...], "node_ids": [...]}. Raises UserError as a
        worker reported it, WorkerDied, and NoRoom when they cannot be placed.
        """
        ...

    def room(self, at_most: int, without: str | None = None) -> int:
        """Workers that would fit now, those that run here counted in, on nodes that neither leave nor are excluded, nor
        are the node `without`."""
        ...

    def leaving(self) -> dict[str, float]:
        """Nodes of the running workers that are being drained: id -> seconds left, inf where unknown."""
        ...

    def exclude(self, node: str) -> None:
        """Place nothing on `node` any more."""
        ...

    def close(self) -> None:
        """Give back what is held between attempts."""
        ...
