"""The spool: what a tracker took and a server did not acknowledge yet, and the rule by which each point arrives once.

Always holds, for each metric: steps are taken in ascending order, each once; they are sent in that order, a batch only
after the one before it was acknowledged; so what the server has of a metric is everything up to its highest step, the
floor, and a later attempt sends nothing at or below the floor that it finds. A record's time is fixed when it is taken,
so that a batch that is sent again is equal in every byte. Called by the MLflow tracker; knows no server by name.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.tracking.tracker import Record

SPOOL_RECORDS = 50_000  # about 50 MB: fourteen hours without a server at one update per second
BATCH_POINTS = 1000  # what MLflow takes in one request
BATCH_RECORDS = 100  # an event is a tag, and it takes that many tags
SETTLE_S = 1.0


@dataclass(frozen=True)
class Point:
    """One value of one metric. `ms`: UTC milliseconds since 1970."""

    name: str
    value: float
    ms: int
    images: int


class ServerFailed(Exception):
    """The server did not answer, or refused; whether it did what was asked is not known."""


class Server(Protocol):
    """One run on a tracking server. Every call may raise ServerFailed."""

    def claim(self, attempt: int) -> int:
        """The run's newest attempt that any tracker or driver claimed, `attempt` included."""

    def newest_steps(self) -> dict[str, int]:
        """Per metric the highest step that is there."""

    def send(self, points: list[Point], events: list[Record]) -> None:
        """Store them; those that are there already, equal in everything, stay single."""


class Spool:
    """A bounded queue. Taken from by one thread, filled by another."""

    def __init__(self, limit: int = SPOOL_RECORDS) -> None:
        self.lost = 0  # records refused because it was full
        self.filled = threading.Condition()
        self._records: deque[Record] = deque()
        self._limit = limit
        self._newest: dict[str, int] = {}  # per metric the highest step taken

    def put(self, record: Record) -> None:
        """Take a record; points at or below a step that was taken already are left out, being of the same update."""
        with self.filled:
            if "values" in record:
                values = {k: v for k, v in record["values"].items() if record["images"] > self._newest.get(k, -1)}
                if not values:
                    return
                record = {**record, "values": values}
            if len(self._records) >= self._limit:
                self.lost += 1
                return
            self._newest.update(dict.fromkeys(record.get("values", ()), record["images"]))
            self._records.append(record)
            self.filled.notify()

    def records(self) -> list[Record]:
        """All, oldest first."""
        with self.filled:
            return list(self._records)

    def batch(self) -> list[Record]:
        """The oldest records that one request can carry; they stay until `remove`."""
        batch: list[Record] = []
        points = 0
        with self.filled:
            for record in self._records:
                points += len(record.get("values", ()))
                if batch and (points > BATCH_POINTS or len(batch) == BATCH_RECORDS):
                    break
                batch.append(record)
        return batch

    def remove(self, count: int) -> None:
        """Forget the oldest `count`: they have arrived."""
        with self.filled:
            for _ in range(count):
                self._records.popleft()

    def empty(self) -> bool:
        with self.filled:
            return not self._records


class Superseded(Exception):
    """A newer attempt logs to this run now; this one has nothing more to say."""


class Delivery:
    """Sends a spool, of the attempt `attempt`. `pause` waits that many seconds."""

    def __init__(self, spool: Spool, server: Server, attempt: int, pause: Callable[[float], Any]) -> None:
        self._spool, self._server, self.attempt, self._pause = spool, server, attempt, pause
        self._floors: dict[str, int] | None = None

    def deliver(self) -> bool:
        """Send one batch; whether there was one. Raises ServerFailed (then all of it is still spooled), Superseded."""
        batch = self._spool.batch()
        if not batch:
            return False
        attempt = self.attempt
        newest = self._server.claim(attempt)
        if newest > attempt:
            raise Superseded(f"attempt {newest} logs to this run now")
        if self._floors is None:
            self._floors = self._settled_floors()
        floors = self._floors
        points = [point for point in points_of(batch) if point.images > floors.get(point.name, -1)]
        self._server.send(points, [record for record in batch if "event" in record])
        self._spool.remove(len(batch))
        return True

    def _settled_floors(self) -> dict[str, int]:
        """The floors, read until they stand still: the last batch of a killed attempt may be on its way through the
        server, which tells nobody when it is done."""
        floors = self._server.newest_steps()
        while self.attempt > 1:
            self._pause(SETTLE_S)
            again = self._server.newest_steps()
            if again == floors:
                break
            floors = again
        return floors


def points_of(records: list[Record]) -> Iterator[Point]:
    """The points of records, in order."""
    for record in records:
        for name, value in record.get("values", {}).items():
            yield Point(name, value, record["ms"], record["images"])
